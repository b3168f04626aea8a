"""Set-up of every benchmark: what our commands set, before torch is loaded; and offers to search in.

`recis` lets OpenMP's idle workers sleep (recis/cli.py says why). Peers run in the same process and so under the same
setting; on a quiet machine FBGEMM's and torch's figures do not depend on it.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:  # torch is loaded by the benchmark, after the line above
    from recis.ebrm import Item
    from recis.ebrm.entities import EntitySchema


NUM_OFFERS = 6000


@dataclass(frozen=True, kw_only=True)
class Offers:
    """Offers of PriceRunner as items: those of its largest category first, shuffled; and queries for that category."""

    schema: "EntitySchema"
    items: "tuple[Item, ...]"
    texts: tuple[str, ...]
    """Title and category noun of each item: what a query-item encoder reads."""
    queries: tuple[str, ...]


@pytest.fixture(scope="session")
def offers() -> Offers:
    """Offers and queries; skips where RECIS_DATA is not set."""
    import numpy as np

    from recis.ebrm.pricerunner import build_task

    home = os.environ.get("RECIS_DATA")
    if home is None:
        pytest.skip("RECIS_DATA is not set: it names the folder of the public data")
    task = build_task(Path(home) / "pricerunner" / "offers.parquet", num_queries={"test": 400})
    categories = [task.catalogue.categories[offer.cluster_id] for offer in task.catalogue.offers]
    largest = max(set(categories), key=categories.count)
    shuffled = np.random.default_rng(0).permutation(len(categories)).tolist()
    order = sorted(shuffled, key=lambda place: categories[place] != largest)[:NUM_OFFERS]
    queries = [q.text for q in task.parts["test"].queries if task.catalogue.categories[q.cluster_id] == largest]
    return Offers(
        schema=task.schema,
        items=tuple(task.item(place) for place in order),
        texts=tuple(task.item_text(place) for place in order),
        queries=tuple(dict.fromkeys(queries)),
    )
