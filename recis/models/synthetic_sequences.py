"""Sequences of items in memory from a stated law, for the recipe and test that every sequence model has.

    next item = the last one's follower with probability 0.7, else one drawn from a Zipf law;  followers: a fixed permutation
    time to the next item = 1 + a geometric number of minutes

So no model finds the next item first more often than about 0.7 of the time, and one that knows no history finds the most
popular one about 0.07 of the time (100 items). `next_items` holds the 0 to 4 items that follow a history; a tenth of the
samples has an empty history.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recis.embedding import Feature, Normal, TableConfig
from recis.errors import ConfigError
from recis.io.batch import Batch
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.models.din import Interest
from recis.models.sampling import Catalogue
from recis.optim import Adam

FOLLOW_PROBABILITY = 0.7
MAX_LENGTH = 16
MAX_NEXT = 4
TIMES = "times"
ITEM = Interest(target=("item_id",), sequence=("items",))
NEXT = Interest(target=("item_id",), sequence=("next_items",))
_SCATTER = 0x1E3779B97F4A7C15  # odd: multiplication by it is one to one on 64 bits


def sequence_tables(dim: int) -> tuple[TableConfig, ...]:
    """Return the one table that history, continuation and catalogue share."""
    return (
        TableConfig(
            name="item",
            features=(Feature("items", "none"), Feature("next_items", "none"), Feature("item_id", "none")),
            embedding_dim=dim,
            initializer=Normal(0.0, 0.1),
            optimizer=Adam(lr=0.01),
        ),
    )


def sequence_catalogue() -> Catalogue:
    """Return the items of SyntheticSequences."""
    source = SyntheticSequences()
    ids = item_ids(torch.arange(source.num_items))
    sparse = {"item_id": JaggedTensor(ids, lengths=torch.ones_like(ids))}
    return Catalogue(_batch(sparse, {}, len(ids)), "item_id")


def item_ids(number: Tensor) -> Tensor:
    """Return the 64-bit ids of item numbers."""
    return (number + 1) * _SCATTER


@dataclass
class SyntheticSequences:
    """A source of batches: the same settings give the same batches; see SyntheticClicks for iteration and state."""

    num_samples: int = 4096
    batch_size: int = 128
    num_items: int = 100
    seed: int = 0
    """Of the samples; the law is the same for all seeds, so another seed gives a test set."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "num_items"):
            if getattr(self, name) < 1:
                raise ConfigError(f"synthetic sequences: {name} must be at least 1; got {getattr(self, name)}")
        draw = torch.Generator().manual_seed(20_260_102)
        self.follower = torch.randperm(self.num_items, generator=draw)
        self._share = (1 / torch.arange(5.0, self.num_items + 5))[torch.randperm(self.num_items, generator=draw)]
        self._position = 0

    def __iter__(self) -> Iterator[Batch]:
        num_batches = -(-self.num_samples // self.batch_size)
        while self._position < num_batches:
            first = self._position * self.batch_size
            self._position += 1
            yield self._samples(self._position - 1, min(self.batch_size, self.num_samples - first))
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the number of delivered batches."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batches that were delivered when `state` was taken."""
        self._position = int(state["position"])

    def _samples(self, number: int, size: int) -> Batch:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        total = MAX_LENGTH + MAX_NEXT
        items = torch.multinomial(self._share, size * total, replacement=True, generator=draw).view(size, total)
        follows = torch.rand(size, total, generator=draw) < FOLLOW_PROBABILITY
        for place in range(1, total):
            items[:, place] = torch.where(follows[:, place], self.follower[items[:, place - 1]], items[:, place])
        gaps = 1 + torch.empty(size, total).geometric_(0.05, generator=draw).long()
        lengths = torch.randint(1, MAX_LENGTH + 1, (size,), generator=draw)
        lengths[torch.rand(size, generator=draw) < 0.1] = 0
        next_lengths = torch.randint(0, MAX_NEXT + 1, (size,), generator=draw)
        place = torch.arange(total)
        in_history = place < lengths[:, None]
        in_next = (place >= lengths[:, None]) & (place < (lengths + next_lengths)[:, None])
        ids = item_ids(items)
        sparse = {
            "items": JaggedTensor(ids[in_history], lengths=lengths),
            "next_items": JaggedTensor(ids[in_next], lengths=next_lengths),
        }
        times = JaggedTensor(gaps.cumsum(1)[in_history], lengths=lengths)
        return _batch(sparse, {TIMES: times}, size)


def _batch(sparse: dict[str, JaggedTensor], extras: dict[str, Tensor | JaggedTensor], size: int) -> Batch:
    return Batch(
        sparse=KeyedJaggedTensor.from_jagged(sparse),
        dense=torch.empty(size, 0),
        dense_keys=(),
        dense_widths=(),
        labels=torch.empty(size, 0),
        label_mask=None,
        label_weights=None,
        weights=torch.ones(size),
        group_ids=None,
        extras=extras,
        num_samples=size,
    )
