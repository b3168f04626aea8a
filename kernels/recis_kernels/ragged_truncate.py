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

from recis_kernels.columns import (
    block_table,
    check_columns,
    column_of_program,
    column_of_value,
    parameter_of_column,
    run_columns,
    values_of_program,
)
from recis_kernels.contents import check_offsets, check_range, check_runs, is_asked
from recis_kernels.dispatch import Impl, choose, jit, launch, njit, tl
from recis_kernels.jagged import bag_of_value, check_offsets_form, lengths_to_offsets
from recis_kernels.jagged_runs import gather_runs
from recis_kernels.jagged_triton import bag_of_place

_PER_PROGRAM = 1024
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
    check_offsets(offsets, None)
    check_columns(offsets.numel() - 1, row_offsets, len(keeps))
    check_columns(offsets.numel() - 1, row_offsets, len(drops))
    if min(keeps, default=0) < 0:
        raise ValueError(f"keep must be at least 0; got {min(keeps)}")
    for drop in drops:
        if drop not in ("left", "right"):
            raise ValueError(f'drop must be "left" or "right"; got {drop!r}')
    lefts = [int(drop == "left") for drop in drops]
    fields = (_cut_op if torch.compiler.is_compiling() else _cut)(offsets, row_offsets, keeps, lefts, impl)
    return Cut(*fields.unbind(0))


def take_runs(values: Tensor, starts: Tensor, lengths: Tensor, num_taken: int, *, impl: Impl = "auto") -> Tensor:
    """Return the runs values[starts[r] : starts[r] + lengths[r]] one after another, [num_taken, ...].

    Args:
        values: [L] or [L, D]. Differentiable.
        starts, lengths: int64 [R], runs ascending and disjoint.
        num_taken: the sum of lengths.

    Raises:
        ValueError: starts or lengths is not int64 [R]; inside `checks()`, runs that are not as said.
    """
    if is_asked():
        _check_taken(starts, lengths, num_taken, values.shape[0])
    if num_taken == values.shape[0]:
        return values  # disjoint ascending runs of that many entries are all of them
    return gather_runs(values, starts, lengths_to_offsets(lengths), num_taken, impl=impl)


def _check_taken(starts: Tensor, lengths: Tensor, num_taken: int, num_values: int) -> None:
    check_range("lengths", lengths, 0, num_taken)
    offsets = lengths_to_offsets(lengths)
    if int(offsets[-1]) != num_taken:
        raise ValueError(f"num_taken must be the sum of lengths, {int(offsets[-1])}; got {num_taken}")
    check_runs(starts, offsets, num_values)
    falls = (starts[1:] < starts[:-1]) & (lengths[1:] > 0) & (lengths[:-1] > 0)
    if bool(falls.any()):
        at = int(falls.nonzero()[0])
        raise ValueError(
            f"starts must ascend; starts[{at}] is {int(starts[at])} and starts[{at + 1}] {int(starts[at + 1])}"
        )


