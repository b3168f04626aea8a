"""Look at a recipe without training it: its tables and lookups, a sample of its ids, the time of its dense part.

The sample is what the recipe's own reader and features deliver, in the order of a run. The dense part is timed on it with
the lookups cut out: they return leaves, so that backward ends there.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from recis.distributed.batches import samples_of
from recis.distributed.shape import ModelShape, table_shape
from recis.distributed.trace import TraceWriter
from recis.embedding import TableSet
from recis.errors import ConfigError
from recis.features import FeatureEngine
from recis.io import Batch, DataConfig, Reader
from recis.jagged import JaggedTensor
from recis.recipes import call_recipe
from recis.trainer import TrainConfig
from recis.trainer.build import Collection, build_model, dense_parameters, find_collections, table_sets
from recis.trainer.data import StepStream
from recis.trainer.randomness import seed_everything
from recis.trainer.scoring import as_float

MAX_SAMPLES = 200_000
_DENSE_SAMPLES = 4096  # timed at once at most
_DENSE_ROUNDS = 5
_DENSE_S = 6.0


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a trace: the feature of the batch, and the name it goes by."""

    name: str
    feature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeFacts:
    """What was found out about a recipe.

    Attributes:
        config: of the run.
        shape: tables, lookups and dense part.
        samples: taken into the trace.
        epoch_samples: samples of one epoch; None where that is not known.
        is_whole: whether the trace holds a whole epoch.
    """

    config: TrainConfig
    shape: ModelShape
    samples: int
    epoch_samples: int | None
    is_whole: bool


@contextmanager
def opened(name: str, *, data: str | None, settings: Sequence[str]) -> Iterator[TrainConfig]:
    """Give the config of a recipe, which may keep files in a folder of its own as long as this is open.

    Raises:
        ConfigError: no such recipe; a wrong option; what the recipe itself refuses.
    """
    with TemporaryDirectory(prefix="recis-plan-") as folder:
        yield call_recipe(name, data=data, out=Path(folder), settings=settings)


def record(
    config: TrainConfig, path: Path, *, max_samples: int = MAX_SAMPLES, max_steps: int | None = None, dense: bool = True
) -> RecipeFacts:
    """Write the ids of a run's first samples as a trace, with what is known of its tables.

    Args:
        config: of the run.
        path: Parquet file to write.
        max_samples: stop behind the step that reaches them, or at the end of the first epoch.
        max_steps: stop behind so many steps; None: as the samples say.
        dense: whether to time the dense part.

    Raises:
        ConfigError: the model has no tables, or the data no samples.
    """
    seed_everything(config.seed)
    model = build_model(config)
    collections = find_collections(model)
    if not collections:
        raise ConfigError(f"recipe {config.name!r} has no tables: there is nothing to spread, plan or simulate")
    shape, columns = shape_of(config, model, collections)
    engine = FeatureEngine(config.features) if config.features else None
    source = _source(config)
    stream = StepStream(source, engine, micro_batches=config.accumulate_steps)
    try:
        steps = stream.steps()
        first = next(steps, None)
        if first is None:
            raise ConfigError(f"recipe {config.name!r}: its data has no samples; give --data")
        epoch_samples = source.num_samples if isinstance(source, Reader) else getattr(source, "num_samples", None)
        batch_size = _batch_size(config, first)
        dense_s = dense_seconds(config, model, collections, first) if dense else (0.0, 0.0)
        shape = replace(shape, batch_size=batch_size, dense_s=dense_s)
        limit = max_samples if epoch_samples is None else min(max_samples, epoch_samples)
        samples, ended = 0, True
        with TraceWriter(path, shape) as writer:
            for number, batches in enumerate(chain((first,), steps), start=1):
                for batch in batches:
                    _write(writer, columns, batch)
                    samples += batch.num_samples
                if samples >= limit or number == max_steps:
                    ended = False
                    break
    finally:
        if isinstance(source, Reader):
            source.close()
    whole = ended or (epoch_samples is not None and samples >= epoch_samples)
    return RecipeFacts(config=config, shape=shape, samples=samples, epoch_samples=epoch_samples, is_whole=whole)


def _source(config: TrainConfig) -> Any:
    """Return what delivers the run's data; a DataConfig as a Reader of one epoch."""
    data = config.train_data
    return (
        Reader(replace(data, epochs=1), micro_batches=config.accumulate_steps) if isinstance(data, DataConfig) else data
    )


def _batch_size(config: TrainConfig, first: Sequence[Batch]) -> int:
    data = config.train_data
    told = data.batch_size if isinstance(data, DataConfig) else None
    return told or max(1, sum(batch.num_samples for batch in first))


