"""Look at a recipe without training it: its tables and lookups, a sample of its ids, the time of what is not tables.

The sample is what the recipe's own reader and features deliver, in the order of a run. What a step does beside its tables is
timed on it, see recis.scale.timing. A model that looks up other ids than the batch's own features (shifted sequences, drawn
negatives) is run over the sample, and what its collections are called with is taken.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from recis.distributed.dense_units import whole_at_once
from recis.distributed.shape import ModelShape
from recis.distributed.trace import TraceWriter
from recis.errors import ConfigError
from recis.features import FeatureEngine
from recis.io import Batch, DataConfig, Reader
from recis.recipes import call_recipe
from recis.scale.ids import ModelIds, ids_of
from recis.scale.timing import feature_times, step_times
from recis.trainer import TrainConfig
from recis.trainer.build import build_model, dense_parameters, find_collections
from recis.trainer.data import StepStream
from recis.trainer.randomness import seed_everything

MAX_SAMPLES = 200_000
_MODEL_S = 30.0  # that a model is run over its sample for its ids


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
        dense: whether to time what is not tables.

    Raises:
        ConfigError: the model has no tables, or the data no samples.
    """
    seed_everything(config.seed)
    model = build_model(config)
    collections = find_collections(model)
    if not collections:
        raise ConfigError(f"recipe {config.name!r} has no tables: there is nothing to spread, plan or simulate")
    engine = FeatureEngine(config.features) if config.features else None
    source = _source(config)
    start = None if isinstance(source, Reader) else source.state_dict()
    try:
        raw = None
        if start is not None:
            raw = next(iter(source), None)
            source.load_state_dict(start)
        steps = StepStream(source, engine, micro_batches=config.accumulate_steps).steps()
        first = next(steps, None)
        if first is None:
            raise ConfigError(f"recipe {config.name!r}: its data has no samples; give --data")
        epoch_samples = _epoch_samples(source)
        ids = ids_of(config, model, collections, first[0])
        shape = replace(_shape(config, model, ids), batch_size=_batch_size(config, first))
        if dense:
            times = step_times(config, first[0])
            shape = replace(
                shape,
                dense_s=times.dense,
                trainer_s=times.trainer,
                features_s=feature_times(_files(config, source), engine, raw),
                optimizer_numbers=times.optimizer_numbers,
            )
        limit = max_samples if epoch_samples is None else min(max_samples, epoch_samples)
        samples, ended, begun = 0, True, time.perf_counter()
        with TraceWriter(path, shape) as writer:
            for number, batches in enumerate(chain((first,), steps), start=1):
                for batch in batches:
                    writer.write(*ids.take(batch))
                    samples += batch.num_samples
                late = ids.runs_model and time.perf_counter() - begun > _MODEL_S
                if samples >= limit or number == max_steps or late:
                    ended = False
                    break
    finally:
        if isinstance(source, Reader):
            source.close()
        else:
            source.load_state_dict(start)
    whole = ended or (epoch_samples is not None and samples >= epoch_samples)
    return RecipeFacts(config=config, shape=shape, samples=samples, epoch_samples=epoch_samples, is_whole=whole)


def _source(config: TrainConfig) -> Any:
    """Return what delivers the run's data; a DataConfig as a Reader of one epoch, of a watched folder the files there now."""
    data = config.train_data
    if not isinstance(data, DataConfig):
        return data
    return Reader(replace(data, epochs=1, follow=None), micro_batches=config.accumulate_steps)


def _files(config: TrainConfig, source: Any) -> DataConfig | None:
    """Return the files that the data is read from; None of a source of one's own."""
    if isinstance(config.train_data, DataConfig):
        return config.train_data
    return source.config if isinstance(source, Reader) else None


def _epoch_samples(source: Any) -> int | None:
    """Return the samples of one epoch; None where that is not known: a stream, or one window of several."""
    is_window = isinstance(source, Reader) and source.config.window is not None
    return None if is_window else getattr(source, "num_samples", None)


def _batch_size(config: TrainConfig, first: Sequence[Batch]) -> int:
    data = config.train_data
    told = data.batch_size if isinstance(data, DataConfig) else None
    return told or max(1, sum(batch.num_samples for batch in first))


def _shape(config: TrainConfig, model: nn.Module, ids: ModelIds) -> ModelShape:
    """Return tables, lookups and the size of the dense part."""
    parameters = dense_parameters(model)
    return ModelShape(
        tables=ids.tables,
        features=ids.features,
        lookups=ids.lookups,
        overlap=config.parallel.overlap,
        rows_item=torch.finfo(getattr(torch, config.parallel.rows_dtype)).bits // 8,
        dense_parameters=sum(value.numel() for value in parameters.values()),
        small_gathers=3 if config.hooks else 2,
        dense_at_once=whole_at_once(model, config.parallel.unit_parameters) if config.parallel.shard_dense else None,
    )
