"""The form in which feature ops take many columns at once: one concatenation, and where each column starts in it.

    values [L] = column 0, column 1, ...;   column c is values[column_offsets[c]:column_offsets[c + 1]]

column_offsets is a tuple of C + 1 Python ints, known without reading a tensor. `join` makes the concatenation; columns
that already lie side by side in one storage, as the outputs of an earlier op do, are joined without a copy.

A GPU runs all columns in one launch: a program takes `block` values of one column, so what depends on the column is the
same for all its lanes. `block_table` tells the programs their column in 8 (2 + P) (C + 1) bytes.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from recis_kernels.dispatch import jit, tl
from recis_kernels.threads import run_parts, split


def join(columns: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """Return the columns [L_c, ...] one after another, and their column_offsets; a view where they lie side by side."""
    ends = tuple(accumulate((column.shape[0] for column in columns), initial=0))
    if len(columns) == 1:
        return columns[0], ends
    if _side_by_side(columns):
        first = columns[0]
        return first.as_strided((ends[-1], *first.shape[1:]), first.stride()), ends
    return torch.cat(list(columns)), ends


def column_of_value(column_offsets: Sequence[int], parameters: Sequence[int], device: torch.device) -> Tensor:
    """Return parameters[c] for each value of column c, int64 [L]."""
    lengths = [stop - start for start, stop in pairwise(column_offsets)]
    table = to_device(torch.tensor([list(parameters), lengths], dtype=torch.int64), device)
    return table[0].repeat_interleave(table[1], output_size=column_offsets[-1])


def run_columns(
    loop: Callable[[int, int, int], object], num_values: int, column_offsets: Sequence[int], *, min_items: int
) -> None:
    """Call loop(column, start, stop) over all values, on several threads; no call crosses the border of a column.

    min_items: values a thread must get to be worth its start.
    """
    borders = list(enumerate(pairwise(column_offsets)))

    def run(start: int, stop: int) -> None:
        for column, (first, last) in borders:
            if max(start, first) < min(stop, last):
                loop(column, max(start, first), min(stop, last))

    run_parts(run, split(num_values, min_items=min_items))


def check_columns(num_values: int, column_offsets: Sequence[int], num_parameters: int) -> None:
    """Raise ValueError unless the columns ascend from 0 to num_values and there is one parameter per column."""
    if len(column_offsets) == 0 or column_offsets[0] != 0 or column_offsets[-1] != num_values:
        raise ValueError(f"column_offsets must go from 0 to {num_values}; got {tuple(column_offsets)[:8]}")
    if any(start > stop for start, stop in pairwise(column_offsets)):
        raise ValueError(f"column_offsets must not descend; got {tuple(column_offsets)[:8]}")
    if len(column_offsets) - 1 != num_parameters:
        raise ValueError(f"{len(column_offsets) - 1} columns need one parameter each; got {num_parameters}")


def block_table(
    column_offsets: Sequence[int], parameters: Sequence[Sequence[int]], block: int, device: torch.device
) -> tuple[Tensor, int]:
    """Return the table of a launch over all columns, int64 [2 + P, C + 1] on device, and its number of programs.

    Row 0 holds the first program of each column, row 1 column_offsets, row 2 + p parameters[p] (C each). Sent from pinned
    memory, so the host waits for nothing.
    """
    programs = accumulate((-(-(stop - start) // block) for start, stop in pairwise(column_offsets)), initial=0)
    rows = [list(programs), list(column_offsets), *([*values, 0] for values in parameters)]
    return to_device(torch.tensor(rows, dtype=torch.int64), device), rows[0][-1]


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """Return a small host table on the device, by way of pinned memory: a pageable copy would stall the host."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


@jit
def column_of_program(table_ptr, program, num_columns):
    """Return the column that a program of a block_table works on: the last one that starts at or before it."""
    low, high = program * 0, program * 0 + num_columns
    while high - low > 1:
        middle = (low + high) >> 1
        starts_later = tl.load(table_ptr + middle) > program
        high = tl.where(starts_later, middle, high)
        low = tl.where(starts_later, low, middle)
    return low


@jit
def values_of_program(table_ptr, program, column, num_columns, BLOCK: tl.constexpr):
    """Return the places int64 [BLOCK] of a program's values in the concatenation, and which of them exist."""
    ends_ptr = table_ptr + num_columns + 1
    first_program = tl.load(table_ptr + column)
    place = tl.load(ends_ptr + column) + (program - first_program) * BLOCK + tl.arange(0, BLOCK)
    return place, place < tl.load(ends_ptr + column + 1)


@jit
def parameter_of_column(table_ptr, column, num_columns, ROW: tl.constexpr):
    """Return parameters[ROW] of the column."""
    return tl.load(table_ptr + (2 + ROW) * (num_columns + 1) + column)


def _side_by_side(columns: Sequence[Tensor]) -> bool:
    first = columns[0]
    storage = first.untyped_storage().data_ptr()
    end = first.storage_offset()
    for column in columns:
        same = column.dtype == first.dtype and column.shape[1:] == first.shape[1:] and column.is_contiguous()
        if not same or column.untyped_storage().data_ptr() != storage or column.storage_offset() != end:
            return False
        end += column.numel()
    return storage != 0
