"""Cut rows of jagged columns to a given length, copy runs of values out of them, and map picks in cut rows back.

    dropped[r] = max(len(r) - keep, 0);   missing[r] = max(keep - len(r), 0)
    drop = "left" keeps the last `keep` entries of a row, "right" the first

Both leave a row one run of its entries, so a cut is described by where each run starts and how long it is; values,
weights and inner rows of nested columns are then copied run by run with take_runs. All columns of a call are their rows
one after another, with a keep and a side per column. Cost: a few operations per row, and one read and write per value kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recis_kernels.columns import check_columns, column_of_value, run_columns
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.jagged import as_words, bag_of_value, check_offsets_form, lengths_to_offsets
from recis_kernels.threads import run_parts, split

Drop = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Cut:
    """R cut rows: row r is now entries starts[r] .. starts[r] + lengths[r] - 1 of the old values; all int64 [R]."""

    starts: Tensor
    lengths: Tensor
    dropped: Tensor
    missing: Tensor


def ragged_truncate(
    offsets: Tensor, row_offsets: Sequence[int], keeps: Sequence[int], drops: Sequence[Drop], *, impl: Impl = "auto"
) -> Cut:
    """Return how each row is cut to its column's keep.

    Args:
        offsets: [R + 1] of all rows, int64 or int32.
        row_offsets: C + 1 ints; column c owns rows row_offsets[c] .. row_offsets[c + 1] - 1.
        keeps: entries a row of column c may keep.
        drops: per column "left" to cut at the head (the oldest), "right" at the end.

    Raises:
        ValueError: a keep is negative, a side is neither, or columns and parameters do not fit together.
    """
    check_offsets_form(offsets)
    check_columns(offsets.numel() - 1, row_offsets, len(keeps))
    check_columns(offsets.numel() - 1, row_offsets, len(drops))
    if min(keeps, default=0) < 0:
        raise ValueError(f"keep must be at least 0; got {min(keeps)}")
    for drop in drops:
        if drop not in ("left", "right"):
            raise ValueError(f'drop must be "left" or "right"; got {drop!r}')
    version = choose(impl, offsets, numba=_truncate_numba, torch=_truncate_torch, reference=_truncate_reference)
    return version(offsets, row_offsets, keeps, drops)


def take_runs(values: Tensor, starts: Tensor, lengths: Tensor, num_taken: int, *, impl: Impl = "auto") -> Tensor:
    """Return the runs values[starts[r] : starts[r] + lengths[r]] one after another, [num_taken, ...].

    Args:
        values: [L] or [L, D].
        starts, lengths: int64 [R].
        num_taken: the sum of lengths.
    """
    if num_taken == values.shape[0]:
        return values  # disjoint ascending runs of that many entries are all of them
    return choose(impl, values, numba=_runs_numba, torch=_runs_torch, reference=_runs_reference)(
        values, starts, lengths, num_taken
    )


def keep_where(mask: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions [M] where mask [L] is True, ascending, and the offsets [B + 1] of what stays of each bag."""
    check_offsets_form(offsets)
    before = lengths_to_offsets(mask.to(torch.int64))
    return mask.nonzero().squeeze(1), before.index_select(0, offsets)


