"""Every Triton kernel compiles for an H100 without a GPU at hand, and none spills registers to memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")


def _check(tmp_path: Path, *options: str) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, str(SCRIPT), "--arch", "90", "--json", str(out), *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    kernels = json.loads(out.read_text())["kernels"]
    spilling = {name: forms for name, forms in kernels.items() if any(form["stack"] for form in forms)}
    assert spilling == {}


def test_every_kernel_compiles_for_sm_90(tmp_path):
    _check(tmp_path, "--forms", "1")


@pytest.mark.slow
@pytest.mark.timeout(3600)  # minutes of compiling alone, far more beside other work
def test_every_form_of_every_kernel_compiles_for_sm_90(tmp_path):
    """All dtypes and switches that the tests launch: minutes."""
    _check(tmp_path)
