"""What tests of several ranks share: a fleet that starts jobs, and the clicks that job_recipe trains on."""

from pathlib import Path

import job_recipe
import kill_recipe
import pytest
from fleet import Fleet


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return kill_recipe.write_data(tmp_path_factory.mktemp("clicks") / "data", num_samples=job_recipe.SAMPLES)
