"""Compile every Triton kernel to GPU machine code on a machine without a GPU, and report what each needs.

    python tests/kernels/compile_kernels.py [--arch 90] [--json FILE]

The interpreter forgives what the compiler refuses: mixed dtypes in a loop, a block that is not a power of two, a pointer of
the wrong width. Each test file of an op has a function `launches()` that calls the op's Triton versions once on small CPU
tensors; here those launches are compiled for the target (ptxas comes with triton) and not run. A kernel that no
`launches()` reaches is an error.
"""

import argparse
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

import recis_kernels  # noqa: E402
from recis_kernels import dispatch  # noqa: E402

HERE = Path(__file__).parent


class TargetOnly:
    """Stands for a GPU driver: says what to compile for, and cannot run anything."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Return registers per thread, bytes of stack (spills) and of shared memory that a compiled kernel uses."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "SHARED")}  # type: ignore[index]


def compile_all(arch: int, prefix: str = "test_", most_forms: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """Run every `launches()` with launching replaced by compiling; returns each kernel's distinct compiled forms."""
    triton.runtime.driver.set_active(TargetOnly(arch))  # type: ignore[arg-type]
    found: dict[str, list[dict[str, Any]]] = {}
    seen: set[str] = set()

    def compile_only(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if most_forms is not None and len(found.get(name_of(kernel), ())) >= most_forms:
            return
        compiled = kernel.warmup(*args, grid=grid, enable_fp_fusion=False, **options)
        if compiled.hash in seen:
            return
        seen.add(compiled.hash)
        constants = {name: value for name, value in options.items() if isinstance(value, int | bool | str)}
        found.setdefault(name_of(kernel), []).append(constants | resource_usage(compiled.asm["cubin"]))

    dispatch.launch = compile_only  # before the ops are imported: each binds the name
    for path in sorted(HERE.glob(f"{prefix}*.py")):
        if "def launches(" not in path.read_text():
            continue
        spec = importlib.util.spec_from_file_location(f"compiled_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.launches()
    return found


def name_of(kernel: Any) -> str:
    """Return module and name of a kernel."""
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}"


def all_kernels() -> set[str]:
    """Return the names of all Triton kernels of the package: jitted functions called _<op>_kernel."""
    names = set()
    for info in pkgutil.iter_modules(recis_kernels.__path__):
        module = importlib.import_module(f"recis_kernels.{info.name}")
        for name, value in vars(module).items():
            own = isinstance(value, triton.runtime.JITFunction) and value.fn.__module__ == module.__name__
            if own and name.endswith("_kernel"):
                names.add(f"{module.__name__}.{name}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", type=int, default=90, help="compute capability times ten, 80 = A100, 90 = H100 and H200"
    )
    parser.add_argument(
        "--only", default="test_", help="only test files whose name starts so; unreached kernels are then no error"
    )
    parser.add_argument("--forms", type=int, help="compile at most so many forms of a kernel; all by default")
    parser.add_argument("--json", type=Path, help="write the table there")
    options = parser.parse_args()
    found = compile_all(options.arch, options.only, options.forms)
    for name, forms in sorted(found.items()):
        print(name)
        for form in forms:
            print("   ", *(f"{key}={value}" for key, value in form.items()))
    if options.json:
        options.json.write_text(json.dumps({"arch": options.arch, "kernels": found}, indent=1))
    missing = sorted(all_kernels() - found.keys()) if options.only == "test_" else []
    if missing:
        print(f"no launches() reaches: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
