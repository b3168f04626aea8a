"""What of a trainer goes into a checkpoint, and how it comes back.

tables, dense tensors     what the model has learned
optim                     dense optimizer by parameter name, numbers of the row optimizers
rng, metrics              generators, states of the training metrics
reader, schedules         positions
trainer                   RunState, the step clocks of the tables, the feature engine as JSON, the kernels' choices
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recis.checkpoint import Boundary, Loaded, Saver, Target, as_checkpoint, load, read_manifest, resolve_chain, tree
from recis.checkpoint.load import read_tree
from recis.checkpoint.manifest import step_folder
from recis.distributed.ranks import Ranks
from recis.errors import CheckpointError, ConfigError
from recis.trainer.build import dense_state, load_named_optimizer_state, named_optimizer_state
from recis.trainer.config import InitFrom, TrainConfig
from recis.trainer.randomness import random_state, set_random_state
from recis.trainer.serialize import differences
from recis_kernels import calibration

if TYPE_CHECKING:
    from recis.trainer.trainer import Trainer


def make_saver(config: TrainConfig, run: Path, ranks: Ranks) -> Saver:
    """Return what writes the checkpoints of a run, this rank's files of them."""
    return Saver(
        run,
        peers=ranks if ranks.world_size > 1 else None,
        keep=config.keep_checkpoints,
        snapshot_memory_mib=config.snapshot_memory_mib,
        background=config.async_save,
    )


def base_of_next(newest: Path | None, step: int, delta_saves: int) -> Path | None:
    """Return the checkpoint that one of `step` is a delta to; None where it must be a full one."""
    if newest is None or delta_saves == 0 or newest.name == step_folder(step):  # that one is about to be replaced
        return None
    num_deltas = len(resolve_chain(newest)) - 1
    return newest if num_deltas < delta_saves else None


def boundary(trainer: "Trainer") -> Boundary:
    """Return the whole state of a run between two steps; on other ranks than 0 without what is equal on all."""
    names = list(trainer.dense_parameters)
    reader = None if trainer.stream is None else trainer.stream.state_dict()
    trees: dict[str, Any] = {"rng": random_state(), "metrics": trainer.metrics.state_dict()}
    dense: dict[str, Any] = {}
    if trainer.parallel is not None:
        trainer.parallel.share_buffers()
        reader = _whole_reader_state(reader, trainer.ranks)
    is_first = trainer.ranks.rank == 0
    if is_first or trainer.shards is not None:
        dense, optimizer = dense_state(trainer.model), named_optimizer_state(trainer.dense_optimizer, names)
        if trainer.shards is not None:  # all ranks give their rows, rank 0 gets them
            dense = trainer.shards.gather(dense, keep=is_first)
            optimizer = trainer.shards.gather_optimizer(optimizer, keep=is_first)
        if is_first:
            trees["optim"] = {"dense": optimizer, "sparse": trainer.sparse_optimizer.state_dict()}
    return Boundary(
        step=trainer.state.step,
        seed=trainer.config.seed,
        clock_s=int(trainer.clock()),
        table_sets=trainer.table_sets,
        dense=dense,
        trees=trees,
        reader=reader,
        schedules=trainer.schedule.state_dict(),
        trainer={
            "run": trainer.state.state_dict(),
            "table_sets": [table_set.state() for table_set in trainer.table_sets],
            "features": None if trainer.engine is None else trainer.engine.to_json(),
            "kernel_choices": calibration.to_json(trainer.choices),
        },
        metrics=trainer.state.metrics,
        config=trainer.config_text,
    )


def _whole_reader_state(state: Any, ranks: Ranks) -> Any:
    """Return the position of the job with the bad rows of all ranks; apart from those it is the same on each."""
    if not isinstance(state, Mapping) or "bad_rows" not in state:
        return state
    every = ranks.gather_objects(state["bad_rows"], "rows that were left out")
    first = [row for bad in every for row in bad["first"]]
    return {**state, "bad_rows": {"count": sum(bad["count"] for bad in every), "first": first}}


def _own_reader_state(state: Any, ranks: Ranks) -> Any:
    """Return the position for this rank: what was left out so far counts on rank 0."""
    if ranks.rank == 0 or not isinstance(state, Mapping) or "bad_rows" not in state:
        return state
    return {**state, "bad_rows": {"count": 0, "first": []}}


