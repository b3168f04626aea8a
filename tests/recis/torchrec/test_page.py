"""The examples of docs/torchrec.md run, one after the other in a process of their own, and print what the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torchrec
ROOT = Path(__file__).parents[3]
_EXAMPLE = re.compile(r"```python\n# runs with torchrec\n(.*?)```.*?```output\n(.*?)```", re.DOTALL)


def test_examples_print_what_the_page_says(tmp_path):
    pytest.importorskip("torchrec")
    examples = _EXAMPLE.findall((ROOT / "docs" / "torchrec.md").read_text())
    assert len(examples) == 3
    script = tmp_path / "page.py"
    script.write_text(
        "\nprint('----')\n".join(code for code, _ in examples) + "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
    )
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    job = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    env = {**os.environ, **job, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [part.strip() for part in done.stdout.split("----\n")]
    assert [part.splitlines()[-1] for part in printed] == [output.strip() for _, output in examples]
