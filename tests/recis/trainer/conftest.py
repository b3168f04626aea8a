"""A small model and a source of batches in memory, for the tests of this folder."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recis.embedding import EmbeddingBagCollection, TableConfig, Uniform
from recis.io.batch import Batch
from recis.jagged import KeyedJaggedTensor
from recis.metrics.auc import ExactAuc
from recis.optim.config import RowWiseAdagrad
from recis.trainer.config import DenseAdamW, TrainConfig


def batch_of(user: list[int], item: list[list[int]], dense: Tensor, labels: Tensor, **more: Any) -> Batch:
    """Return a batch with a single-id feature "user" and a bag feature "item"."""
    lengths = torch.tensor([1] * len(user) + [len(bag) for bag in item], dtype=torch.int64)
    values = torch.tensor(user + [entry for bag in item for entry in bag], dtype=torch.int64)
    sparse = KeyedJaggedTensor(keys=("user", "item"), values=values, lengths=lengths, stride=len(user))
    labels = labels.unsqueeze(1) if labels.ndim == 1 else labels
    fields = {"label_mask": None, "label_weights": None, "weights": torch.ones(len(user)), "group_ids": None}
    return Batch(
        sparse=sparse,
        dense=dense,
        dense_keys=("x",),
        dense_widths=(dense.shape[1],),
        labels=labels,
        extras={},
        num_samples=len(user),
        **{**fields, **more},
    )


def random_batch(seed: int, size: int, *, num_tasks: int = 1) -> Batch:
    """Return a batch that is a function of the seed; labels follow the ids and the dense column."""
    generator = torch.Generator().manual_seed(seed)
    user = torch.randint(0, 12, (size,), generator=generator).tolist()
    item = [
        torch.randint(0, 40, (int(n),), generator=generator).tolist()
        for n in torch.randint(0, 4, (size,), generator=generator)
    ]
    dense = torch.randn(size, 2, generator=generator)
    logit = torch.tensor([(u % 3) - 1.0 for u in user]) + dense[:, 0]
    labels = (torch.rand(size, num_tasks, generator=generator) < torch.sigmoid(logit)[:, None]).float()
    return batch_of(user, item, dense, labels)


class ListSource:
    """Delivers given batches, epoch after epoch."""

    def __init__(self, batches: list[Batch], *, epochs: int = 1) -> None:
        self.num_batches = len(batches)
        self.epochs = epochs
        self._batches = batches
        self._next = 0

    def __iter__(self) -> Iterator[Batch]:
        while self._next < self.epochs * len(self._batches):
            batch = self._batches[self._next % len(self._batches)]
            self._next += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._next = state["next"]


class ToyModel(nn.Module):
    """One pooled collection, one hidden layer with dropout, T logits."""

    def __init__(self, config: "ToyConfig") -> None:
        super().__init__()
        self.embeddings = EmbeddingBagCollection(config.tables, seed=config.seed)
        width = sum(self.embeddings.embedding_dims.values()) + 2
        self.hidden = nn.Linear(width, 8)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(8, config.num_tasks)

    def forward(self, batch: Batch) -> Tensor:
        pooled = torch.cat([*self.embeddings(batch.sparse).values(), batch.dense], dim=1)
        return self.out(self.dropout(torch.relu(self.hidden(pooled))))


def toy_tables(**changes: Any) -> tuple[TableConfig, ...]:
    """Return the tables of the toy model, `changes` in both."""
    settings = {"optimizer": RowWiseAdagrad(lr=0.1), "initializer": Uniform(-0.1, 0.1), **changes}
    return (
        TableConfig(name="user", features=("user",), embedding_dim=4, **settings),
        TableConfig(name="item", features=("item",), embedding_dim=3, **settings),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyConfig:
    tables: tuple[TableConfig, ...] = toy_tables()
    dropout: float = 0.0
    num_tasks: int = 1
    seed: int = 3

    def build(self) -> ToyModel:
        return ToyModel(self)


def toy_config(**changes: Any) -> TrainConfig:
    """Return a run of 10 steps of 16 samples."""
    settings: dict[str, Any] = {
        "name": "toy",
        "model": ToyConfig(),
        "train_data": ListSource([random_batch(seed, 16) for seed in range(10)]),
        "metrics": (ExactAuc(),),
        "dense_optimizer": DenseAdamW(lr=0.01),
        "log_every_steps": 5,
    }
    return TrainConfig(**{**settings, **changes})


@pytest.fixture
def toy() -> SimpleNamespace:
    """The functions and classes above."""
    return SimpleNamespace(
        batch_of=batch_of,
        random_batch=random_batch,
        Source=ListSource,
        Model=ToyModel,
        Config=ToyConfig,
        tables=toy_tables,
        config=toy_config,
        source=lambda seeds, size=16, epochs=1: ListSource([random_batch(s, size) for s in seeds], epochs=epochs),
    )
