"""Which ids a model looks up for a batch: the batch's own features, or what its collections are called with.

Most models hand their batch to their collections. Some make ids of their own; then the model is run (training mode, no
gradients), and each call of a collection is a lookup. Ids that are not one bag per sample (negatives drawn for the whole
batch) are spread evenly over the samples.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recis.distributed.shape import TableShape, table_shape
from recis.embedding import HashTable
from recis.io import Batch
from recis.jagged import KeyedJaggedTensor
from recis.trainer import TrainConfig
from recis.trainer.build import Collection, table_sets
from recis.trainer.scoring import as_float

Call = tuple[int, KeyedJaggedTensor]  # number of the collection, what it was called with


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of a trace: its name, the feature, and the call that has it (None: the batch)."""

    name: str
    feature: str
    call: int | None


class ModelIds:
    """The ids of a model's batches.

    Attributes:
        tables: those that are looked up.  features: column -> number of its table.  lookups: columns of each.
        runs_model: whether the model has to be run for them.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        collections: Sequence[Collection],
        calls: Sequence[tuple[int, tuple[str, ...]]],
        *,
        runs_model: bool,
    ) -> None:
        self._config, self._model, self._collections = config, model, collections
        self.runs_model = runs_model
        self._steps = int(runs_model)  # `ids_of` has run the first
        stores = {id(store): n for n, store in enumerate(s for one in table_sets(collections) for s in one.stores)}
        found: dict[str, HashTable] = {}
        self._columns: list[_Column] = []
        lookups: list[tuple[str, ...]] = []
        for number, (owner, features) in enumerate(calls):
            collection = collections[owner]
            by_store: dict[int, list[str]] = {}
            for feature in features:
                table = collection.table_set.features[feature][1]
                again = runs_model and sum(feature in names for _, names in calls) > 1
                name = f"{feature}#{number}" if again else _name(feature, table, found)
                column = _Column(name, feature, number if runs_model else None)
                if column.name not in found:
                    found[column.name] = table
                    self._columns.append(column)
                by_store.setdefault(stores[id(table.store)], []).append(column.name)
            lookups += [tuple(names) for names in by_store.values()]
        tables = list({id(table): table for table in found.values()}.values())
        self.tables: tuple[TableShape, ...] = tuple(
            table_shape(table.config, store=stores[id(table.store)]) for table in tables
        )
        place = {id(table): number for number, table in enumerate(tables)}
        self.features = {name: place[id(table)] for name, table in found.items()}
        self.lookups = tuple(lookups)

    def take(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return ids [L] and offsets [B + 1] of each column."""
        calls: list[Call] = []
        if self.runs_model:
            self._steps += 1
            calls = calls_of(self._config, self._model, self._collections, batch, step=self._steps)
        values: dict[str, Tensor] = {}
        offsets: dict[str, Tensor] = {}
        for column in self._columns:
            given = batch.sparse if column.call is None else calls[column.call][1]
            bags = given[column.feature]
            lengths = bags.lengths.long()
            assert isinstance(bags.values, Tensor)
            values[column.name] = bags.values[: int(lengths.sum())]
            if given.stride != batch.num_samples:
                lengths = _evenly(values[column.name].numel(), batch.num_samples)
            offsets[column.name] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return values, offsets


def ids_of(config: TrainConfig, model: nn.Module, collections: Sequence[Collection], batch: Batch) -> ModelIds:
    """Return where the ids of a model come from, as its first batch shows."""
    keys = set(batch.sparse.keys)
    if all(feature in keys for collection in collections for feature in collection.features):
        own = [(number, tuple(collection.features)) for number, collection in enumerate(collections)]
        return ModelIds(config, model, collections, own, runs_model=False)
    seen = calls_of(config, model, collections, batch, step=1)
    made = [(n, tuple(f for f in collections[n].features if f in given.keys)) for n, given in seen]
    return ModelIds(config, model, collections, made, runs_model=True)


def calls_of(
    config: TrainConfig, model: nn.Module, collections: Sequence[Collection], batch: Batch, *, step: int
) -> list[Call]:
    """Run a model over a batch, without gradients, and return what its collections were called with, in order."""
    model.train()
    with _listening(collections) as calls, torch.no_grad():
        config.loss(as_float(model(batch)), batch)
    for collection in collections:
        collection.end_step(step)
    return calls


@contextmanager
def _listening(collections: Sequence[Collection]) -> Iterator[list[Call]]:
    calls: list[Call] = []

    def note(number: int) -> Any:
        return lambda module, given: calls.append((number, given[0]))

    handles = [collection.register_forward_pre_hook(note(n)) for n, collection in enumerate(collections)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _name(feature: str, table: HashTable, found: dict[str, HashTable]) -> str:
    """Return the feature's name; with its table where another table has a feature of that name."""
    same = found.get(feature)
    return feature if same is None or same is table else f"{feature}@{table.name}"


def _evenly(count: int, samples: int) -> Tensor:
    bounds = torch.arange(samples + 1) * count // max(1, samples)
    return bounds.diff()
