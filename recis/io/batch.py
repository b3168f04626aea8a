"""The two batches of the product: columns as they were read, and features as models see them.

    files --Reader--> RawBatch(columns by name) --FeatureEngine--> Batch(sparse, dense, labels, weights, groups)

Both are immutable; `to(device)` gives a new one. A string column is byte-jagged: values uint8 [num_bytes], one bag per
string. B = samples, F = sparse features, K = dense columns, T = tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recis.errors import ConfigError, nearest
from recis.jagged import JaggedTensor, KeyedJaggedTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOrigin:
    """Where each row of a batch came from.

    Attributes:
        units: (file, unit in words) of every unit of the source, shared by all batches of a reader.
        unit: [B] int32, index into units.
        row: [B] int64, row number from 0 inside the unit.
    """

    units: Sequence[tuple[str, str]]
    unit: Tensor
    row: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RawBatch:
    """Columns of B samples as the reader delivers them.

    Attributes:
        columns: by name; a dense column is a Tensor [B] or [B, width], an id list, nested list or string column a
            JaggedTensor with B bags.
        num_samples: B; may be 0 (a rank whose lanes are exhausted joins with an empty batch).
        origin: where the rows came from, for error messages; None when unknown.
        ends_step: whether this is the last micro-batch of its optimizer step.
    """

    columns: Mapping[str, Tensor | JaggedTensor]
    num_samples: int
    origin: RowOrigin | None = None
    ends_step: bool = True

    def tensor(self, name: str) -> Tensor:
        """Return a dense column: [B] or [B, width].

        Raises:
            ConfigError: there is no such column, or it is jagged.
        """
        column = self._column(name)
        if not isinstance(column, Tensor):
            raise ConfigError(f"column {name!r} is jagged: use batch.jagged({name!r})")
        return column

    def jagged(self, name: str) -> JaggedTensor:
        """Return a column of ids, lists or strings, B bags.

        Raises:
            ConfigError: there is no such column, or it is dense.
        """
        column = self._column(name)
        if isinstance(column, Tensor):
            raise ConfigError(f"column {name!r} is dense: use batch.tensor({name!r})")
        return column

    def _column(self, name: str) -> Tensor | JaggedTensor:
        if name not in self.columns:
            raise ConfigError(f"no column {name!r} in the batch; {nearest(name, self.columns)}")
        return self.columns[name]

    def locate(self, row: int) -> tuple[str | None, str | None, int]:
        """Return (file, unit, row inside the unit) of a sample; (None, None, row) when the origin is unknown."""
        if self.origin is None:
            return None, None, row
        return (*self.origin.units[int(self.origin.unit[row])], int(self.origin.row[row]))

    def to(self, device: torch.device | str) -> "RawBatch":
        """Return the batch with its columns on `device`; the origin stays where it is."""
        return replace(self, columns={name: column.to(device) for name, column in self.columns.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Features, labels and weights of B samples: what the feature engine makes and every model receives.

    Attributes:
        sparse: ids of F features, key-major, stride B.
        dense: [B, K] float32; the features of `dense_keys` side by side.
        dense_keys: names of the dense features, in column order.
        dense_widths: columns each of them takes; sums to K.
        labels: [B, T] float32.
        label_mask: [B, T] bool, True where the label is present; None = all present.
        label_weights: [B, T] float32 weight per task; None = all 1.
        weights: [B] float32 sample weights.
        group_ids: [B] int64, the query or user of a sample for grouped metrics; None = not grouped.
        extras: passed through for losses and hooks (propensities, row ids), B rows each.
        num_samples: B.
    """

    sparse: KeyedJaggedTensor
    dense: Tensor
    dense_keys: tuple[str, ...]
    dense_widths: tuple[int, ...]
    labels: Tensor
    label_mask: Tensor | None
    label_weights: Tensor | None
    weights: Tensor
    group_ids: Tensor | None
    extras: Mapping[str, Tensor | JaggedTensor]
    num_samples: int

    def dense_feature(self, name: str) -> Tensor:
        """Return the columns [B, width] of one dense feature, a view.

        Raises:
            ConfigError: the batch has no dense feature of that name.
        """
        first = 0
        for key, width in zip(self.dense_keys, self.dense_widths, strict=True):
            if key == name:
                return self.dense[:, first : first + width]
            first += width
        raise ConfigError(f"no dense feature {name!r} in the batch; {nearest(name, self.dense_keys)}")

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with every tensor on `device`."""
        return Batch(
            sparse=self.sparse.to(device),
            dense=self.dense.to(device),
            dense_keys=self.dense_keys,
            dense_widths=self.dense_widths,
            labels=self.labels.to(device),
            label_mask=None if self.label_mask is None else self.label_mask.to(device),
            label_weights=None if self.label_weights is None else self.label_weights.to(device),
            weights=self.weights.to(device),
            group_ids=None if self.group_ids is None else self.group_ids.to(device),
            extras={name: column.to(device) for name, column in self.extras.items()},
            num_samples=self.num_samples,
        )
