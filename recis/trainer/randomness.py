"""One seed for torch, numpy and random; their states as something a checkpoint can hold; deterministic torch.

Tables and readers need none of this: their randomness is a function of the seed and the id, step or epoch.
"""

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils import deterministic

from recis_kernels.unique_ids import order_by_segment_and_id

_TIMED_IDS = 65536


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy's global generator and random; some 20 us on a machine without an accelerator."""
    if _has_accelerator():
        torch.manual_seed(seed)
    else:  # torch.manual_seed formats a stack trace for each kind of device that is not there: milliseconds
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  models and samplers of users may draw from the global generator
    random.seed(seed)


@cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


def random_state() -> dict[str, Any]:
    """Return the states of the global generators as tensors and plain values."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "numpy": {
            "kind": kind,
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the global generators back where `random_state` found them."""
    torch.set_rng_state(state["torch"].clone())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([item.clone() for item in state["cuda"]])
    saved = state["numpy"]
    keys = saved["keys"].numpy().astype(np.uint32)
    np.random.set_state((saved["kind"], keys, saved["position"], saved["has_gauss"], saved["cached"]))  # noqa: NPY002
    saved = state["python"]
    random.setstate((saved["version"], tuple(saved["words"].tolist()), saved["gauss"]))


@contextmanager
def deterministic_torch(enabled: bool) -> Iterator[None]:
    """Let torch use only deterministic algorithms inside the block; the setting before comes back afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(enabled or before)
    settings.fill_uninitialized_memory = False  # it costs a pass over every new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filled


def deterministic_note() -> str:
    """Return a line that says what deterministic mode costs here: the order of new ids is timed now, in some milliseconds."""
    ids = torch.randint(-(2**63), 2**63 - 1, (_TIMED_IDS,), generator=torch.Generator().manual_seed(0))
    segments = torch.zeros(_TIMED_IDS, dtype=torch.int32)
    seconds = []
    for _ in range(4):
        begun = time.perf_counter()
        order_by_segment_and_id(ids, segments, 1)
        seconds.append(time.perf_counter() - begun)
    return (
        f"deterministic: new ids take rows in ascending order, {min(seconds) / _TIMED_IDS * 1e9:.0f} ns each on this "
        "machine; ids that have rows cost nothing more; torch uses deterministic algorithms only"
    )
