"""The wheel: builds, installs into an environment that holds only the core's dependencies, imports fast, and runs the demo.

The environment is kept in .venv/wheel-env, so that its dependencies are installed once per checkout.
"""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENV = ROOT / ".venv" / "wheel-env"
PYTHON = ENV / "bin" / "python"
IMPORT_LIMIT_S = 2.5


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack what is left of modules that are gone
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=ROOT)
    (path,) = out.glob("recis-*.whl")
    return path


@pytest.fixture(scope="module")
def bare(wheel):
    """Return the Python of an environment with the wheel and the core's dependencies, no extra and no checkout."""
    pip = (PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "-q", "-c", ROOT / "constraints.txt")
    if not (ENV / "ready").exists():
        venv.create(ENV, with_pip=True, clear=True)
        run(*pip, "torch==2.13.0")
        run(*pip, wheel)
        (ENV / "ready").touch()
    run(*pip, "--force-reinstall", "--no-deps", wheel)
    return PYTHON


def test_wheel_holds_the_three_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {"recis", "relevance", "recis_kernels"} <= tops
    assert not [top for top in tops if top not in {"recis", "relevance", "recis_kernels"} and ".dist-info" not in top]
    for package in ("recis", "relevance", "recis_kernels"):
        assert f"{package}/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_core_imports_without_extras_and_fast(bare, tmp_path):
    code = (
        "import time; begin = time.perf_counter(); import recis, torch; "
        "from recis import TableConfig, Trainer, TrainConfig, EmbeddingBagCollection; print(time.perf_counter() - begin)"
    )
    import_only = "import time; begin = time.perf_counter(); import recis, torch; print(time.perf_counter() - begin)"
    assert min(float(run(bare, "-c", import_only, cwd=tmp_path)) for _ in range(3)) < IMPORT_LIMIT_S
    assert min(float(run(bare, "-c", code, cwd=tmp_path)) for _ in range(3)) < 2 * IMPORT_LIMIT_S
    extras = (
        "import importlib.util as u; print([m for m in ('triton', 'fbgemm_gpu', 'transformers') if u.find_spec(m)])"
    )
    missing = run(bare, "-c", extras, cwd=tmp_path)
    assert missing.strip() == "[]"


def test_demo_runs_from_the_wheel(bare, tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path)}
    small = ("--set", "num_samples=24000", "--set", "num_users=800", "--set", "num_items=400")
    out = run(ENV / "bin" / "recis", "demo", "--out", tmp_path / "run", *small, cwd=tmp_path, env=environment)
    assert "Bayes-optimal AUC" in out
    assert "equal to the straight run" in out
    assert (tmp_path / "run" / "report.html").exists()
    verified = run(ENV / "bin" / "recis", "verify", tmp_path / "run", cwd=tmp_path, env=environment)
    assert verified.strip().endswith("ok")
