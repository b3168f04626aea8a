"""DLRM: dense features through a bottom MLP, all pairwise dot products, a top MLP.

    z0 = bottom(dense) [D];   z_f = embedding of feature f [D]
    logits = top([z0, <z_f, z_g> for f > g])

Source: Naumov et al. 2019, arXiv:1906.00091.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recis.embedding import TableConfig
from recis.errors import ConfigError
from recis.models.inputs import DenseInput, PooledInputs
from recis.models.layers import MLP, DotInteraction
from recis.models.synthetic import synthetic_dense, synthetic_tables

if TYPE_CHECKING:
    from recis.io.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class DlrmConfig:
    """Tables of one embedding_dim D, at least one dense feature."""

    tables: tuple[TableConfig, ...]
    dense: tuple[DenseInput, ...]
    bottom_hidden: tuple[int, ...] = (128, 64)
    """Hidden widths before the bottom MLP's last layer of width D."""
    top_hidden: tuple[int, ...] = (256, 128)
    dropout: float = 0.0
    """Of the top MLP."""
    num_tasks: int = 1
    seed: int = 0
    """Of the tables' first weights."""

    def __post_init__(self) -> None:
        if not self.dense:
            raise ConfigError("DLRM needs at least one dense feature for its bottom MLP; use DeepFM or DCN without any")

    def build(self) -> "Dlrm":
        """Return the model with fresh weights."""
        return Dlrm(self)


class Dlrm(nn.Module):
    """forward(batch) -> logits [B, num_tasks]."""

    def __init__(self, config: DlrmConfig) -> None:
        super().__init__()
        self.inputs = PooledInputs(config.tables, config.dense, seed=config.seed)
        dim = self.inputs.field_dim()
        self.bottom = MLP(self.inputs.dense.width, (*config.bottom_hidden, dim))
        self.interaction = DotInteraction(1 + self.inputs.num_fields)
        top_width = dim + self.interaction.out_width
        self.top = MLP(top_width, config.top_hidden, out_width=config.num_tasks, dropout=config.dropout)

    def forward(self, batch: "Batch") -> Tensor:
        bottom = self.bottom(self.inputs.dense(batch))
        fields = torch.cat([bottom.unsqueeze(1), self.inputs.fields(batch)], dim=1)
        return self.top(torch.cat([bottom, self.interaction(fields)], dim=1))


def synthetic() -> DlrmConfig:
    """Return a small DLRM for `recis.models.synthetic.SyntheticClicks`: seconds on a laptop."""
    return DlrmConfig(tables=synthetic_tables(8), dense=synthetic_dense(), bottom_hidden=(16,), top_hidden=(32, 16))
