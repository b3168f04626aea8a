"""Choose which version of an op runs: the one place that knows about backends.

Each op has up to four versions: `triton` (CUDA, or the interpreter on CPU), `numba` (CPU loops), `torch` (any device) and
`reference` (slow, obvious, float64). Callers never name one; tests and benchmarks do.

Numba loops are compiled with `njit` of this module: it releases the GIL, caches on disk, and never uses fastmath, because
results must be equal bit for bit on every machine.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import numba
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU core needs no triton; choose() names the extra when a version of it is asked for
    triton = None
    tl = None

Impl = Literal["auto", "triton", "numba", "torch", "reference"]

_checks: ContextVar[bool] = ContextVar("recis_kernels_checks", default=False)


@contextmanager
def checks(enabled: bool = True) -> Iterator[None]:
    """Switch content checks (offsets ascending, indices in range) on inside the block; each costs one host sync."""
    token = _checks.set(enabled)
    try:
        yield
    finally:
        _checks.reset(token)


def checks_enabled() -> bool:
    """Return whether the calling context asked for content checks."""
    return _checks.get()


def choose(
    impl: Impl,
    tensor: torch.Tensor,
    *,
    triton: Callable[..., Any] | None = None,
    numba: Callable[..., Any] | None = None,
    torch: Callable[..., Any] | None = None,
    reference: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Return the version of an op to run on `tensor`'s device.

    `auto` means triton on CUDA; on CPU the numba loop when the op has one, else the torch version (an op passes only the
    one its recorded benchmark favours as `numba=`, or leaves it out). Falls back to torch on CUDA while an op has no
    triton version.

    Raises:
        ValueError: the named version does not exist for this op.
    """
    versions = {"triton": triton, "numba": numba, "torch": torch, "reference": reference}
    if impl == "auto":
        order = ("triton", "torch", "reference") if tensor.is_cuda else ("numba", "torch", "reference")
        for name in order:
            if versions[name] is not None:
                return versions[name]  # type: ignore[return-value]
        raise ValueError(f"this op has no version for device {tensor.device}; move the tensors to the CPU")
    chosen = versions.get(impl)
    if chosen is None:
        have = ", ".join(name for name, version in versions.items() if version is not None)
        raise ValueError(f"impl={impl!r} is not available for this op; it has: {have}")
    return chosen


def njit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a CPU loop: no GIL, cached on disk, IEEE arithmetic, C division; no bounds checks."""
    return numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=False)(function)
