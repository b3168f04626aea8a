"""Plan a recipe: sample its ids, replay them over N ranks, and account for memory and time."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from recis.distributed.id_statistics import IdStatistics, statistics_of
from recis.distributed.plan import GIGA, Plan, make_plan
from recis.distributed.replay import check_world
from recis.distributed.simulate import simulate
from recis.distributed.trace import Trace, TraceStep
from recis.errors import ConfigError, nearest
from recis.io import DataConfig
from recis.io.lanes import check_split
from recis.recipes import find_recipe
from recis.scale.cli import rows_of
from recis.scale.costs_file import known, measured
from recis.scale.recipe import RecipeFacts, opened, record
from recis.trainer import TrainConfig

_STEPS = 9  # replayed: the first one makes rows, eight are counted


def plan_recipe(
    recipe: str,
    *,
    world_size: int,
    memory_gb: float | None = None,
    data: str | None = None,
    settings: Sequence[str] = (),
    rows: Sequence[str] = (),
    trace: Path | None = None,
    max_samples: int = 200_000,
    costs: Path | None = None,
    link: tuple[float | None, float | None] = (None, None),
    cores: int | None = None,
    say: Callable[[str], object] = print,
) -> Plan:
    """Return the plan of a recipe for N ranks; the arguments are the command's.

    Raises:
        ConfigError: an unknown recipe or table, a number out of range, a recipe without tables.
        DataError: the trace cannot be used.
    """
    check_world(world_size)
    if memory_gb is not None and not memory_gb > 0:
        raise ConfigError(f"--memory-per-rank must be above 0 GB; got {memory_gb:g}")
    if max_samples < 2:
        raise ConfigError(f"--samples must be at least 2; got {max_samples}")
    told = rows_of(rows)
    find_recipe(recipe)
    found = known(costs) or measured(None, say)
    found = found.with_link(gb_per_s=link[0], latency_us=link[1])
    with TemporaryDirectory(prefix="recis-plan-") as folder, opened(recipe, data=data, settings=settings) as config:
        path = Path(folder) / "sample.parquet"
        program_bytes = _resident_bytes()
        facts = record(config, path, max_samples=max_samples, max_steps=None if trace is None else 1)
        sample = Trace(path if trace is None else trace)
        _check_features(sample, facts)
        micro_batches = config.accumulate_steps * (config.parallel.parts or world_size)
        sample.shape = replace(facts.shape, dense_grads_whole=micro_batches > world_size)
        for name in told:
            if name not in (names := [table.name for table in facts.shape.tables]):
                raise ConfigError(f"--rows {name}=...: no table {name!r}; {nearest(name, names)}")
        batch, notes = _batch(config, facts, world_size)
        if sample.num_samples < batch * world_size:
            raise ConfigError(
                f"recipe {recipe!r}: {sample.num_samples:,} samples are less than one step of {world_size:,} ranks; plan "
                "fewer ranks, or give more --data or --samples"
            )
        result = simulate(sample, world_size=world_size, batch=batch, max_steps=_STEPS, costs=found, cores=cores)
        seen = sample_statistics(sample)
        whole = max(facts.epoch_samples or 0, sample.num_samples)
        if facts.epoch_samples is None:
            notes.append("the data does not say how many samples it has: rows are those of the sample, see --rows")
        return make_plan(
            recipe,
            result,
            seen,
            rows={name: _rows(name, one, told, whole) for name, one in seen.items()},
            program_bytes=program_bytes,
            memory_limit=None if memory_gb is None else memory_gb * GIGA,
            notes=[*notes, *_uncounted(config)],
        )


def _rows(name: str, seen: IdStatistics, told: Mapping[str, int], samples: int) -> tuple[int, str]:
    return (told[name], f"{told[name]:,} rows as given") if name in told else seen.rows_at(samples)


def _check_features(sample: Trace, facts: RecipeFacts) -> None:
    have, need = set(sample.shape.features), set(facts.shape.features)
    if have != need:
        raise ConfigError(
            f"--trace {sample.path}: has the features {sorted(have)}, the recipe looks up {sorted(need)}; record one with "
            "recis simulate --record"
        )


def _batch(config: TrainConfig, facts: RecipeFacts, world_size: int) -> tuple[int, list[str]]:
    """Return the samples of a rank per step, and what to say of it."""
    total = facts.shape.batch_size or 1
    batch, notes = -(-total // world_size), []
    try:
        config.parallel.deals_dense(world_size, deterministic=config.deterministic)
    except ConfigError as error:
        notes.append(f"training would refuse this: {error}")
    if isinstance(config.train_data, DataConfig):
        notes += _refused_by_training(config, config.train_data, world_size)
    if total < world_size:
        notes.append(
            f"batch_size={total} gives less than one sample per rank: more ranks than {total} train nothing faster"
        )
    if config.accumulate_steps > 1:
        notes.append(f"accumulate_steps={config.accumulate_steps}: planned as one lookup of the whole step")
    return batch, notes


def _refused_by_training(config: TrainConfig, data: DataConfig, world_size: int) -> list[str]:
    """Return why training would not start on so many ranks, as its reader says it."""
    if world_size > 1 and data.follow is not None:
        return ["training reads a watched folder in one process: it would refuse more ranks"]
    try:
        check_split(
            batch_size=data.batch_size,
            num_lanes=data.num_lanes,
            rank=0,
            world_size=config.parallel.parts_over(world_size),
            micro_batches=config.accumulate_steps,
        )
    except ConfigError as error:
        return [f"training would refuse this: {error}"]
    return []


def _uncounted(config: TrainConfig) -> list[str]:
    data = config.train_data
    parts = [f"an async save copies up to snapshot_memory_mib={config.snapshot_memory_mib} more while it runs"]
    if isinstance(data, DataConfig):
        parts.append(f"the reader holds up to memory_limit_mib={data.memory_limit_mib}")
    return [f"not counted above: activations of the dense part; {'; '.join(parts)}"]


def sample_statistics(sample: Trace) -> dict[str, IdStatistics]:
    """Return the statistics of each table's ids in a trace."""
    half = max(1, sample.num_samples // 2)
    parts: list[TraceStep] = []
    for step in sample.steps(half):
        parts.append(step)
        if len(parts) == 2:
            break
    found = {}
    for number, table in enumerate(sample.shape.tables):
        names = [name for name, of in sample.shape.features.items() if of == number]
        halves = [torch.cat([step.values[name] for name in names]).numpy() for step in parts]
        second = halves[1] if len(halves) > 1 else halves[0][:0]
        samples = sum(step.num_samples for step in parts)
        found[table.name] = statistics_of(halves[0], second, samples)
    return found


def _resident_bytes() -> int:
    """Return what this process holds in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
