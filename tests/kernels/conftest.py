"""Kernel tests: outputs filled with NaN, kernels on the device that --kernel-device names, and no need of hypothesis.

Memory that a kernel should write is NaN before it runs, so that an element it forgets shows.
"""

import os
from importlib.util import find_spec
from typing import Any

import kernel_device
import no_hypothesis
import pytest
import torch
from torch.utils import deterministic

if find_spec("hypothesis") is None:
    no_hypothesis.install()


def pytest_addoption(parser):
    kernel_device.add_option(parser)


def pytest_configure(config):
    device = kernel_device.device_of(config)
    if device.type == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)
        kernel_device.mirror_launches(device)
    else:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # --kernel-device cpu on a machine with a GPU


@pytest.fixture
def device(request) -> torch.device:
    """Return where Triton kernels run: for tests that make tensors there themselves."""
    return kernel_device.device_of(request.config)


@pytest.fixture(autouse=True)
def _nan_filled_empties():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings: Any = deterministic
    settings.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
