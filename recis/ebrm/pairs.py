"""Labelled (query, item) pairs as arrays, and the scores a model gives them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from recis.ebrm.entities import Item
from recis.ebrm.model import EBRM
from recis.errors import DataError

BATCH_QUERIES = 32  # scored together, so that the encoder gets full batches


@dataclass(frozen=True, slots=True, kw_only=True)
class QIPairs:
    """P pairs of queries and items.

    Raises:
        DataError: arrays of different lengths, a place outside queries or items, or a label outside [0, 1].
    """

    queries: tuple[str, ...]
    items: tuple[Item, ...]
    query: np.ndarray
    """int [P], place in queries."""
    item: np.ndarray
    """int [P], place in items."""
    label: np.ndarray
    """[P] in [0, 1]; 1 = relevant."""

    def __post_init__(self) -> None:
        shapes = {self.query.shape, self.item.shape, self.label.shape}
        if len(shapes) != 1 or self.query.ndim != 1:
            raise DataError(f"query, item and label of pairs must all be [P]; got {sorted(shapes)}")
        for name, places, count in (("query", self.query, len(self.queries)), ("item", self.item, len(self.items))):
            if len(places) and not 0 <= places.min() <= places.max() < count:
                raise DataError(f"pairs: {name} must be 0 to {count - 1}", value=(int(places.min()), int(places.max())))
        if len(self.label) and not (self.label.min() >= 0 and self.label.max() <= 1):
            raise DataError("pairs: labels must lie in [0, 1]", value=float(self.label.max()))

    def __len__(self) -> int:
        return len(self.query)

    def by_query(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each query that has pairs, as its place and the rows of its pairs, queries and rows ascending."""
        order = np.argsort(self.query, kind="stable")
        places, starts = np.unique(self.query[order], return_index=True)
        yield from zip(places.tolist(), np.split(order, starts[1:]), strict=True)

    def first_queries(self, count: int) -> "QIPairs":
        """Return the pairs of the first `count` queries that have pairs."""
        rows = np.flatnonzero(np.isin(self.query, np.unique(self.query)[:count]))
        return QIPairs(
            queries=self.queries,
            items=self.items,
            query=self.query[rows],
            item=self.item[rows],
            label=self.label[rows],
        )


def score_pairs(model: EBRM, pairs: QIPairs) -> tuple[np.ndarray, int]:
    """Return log r [P] float64 of pairs, through the model's cache, and how many pairs were encoded. Raises as EBRM.score."""
    packed = model.pack(pairs.items)
    log_r, num_calls = np.empty(len(pairs)), 0
    groups = list(pairs.by_query())
    for first in range(0, len(groups), BATCH_QUERIES):
        part = groups[first : first + BATCH_QUERIES]
        requests = [(pairs.queries[place], packed.select(pairs.item[rows])) for place, rows in part]
        for (_, rows), scores in zip(part, model.score_many(requests), strict=True):
            log_r[rows] = scores.log_r
            num_calls += scores.encoder_calls
    return log_r, num_calls
