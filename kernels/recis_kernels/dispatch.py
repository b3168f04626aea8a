"""Choose which version of an op runs: the one place that knows about backends.

Each op has up to four versions: `triton` (CUDA, or the interpreter on CPU), `numba` (CPU loops), `torch` (any device) and
`reference` (slow, obvious, float64). Callers never name one; tests and benchmarks do.

Numba loops are compiled with `njit` of this module: it releases the GIL, caches on disk, and never uses fastmath, because
results must be equal bit for bit on every machine.
"""

import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numba
import torch

from recis_kernels import calibration

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU core needs no triton; jit() leaves its kernels unmade and launch() names the way out
    triton = None
    tl = SimpleNamespace(constexpr=None)  # kernels are defined all the same, and name it in annotations

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
    one its recorded benchmark favours as `numba=`, or leaves it out). Of an op with both, tensors with fewer elements than
    the calibration's numba_from_items go to torch; compiled graphs are traced with the numba loop. Falls back to torch on
    CUDA while an op has no triton version.

    Raises:
        ValueError: the named version does not exist for this op.
    """
    versions = {"triton": triton, "numba": numba, "torch": torch, "reference": reference}
    if impl == "auto":
        order = ("triton", "torch", "reference") if tensor.is_cuda else ("numba", "torch", "reference")
        if order[0] == "numba" and torch is not None and _is_small(tensor):
            order = ("torch",)
        for name in order:
            if versions[name] is not None:
                return versions[name]  # type: ignore[return-value]
        raise ValueError(f"this op has no version for device {tensor.device}; move the tensors to the CPU")
    chosen = versions.get(impl)
    if chosen is None:
        have = ", ".join(name for name, version in versions.items() if version is not None)
        raise ValueError(f"impl={impl!r} is not available for this op; it has: {have}")
    return chosen


def _is_small(tensor: torch.Tensor) -> bool:
    """Return whether calibration gives a CPU tensor to torch; never while a graph is traced: it reads a file once."""
    if torch.compiler.is_compiling():
        return False
    least = calibration.current().numba_from_items
    return least > 0 and tensor.numel() < least


def njit(function: Callable[..., Any]) -> Any:
    """Compile a CPU loop: no GIL, cached on disk, IEEE arithmetic, C division; no bounds checks.

    Numba takes a cached loop for good while the loop's own file is unchanged, but machine code of functions it calls is part
    of it. Here the loop is compiled again when any of our files that its file imports, at any depth, has changed.
    """
    loop = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=False)(function)
    cached: Any = getattr(getattr(loop, "_cache", None), "_cache_file", None)
    if cached is not None and hasattr(cached, "_source_stamp"):  # numba may be told to compile nothing or cache nothing
        cached._source_stamp = (cached._source_stamp, source_digest(Path(function.__code__.co_filename)))
    return loop


_OURS = re.compile(r"^\s*(?:from|import)\s+(recis(?:_kernels)?(?:\.\w+)*)(?:\s+import\s+\(?([^)\n]*))?", re.MULTILINE)


def source_digest(path: Path) -> str:
    """Return a digest of a source file and of all files of ours that it imports, directly or through others."""
    seen: dict[Path, bytes] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        imports, seen[file] = _imports(file)
        waiting.extend(imports)
    return hashlib.sha256(b"".join(seen[file] for file in sorted(seen))).hexdigest()


@cache
def _imports(path: Path) -> tuple[tuple[Path, ...], bytes]:
    """Return the files of ours that a file imports, and the digest of its content."""
    content = path.read_bytes()
    found: list[Path] = []
    for module, names in _OURS.findall(content.decode()):
        first, *rest = module.split(".")
        for root in getattr(sys.modules.get(first), "__path__", ()):
            here = Path(root).joinpath(*rest)
            taken = [here / f"{name.split()[0]}.py" for name in names.split(",") if name.split()]
            found += [file for file in (here.with_suffix(".py"), here / "__init__.py", *taken) if file.is_file()]
    return tuple(found), hashlib.sha256(content).digest()


def jit(function: Callable[..., Any]) -> Any:
    """Make a Triton kernel, or a function that kernels call; where triton is absent, leave the function as it is."""
    return function if triton is None else triton.jit(function)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a Triton kernel on the device of its first tensor argument; an empty grid runs nothing.

    Products and sums are not contracted into fused multiply-adds: a GPU's bits then equal the CPU's and the interpreter's.
    Tensors on the CPU are for the interpreter (TRITON_INTERPRET=1 before triton is imported).

    Args:
        kernel: made by `jit`.
        grid: programs per axis, up to three.
        args: the kernel's arguments; tensors become pointers.
        options: the kernel's constexpr arguments by name, num_warps and num_stages.

    Raises:
        RuntimeError: triton is not installed, or the tensors are on the CPU and the interpreter is off.
        ValueError: the tensors lie on different devices.
    """
    if triton is None:
        raise RuntimeError("this needs triton, which is not installed: pip install triton==3.9.0")
    devices = {arg.device for arg in args if isinstance(arg, torch.Tensor)}
    if len(devices) != 1:
        raise ValueError(
            f"a kernel's tensors must lie on one device; got {sorted(map(str, devices))}: move them together"
        )
    device = devices.pop()
    if 0 in grid:
        return
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, enable_fp_fusion=False, **options)
        return
    if isinstance(kernel, triton.runtime.JITFunction):
        raise RuntimeError(
            f"a Triton kernel cannot run on {device} tensors: move them to a CUDA device, leave impl at 'auto', "
            "or set TRITON_INTERPRET=1 before triton is imported"
        )
    kernel[grid](*args, **options)
