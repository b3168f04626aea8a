"""A fixed set of ids per table: what turns arbitrary 64-bit ids into the row numbers that TorchRec and FBGEMM want.

row of ids[k] = k, ids ascending;   any other id: row V, one past the last
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor as TorchRecKeyed

from recis.embedding import HashTable
from recis.errors import ConfigError


class FixedVocabulary(nn.Module):
    """Turns ids into row numbers; the ids are buffers and go into `state_dict()`.

    Args:
        ids: table -> its distinct ids [V] int64, ascending.
        features: feature -> its table.
        takes_weights: whether batches may have weights.

    Raises:
        ConfigError: ids are not ascending int64, or a feature's table has none.
    """

    def __init__(self, ids: Mapping[str, Tensor], features: Mapping[str, str], *, takes_weights: bool = True) -> None:
        super().__init__()
        self.takes_weights = takes_weights
        self.tables, self.features = tuple(ids), dict(features)
        for number, (table, values) in enumerate(ids.items()):
            if values.ndim != 1 or values.dtype != torch.int64 or not bool((values[1:] > values[:-1]).all()):
                raise ConfigError(
                    f"table {table!r}: the ids of a vocabulary must be [V] int64, distinct and ascending; got "
                    f"{values.dtype} {tuple(values.shape)}: take ids.unique()"
                )
            self.register_buffer(f"ids_{number}", values.clone())
        for feature, table in features.items():
            if table not in ids:
                raise ConfigError(f"feature {feature!r} is of table {table!r}, which has no vocabulary")

    def ids(self, table: str) -> Tensor:
        """Return the ids of a table, [V] ascending."""
        return self.get_buffer(f"ids_{self.tables.index(table)}")

    def rows_of(self, table: str, values: Tensor) -> Tensor:
        """Return the row of each id [L], int64 [L]; V for ids that are not in the vocabulary."""
        ids = self.ids(table)
        if ids.numel() == 0:
            return torch.zeros_like(values)
        places = torch.searchsorted(ids, values).clamp(max=ids.numel() - 1)
        return torch.where(ids[places] == values, places, ids.numel())

    def forward(self, features: TorchRecKeyed) -> TorchRecKeyed:
        """Return the batch with row numbers in place of ids; lengths and weights are shared, other features stay.

        Raises:
            ValueError: ids are not int64, or the batch has weights that would be left out.
        """
        if not self.takes_weights and features.weights_or_none() is not None:
            raise ValueError("the batch has weights; export with is_weighted=True, or leave them out")
        values = features.values()
        if values.dtype != torch.int64:
            raise ValueError(f"ids must be int64; the batch has {values.dtype}: hash or cast them to int64")
        parts = [
            self.rows_of(self.features[key], values[start:stop]) if key in self.features else values[start:stop]
            for key, (start, stop) in zip(features.keys(), pairwise(features.offset_per_key()), strict=True)
        ]
        return TorchRecKeyed(
            keys=features.keys(),
            values=torch.cat(parts) if parts else values,
            weights=features.weights_or_none(),
            lengths=features.lengths(),
            stride=features.stride(),
        )


def require_all_rows(table: HashTable) -> None:
    """Raise ConfigError where other processes hold rows of a table whose ids are to become a vocabulary."""
    exchange: Any = table.store.exchange
    if exchange is not None and exchange.world_size > 1:
        raise ConfigError(
            f"table {table.name!r}: its rows are shared by several processes; save a checkpoint, and load it in one process"
        )
