"""DCN-V2: explicit feature crosses beside (or below) an MLP.

    x0 = [embeddings, dense];   c = cross(x0), x' = x0 * (W x + b) + x per layer
    parallel: logits = W [c, MLP(x0)] + b          stacked: logits = W MLP(c) + b

Source: Wang et al. 2021, arXiv:2008.13535.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recis.embedding import TableConfig
from recis.models.inputs import DenseInput, PooledInputs
from recis.models.layers import MLP, CrossNet
from recis.models.synthetic import synthetic_dense, synthetic_tables

if TYPE_CHECKING:
    from recis.io.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class DcnConfig:
    """Tables may have different widths."""

    tables: tuple[TableConfig, ...]
    dense: tuple[DenseInput, ...] = ()
    num_crosses: int = 3
    cross_rank: int | None = None
    """Rank of the cross matrices; None keeps them full, width^2 weights each."""
    hidden: tuple[int, ...] = (256, 128)
    dropout: float = 0.0
    """Of the MLP."""
    stacked: bool = False
    """MLP on the crosses instead of beside them."""
    num_tasks: int = 1
    seed: int = 0
    """Of the tables' first weights."""

    def build(self) -> "Dcn":
        """Return the model with fresh weights."""
        return Dcn(self)


class Dcn(nn.Module):
    """forward(batch) -> logits [B, num_tasks]."""

    def __init__(self, config: DcnConfig) -> None:
        super().__init__()
        self.inputs = PooledInputs(config.tables, config.dense, seed=config.seed)
        width = self.inputs.width
        self.cross = CrossNet(width, config.num_crosses, rank=config.cross_rank)
        self.mlp = MLP(width, config.hidden, dropout=config.dropout)
        self.stacked = config.stacked
        joined = self.mlp.out_width if config.stacked else width + self.mlp.out_width
        self.head = nn.Linear(joined, config.num_tasks)

    def forward(self, batch: "Batch") -> Tensor:
        x = self.inputs.flat(batch)
        crossed = self.cross(x)
        return self.head(self.mlp(crossed) if self.stacked else torch.cat([crossed, self.mlp(x)], dim=1))


def synthetic() -> DcnConfig:
    """Return a small DCN-V2 for `recis.models.synthetic.SyntheticClicks`: seconds on a laptop."""
    return DcnConfig(tables=synthetic_tables(8), dense=synthetic_dense(), num_crosses=2, cross_rank=8, hidden=(32, 16))
