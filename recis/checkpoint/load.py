"""Load a checkpoint, or parts of it, into tables and modules that exist already.

    load(path, into=Target(tables, dense), tables={"new": "old"}, parts={"weights", "dense"})

    weights     rows of the tables, what admission has counted, the tables' own counters and clocks
    optimizer   row optimizer states, the dense optimizer, schedules
    dense       parameters and buffers outside the tables
    reader      where the run stands: reader position, metric states, best value so far
    rng         states of the random generators

Every byte is verified before the first is used, so a damaged file leaves the target as it was. A rank reads the table
parts that meet its slices, whatever the number of ranks that wrote them.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from recis.checkpoint import tree
from recis.checkpoint.chain import check_chain, check_files, latest, resolve_chain
from recis.checkpoint.manifest import Manifest, TableEntry, rank_slices
from recis.checkpoint.parts import Slices, files_of, in_slices, meets, read_parts, read_tombstones
from recis.checkpoint.tensors import dtype_name, read_tensors
from recis.errors import CheckpointError, nearest

if TYPE_CHECKING:
    from recis.embedding import HashTable

Part = Literal["weights", "optimizer", "dense", "reader", "rng"]
FROZEN = "frozen_sha256"  # last part of the name of a dense tensor that stands for weights that do not train
_IMPORT_ROWS = 65536  # imported at once: a smaller batch spends its time in calls, a larger one outgrows the cache
ALL_PARTS: frozenset[Part] = frozenset(("weights", "optimizer", "dense", "reader", "rng"))
TREE_PARTS: Mapping[str, Part] = {"optim": "optimizer", "rng": "rng", "metrics": "reader"}  # file -> part


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is loaded into: tables by name, and dense tensors by name (written in place)."""

    tables: Mapping[str, "HashTable"] = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a checkpoint held beside rows and dense tensors; None for parts that were not asked for.

    Attributes:
        path: the checkpoint.
        manifest: its manifest.
        trees: states by name ("optim", "rng", "metrics"), as they were given to save.
        reader, schedules, trainer, metrics: as they were given to save.
    """

    path: Path
    manifest: Manifest
    trees: Mapping[str, Any]
    reader: Any = None
    schedules: Any = None
    trainer: Any = None
    metrics: Any = None


def load(
    path: Path | Sequence[Path],
    *,
    into: Target,
    tables: Mapping[str, str] | None = None,
    parts: frozenset[Part] | set[Part] = ALL_PARTS,
    strict: bool = True,
    cast: bool = False,
    rebase_steps: bool = False,
    rank: int = 0,
    world_size: int = 1,
    verify: bool = True,
) -> Loaded:
    """Load one checkpoint (a delta with its bases beside it) or a chain given in order.

    Args:
        path: a checkpoint folder; or a full one and deltas on it, oldest first.
        into: tables and tensors that take the values. A table that is loaded is cleared first.
        tables: {name in `into`: name in the checkpoint} of the tables to load, renaming as it says; None loads every
            table of `into` under its own name.
        parts: what to load. Rows without "optimizer" get the optimizer's initial state.
        strict: whether a table, dense tensor or optimizer state that only one side has is an error. Not strict: what
            both have is loaded, states that are missing are initial ones.
        cast: whether weights of another dtype are converted.
        rebase_steps: count steps from the checkpoint's on: last_seen becomes 0 for rows seen in its last step and
            negative for older ones, so that a new run evicts by the true age.
        rank, world_size: load the ids that this rank owns.
        verify: check size and SHA-256 of every file first; only for a checkpoint that was verified just now.

    Raises:
        CheckpointError: a damaged file, another dimension or dtype, a missing table; the text names both sides and the
            way out.
    """
    chain = resolve_chain(path) if isinstance(path, Path) else list(path)
    manifests = check_chain(chain)
    if verify:
        faults = [
            fault for item, manifest in zip(chain, manifests, strict=True) for fault in check_files(item, manifest)
        ]
        if faults:
            raise CheckpointError("; ".join(faults) + "; take another checkpoint")
    newest, manifest = chain[-1], manifests[-1]
    names = _tables_to_load(newest, manifest, into, tables, strict) if "weights" in parts else {}
    for new, old in names.items():
        _check_fit(newest, manifest.tables[old], old, into.tables[new], parts, strict=strict, cast=cast)
    if "dense" in parts:
        _load_dense(newest, manifest, into.dense, strict=strict)
    with ThreadPoolExecutor(2) as pool:
        for new, old in names.items():
            _load_table(
                chain,
                manifests,
                old,
                into.tables[new],
                pool,
                with_optimizer="optimizer" in parts,
                rebase_steps=rebase_steps,
                rank=rank,
                world_size=world_size,
            )
    trees = {name: read_tree(newest, manifest, name, rank) for name, part in TREE_PARTS.items() if part in parts}
    return Loaded(
        path=newest,
        manifest=manifest,
        trees=trees,
        reader=tree.unpack(manifest.reader, {}) if "reader" in parts else None,
        schedules=tree.unpack(manifest.schedules, {}) if "optimizer" in parts else None,
        trainer=tree.unpack(manifest.trainer, {}) if "reader" in parts else None,
        metrics=tree.unpack(manifest.metrics, {}) if "reader" in parts else None,
    )


def load_latest(run: Path, *, into: Target, rank: int = 0, world_size: int = 1) -> Loaded | None:
    """Load the newest whole checkpoint of a run, all parts; None where the run has none.

    Raises:
        CheckpointError: none is whole, or it does not fit `into`.
    """
    newest = latest(run)
    if newest is None:
        return None
    return load(newest, into=into, rank=rank, world_size=world_size, verify=False)


def read_tree(checkpoint: Path, manifest: Manifest, name: str, rank: int = 0) -> Any:
    """Return a state that was saved under `name`, this rank's; that of rank 0 where a rank has none of its own."""
    for owner in dict.fromkeys((rank, 0)):
        file = f"{name}-{owner:05d}-of-{manifest.world_size:05d}.safetensors"
        if file in manifest.files:
            tensors, metadata = read_tensors(checkpoint / file)
            return tree.unpack(tree.from_text(metadata["tree"]), tensors)
    return None


