"""Turn numbers into bucket numbers by sorted boundaries.

    out[i] = how many boundaries of the column are <= x[i];   NaN -> all of them

A value on a boundary belongs to the bucket above it. Boundaries are rounded once to the dtype of the values, so that a
value written like the boundary meets it (0.7 in fp32 is below 0.7 in fp64); for integer values each becomes the smallest
integer not below it, which decides exactly. All columns of a call are one concatenation (see columns.py) with their own
boundaries.

The CPU loop finds the place of a value in an even grid over the boundaries and searches only those of that grid cell:
about 3 ns a value, where a binary search over 100 boundaries mispredicts its branches for 30. The cell is a
non-decreasing function of the value, rounding included, so the boundaries of lower cells are all below it. The Triton
version halves all boundaries of the column, which stay in a GPU's nearest cache. Cost: one read and one write per value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from recis_kernels.calibration import current
from recis_kernels.columns import (
    block_table,
    check_columns,
    column_of_program,
    parameter_of_column,
    run_columns,
    to_device,
    values_of_program,
)
from recis_kernels.dispatch import Impl, choose, jit, launch, njit, tl

_CELLS_PER_BOUNDARY = 16  # most cells then hold no boundary or one
_MIN_CELLS, _MAX_CELLS = 64, 1 << 16  # the largest table still fits the second-level cache
_INT64_LIMITS = (-(2**63), 2**63 - 1)


@dataclass(frozen=True, slots=True)
class _Grid:
    """Boundaries of one dtype; cells[c] = how many lie in grid cells below c."""

    numbers: Tensor
    cells: Tensor
    low: float
    scale: float


class Boundaries:
    """Boundaries of one column, prepared for every dtype of values; build it once, use it in every call.

    Raises:
        ValueError: a number is not finite, or they descend.
    """

    __slots__ = ("grids", "numbers")

    def __init__(self, numbers: Sequence[float]) -> None:
        if any(not math.isfinite(number) for number in numbers):
            raise ValueError(f"boundaries must be finite; got {list(numbers)[:8]}")
        if any(low > high for low, high in pairwise(numbers)):
            raise ValueError(f"boundaries must ascend; got {list(numbers)[:8]}")
        self.numbers = tuple(numbers)
        with np.errstate(over="ignore"):  # one above every fp32 becomes inf, which no finite fp32 reaches either
            single = np.array(numbers, dtype=np.float32)
        self.grids = {
            torch.float32: _grid(single),
            torch.float64: _grid(np.array(numbers, dtype=np.float64)),
            torch.int64: _grid(np.array(_whole(numbers), dtype=np.int64)),
        }


def bucketize(
    values: Tensor, column_offsets: Sequence[int], boundaries: Sequence[Boundaries], *, impl: Impl = "auto"
) -> Tensor:
    """Return the bucket of every value, int64 [L].

    Args:
        values: [L] float32, float64 or int64 of all columns.
        column_offsets: C + 1 ints, see columns.py.
        boundaries: one per column.

    Raises:
        ValueError: values has another shape or dtype, or columns and boundaries do not fit together.
    """
    if values.ndim != 1 or values.dtype not in (torch.float32, torch.float64, torch.int64):
        raise ValueError(f"values must be [L] float32, float64 or int64; got {tuple(values.shape)} {values.dtype}")
    check_columns(values.shape[0], column_offsets, len(boundaries))
    grids = [one.grids[values.dtype] for one in boundaries]
    numbers, cells = [grid.numbers for grid in grids], [grid.cells for grid in grids]
    lows, scales = [grid.low for grid in grids], [grid.scale for grid in grids]
    run = _op if torch.compiler.is_compiling() else _run
    return run(values, column_offsets, numbers, cells, lows, scales, impl)


def _run(
    values: Tensor,
    column_offsets: Sequence[int],
    numbers: Sequence[Tensor],
    cells: Sequence[Tensor],
    lows: Sequence[float],
    scales: Sequence[float],
    impl: str,
) -> Tensor:
    """Return the buckets; per column the fields of its _Grid."""
    numba = partial(_numba, cells=cells, lows=lows, scales=scales)
    version = choose(impl, values, triton=_triton, numba=numba, torch=_torch, reference=_reference)  # type: ignore[arg-type]
    return version(values, column_offsets, numbers)


_op = torch.library.custom_op("recis::bucketize", _run, mutates_args=())


@_op.register_fake
def _(values, column_offsets, numbers, cells, lows, scales, impl):
    return values.new_empty(values.shape, dtype=torch.int64)


def _reference(values: Tensor, column_offsets: Sequence[int], numbers: Sequence[Tensor]) -> Tensor:
    out = []
    for column, known in enumerate(numbers):
        part = values[column_offsets[column] : column_offsets[column + 1]].tolist()
        out += [sum(math.isnan(value) or number <= value for number in known.tolist()) for value in part]
    return torch.tensor(out, dtype=torch.int64, device=values.device)


def _torch(values: Tensor, column_offsets: Sequence[int], numbers: Sequence[Tensor]) -> Tensor:
    out = torch.empty(values.shape[0], dtype=torch.int64, device=values.device)
    for column, known in enumerate(numbers):
        part = slice(column_offsets[column], column_offsets[column + 1])
        out[part] = torch.bucketize(values[part].contiguous(), known.to(values.device), right=True)
    return out


def _numba(values, column_offsets, numbers, cells, lows, scales) -> Tensor:
    out = torch.empty(values.shape[0], dtype=torch.int64)
    source, target = values.contiguous().numpy(), out.numpy()

    def loop(column: int, start: int, stop: int) -> None:
        known, table = numbers[column].numpy(), cells[column].numpy()
        _count(source, target, known, table, lows[column], scales[column], start, stop)

    run_columns(loop, values.shape[0], column_offsets, min_items=32768)
    return out


def _triton(values: Tensor, column_offsets: Sequence[int], numbers: Sequence[Tensor]) -> Tensor:
    out = values.new_empty(values.shape, dtype=torch.int64)
    counts = [known.numel() for known in numbers]
    known = to_device(torch.cat([values.new_empty(0, device="cpu"), *numbers]), values.device)
    firsts = list(accumulate(counts, initial=0))[:-1]
    block = current().block_items
    table, programs = block_table(column_offsets, (firsts, counts), block, values.device)
    arguments = values.contiguous(), known, table, out, len(counts)
    launch(_bucketize_kernel, (programs,), *arguments, BLOCK=block, num_warps=8)
    return out


def _whole(numbers: Sequence[float]) -> list[int]:
    """Smallest integers not below the boundaries; one above every int64 can never be reached and is left out."""
    low, high = _INT64_LIMITS
    return [max(low, math.ceil(number)) for number in numbers if math.ceil(number) <= high]


def _grid(numbers: np.ndarray) -> _Grid:
    num_cells = _MIN_CELLS
    while num_cells < min(_CELLS_PER_BOUNDARY * numbers.size, _MAX_CELLS):
        num_cells *= 2
    low, scale = 0.0, 0.0
    if numbers.size:
        low, span = float(numbers[0]), float(numbers[-1]) - float(numbers[0])
        scale = num_cells / span if span > 0 and math.isfinite(span) else 0.0  # 0: all boundaries in cell 0
    cell_of_boundary = np.array([_cell(number, low, scale, num_cells) for number in numbers], dtype=np.int64)
    cells = np.searchsorted(cell_of_boundary, np.arange(num_cells + 2), side="left").astype(np.int32)
    return _Grid(torch.from_numpy(numbers), torch.from_numpy(cells), low, scale)


@njit
def _cell(value, low, scale, num_cells):
    place = (np.float64(value) - low) * scale
    if not place > 0:  # below the grid; also inf * 0
        return np.int64(0)
    return np.int64(min(place, np.float64(num_cells)))


@njit
def _count(source, target, numbers, cells, low, scale, start, stop):
    num_cells = cells.size - 2
    for i in range(start, stop):
        value = source[i]
        cell = _cell(value, low, scale, num_cells)
        below, end = np.int64(cells[cell]), np.int64(cells[cell + 1])
        while end - below > 4:  # many boundaries in one cell: halve them
            middle = (below + end) >> 1
            if value < numbers[middle]:
                end = middle
            else:
                below = middle + 1
        while below < end and not value < numbers[below]:
            below += 1
        target[i] = below if value == value else numbers.size


@jit
def _bucketize_kernel(values_ptr, numbers_ptr, table_ptr, out_ptr, num_columns, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    column = column_of_program(table_ptr, program, num_columns)
    place, mask = values_of_program(table_ptr, program, column, num_columns, BLOCK)
    value = tl.load(values_ptr + place, mask=mask, other=0)
    numbers_ptr += parameter_of_column(table_ptr, column, num_columns, 0)
    low = tl.zeros([BLOCK], dtype=tl.int64)
    high = low + parameter_of_column(table_ptr, column, num_columns, 1)
    open_size = parameter_of_column(table_ptr, column, num_columns, 1)
    while open_size > 0:  # every lane has at most open_size candidates left
        middle = (low + high) >> 1
        searching = mask & (low < high)
        number = tl.load(numbers_ptr + middle, mask=searching, other=0)
        above = searching & ((value >= number) | (value != value))  # NaN is above all
        high = tl.where(searching & ~above, middle, high)
        low = tl.where(above, middle + 1, low)
        open_size = open_size >> 1
    tl.store(out_ptr + place, low, mask=mask)