def restore(trainer: "Trainer", checkpoint: Path) -> Any:
    """Put a trainer where a checkpoint of the same config was saved; returns the position of its reader.

    The checkpoint must have been verified just now.
    """
    _check_features(trainer, checkpoint)
    ranks = trainer.ranks
    loaded = _loaded(trainer, checkpoint, verify=False)
    _restore_optimizers(trainer, loaded)
    set_random_state(loaded.trees["rng"])
    _restore_metrics(trainer, loaded)
    trainer.state.load_state_dict(loaded.trainer["run"])
    trainer.state.metrics = dict(loaded.metrics or {})
    trainer.state.checkpoint = checkpoint
    if "kernel_choices" in loaded.trainer:  # checkpoints of the first release have none
        try:
            trainer.choices = calibration.from_json(loaded.trainer["kernel_choices"])
        except ValueError as error:
            raise CheckpointError(
                f"{checkpoint}: its kernel choices: {error}; resume with the release of the run"
            ) from error
    for table_set, state in zip(trainer.table_sets, loaded.trainer["table_sets"], strict=True):
        table_set.load_state(state)
    _mark_base(trainer)
    return _own_reader_state(loaded.reader, ranks)


def _restore_metrics(trainer: "Trainer", loaded: Loaded) -> None:
    """Give each rank its own training metrics; where others saved them, rank 0 takes the rows of all."""
    ranks, manifest = trainer.ranks, loaded.manifest
    if manifest.world_size == ranks.world_size:
        trainer.metrics.load_state_dict(loaded.trees["metrics"])
    elif ranks.rank == 0:
        states = [read_tree(loaded.path, manifest, "metrics", rank) for rank in range(manifest.world_size)]
        trainer.metrics.load_state_dict(trainer.metrics.merged(states).state_dict())


def start_from(trainer: "Trainer", init: InitFrom) -> None:
    """Give a new run what another has learned; its steps are counted from 0 again, the age of rows goes on.

    Raises:
        CheckpointError: a checkpoint is damaged, or does not fit the model.
    """
    chain = [as_checkpoint(Path(init.paths[0])), *map(Path, init.paths[1:])]
    loaded = _loaded(
        trainer,
        chain if len(chain) > 1 else chain[0],
        tables=None if init.tables is None else dict(init.tables),
        parts=set(init.parts),
        strict=init.strict,
        cast=init.cast,
        rebase_steps=True,
    )
    saved = loaded.trees.get("optim")
    if saved is not None:  # moments only: learning rates and schedules are those of the new run
        names = list(trainer.dense_parameters)
        own = named_optimizer_state(trainer.dense_optimizer, names)
        known = {name: value for name, value in saved["dense"]["state"].items() if name in names}
        _load_dense_optimizer(trainer, {"state": known, "groups": own["groups"]})
    _mark_base(trainer)


def load_weights(trainer: "Trainer", path: Path) -> Loaded:
    """Load tables and dense tensors of a checkpoint, or of the newest whole one of a run.

    Raises:
        ConfigError: the trainer's features are not those that the weights were trained with.
        CheckpointError: nothing whole is there, or it does not fit the model.
    """
    checkpoint = as_checkpoint(path)
    _check_features(trainer, checkpoint)
    loaded = _loaded(trainer, checkpoint, parts={"weights", "dense"})
    for table_set in trainer.table_sets:
        table_set.load_step(loaded.manifest.step)
    return loaded


def _loaded(trainer: "Trainer", path: Path | Sequence[Path], **options: Any) -> Loaded:
    """Load what of a checkpoint belongs to this rank; `options` are those of recis.checkpoint.load."""
    dense, ranks, shards = dense_state(trainer.model), trainer.ranks, trainer.shards
    if shards is not None:
        dense = shards.gather(dense)
    into = Target(tables=trainer.tables, dense=dense)
    loaded = load(path, into=into, rank=ranks.rank, world_size=ranks.world_size, **options)
    if shards is not None:
        shards.scatter(dense)
    return loaded


def _load_dense_optimizer(trainer: "Trainer", saved: Mapping[str, Any]) -> None:
    own = saved if trainer.shards is None else trainer.shards.own_optimizer(saved)
    load_named_optimizer_state(trainer.dense_optimizer, list(trainer.dense_parameters), own)


def _restore_optimizers(trainer: "Trainer", loaded: Loaded) -> None:
    saved: Mapping[str, Any] | None = loaded.trees["optim"]
    if saved is None:
        raise CheckpointError(f"{loaded.path}: it has no optimizer state; load without the part 'optimizer'")
    _load_dense_optimizer(trainer, saved["dense"])
    trainer.sparse_optimizer.load_state_dict(saved["sparse"])
    if loaded.schedules is not None:
        trainer.schedule.load_state_dict(loaded.schedules)


def _check_features(trainer: "Trainer", checkpoint: Path) -> None:
    """Refuse weights that other features, or other vocabulary files, were the input of."""
    saved = (tree.unpack(read_manifest(checkpoint).trainer, {}) or {}).get("features")
    if saved is None or trainer.engine is None:
        return
    lines = differences(saved, trainer.engine.to_json())
    if lines:
        raise ConfigError(
            f"{checkpoint}: it was trained with other features: {'; '.join(lines[:6])}; "
            "use the features and vocabulary files of its run"
        )


def _mark_base(trainer: "Trainer") -> None:
    for table in trainer.tables.values():
        table.mark_base()
