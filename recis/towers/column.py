"""ColumnTower: vectors that lie in the data itself, one list of numbers per sample, as a dense feature.

    floats [B bags] -> [B, vector_width], zeros where a sample has none -> projection (if asked for) -> [B, width]

The column is read as `Floats(name, default=())` and passed on as an extra; a null or an empty list is a missing vector, which
gives zeros behind the projection too, and is counted.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recis.errors import ConfigError, DataError, nearest
from recis.jagged import JaggedTensor

if TYPE_CHECKING:
    from recis.io.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnTowerConfig:
    """A column of vectors in batch.extras."""

    name: str
    """Of the dense feature it makes."""
    column: str
    vector_width: int
    """Numbers in each vector; another count is an error that names the row."""
    out_width: int | None = None
    """Width of a trained projection; None: the vectors as they are."""
    seed: int = 0
    """Of the projection's weights."""

    def __post_init__(self) -> None:
        for name in ("vector_width", "out_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"column tower {self.name!r}: {name} must be at least 1; got {value}")

    def build(self) -> "ColumnTower":
        """Return the tower."""
        return ColumnTower(self)


class ColumnTower(nn.Module):
    """forward(batch) -> [B, width] float32. Attributes: width, num_missing (samples so far without a vector)."""

    def __init__(self, config: ColumnTowerConfig) -> None:
        super().__init__()
        self.config, self.name = config, config.name
        self.num_missing = 0
        self.width = config.vector_width if config.out_width is None else config.out_width
        self.projection: nn.Module = nn.Identity()
        if config.out_width is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.projection = nn.Linear(config.vector_width, config.out_width)

    def forward(self, batch: "Batch") -> Tensor:
        """Return [B, width].

        Raises:
            ConfigError: batch.extras has no such column of numbers.
            DataError: a vector has another width, or a number that is not finite.
        """
        column = batch.extras.get(self.config.column)
        if not isinstance(column, JaggedTensor) or not column.flat_values.is_floating_point():
            raise ConfigError(
                f"column tower {self.name!r}: batch.extras has no lists of numbers {self.config.column!r}; "
                f"{nearest(self.config.column, batch.extras)}"
            )
        has = column.lengths == self.config.vector_width
        self._check(column, has)
        self.num_missing += int((~has).sum())
        vectors = column.flat_values.new_zeros(len(has), self.config.vector_width, dtype=torch.float32)
        vectors = vectors.index_put(
            (has.nonzero()[:, 0],), column.flat_values.view(-1, self.config.vector_width).float()
        )
        return (self.projection(vectors) * has[:, None]).float()

    def _check(self, column: JaggedTensor, has: Tensor) -> None:
        wrong = ~has & (column.lengths != 0)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise DataError(
                f"a vector must have {self.config.vector_width} numbers, or none at all",
                row=row,
                column=self.config.column,
                value=int(column.lengths[row]),
            )
        finite = column.flat_values.isfinite()
        if not bool(finite.all()):
            place = int((~finite).nonzero()[0])
            row = int(torch.searchsorted(column.offsets, torch.tensor(place), right=True)) - 1
            raise DataError("a number of a vector is not finite", row=row, column=self.config.column)
