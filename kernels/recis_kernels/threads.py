"""Run one CPU loop on several threads, each on its own share of the work.

The loops release the GIL, so plain Python threads run them at once. We do not use numba's or OpenMP's own pools: numba's
aborts when two Python threads (a reader and the trainer) enter it together, and OpenMP's workers spin after each region
and take the core that torch needs next. Workers start once and sleep between calls.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Lock

import torch

from recis_kernels import calibration

MIN_ITEMS_PER_THREAD = 4096  # below this the hand-over of a share costs more than the second core gives
HAND_OVER_US = calibration.BUILT_IN.thread_hand_over_us  # what this and the ops' own least shares are stated for

_lock = Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def num_threads() -> int:
    """Return how many threads a loop may use: torch's own setting, so `torch.set_num_threads` governs both."""
    return torch.get_num_threads()


def split(num_items: int, *, min_items: int = MIN_ITEMS_PER_THREAD) -> list[tuple[int, int]]:
    """Cut range(num_items) into at most num_threads() even (start, stop) parts.

    Each has at least min_items where a hand-over to another thread takes HAND_OVER_US, and in proportion where this
    machine's calibration says otherwise.
    """
    least = max(1, round(min_items * calibration.current().thread_hand_over_us / HAND_OVER_US))
    parts = max(1, min(num_threads(), num_items // least))
    bounds = [num_items * part // parts for part in range(parts + 1)]
    return list(pairwise(bounds))


def run_parts(loop: Callable[[int, int], object], parts: list[tuple[int, int]]) -> list[object]:
    """Call loop(start, stop) for each part at once and return the results in order; the caller runs the first itself."""
    if len(parts) == 1:
        return [loop(*parts[0])]
    pool = _get_pool(len(parts) - 1)
    futures = [pool.submit(loop, *part) for part in parts[1:]]
    first = loop(*parts[0])
    return [first, *(future.result() for future in futures)]


def _get_pool(workers: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or workers > _pool_size:
            _pool = ThreadPoolExecutor(max_workers=max(workers, 1), thread_name_prefix="recis-kernel")
            _pool_size = workers
        return _pool