def ragged_take(
    offsets: Tensor, dropped: Tensor, picks: Tensor, pick_offsets: Tensor, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Return flat indices offsets[r] + dropped[r] + pick (int64 [M]) and their offsets [B + 1].

    offsets [B + 1] and dropped [B] describe the rows before the cut; picks [P] are positions in the cut rows, in the
    bags of pick_offsets [B + 1]. A pick past its row's end, or below 0, is discarded.

    Raises:
        ValueError: the shapes disagree.
    """
    check_offsets_form(offsets)
    check_offsets_form(pick_offsets)
    num_rows = offsets.numel() - 1
    if dropped.shape != (num_rows,) or pick_offsets.numel() != num_rows + 1:
        raise ValueError(
            f"{num_rows} rows need dropped [{num_rows}] and pick_offsets [{num_rows + 1}]; "
            f"got {tuple(dropped.shape)} and {tuple(pick_offsets.shape)}"
        )
    return choose(impl, picks, torch=_take_torch, reference=_take_reference)(offsets, dropped, picks, pick_offsets)


def _take_reference(offsets: Tensor, dropped: Tensor, picks: Tensor, pick_offsets: Tensor) -> tuple[Tensor, Tensor]:
    starts, cuts, bags = offsets.tolist(), dropped.tolist(), pick_offsets.tolist()
    taken, lengths = [], []
    for row in range(len(cuts)):
        flat = [starts[row] + cuts[row] + pick for pick in picks[bags[row] : bags[row + 1]].tolist() if pick >= 0]
        kept = [index for index in flat if index < starts[row + 1]]
        taken += kept
        lengths.append(len(kept))
    indices = torch.tensor(taken, dtype=torch.int64, device=picks.device)
    return indices, lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64, device=picks.device))


def _take_torch(offsets: Tensor, dropped: Tensor, picks: Tensor, pick_offsets: Tensor) -> tuple[Tensor, Tensor]:
    row = bag_of_value(pick_offsets, picks.shape[0])
    first = (offsets[:-1] + dropped).to(torch.int64)
    flat = first.index_select(0, row) + picks
    inside = (picks >= 0) & (flat < offsets[1:].index_select(0, row))
    kept = torch.zeros(offsets.numel() - 1, dtype=torch.int64, device=picks.device).index_add_(0, row, inside.long())
    return flat[inside], lengths_to_offsets(kept)


def _truncate_reference(
    offsets: Tensor, row_offsets: Sequence[int], keeps: Sequence[int], drops: Sequence[Drop]
) -> Cut:
    columns = list(zip(pairwise(row_offsets), keeps, drops, strict=True))
    rule_of_row = [(keep, drop) for (start, stop), keep, drop in columns for _ in range(start, stop)]
    rows = []
    for (start, stop), (keep, drop) in zip(pairwise(offsets.tolist()), rule_of_row, strict=True):
        dropped, missing = max(stop - start - keep, 0), max(keep - (stop - start), 0)
        rows.append((start + (dropped if drop == "left" else 0), stop - start - dropped, dropped, missing))
    fields = torch.tensor(rows, dtype=torch.int64, device=offsets.device).view(-1, 4)
    return Cut(*fields.unbind(1))


def _truncate_torch(offsets: Tensor, row_offsets: Sequence[int], keeps: Sequence[int], drops: Sequence[Drop]) -> Cut:
    keep = column_of_value(row_offsets, keeps, offsets.device)
    from_left = column_of_value(row_offsets, [int(drop == "left") for drop in drops], offsets.device)
    lengths = offsets.diff().to(torch.int64)
    dropped = (lengths - keep).clamp_(min=0)
    missing = (keep - lengths).clamp_(min=0)
    return Cut(offsets[:-1] + dropped * from_left, lengths - dropped, dropped, missing)


def _truncate_numba(offsets: Tensor, row_offsets: Sequence[int], keeps: Sequence[int], drops: Sequence[Drop]) -> Cut:
    fields = torch.empty(4, offsets.numel() - 1, dtype=torch.int64)
    ends, target = offsets.numpy(), fields.numpy()
    run_columns(
        lambda column, *part: _cut_rows(ends, target, keeps[column], drops[column] == "left", *part),
        fields.shape[1],
        row_offsets,
        min_items=32768,
    )
    return Cut(*fields.unbind(0))


def _runs_reference(values: Tensor, starts: Tensor, lengths: Tensor, num_taken: int) -> Tensor:
    runs = [values[start : start + size] for start, size in zip(starts.tolist(), lengths.tolist(), strict=True)]
    return torch.cat([values[:0], *runs])


def _runs_torch(values: Tensor, starts: Tensor, lengths: Tensor, num_taken: int) -> Tensor:
    offsets = lengths_to_offsets(lengths)
    shift = starts - offsets[:-1]
    source = torch.arange(num_taken, device=values.device) + shift.repeat_interleave(lengths, output_size=num_taken)
    return values.index_select(0, source)


def _runs_numba(values: Tensor, starts: Tensor, lengths: Tensor, num_taken: int) -> Tensor:
    out = values.new_empty((num_taken, *values.shape[1:]))
    if num_taken == 0:
        return out
    width = out.numel() // num_taken
    source, target, firsts = as_words(values), as_words(out), starts.numpy()
    ends = lengths_to_offsets(lengths).numpy()
    run_parts(lambda start, stop: _copy_runs(source, target, firsts, ends, width, start, stop), split(starts.numel()))
    return out


@njit
def _cut_rows(ends, target, keep, from_left, start, stop):
    for row in range(start, stop):
        first = np.int64(ends[row])
        length = np.int64(ends[row + 1]) - first
        dropped = max(length - keep, 0)
        target[0, row] = first + dropped if from_left else first
        target[1, row] = length - dropped
        target[2, row] = dropped
        target[3, row] = max(keep - length, 0)


@njit
def _copy_runs(source, target, firsts, ends, width, start, stop):
    for row in range(start, stop):
        first, at = firsts[row] * width, ends[row] * width
        for i in range(ends[row + 1] * width - at):
            target[at + i] = source[first + i]
