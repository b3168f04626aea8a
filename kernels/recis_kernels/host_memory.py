"""Allocate large zeroed CPU buffers that start on a cache line and lie in huge pages where the system has them.

Random access over hundreds of MiB spends as long on address translation as on the data: 256 MiB are 65,536 pages of
4 KiB but 128 of 2 MiB. Memory is mapped lazily, so a buffer costs only the pages that were touched.
"""

import contextlib
import mmap

import torch
from torch import Tensor

ALIGNMENT = 256  # a group of hash slots; four cache lines, so rows and AVX-512 loads start well too
_HUGE_PAGE = 2 << 20


def zeroed_bytes(num_bytes: int, device: torch.device | str = "cpu") -> Tensor:
    """Return uint8 zeros [num_bytes] whose data_ptr is a multiple of ALIGNMENT; the memory lives as long as the tensor.

    Raises:
        MemoryError: the system refuses that much address space.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    if num_bytes < _HUGE_PAGE:
        buffer = torch.zeros(num_bytes + ALIGNMENT, dtype=torch.uint8)
        return _aligned(buffer, num_bytes, ALIGNMENT)
    try:
        # private: the default, shared anonymous memory, is kept in a file system that has no huge pages as a rule
        pages = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot map {num_bytes / 2**20:.0f} MiB of memory: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without huge pages: slower, equally right
            pages.madvise(mmap.MADV_HUGEPAGE)
    return _aligned(torch.frombuffer(pages, dtype=torch.uint8), num_bytes, _HUGE_PAGE)


def _aligned(buffer: Tensor, num_bytes: int, alignment: int) -> Tensor:
    start = -buffer.data_ptr() % alignment
    return buffer[start : start + num_bytes]
