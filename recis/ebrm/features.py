"""What a model says, as dense columns of a ranker: r, log r, log g of each type, and whether the score is approximate.

    ebrm_r  ebrm_log_r  ebrm_log_g_<type> ...  ebrm_approximate        in schema order

Logs are cut at -20, below which a ranker learns nothing. Where the model's part is to be trained with the ranker, put
`SoftLogicPool` on logits of your own instead, e.g. products of embedding rows of query and entity ids.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recis.ebrm.entities import Item
from recis.ebrm.model import EBRM, Scores
from recis.ebrm.packed import PackedItems
from recis.errors import ConfigError

if TYPE_CHECKING:
    from recis.io.batch import Batch

MIN_LOG = -20.0


class EBRMFeatures:
    """Dense features of an EBRM.

    Attributes:
        model: scored with, cache and overrides included.
        keys: names of the columns, in order; each is one column wide.
    """

    def __init__(self, model: EBRM) -> None:
        self.model = model
        per_type = (f"ebrm_log_g_{name}" for name in model.config.schema.names)
        self.keys = ("ebrm_r", "ebrm_log_r", *per_type, "ebrm_approximate")

    def columns(self, scores: Scores) -> Tensor:
        """Return the columns [I, K] float32 of scored items."""
        parts = (
            scores.r[:, None],
            np.maximum(scores.log_r, MIN_LOG)[:, None],
            np.maximum(scores.log_g, MIN_LOG),
            scores.approximate[:, None],
        )
        return torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32))

    def rows(self, queries: Sequence[str], items: Sequence[Item]) -> Tensor:
        """Return the columns [B, K] of pairs: query b with item b; an empty query has r = 0. Queries are scored together.

        Raises:
            ValueError: as `EBRM.score`, or the lengths differ.
        """
        places: dict[str, list[int]] = {}
        for place, (query, _) in enumerate(zip(queries, items, strict=True)):
            places.setdefault(query, []).append(place)
        requests: list[tuple[str, Sequence[Item] | PackedItems]] = [
            (query, [items[place] for place in group]) for query, group in places.items()
        ]
        rows = torch.empty(len(queries), len(self.keys))
        answers = self.model.score_many(requests, on_empty="skip")
        for group, scores in zip(places.values(), answers, strict=True):
            rows[group] = self.columns(scores)
        return rows

    def named_columns(self, queries: Sequence[str], items: Sequence[Item]) -> dict[str, Tensor]:
        """Return `rows` as columns [B] by name: columns of a RawBatch, for dense features of a feature engine."""
        return dict(zip(self.keys, self.rows(queries, items).unbind(1), strict=True))

    def extend(self, batch: "Batch", queries: Sequence[str], items: Sequence[Item]) -> "Batch":
        """Return a batch of B samples with these columns behind its dense ones.

        Raises:
            ConfigError: the batch has such columns already.
            ValueError: as `rows`, or not B pairs.
        """
        if set(self.keys) & set(batch.dense_keys):
            raise ConfigError(f"the batch has dense features {sorted(set(self.keys) & set(batch.dense_keys))} already")
        if len(queries) != batch.num_samples:
            raise ValueError(f"a batch of {batch.num_samples} samples needs as many queries; got {len(queries)}")
        rows = self.rows(queries, items).to(batch.dense.device)
        return replace(
            batch,
            dense=torch.cat([batch.dense, rows], dim=1),
            dense_keys=(*batch.dense_keys, *self.keys),
            dense_widths=(*batch.dense_widths, *([1] * len(self.keys))),
        )
