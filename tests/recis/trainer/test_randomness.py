"""Seeds: cheap ones draw what torch.manual_seed would, and those of a step's parts are a hash of where they are."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from recis.trainer.parallel import ParallelRun
from recis.trainer.randomness import seed_everything
from recis_kernels.philox import hash64


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_seeding_draws_what_the_libraries_own_seeding_draws(seed):
    torch.manual_seed(seed)
    want = torch.rand(5)
    seed_everything(seed)
    first = (torch.rand(5), np.random.rand(), random.random())  # noqa: NPY002
    assert first[0].equal(want)
    assert first[1] == np.random.RandomState(seed % 2**32).rand()
    assert first[2] == random.Random(seed).random()
    seed_everything(seed)
    assert torch.rand(5).equal(want)


@pytest.mark.parametrize("seed", [0, 5, -3, 2**63 - 1])
def test_the_seed_of_a_part_is_a_hash_of_seed_step_part_and_micro_batch(seed):
    """Runs of earlier releases go on with the same random numbers, so the formula may not change."""
    parts: Any = SimpleNamespace(_own_parts=range(1, 4, 2), _trainer=SimpleNamespace(config=SimpleNamespace(seed=seed)))
    for number, (part, micro_batch) in enumerate([(1, 0), (3, 0), (1, 1), (3, 1)]):
        want = torch.zeros((), dtype=torch.int64)
        for value in torch.tensor([seed, 12, part, micro_batch]):
            want = hash64(want ^ value)
        assert ParallelRun._seed(parts, 12, number) == int(want) & (2**63 - 1)
