"""What a machine can do, whatever the op: copy, read, gather of random rows, updates of random words.

    copy      bytes read + written per second of a large copy            read     bytes of a large sum
    gather    rows of 32 B to 1 KiB at random places, read and written out in order, 8 B of index each
    update    adds to random 4-byte floats on a GPU (atomic), to random int64 on a CPU (torch's index_add_: one thread adds
              at a time, so nothing is atomic); counted per add, since a sector moves for 4 or 8 useful bytes

Buffers are larger than any cache. Times are medians, on a GPU by events.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from recis.bench.harness import time_once
from recis_kernels.dispatch import jit, launch, njit, tl
from recis_kernels.host_memory import zeroed_bytes
from recis_kernels.prefetch import prefetch
from recis_kernels.threads import run_parts, split

GATHER_BYTES = (32, 64, 128, 256, 512, 1024)
_AHEAD = 16  # rows asked for ahead; compiled into the loop
_REPEATS, _WARM_UP = 7, 2
_GATHERED = {"cpu": 32 << 20, "cuda": 256 << 20}  # bytes of one call
_TABLE = {"cpu": 256 << 20, "cuda": 2 << 30}
_NUM_UPDATES = {"cpu": 1 << 20, "cuda": 1 << 24}


def median_s(run: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call, after two that warm up."""
    return float(np.median([time_once(run, str(device)) for _ in range(_WARM_UP + _REPEATS)][_WARM_UP:]))


def read_gb_per_s(device: torch.device, size_mib: int = 256) -> float:
    """Return bytes per second of a sum over a large buffer."""
    values = torch.ones(size_mib * 2**20 // 4, device=device)
    return values.numel() * 4 / median_s(values.sum, device) / 1e9


def gather_gb_per_s(device: torch.device, *, scale: float = 1.0) -> dict[int, float]:
    """Return bytes per second of a gather by row size in bytes; scale shrinks the buffers for tests."""
    table_bytes, moved = (int(sizes[device.type] * scale) for sizes in (_TABLE, _GATHERED))
    num_rows = -(-table_bytes // GATHER_BYTES[-1])
    memory = zeroed_bytes(num_rows * GATHER_BYTES[-1], device).view(torch.float32).fill_(1.0)  # in huge pages, touched
    found = {}
    for row_bytes in GATHER_BYTES:
        table = memory.view(-1, row_bytes // 4)
        rows = torch.randint(table.shape[0], (max(1, moved // row_bytes),), device=device)
        out = torch.empty(rows.numel(), table.shape[1], device=device)
        seconds = median_s(lambda table=table, rows=rows, out=out: gather_rows(table, rows, out), device)
        found[row_bytes] = rows.numel() * (8 + 2 * row_bytes) / seconds / 1e9
    return found


def gather_rows(table: Tensor, rows: Tensor, out: Tensor) -> None:
    """Write table[rows] into out; table float32 [N, D], D a power of two, rows int64 [L] in [0, N), out [L, D]."""
    dim = table.shape[1]
    if table.is_cuda:
        block = max(1, 2048 // dim)
        grid = (-(-rows.numel() // block),)
        launch(_gather_kernel, grid, table, rows, out, rows.numel(), D=dim, ROWS=block, num_warps=4)
        return
    arrays = (table.numpy(), rows.numpy(), out.numpy())
    run_parts(lambda start, stop: _gather_loop(*arrays, table.data_ptr(), start, stop), split(rows.numel()))


@jit
def _gather_kernel(table_ptr, rows_ptr, out_ptr, num_rows, D: tl.constexpr, ROWS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = place < num_rows
    row = tl.load(rows_ptr + place, mask=inside, other=0)
    cols = tl.arange(0, D)
    values = tl.load(table_ptr + row[:, None] * D + cols[None, :], mask=inside[:, None], other=0.0)
    tl.store(out_ptr + place[:, None] * D + cols[None, :], values, mask=inside[:, None])


@njit
def _gather_loop(table, rows, out, address, start, stop):
    row_bytes, last = 4 * table.shape[1], rows.size - 1
    for n in range(start, stop):
        soon = address + rows[min(n + _AHEAD, last)] * row_bytes
        for line in range(0, row_bytes, 64):
            prefetch(soon + line)
        row = rows[n]
        for c in range(table.shape[1]):
            out[n, c] = table[row, c]


def updates_per_s(device: torch.device, *, scale: float = 1.0) -> tuple[str, float]:
    """Return what was measured, in words, and random adds per second."""
    count = max(1, int(_NUM_UPDATES[device.type] * scale))
    num_words = max(1, int(_TABLE[device.type] * scale) // 8)
    places = torch.randint(num_words, (count,), device=device)
    if device.type == "cuda":
        words = torch.zeros(num_words, device=device)
        return "atomic add of float32 at random places", count / median_s(lambda: atomic_add(words, places), device)
    words, ones = torch.zeros(num_words, dtype=torch.int64), torch.ones(count, dtype=torch.int64)
    seconds = median_s(lambda: words.index_add_(0, places, ones), device)
    return "index_add_ of int64 at random places (one thread, not atomic)", count / seconds


def atomic_add(words: Tensor, places: Tensor) -> None:
    """Add 1 to words[place] for every place; words float32 [N], places int64 [L]."""
    grid = (-(-places.numel() // 1024),)
    launch(_atomic_add_kernel, grid, words, places, places.numel(), BLOCK=1024, num_warps=4)


@jit
def _atomic_add_kernel(words_ptr, places_ptr, num_places, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_places
    target = tl.load(places_ptr + place, mask=inside, other=0)
    tl.atomic_add(words_ptr + target, 1.0, mask=inside, sem="relaxed")
