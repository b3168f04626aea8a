"""Time what a step does beside its tables, on a recipe's own sample, in one process that sends nothing.

    dense      forward, loss, backward and update of the dense part
    trainer    what a step of the trainer takes besides: weights, seeds, metrics, gradients taken and put back, clipping
    features   what makes a Batch of the columns read; of a source that delivers Batch: cutting out a rank's part

Lookups are cut out: they return leaves, so that backward ends there, and what they take is not counted; nor is the tables'
update. Each is timed at two sizes, which give seconds = fixed + samples x per sample. Steps with and without the trainer
take turns, so that a machine that drifts does so for both.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from torch import Tensor, nn

from recis.distributed.batches import samples_of
from recis.distributed.config import Parallel
from recis.features import FeatureEngine
from recis.io import Batch, DataConfig, Reader
from recis.io.batch import RawBatch
from recis.jagged import JaggedTensor
from recis.trainer import TrainConfig, Trainer
from recis.trainer.build import Collection
from recis.trainer.randomness import deterministic_torch
from recis.trainer.scoring import as_float

MAX_SAMPLES = 4096  # timed at once at most
_ROUNDS = 7
_LIMIT_S = 3.0  # for the rounds of one size

Seconds = tuple[float, float]  # fixed, per sample


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds of a step's parts, (fixed, per sample), and how many numbers the dense optimizer keeps."""

    dense: Seconds
    trainer: Seconds
    optimizer_numbers: int


def step_times(config: TrainConfig, batch: Batch) -> StepTimes:
    """Return what the dense part and the trainer take, by a trainer of the run that trains on samples of a batch."""
    alone = replace(
        config,
        hooks=(),
        eval_data=None,
        eval_every_steps=None,
        evaluate=None,
        monitor=None,
        after=None,
        init_from=None,
        compile_dense=False,
        parallel=Parallel(parts=2),  # with more than one part the step is that of several ranks
    )
    trainer = Trainer(alone, None, quiet=True)
    sizes = _sizes(batch.num_samples)
    with deterministic_torch(config.deterministic), _without_tables(trainer) as spent:
        found = [_timed(trainer, samples_of(batch, 0, size), spent) for size in sizes]
    trainer.close()
    kept = sum(
        value.numel()
        for state in trainer.dense_optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.ndim
    )
    dense, trainers = ([one[place] for one in found] for place in (0, 1))
    return StepTimes(dense=line_through(sizes, dense), trainer=line_through(sizes, trainers), optimizer_numbers=kept)


def feature_times(files: DataConfig | None, engine: FeatureEngine | None, first: RawBatch | Batch | None) -> Seconds:
    """Return what the features of a batch take in the training thread; reading goes on beside it and does not count.

    Args:
        files: that the data is read from; None of a source of one's own.
        engine: of the features; None where the source delivers Batch.
        first: a batch of a source of one's own, else None.
    """
    if isinstance(first, Batch):
        sizes = _sizes(first.num_samples)
        return line_through(sizes, [_rounds(partial(samples_of, first, 0, size)) for size in sizes])
    if engine is None or (first is None and files is None):
        return (0.0, 0.0)
    if first is not None:
        return (0.0, _rounds(partial(engine.forward, first)) / max(1, first.num_samples))
    assert files is not None
    found = [_first_of(files, size) for size in _sizes(files.batch_size)]
    raws = [raw for raw in found if raw is not None and raw.num_samples]
    if len(raws) < len(found):  # a first window without rows
        return (0.0, 0.0)
    return line_through([raw.num_samples for raw in raws], [_rounds(partial(engine.forward, raw)) for raw in raws])


def line_through(sizes: Sequence[int], seconds: Sequence[float]) -> Seconds:
    """Return (fixed, per sample) of the times of two sizes, the first of which may be equal or smaller; nothing below 0."""
    (few, many), (few_s, many_s) = sizes, seconds
    per_sample = max(0.0, (many_s - few_s) / (many - few)) if many > few else many_s / many
    per_sample = min(per_sample, many_s / many)
    return (max(0.0, many_s - per_sample * many), per_sample)


def _sizes(num_samples: int) -> tuple[int, int]:
    many = max(1, min(num_samples, MAX_SAMPLES))
    return max(1, many // 4), many


def _first_of(files: DataConfig, batch_size: int) -> RawBatch | None:
    """Return the first rows of the files."""
    alone = replace(files, epochs=1, follow=None, shuffle_rows=0, num_lanes=1, batch_size=batch_size)
    with Reader(alone) as reader:
        return next(iter(reader), None)


def _rounds(run: Callable[[], object]) -> float:
    """Return the median of some calls, after one that warms up."""
    run()
    times, begun = [], time.perf_counter()
    while not times or (len(times) < _ROUNDS and time.perf_counter() - begun < _LIMIT_S):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def _timed(trainer: Trainer, batch: Batch, spent: list[float]) -> tuple[float, float]:
    """Return the seconds of the dense part alone, and what a whole step takes besides."""
    alone, whole = [], []

    def once(run: Callable[[], object], times: list[float]) -> None:
        spent.clear()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start - sum(spent))

    begun = time.perf_counter()
    while len(alone) < 2 or (len(alone) <= _ROUNDS and time.perf_counter() - begun < _LIMIT_S):
        once(lambda: _dense_step(trainer, batch), alone)
        once(lambda: trainer.train_step([batch]), whole)
    dense_s = median(alone[1:])  # the first ones warm up
    return dense_s, max(0.0, median(whole[1:]) - dense_s)


def _dense_step(trainer: Trainer, batch: Batch) -> None:
    trainer.dense_optimizer.zero_grad()
    with trainer.autocast(batch.weights.device.type):
        output = as_float(trainer.forward(batch))
    loss = trainer.loss(output, batch) / max(1, batch.num_samples)
    if loss.requires_grad:
        loss.backward()
    trainer.dense_optimizer.step()


@contextmanager
def _without_tables(trainer: Trainer) -> Iterator[list[float]]:
    """Let lookups return leaves; gives a list that the seconds of lookups and of the tables' update are added to."""
    spent: list[float] = []
    undo = [_cut(collection, spent) for collection in trainer.collections]
    undo += [_noted(collection, "end_step", spent) for collection in trainer.collections]
    undo.append(_noted(trainer.sparse_optimizer, "step", spent))
    try:
        yield spent
    finally:
        for one in undo:
            one()


def _noted(owner: Any, name: str, spent: list[float]) -> Callable[[], None]:
    """Let a method of one object note its seconds; returns what undoes it."""
    plain = getattr(owner, name)

    def noting(*given: Any) -> Any:
        begun = time.perf_counter()
        try:
            return plain(*given)
        finally:
            spent.append(time.perf_counter() - begun)

    setattr(owner, name, noting)
    return lambda: delattr(owner, name)


def _cut(collection: Collection, spent: list[float]) -> Callable[[], None]:
    """Let a collection look up without training, return leaves and note its seconds; returns what undoes it."""
    begun: list[float] = []

    def before(module: nn.Module, given: Any) -> None:
        begun.append(time.perf_counter())
        module.training = False  # what is looked up to be trained would wait for its gradients

    def after(module: nn.Module, given: Any, out: dict[str, Any]) -> dict[str, Any]:
        module.training = True
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
