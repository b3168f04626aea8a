"""What tags say, as inputs of a ranker: ids of the values in query and item, and how well the two agree.

    tag_query_<type>, tag_item_<type>    sparse   ids of the values of this type, each once, a bag per sample
    tag_match_<type>                     dense    how many values query and item share
    tag_conflict_<type>                  dense    1 where both have values and share none

An id is the 63-bit FarmHash of type and canonical value, so equal values of query and item have one id and may share a
table. Unknown here is not a conflict: a query without a colour conflicts with no colour.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from recis.errors import ConfigError
from recis.io.batch import Batch
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.tagger.rules import Span
from recis_kernels.id_hash import hash_strings

Canonical = Callable[[str, str], str]


class TagFeatures:
    """Sparse and dense features of tagged queries and items.

    Attributes:
        types: the tagger's types that become features, in column order; spans of other types are left out.
        sparse_keys, dense_keys: names of the features, in order; a dense one is one column wide.
    """

    def __init__(self, types: Sequence[str], *, canonical: Canonical | None = None) -> None:
        """Build; canonical(type, surface) says which surfaces mean the same, e.g. `EntitySchema.canonical`.

        Raises:
            ValueError: there are no types, or one is there twice.
        """
        if not types or len(set(types)) != len(types):
            raise ValueError(f"types must be one or more names, each once; got {list(types)}")
        self.types = tuple(types)
        self._canonical = canonical or _as_it_is
        self.sparse_keys = tuple(f"tag_{side}_{name}" for side in ("query", "item") for name in types)
        self.dense_keys = tuple(f"tag_{what}_{name}" for what in ("match", "conflict") for name in types)

    def sparse(self, queries: Sequence[Sequence[Span]], items: Sequence[Sequence[Span]]) -> KeyedJaggedTensor:
        """Return the ids of `sparse_keys` for B pairs, stride B.

        Raises:
            ValueError: queries and items differ in number.
        """
        sides = self._values(queries, items)
        columns = [[row[name] for row in side] for side in sides for name in self.types]
        values = [f"{name}\x1f{value}" for side in sides for name in self.types for row in side for value in row[name]]
        ids = _ids(values)
        lengths = torch.tensor([len(found) for column in columns for found in column], dtype=torch.int64)
        return KeyedJaggedTensor(self.sparse_keys, ids, lengths=lengths, stride=len(queries))

    def dense(self, queries: Sequence[Sequence[Span]], items: Sequence[Sequence[Span]]) -> Tensor:
        """Return the columns [B, 2 T] float32 of `dense_keys` for B pairs.

        Raises:
            ValueError: queries and items differ in number.
        """
        columns = torch.zeros(len(queries), 2 * len(self.types))
        for place, (query, item) in enumerate(zip(*self._values(queries, items), strict=True)):
            for column, name in enumerate(self.types):
                shared = len(set(query[name]) & set(item[name]))
                columns[place, column] = shared
                columns[place, len(self.types) + column] = bool(query[name] and item[name] and not shared)
        return columns

    def extend(self, batch: Batch, queries: Sequence[Sequence[Span]], items: Sequence[Sequence[Span]]) -> Batch:
        """Return a batch of B samples with these features behind its own.

        Raises:
            ConfigError: the batch has a feature of one of these names.
            ValueError: not B pairs.
        """
        taken = {*batch.sparse.keys, *batch.dense_keys} & {*self.sparse_keys, *self.dense_keys}
        if taken:
            raise ConfigError(f"the batch has features {sorted(taken)} already")
        if len(queries) != batch.num_samples:
            raise ValueError(f"a batch of {batch.num_samples} samples needs as many queries; got {len(queries)}")
        device = batch.dense.device
        return replace(
            batch,
            sparse=KeyedJaggedTensor.concat([batch.sparse, self.sparse(queries, items).to(device)]),
            dense=torch.cat([batch.dense, self.dense(queries, items).to(device)], dim=1),
            dense_keys=(*batch.dense_keys, *self.dense_keys),
            dense_widths=(*batch.dense_widths, *([1] * len(self.dense_keys))),
        )

    def _values(
        self, queries: Sequence[Sequence[Span]], items: Sequence[Sequence[Span]]
    ) -> tuple[list[dict[str, list[str]]], list[dict[str, list[str]]]]:
        if len(queries) != len(items):
            raise ValueError(f"tags are given in pairs; got {len(queries)} queries and {len(items)} items")
        return [self._by_type(spans) for spans in queries], [self._by_type(spans) for spans in items]

    def _by_type(self, spans: Sequence[Span]) -> dict[str, list[str]]:
        """Return type -> its values, each once, in order of the text."""
        found: dict[str, list[str]] = {name: [] for name in self.types}
        for span in spans:
            if span.type in found:
                value = self._canonical(span.type, span.surface)
                if value not in found[span.type]:
                    found[span.type].append(value)
        return found


def _as_it_is(kind: str, surface: str) -> str:
    del kind
    return surface


def _ids(values: Sequence[str]) -> Tensor:
    texts = JaggedTensor.from_strings(values)
    return hash_strings(texts.flat_values, texts.offsets, [0, len(values)], ["farm"], [0])
