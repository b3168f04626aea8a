"""The PriceRunner task, built once for all tests that look at it."""

import pytest


@pytest.fixture(scope="session")
def pricerunner_task(data_dir):
    """The task with all offers and the first queries of each part."""
    from recis.ebrm.pricerunner import build_task

    return build_task(data_dir / "pricerunner" / "offers.parquet", num_queries={"train": 700, "dev": 200, "test": 600})