def _write(writer: TraceWriter, columns: Sequence[Column], batch: Batch) -> None:
    values: dict[str, Tensor] = {}
    offsets: dict[str, Tensor] = {}
    for column in columns:
        bags = batch.sparse[column.feature]
        assert isinstance(bags.values, Tensor)
        values[column.name] = bags.values[: int(bags.lengths.sum())]
        lengths = bags.lengths.long()
        offsets[column.name] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    writer.write(values, offsets)


def shape_of(
    config: TrainConfig, model: nn.Module, collections: Sequence[Collection]
) -> tuple[ModelShape, list[Column]]:
    """Return tables, lookups and dense part of a model, and the columns its trace has."""
    sets = table_sets(collections)
    stores = {id(store): number for number, store in enumerate(store for one in sets for store in one.stores)}
    tables = [(one, table) for one in sets for table in one.tables.values()]
    numbers = {id(table): number for number, (_, table) in enumerate(tables)}
    names = _column_names(sets)
    features: dict[str, int] = {}
    columns: dict[str, Column] = {}
    lookups = []
    for collection in collections:
        one = collection.table_set
        by_store: dict[int, list[str]] = {}
        for feature in collection.features:
            table = one.features[feature][1]
            column = names[id(one), feature]
            by_store.setdefault(stores[id(table.store)], []).append(column)
            features[column] = numbers[id(table)]
            columns[column] = Column(column, feature)
        lookups += [tuple(found) for found in by_store.values()]
    parameters = dense_parameters(model)
    used = sorted(set(features.values()))  # a table without a feature in any collection is never looked up
    place = {number: rank for rank, number in enumerate(used)}
    return (
        ModelShape(
            tables=tuple(
                table_shape(tables[number][1].config, store=stores[id(tables[number][1].store)]) for number in used
            ),
            features={column: place[number] for column, number in features.items()},
            lookups=tuple(lookups),
            rows_item=torch.finfo(getattr(torch, config.parallel.rows_dtype)).bits // 8,
            dense_parameters=sum(value.numel() for value in parameters.values()),
            optimizer_numbers=optimizer_numbers(config),
        ),
        list(columns.values()),
    )


def _column_names(sets: Sequence[TableSet]) -> dict[tuple[int, str], str]:
    """Return (table set, feature) -> column; a feature of several sets is told apart by its table."""
    every = [feature for one in sets for feature in one.features]
    return {
        (id(one), feature): feature if every.count(feature) == 1 else f"{feature}@{table.name}"
        for one in sets
        for feature, (_, table) in one.features.items()
    }


def optimizer_numbers(config: TrainConfig) -> int:
    """Return how many numbers the dense optimizer keeps per parameter, seen on one of six."""
    weight = nn.Parameter(torch.zeros(2, 3))
    optimizer = config.dense_optimizer.build([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state: Mapping[str, Any] = optimizer.state[weight]
    return sum(isinstance(value, Tensor) and value.shape == weight.shape for value in state.values())


# ---- time of the dense part


def dense_seconds(
    config: TrainConfig, model: nn.Module, collections: Sequence[Collection], batches: Sequence[Batch]
) -> tuple[float, float]:
    """Return seconds of forward, loss, backward and update without the lookups: fixed, and per sample."""
    batch = batches[0]
    many = min(batch.num_samples, _DENSE_SAMPLES)
    few = max(1, many // 4)
    optimizer = config.dense_optimizer.build(dense_parameters(model).values())
    model.train()
    spent: list[float] = []
    handles = [_cut(collection, spent) for collection in collections]
    try:
        found = [_dense_s(config, model, optimizer, samples_of(batch, 0, count), spent) for count in (few, many)]
    finally:
        for remove in handles:
            remove()
    per_sample = max(0.0, (found[1] - found[0]) / (many - few)) if many > few else found[1] / many
    return max(0.0, found[1] - per_sample * many), per_sample


def _dense_s(
    config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, spent: list[float]
) -> float:
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 2 or (len(times) < _DENSE_ROUNDS and time.perf_counter() - begun < _DENSE_S / 2):
        spent.clear()
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = config.loss(as_float(model(batch)), batch) / max(1, batch.num_samples)
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start - sum(spent))
    return median(times[1:])  # the first one warms up


def _cut(collection: Collection, spent: list[float]) -> Callable[[], None]:
    """Let a collection return leaves, and note the seconds of its lookups; returns what undoes it."""
    begun: list[float] = []

    def before(module: nn.Module, given: Any) -> None:
        begun.append(time.perf_counter())

    def after(module: nn.Module, given: Any, out: dict[str, Any]) -> dict[str, Any]:
        leaves = {name: _leaf(value) for name, value in out.items()}
        spent.append(time.perf_counter() - begun.pop())
        return leaves

    hooks = (collection.register_forward_pre_hook(before), collection.register_forward_hook(after))

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove


def _leaf(value: Any) -> Any:
    if isinstance(value, JaggedTensor):
        assert isinstance(value.values, Tensor)
        return value.with_values(value.values.detach().requires_grad_(), value.weights)
    return value.detach().requires_grad_()
