"""A small click log made in memory from a stated model, for the recipe and test that every model file has.

    logit = quality[i] + 1.5 <taste[u], style[i]> + 2 (share of i's category in u's clicked items) - 0.5 |price[i] - budget[u]|
    click ~ Bernoulli(sigmoid(logit));  with two tasks: like ~ Bernoulli(sigmoid(2 quality[i] - price[i])), known where clicked

Users and items are drawn from Zipf laws. Extras carry `probability` [B], sigmoid(logit): no model ranks better in expectation,
so its AUC is the ceiling. Ids are scattered over 64 bits, negatives included; a tenth of the samples has an empty history.
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
from recis.models.inputs import DenseInput
from recis.optim import Adagrad

MAX_HISTORY = 12
TASTE_DIM = 3
_SCATTER = 0x1E3779B97F4A7C15  # odd: multiplication by it is one to one on 64 bits


def synthetic_tables(dim: int, *, sequences: bool = False) -> tuple[TableConfig, ...]:
    """Return tables for SyntheticClicks; the history is pooled by its mean, or left as sequences."""
    pooling = "none" if sequences else "mean"
    features = {
        "user": ("user_id",),
        "item": ("item_id", Feature("clicked_items", pooling)),
        "category": ("category", Feature("clicked_categories", pooling)),
    }
    return tuple(
        TableConfig(
            name=name, features=served, embedding_dim=dim, initializer=Normal(0.0, 0.1), optimizer=Adagrad(lr=0.1)
        )
        for name, served in features.items()
    )


def synthetic_dense() -> tuple[DenseInput, ...]:
    """Return the dense features of SyntheticClicks."""
    return (DenseInput("price"), DenseInput("profile", 2))


@dataclass
class SyntheticClicks:
    """A source of batches: the same settings give the same batches.

    Iterating goes on from the batch after the last one delivered; when all are delivered it stops, and the next iteration
    starts again. `state_dict` holds that position.
    """

    num_samples: int = 8192
    batch_size: int = 256
    num_users: int = 200
    num_items: int = 100
    num_categories: int = 10
    num_tasks: int = 1
    seed: int = 0
    """Of the samples; users and items are the same for all seeds, so another seed gives a test set."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "num_users", "num_items", "num_categories"):
            if getattr(self, name) < 1:
                raise ConfigError(f"synthetic clicks: {name} must be at least 1; got {getattr(self, name)}")
        if self.num_tasks not in (1, 2):
            raise ConfigError(f"synthetic clicks: num_tasks must be 1 or 2; got {self.num_tasks}")
        self._world = _World(self)
        self._position = 0

    def __iter__(self) -> Iterator[Batch]:
        num_batches = -(-self.num_samples // self.batch_size)
        while self._position < num_batches:
            first = self._position * self.batch_size
            self._position += 1
            yield self._batch(self._position - 1, min(self.batch_size, self.num_samples - first))
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the number of delivered batches."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batches that were delivered when `state` was taken."""
        self._position = int(state["position"])

    def items(self) -> Batch:
        """Return all items as a batch of their features (item_id, category, price), without labels: a catalogue."""
        item = torch.arange(self.num_items)
        sparse = {
            "item_id": JaggedTensor(_id(item), lengths=torch.ones_like(item)),
            "category": JaggedTensor(_id(self._world.category), lengths=torch.ones_like(item)),
        }
        return self._as_batch(sparse, self._world.price[:, None], (("price", 1),), torch.empty(self.num_items, 0), {})

    def _batch(self, number: int, size: int) -> Batch:
        world = self._world
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        user = torch.multinomial(world.user_share, size, replacement=True, generator=draw)
        item = torch.multinomial(world.item_share, size, replacement=True, generator=draw)
        lengths = torch.randint(0, MAX_HISTORY + 1, (size,), generator=draw)
        lengths[torch.rand(size, generator=draw) < 0.1] = 0
        owner = torch.repeat_interleave(user, lengths)
        clicked = torch.multinomial(world.affinity[owner], 1, generator=draw).squeeze(1) if len(owner) else owner
        bag = torch.repeat_interleave(torch.arange(size), lengths)
        same = (world.category[clicked] == world.category[item][bag]).float()
        match = torch.zeros(size).index_add(0, bag, same) / lengths.clamp(min=1)
        logit = world.quality[item] + 1.5 * (world.taste[user] * world.style[item]).sum(1)
        logit = logit + 2.0 * match - 0.5 * (world.price[item] - world.budget[user]).abs()
        labels = torch.bernoulli(logit.sigmoid(), generator=draw)[:, None]
        if self.num_tasks == 2:
            like = torch.bernoulli((2 * world.quality[item] - world.price[item]).sigmoid(), generator=draw)
            labels = torch.cat([labels, like[:, None]], dim=1)
        one = torch.ones_like(user)
        sparse = {
            "user_id": JaggedTensor(_id(user), lengths=one),
            "item_id": JaggedTensor(_id(item), lengths=one),
            "category": JaggedTensor(_id(world.category[item]), lengths=one),
            "clicked_items": JaggedTensor(_id(clicked), lengths=lengths),
            "clicked_categories": JaggedTensor(_id(world.category[clicked]), lengths=lengths),
        }
        dense = torch.cat([world.price[item][:, None], world.profile[user]], dim=1)
        extras = {"probability": logit.sigmoid()}
        return self._as_batch(sparse, dense, (("price", 1), ("profile", 2)), labels, extras, groups=user)

    def _as_batch(
        self,
        sparse: dict[str, JaggedTensor],
        dense: Tensor,
        dense_features: tuple[tuple[str, int], ...],
        labels: Tensor,
        extras: dict[str, Tensor],
        *,
        groups: Tensor | None = None,
    ) -> Batch:
        mask = None
        if labels.shape[1] == 2:
            mask = torch.stack([torch.ones(len(labels), dtype=torch.bool), labels[:, 0] > 0], dim=1)
        return Batch(
            sparse=KeyedJaggedTensor.from_jagged(sparse),
            dense=dense,
            dense_keys=tuple(name for name, _ in dense_features),
            dense_widths=tuple(width for _, width in dense_features),
            labels=labels,
            label_mask=mask,
            label_weights=None,
            weights=torch.ones(len(labels)),
            group_ids=groups,
            extras=extras,
            num_samples=len(labels),
        )


class _World:
    """What is hidden from the model."""

    def __init__(self, sizes: SyntheticClicks) -> None:
        draw = torch.Generator().manual_seed(20_260_101)
        users, items = sizes.num_users, sizes.num_items
        self.taste = torch.randn(users, TASTE_DIM, generator=draw) / TASTE_DIM**0.5
        self.budget = torch.randn(users, generator=draw)
        self.profile = torch.stack([self.budget + 0.5 * torch.randn(users, generator=draw), self.taste[:, 0]], dim=1)
        self.style = torch.randn(items, TASTE_DIM, generator=draw)
        self.price = torch.randn(items, generator=draw)
        self.quality = torch.randn(items, generator=draw)
        self.category = torch.randint(0, sizes.num_categories, (items,), generator=draw)
        self.affinity = (2 * self.taste @ self.style.T).exp()
        self.user_share = 1 / torch.arange(5.0, users + 5) ** 0.8
        self.item_share = (1 / torch.arange(5.0, items + 5) ** 0.8)[torch.randperm(items, generator=draw)]


def _id(number: Tensor) -> Tensor:
    return (number + 1) * _SCATTER