def _tables_to_load(
    path: Path, manifest: Manifest, into: Target, tables: Mapping[str, str] | None, strict: bool
) -> dict[str, str]:
    if tables is not None:
        for new, old in tables.items():
            if new not in into.tables:
                raise CheckpointError(f"{path}: no table {new!r} to load into; {nearest(new, into.tables)}")
            if old not in manifest.tables:
                raise CheckpointError(f"{path}: it has no table {old!r}; {nearest(old, manifest.tables)}")
        return dict(tables)
    if strict:
        for name in into.tables:
            if name not in manifest.tables:
                raise CheckpointError(
                    f"{path}: it has no table {name!r}; {nearest(name, manifest.tables)}; name the tables to load "
                    "({new: old}), or load with strict=False"
                )
        for name in manifest.tables:
            if name not in into.tables:
                raise CheckpointError(
                    f"{path}: its table {name!r} is not in the model; {nearest(name, into.tables)}; name the tables "
                    "to load, or load with strict=False"
                )
    return {name: name for name in into.tables if name in manifest.tables}


def _check_fit(
    path: Path, entry: TableEntry, old: str, table: "HashTable", parts: Any, *, strict: bool, cast: bool
) -> None:
    config = table.config
    where = f"{path}: table {old!r}"
    if entry.dim != config.embedding_dim:
        raise CheckpointError(
            f"{where} has rows of [{entry.dim}], the model's table {config.name!r} rows of [{config.embedding_dim}]; "
            f"set embedding_dim={entry.dim}, or leave the table out (tables=, strict=False)"
        )
    dtype = dtype_name(config.torch_dtype)
    if entry.dtype != dtype and not cast:
        raise CheckpointError(
            f"{where} has {entry.dtype} rows [{entry.rows}, {entry.dim}], the model's table {config.name!r} {dtype} "
            f"rows [*, {config.embedding_dim}]; load with cast=True to convert them"
        )
    widths = table.state_widths
    if strict and "optimizer" in parts and dict(entry.state_widths) != widths:
        raise CheckpointError(
            f"{where} has optimizer state {dict(entry.state_widths)}, the model's table {config.name!r} "
            f"({type(config.optimizer).__name__}) {widths}; load without the part 'optimizer' to start it afresh, or "
            "with strict=False to keep what both have"
        )


