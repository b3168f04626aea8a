"""Set-up of every test: fixed seeds, Triton's interpreter where there is no GPU, and the folder of the public data."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as recis/cli.py does, and for its reason: before torch is loaded

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when a test imports it


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _no_measured_choices(tmp_path_factory):
    """Choices of the kernels and limits that were measured on this machine lie in the user's cache: tests use neither."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of the public data, or skip: the run's summary counts and names what was skipped."""
    folder = os.environ.get("RECIS_DATA")
    if not folder:
        pytest.skip("RECIS_DATA is not set: it names the folder of the public data")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"RECIS_DATA={folder} is not a folder")
    return path
