"""Put towers under a ranker: what a tower gives is a dense feature, and the ranker adopts it by listing it.

    config = WithTowers(ranker=DeepFMConfig(..., dense=(DenseInput("price"), DenseInput("title", 32))), towers=(title,))

Before a DenseInputs of the ranker that lists a tower's name reads the batch, the tower's output joins the batch under that
name, times a gate that starts at 0. So the ranker's first output is the one it gives with zeros there, which is the one of the
same ranker without the feature (`take_over` brings the weights of such a one). A tower runs only where it is listed, so the
item tower of a two-tower model also serves its drawn items.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from recis.errors import ConfigError, nearest
from recis.models.inputs import DenseInputs
from recis.towers.optimizer import set_lr_scale, set_part

if TYPE_CHECKING:
    from recis.io.batch import Batch

GATES = "gates"  # part that the gates' parameters are marked as


@runtime_checkable
class TowerConfig(Protocol):
    """What a tower's config has: the name of its feature, and `build`, whose module has `width`."""

    @property
    def name(self) -> str: ...

    def build(self) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WithTowers:
    """A ranker and the towers it lists."""

    ranker: Any
    """Config of the ranker: `build()` gives the module."""
    towers: tuple[TowerConfig, ...]
    gate_lr_scale: float = 10.0
    """Learning rate of the gates as a share of the run's: they start at 0, and until they open the towers learn little."""

    def __post_init__(self) -> None:
        names = [tower.name for tower in self.towers]
        if not names or len(set(names)) < len(names) or GATES in names:
            raise ConfigError(f"WithTowers: needs towers of distinct names other than {GATES!r}; got {names}")
        if not self.gate_lr_scale > 0:
            raise ConfigError(f"WithTowers: gate_lr_scale must be above 0; got {self.gate_lr_scale}")

    def build(self) -> "TowerRanker":
        """Return the module."""
        return TowerRanker(self)


class TowerRanker(nn.Module):
    """forward(batch) -> what the ranker gives. Attributes: ranker, towers by name, gates by name (scalars, at first 0).

    Raises:
        ConfigError: no DenseInputs of the ranker lists a tower, or it lists it with another width.
    """

    def __init__(self, config: WithTowers) -> None:
        super().__init__()
        self.ranker: nn.Module = config.ranker.build()
        self.towers = nn.ModuleDict({tower.name: tower.build() for tower in config.towers})
        self.gates = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in self.towers})
        for name, tower in self.towers.items():
            set_part(tower, name)
        set_part(self.gates, GATES)
        set_lr_scale(self.gates, config.gate_lr_scale)
        readers = [module for module in self.ranker.modules() if isinstance(module, DenseInputs)]
        listed = {name for reader in readers for name in reader.names}
        for name in self.towers:
            if name not in listed:
                raise ConfigError(
                    f"no DenseInput of the ranker is called {name!r} as the tower is; {nearest(name, listed)}"
                )
        for reader in readers:
            names = [name for name in reader.names if name in self.towers]
            for name, width in zip(reader.names, reader.widths, strict=True):
                if name in names and width != self.towers[name].width:
                    raise ConfigError(
                        f"DenseInput {name!r} has width {width}; the tower gives {self.towers[name].width}"
                    )
            if names:
                reader.register_forward_pre_hook(_Join(self, names))

    def forward(self, batch: "Batch") -> Any:
        return self.ranker(batch)

    def joined(self, batch: "Batch", names: list[str]) -> "Batch":
        """Return the batch with the gated outputs of these towers as its last dense features."""
        for name in names:
            if name in batch.dense_keys:
                raise ConfigError(f"the batch has a dense feature {name!r} of its own; call the tower something else")
        made = [(self.gates[name] * self.towers[name](batch)).to(batch.dense.dtype) for name in names]
        return replace(
            batch,
            dense=torch.cat([batch.dense, *made], dim=1),
            dense_keys=(*batch.dense_keys, *names),
            dense_widths=(*batch.dense_widths, *(part.shape[1] for part in made)),
        )


class _Join:
    """Forward pre-hook of a DenseInputs."""

    def __init__(self, owner: TowerRanker, names: list[str]) -> None:
        self.owner, self.names = owner, names

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.owner.joined(inputs[0], self.names), *inputs[1:])


@torch.no_grad()
def take_over(wide: TowerRanker, narrow: nn.Module, batch: "Batch") -> None:
    """Give a ranker with towers the dense weights of the same ranker without, so that it starts where that one stands.

    A weight that is larger in `wide` gets the old one as its leading block: right where the towers' features are listed last
    and stand last in what the layers read. That is not taken on trust: both are run on `batch`, and if they differ the old
    weights are put back. Rows of tables are not copied; load them from the other run's checkpoint (TrainConfig.init_from).

    Raises:
        ConfigError: the two have other parameters, or do not agree on the batch.
    """
    old = {name: value.clone() for name, value in wide.ranker.state_dict().items()}
    new = narrow.state_dict()
    if old.keys() != new.keys() or any(value.ndim != new[name].ndim for name, value in old.items()):
        odd = sorted(old.keys() ^ new.keys())
        raise ConfigError(f"the two rankers have different parameters: {odd[:4]}; build both from one config")
    for name, value in wide.ranker.state_dict().items():
        if any(there > here for there, here in zip(new[name].shape, value.shape, strict=True)):
            raise ConfigError(f"{name} is {tuple(new[name].shape)} without towers, {tuple(value.shape)} with them")
        value[tuple(slice(0, size) for size in new[name].shape)] = new[name]
    modes = [(part, part.training) for part in (wide, narrow)]
    for part, _ in modes:
        part.eval()
    gates = {name: gate.clone() for name, gate in wide.gates.items()}
    for gate in wide.gates.values():
        gate.zero_()
    same = torch.allclose(_output(wide, batch), _output(narrow, batch), rtol=1e-4, atol=1e-5)
    for name, gate in wide.gates.items():
        gate.copy_(gates[name])
    for part, mode in modes:
        part.train(mode)
    if not same:
        wide.ranker.load_state_dict(old)
        raise ConfigError(
            "the rankers with and without towers give different outputs after the weights were copied: list the towers "
            "last, and use a ranker whose layers read dense features last (DCN: stacked=True)"
        )


def _output(model: nn.Module, batch: "Batch") -> Tensor:
    return model(batch).float()
