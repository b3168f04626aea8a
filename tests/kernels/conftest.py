"""Kernel tests run with uninitialised memory filled with NaN, so that an element a kernel forgets to write shows."""

from typing import Any

import pytest
import torch
from torch.utils import deterministic


@pytest.fixture(autouse=True)
def _nan_filled_empties():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings: Any = deterministic
    settings.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
