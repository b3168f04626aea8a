"""Sum row gradients by hand: over calls of one process, and over ranks.

    buffer.add(rows, grads);  buffer.add(rows, grads);  rows, sums = buffer.drain(scale)

The sum of a row is the left fold of its gradients in the order they were added, in fp32: how the positions were cut into
calls changes no bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from recis_kernels.row_grads import RowGrad, reduce_grads

RankGrads = tuple[Tensor, Tensor]  # rows [U] distinct, summed gradients [U, D]


class RowGradBuffer:
    """Collects (rows, gradients) until they are drained."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Tensor, grads: Tensor) -> None:
        """Add gradients [L, D] float32 of rows [L] int64; a row may occur any number of times, -1 is no row.

        Raises:
            ValueError: shapes or dtypes do not fit, or D differs from what was added before.
        """
        if rows.ndim != 1 or rows.dtype != torch.int64 or grads.ndim != 2 or grads.shape[0] != rows.shape[0]:
            raise ValueError(
                f"rows must be int64 [L] and grads [L, D]; got {tuple(rows.shape)} {rows.dtype}, {tuple(grads.shape)}"
            )
        if self._parts and self._parts[0][1].shape[1] != grads.shape[1]:
            raise ValueError(f"grads must have D = {self._parts[0][1].shape[1]}, as before; got {grads.shape[1]}")
        have = rows >= 0
        self._parts.append((rows[have], grads.detach().float()[have]))

    def drain(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the distinct rows [U], ascending, and their sums times scale [U, D]; the buffer is empty afterwards.

        Raises:
            ValueError: nothing was ever added, so D is unknown.
        """
        if not self._parts:
            raise ValueError("drain: nothing was added, so the width of the gradients is unknown; call add first")
        rows, grads = (torch.cat(column) for column in zip(*self._parts, strict=True))
        self._parts = []
        distinct, inverse = torch.unique(rows, return_inverse=True)
        return distinct, _fold(inverse, grads, distinct.numel()) * scale


def sum_over_ranks(parts: Sequence[RankGrads]) -> RankGrads:
    """Return distinct rows ascending and the sum of the ranks' gradients divided by the number of ranks, DDP's mean."""
    rows, sums, _ = _over_ranks(parts)
    return rows, sums / len(parts)


def mean_over_contributors(parts: Sequence[RankGrads]) -> RankGrads:
    """Return distinct rows ascending and each row's mean over the ranks that touched it."""
    rows, sums, contributors = _over_ranks(parts)
    return rows, sums / contributors[:, None]


def _over_ranks(parts: Sequence[RankGrads]) -> tuple[Tensor, Tensor, Tensor]:
    rows, grads = (torch.cat(column) for column in zip(*parts, strict=True))
    distinct, inverse, counts = torch.unique(rows, return_inverse=True, return_counts=True)
    return distinct, _fold(inverse, grads.float(), distinct.numel()), counts


def _fold(inverse: Tensor, grads: Tensor, num_rows: int) -> Tensor:
    order = torch.arange(inverse.numel() + 1)
    view = RowGrad(inverse=inverse, offsets=order, stride=inverse.numel(), per_position=True, grad=grads)
    return reduce_grads([view] if inverse.numel() else [], num_rows, grads.shape[1])