def _load_table(
    chain: Sequence[Path],
    manifests: Sequence[Manifest],
    name: str,
    table: "HashTable",
    pool: ThreadPoolExecutor,
    *,
    with_optimizer: bool,
    rebase_steps: bool,
    rank: int,
    world_size: int,
) -> None:
    slices = rank_slices(rank, world_size) if table.slices is None else table.slices
    age = manifests[-1].step if rebase_steps else 0
    table.clear()
    if name in manifests[0].tables:
        table.reserve(manifests[0].tables[name].rows // world_size)
    for path, manifest in zip(chain, manifests, strict=True):
        if name not in manifest.tables:  # a table that joined the run between two checkpoints of the chain
            continue
        if manifest.base is not None:
            table.remove(read_tombstones(path, manifest, name, slices))
        for fields in read_parts(path, manifest, name, slices=slices, pool=pool):
            if age:
                fields["last_seen"] = fields["last_seen"] - age
            rows = _fitting(fields, table, with_optimizer)
            for first in range(0, rows["ids"].numel(), _IMPORT_ROWS):
                table.import_rows({key: values[first : first + _IMPORT_ROWS] for key, values in rows.items()})
    states = manifests[-1].tables[name].states
    state = states[rank] if len(states) == world_size else merge_states(states, rank)
    table.load_state(state if with_optimizer else {**state, "t": 0})
    counted = [
        file
        for file in files_of(manifests[-1], "admission", name)
        if meets(manifests[-1].files[file].slices, slices)  # a sketch counts for whoever owns some of its ids
    ]
    for index, file in enumerate(counted):
        admission = _admission(read_tensors(chain[-1] / file)[0], slices)
        if "sightings.last_seen" in admission:
            admission["sightings.last_seen"] = admission["sightings.last_seen"] - age
        table.load_admission_state(admission, merge=index > 0)


def _fitting(fields: Mapping[str, Tensor], table: "HashTable", with_optimizer: bool) -> dict[str, Tensor]:
    """Return the fields that the table has: other optimizer states are left out, and start as initial ones."""
    widths = table.state_widths if with_optimizer else {}
    left_out = [
        key
        for key, value in fields.items()
        if key.startswith("state.") and widths.get(key.removeprefix("state.")) != value.shape[1]
    ]
    kept = {key: value for key, value in fields.items() if key not in left_out}
    kept["weight"] = kept["weight"].to(table.config.torch_dtype)
    return kept


def merge_states(states: Sequence[Any], rank: int) -> Any:
    """Return a table's state for a rank when others saved it: rank 0 takes the counters of all, the others none."""
    counters = [state["counters"] for state in states]
    summed = {key: sum(item[key] for item in counters) if rank == 0 else 0 for key in counters[0]}
    return {**states[0], "counters": summed}


def _admission(state: dict[str, Tensor], slices: Slices) -> dict[str, Tensor]:
    """Return what admission counted of the ids in `slices`; sketches count for whoever met them."""
    ids = state.get("sightings.ids")
    picked = None if ids is None else in_slices(ids, slices)
    if picked is None:
        return state
    return {key: value[picked] if key.startswith("sightings.") else value for key, value in state.items()}


def _load_dense(path: Path, manifest: Manifest, dense: Mapping[str, Tensor], *, strict: bool) -> None:
    saved: dict[str, Tensor] = {}
    for name in sorted(manifest.files):
        if name.startswith("dense-"):
            saved.update(read_tensors(path / name)[0])
    for name, tensor in dense.items():
        if name not in saved:
            if strict:
                raise CheckpointError(
                    f"{path}: it has no dense tensor {name!r}; {nearest(name, saved)}; load with strict=False to keep "
                    "the one of the model"
                )
        elif saved[name].shape != tensor.shape or saved[name].dtype != tensor.dtype:
            raise CheckpointError(
                f"{path}: dense tensor {name!r} is {_describe(saved[name])}, the model's is {_describe(tensor)}; build "
                "the model as it was saved, or leave the part 'dense' out"
            )
    for name in saved:
        if strict and name not in dense:
            raise CheckpointError(
                f"{path}: its dense tensor {name!r} is not in the model; {nearest(name, dense)}; load with "
                "strict=False to drop it"
            )
    for name, tensor in dense.items():
        if name.split(".")[-1] == FROZEN and name in saved and not torch.equal(tensor.cpu(), saved[name]):
            raise CheckpointError(
                f"{path}: the frozen weights of {name.removesuffix(FROZEN)}* had SHA-256 {_hex(saved[name])} when it was "
                f"saved, the model's have {_hex(tensor)}; use the folder of weights that the run was trained with"
            )
    with torch.no_grad():
        for name, tensor in dense.items():
            if name in saved and name.split(".")[-1] != FROZEN:
                tensor.copy_(saved[name])


def _hex(digest: Tensor) -> str:
    return bytes(digest.tolist()).hex()[:12]


def _describe(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
