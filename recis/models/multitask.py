"""Several tasks on shared embeddings: MMoE and PLE, each with a small tower per task.

    MMoE   tower_t(sum_e gate_te(x) expert_e(x))
    PLE    the same on top of extraction layers in which a task also has experts of its own

x = [embeddings, dense]. Layers and sources: `recis.models.experts`. Task weights and masks belong to the loss, see
`recis.models.losses`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from recis.embedding import TableConfig
from recis.errors import ConfigError
from recis.models.experts import CgcLayer, MixtureOfExperts, StackedMLP
from recis.models.inputs import DenseInput, PooledInputs
from recis.models.synthetic import synthetic_dense, synthetic_tables

if TYPE_CHECKING:
    from recis.io.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class MmoeConfig:
    """All experts shared; one gate and one tower per task."""

    tables: tuple[TableConfig, ...]
    num_tasks: int
    dense: tuple[DenseInput, ...] = ()
    num_experts: int = 4
    expert_hidden: tuple[int, ...] = (128,)
    tower_hidden: tuple[int, ...] = (64,)
    seed: int = 0
    """Of the tables' first weights."""

    def build(self) -> "Mmoe":
        """Return the model with fresh weights."""
        return Mmoe(self)


class Mmoe(nn.Module):
    """forward(batch) -> logits [B, num_tasks]."""

    def __init__(self, config: MmoeConfig) -> None:
        super().__init__()
        self.inputs = PooledInputs(config.tables, config.dense, seed=config.seed)
        self.mixture = MixtureOfExperts(self.inputs.width, config.num_tasks, config.num_experts, config.expert_hidden)
        self.towers = StackedMLP(config.num_tasks, self.mixture.out_width, config.tower_hidden, out_width=1)

    def forward(self, batch: "Batch") -> Tensor:
        return self.towers(self.mixture(self.inputs.flat(batch))).squeeze(2).T


@dataclass(frozen=True, slots=True, kw_only=True)
class PleConfig:
    """Extraction layers with shared and task-own experts; one tower per task."""

    tables: tuple[TableConfig, ...]
    num_tasks: int
    dense: tuple[DenseInput, ...] = ()
    num_layers: int = 2
    shared_experts: int = 2
    own_experts: int = 2
    """Experts of each task that no other task reads, per layer."""
    expert_hidden: tuple[int, ...] = (128,)
    tower_hidden: tuple[int, ...] = (64,)
    seed: int = 0
    """Of the tables' first weights."""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ConfigError(f"PLE: num_layers must be at least 1; got {self.num_layers}")

    def build(self) -> "Ple":
        """Return the model with fresh weights."""
        return Ple(self)


class Ple(nn.Module):
    """forward(batch) -> logits [B, num_tasks]."""

    def __init__(self, config: PleConfig) -> None:
        super().__init__()
        self.inputs = PooledInputs(config.tables, config.dense, seed=config.seed)
        width = self.inputs.width
        self.extraction = nn.ModuleList()
        for number in range(config.num_layers):
            layer = CgcLayer(
                width,
                config.num_tasks,
                own_experts=config.own_experts,
                shared_experts=config.shared_experts,
                hidden=config.expert_hidden,
                is_last=number == config.num_layers - 1,
            )
            self.extraction.append(layer)
            width = layer.out_width
        self.num_tasks = config.num_tasks
        self.towers = StackedMLP(config.num_tasks, width, config.tower_hidden, out_width=1)

    def forward(self, batch: "Batch") -> Tensor:
        shared = self.inputs.flat(batch)
        tasks = shared.expand(self.num_tasks, *shared.shape)
        for layer in self.extraction:
            tasks, shared = layer(tasks, shared)
        return self.towers(tasks).squeeze(2).T


def synthetic_mmoe() -> MmoeConfig:
    """Return a small MMoE for `SyntheticClicks(num_tasks=2)`: seconds on a laptop."""
    return MmoeConfig(
        tables=synthetic_tables(8),
        num_tasks=2,
        dense=synthetic_dense(),
        num_experts=3,
        expert_hidden=(32,),
        tower_hidden=(16,),
    )


def synthetic_ple() -> PleConfig:
    """Return a small PLE for `SyntheticClicks(num_tasks=2)`: seconds on a laptop."""
    return PleConfig(
        tables=synthetic_tables(8),
        num_tasks=2,
        dense=synthetic_dense(),
        expert_hidden=(32,),
        tower_hidden=(16,),
        shared_experts=1,
        own_experts=1,
    )
