"""DeepFM: a linear term, a factorization machine and an MLP on the same embeddings, added.

    row of a table = [w, v]: one linear weight, then D factors, so one lookup serves all three parts
    logit = b + sum_f w_f + <u, x> + FM({v_f} and {x_k c_k}) + MLP([v_f, x])          x = dense columns, c_k [D] learned

A table's embedding_dim is therefore 1 + D. Source: Guo et al. 2017, arXiv:1703.04247; dense columns join the FM as in
Rendle 2010.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recis.embedding import TableConfig, TableSet
from recis.errors import ConfigError
from recis.models.inputs import DenseInput, PooledInputs
from recis.models.layers import MLP, FactorizationMachine
from recis.models.synthetic import synthetic_dense, synthetic_tables

if TYPE_CHECKING:
    from recis.io.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepFMConfig:
    """Tables of one embedding_dim 1 + D, D at least 1."""

    tables: tuple[TableConfig, ...]
    dense: tuple[DenseInput, ...] = ()
    hidden: tuple[int, ...] = (256, 128)
    dropout: float = 0.0
    """Of the MLP."""
    seed: int = 0
    """Of the tables' first weights."""

    def build(self) -> "DeepFM":
        """Return the model with fresh weights."""
        return DeepFM(self)


class DeepFM(nn.Module):
    """forward(batch) -> logits [B, 1]. Give `tables`, made of the config's, where other parts of a model use them too."""

    def __init__(self, config: DeepFMConfig, tables: TableSet | None = None) -> None:
        super().__init__()
        self.inputs = PooledInputs(config.tables if tables is None else tables, config.dense, seed=config.seed)
        dim = self.inputs.field_dim() - 1
        if dim < 1:
            raise ConfigError("DeepFM: embedding_dim must be at least 2: a linear weight and one factor or more; got 1")
        num_dense = self.inputs.dense.width
        self.bias = nn.Parameter(torch.zeros(1))
        self.dense_linear = nn.Parameter(torch.zeros(num_dense, 1))
        self.dense_factors = nn.Parameter(torch.empty(num_dense, dim).normal_(std=0.01))
        self.fm = FactorizationMachine()
        self.mlp = MLP(self.inputs.num_fields * dim + num_dense, config.hidden, out_width=1, dropout=config.dropout)

    def forward(self, batch: "Batch") -> Tensor:
        rows = self.inputs.fields(batch)
        dense = self.inputs.dense(batch)
        linear, factors = rows[:, :, 0].sum(1, keepdim=True), rows[:, :, 1:]
        linear = self.bias + linear + dense @ self.dense_linear
        fm = self.fm(torch.cat([factors, dense.unsqueeze(2) * self.dense_factors], dim=1))
        return linear + fm + self.mlp(torch.cat([factors.flatten(1), dense], dim=1))


def synthetic() -> DeepFMConfig:
    """Return a small DeepFM for `recis.models.synthetic.SyntheticClicks`: seconds on a laptop."""
    return DeepFMConfig(tables=synthetic_tables(9), dense=synthetic_dense(), hidden=(32, 16))
