"""Hugging Face's package imports as `kernels`; our folder of that name must not get in TRL's way, with theirs or without."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import sys
sys.path[:0] = {extra!r}
import recis, recis_kernels
import transformers
from trl import DPOTrainer, GRPOTrainer, SFTTrainer
from importlib.util import find_spec
spec = find_spec("kernels")
print("theirs" if spec is not None and spec.origin else "absent", recis_kernels.__file__)
"""


@pytest.mark.parametrize("installed", [False, True], ids=["kernels absent", "kernels present"])
def test_trl_imports_beside_ours_from_the_repository_root(installed):
    pytest.importorskip("trl", reason="the extra [rl] is not installed")
    extra = [str(Path(sys.prefix) / "hf-kernels")] if installed else []
    if installed and not Path(extra[0], "kernels").is_dir():
        pytest.skip("Hugging Face's kernels is not in .venv/hf-kernels; `make test` puts it there")
    run = subprocess.run(
        [sys.executable, "-c", CODE.format(extra=extra)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found, ours = run.stdout.split()[-2:]
    assert found == ("theirs" if installed else "absent")
    assert Path(ours).parent == ROOT / "kernels" / "recis_kernels"