def keep_where(mask: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions [M] where mask [L] is True, ascending, and the offsets [B + 1] of what stays of each bag."""
    check_offsets_form(offsets)
    check_offsets(offsets, mask.shape[0])
    before = lengths_to_offsets(mask.to(torch.int64))
    return mask.nonzero().squeeze(1), before.index_select(0, offsets)


def ragged_take(
    offsets: Tensor, dropped: Tensor, picks: Tensor, pick_offsets: Tensor, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Return flat indices offsets[r] + dropped[r] + pick (int64 [M]) and their offsets [B + 1].

    offsets [B + 1] and dropped [B] describe the rows before the cut; picks [P] are positions in the cut rows, in the
    bags of pick_offsets [B + 1]. A pick past its row's end, or below 0, is discarded. One host sync on a GPU: M.

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
    check_offsets(offsets, None)
    check_offsets(pick_offsets, picks.shape[0], whole=True, name="pick_offsets")
    if is_asked():
        _check_dropped(dropped, offsets)
    run = _take_op if torch.compiler.is_compiling() else _take
    return run(offsets, dropped, picks, pick_offsets, impl)


def _check_dropped(dropped: Tensor, offsets: Tensor) -> None:
    lengths = offsets.diff()
    wrong = ((dropped < 0) | (dropped > lengths)).nonzero()
    if wrong.numel():
        row = int(wrong[0])
        raise ValueError(
            f"dropped[{row}] must lie in 0..{int(lengths[row])}, its row's length; got {int(dropped[row])}"
        )


# ---- nodes of torch.compile; lefts[c] is 1 where the head is cut


def _cut(offsets: Tensor, row_offsets: Sequence[int], keeps: Sequence[int], lefts: Sequence[int], impl: str) -> Tensor:
    """Return starts, lengths, dropped and missing, int64 [4, R]."""
    cpu = {"numba": _truncate_numba, "torch": _truncate_torch, "reference": _truncate_reference}
    return choose(impl, offsets, triton=_truncate_triton, **cpu)(offsets, row_offsets, keeps, lefts)  # type: ignore[arg-type]


def _take(offsets: Tensor, dropped: Tensor, picks: Tensor, pick_offsets: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    version = choose(impl, picks, triton=_take_triton, torch=_take_torch, reference=_take_reference)  # type: ignore[arg-type]
    return version(offsets, dropped, picks, pick_offsets)


_cut_op = torch.library.custom_op("recis::ragged_truncate", _cut, mutates_args=())
_take_op = torch.library.custom_op("recis::ragged_take", _take, mutates_args=())


@_cut_op.register_fake
def _(offsets, row_offsets, keeps, lefts, impl):
    return offsets.new_empty((4, offsets.shape[0] - 1), dtype=torch.int64)


@_take_op.register_fake
def _(offsets, dropped, picks, pick_offsets, impl):
    num_taken = torch.library.get_ctx().new_dynamic_size()
    return picks.new_empty(num_taken, dtype=torch.int64), offsets.new_empty(offsets.shape, dtype=torch.int64)


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
    return flat[inside].to(torch.int64), lengths_to_offsets(kept)


def _take_triton(offsets: Tensor, dropped: Tensor, picks: Tensor, pick_offsets: Tensor) -> tuple[Tensor, Tensor]:
    num_picks, num_rows = picks.shape[0], dropped.shape[0]
    flat = torch.empty(num_picks, dtype=torch.int64, device=picks.device)
    if num_picks:
        arguments = offsets, dropped, picks, pick_offsets
        grid = (-(-num_picks // _PER_PROGRAM),)
        contiguous = [argument.contiguous() for argument in arguments]
        launch(_ragged_take_kernel, grid, *contiguous, flat, num_rows, num_picks, BLOCK=_PER_PROGRAM, num_warps=8)
    positions, new_offsets = keep_where(flat >= 0, pick_offsets)
    return flat.index_select(0, positions), new_offsets


def _truncate_reference(
    offsets: Tensor, row_offsets: Sequence[int], keeps: Sequence[int], lefts: Sequence[int]
) -> Tensor:
    columns = list(zip(pairwise(row_offsets), keeps, lefts, strict=True))
    rule_of_row = [(keep, left) for (start, stop), keep, left in columns for _ in range(start, stop)]
    rows = []
    for (start, stop), (keep, left) in zip(pairwise(offsets.tolist()), rule_of_row, strict=True):
        dropped, missing = max(stop - start - keep, 0), max(keep - (stop - start), 0)
        rows.append((start + dropped * left, stop - start - dropped, dropped, missing))
    return torch.tensor(rows, dtype=torch.int64, device=offsets.device).view(-1, 4).T.contiguous()


def _truncate_torch(offsets: Tensor, row_offsets: Sequence[int], keeps: Sequence[int], lefts: Sequence[int]) -> Tensor:
    keep = column_of_value(row_offsets, keeps, offsets.device)
    left = column_of_value(row_offsets, lefts, offsets.device)
    lengths = offsets.diff().to(torch.int64)
    dropped = (lengths - keep).clamp_(min=0)
    return torch.stack((offsets[:-1] + dropped * left, lengths - dropped, dropped, (keep - lengths).clamp_(min=0)))


def _truncate_numba(offsets: Tensor, row_offsets: Sequence[int], keeps: Sequence[int], lefts: Sequence[int]) -> Tensor:
    fields = torch.empty(4, offsets.numel() - 1, dtype=torch.int64)
    ends, target = offsets.numpy(), fields.numpy()
    run_columns(
        lambda column, *part: _cut_rows(ends, target, keeps[column], lefts[column], *part),
        fields.shape[1],
        row_offsets,
        min_items=32768,
    )
    return fields


def _truncate_triton(offsets: Tensor, row_offsets: Sequence[int], keeps: Sequence[int], lefts: Sequence[int]) -> Tensor:
    fields = torch.empty(4, offsets.numel() - 1, dtype=torch.int64, device=offsets.device)
    table, programs = block_table(row_offsets, (keeps, lefts), _PER_PROGRAM, offsets.device)
    sizes = len(keeps), fields.shape[1]
    launch(_ragged_truncate_kernel, (programs,), offsets.contiguous(), table, fields, *sizes, BLOCK=_PER_PROGRAM)
    return fields


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


@jit
def _ragged_truncate_kernel(offsets_ptr, table_ptr, out_ptr, num_columns, num_rows, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    column = column_of_program(table_ptr, program, num_columns)
    row, mask = values_of_program(table_ptr, program, column, num_columns, BLOCK)
    first = tl.load(offsets_ptr + row, mask=mask, other=0).to(tl.int64)
    length = tl.load(offsets_ptr + row + 1, mask=mask, other=0).to(tl.int64) - first
    keep = parameter_of_column(table_ptr, column, num_columns, 0)
    dropped = tl.maximum(length - keep, 0)
    start = first + dropped * parameter_of_column(table_ptr, column, num_columns, 1)
    out_ptr += row
    tl.store(out_ptr, start, mask=mask)
    tl.store(out_ptr + num_rows, length - dropped, mask=mask)
    tl.store(out_ptr + tl.full([], num_rows, tl.int64) * 2, dropped, mask=mask)
    tl.store(out_ptr + tl.full([], num_rows, tl.int64) * 3, tl.maximum(keep - length, 0), mask=mask)


@jit
def _ragged_take_kernel(
    offsets_ptr, dropped_ptr, picks_ptr, pick_offsets_ptr, out_ptr, num_rows, num_picks, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < num_picks
    row = bag_of_place(pick_offsets_ptr, place, num_rows)
    pick = tl.load(picks_ptr + place, mask=mask, other=-1).to(tl.int64)
    flat = tl.load(offsets_ptr + row).to(tl.int64) + tl.load(dropped_ptr + row) + pick
    inside = (pick >= 0) & (flat < tl.load(offsets_ptr + row + 1))
    tl.store(out_ptr + place, tl.where(inside, flat, -1), mask=mask)
