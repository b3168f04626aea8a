"""Look into checkpoints without loading them: is every byte right, and what is in there.

`verify` checks sizes and hashes, that nothing is missing or left over, shapes and types against the manifest, that no id
has two rows or lies with the wrong owner, and that the rows add up. Memory: one part of a table.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recis.checkpoint.chain import check_files, resolve_chain
from recis.checkpoint.manifest import MANIFEST_NAME, Manifest, TableEntry, list_checkpoints, read_manifest
from recis.checkpoint.parts import files_of, read_fields, slice_of
from recis.checkpoint.tensors import dtype_name, read_tensors
from recis.errors import CheckpointError


def verify(path: Path) -> list[str]:
    """Return one line per fault of a checkpoint, or of all checkpoints of a run; an empty list means all is well.

    Raises:
        CheckpointError: `path` is neither a checkpoint nor a run with one.
    """
    if (path / MANIFEST_NAME).exists():
        return _verify_one(path)
    folders = list_checkpoints(path)
    if not folders:
        raise CheckpointError(f"{path}: neither a checkpoint (no {MANIFEST_NAME}) nor a run with one (no step_*)")
    return [fault for folder in folders for fault in _verify_one(folder)]


def _verify_one(path: Path) -> list[str]:
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    faults = check_files(path, manifest)
    expected = {*manifest.files, MANIFEST_NAME}
    faults += [f"{item}: not in the manifest" for item in sorted(path.iterdir()) if item.name not in expected]
    if faults:
        return faults  # what lies in damaged files is not worth a look
    try:
        resolve_chain(path)
        for name, entry in manifest.tables.items():
            faults += _verify_table(path, manifest, name, entry)
        faults += _verify_dense(path, manifest)
    except CheckpointError as error:
        faults.append(str(error))
    return faults


def _verify_table(path: Path, manifest: Manifest, name: str, entry: TableEntry) -> list[str]:
    faults = []
    ids = [torch.empty(0, dtype=torch.int64)]
    for file in files_of(manifest, "table", name):
        fields = read_fields(path / file)
        ids.append(fields["ids"].clone())
        for key, want in _field_types(entry).items():
            have = fields.get(key)
            found = None if have is None else (dtype_name(have.dtype), list(have.shape[1:]))
            if found != want:
                faults.append(f"{path / file}: {key} must be {want} per row; got {found}")
        slices = manifest.files[file].slices
        if slices is not None:
            owner = slice_of(fields["ids"])
            foreign = int(((owner < slices[0]) | (owner >= slices[1])).sum())
            if foreign:
                faults.append(f"{path / file}: {foreign} ids are not of its slices [{slices[0]}, {slices[1]})")
    every = torch.cat(ids)
    repeated = every.numel() - every.unique().numel()
    if repeated:
        faults.append(f"{path}: table {name!r} has {repeated} ids twice")
    if every.numel() != entry.rows:
        faults.append(f"{path}: table {name!r} has {every.numel()} rows, the manifest says {entry.rows}")
    tombstones = sum(read_tensors(path / file)[0]["ids"].numel() for file in files_of(manifest, "tombstones", name))
    if tombstones != entry.tombstones:
        faults.append(f"{path}: table {name!r} has {tombstones} tombstones, the manifest says {entry.tombstones}")
    return faults


def _field_types(entry: TableEntry) -> dict[str, tuple[str, list[int]]]:
    states = {f"state.{name}": ("F32", [width]) for name, width in entry.state_widths.items()}
    return {"ids": ("I64", []), "weight": (entry.dtype, [entry.dim]), **states, "count": ("I32", [])}


def _verify_dense(path: Path, manifest: Manifest) -> list[str]:
    saved: dict[str, Tensor] = {}
    for file in manifest.files:
        if file.startswith("dense-"):
            saved.update(read_tensors(path / file)[0])
    have = {name: {"shape": list(value.shape), "dtype": dtype_name(value.dtype)} for name, value in saved.items()}
    names = sorted(name for name in {*have, *manifest.dense} if have.get(name) != manifest.dense.get(name))
    return [
        f"{path}: dense {name!r} is {have.get(name)}, the manifest says {manifest.dense.get(name)}" for name in names
    ]


def inspect(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds as JSON-able data; of a run, its newest checkpoint and the steps of all.

    Reads manifests only; `verify` says whether the files agree.

    Raises:
        CheckpointError: `path` is neither, or a manifest cannot be read.
    """
    if (path / MANIFEST_NAME).exists():
        return _inspect_one(path)
    folders = list_checkpoints(path)
    if not folders:
        raise CheckpointError(f"{path}: neither a checkpoint (no {MANIFEST_NAME}) nor a run with one (no step_*)")
    return {**_inspect_one(folders[-1]), "checkpoints": [folder.name for folder in folders]}


def _inspect_one(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    tables = {name: _inspect_table(manifest, name, entry) for name, entry in sorted(manifest.tables.items())}
    return {
        "path": str(path),
        "step": manifest.step,
        "kind": manifest.kind,
        "base_step": None if manifest.base is None else manifest.base.step,
        "world_size": manifest.world_size,
        "seed": manifest.seed,
        "clock_s": manifest.clock_s,
        "bytes": manifest.num_bytes,
        "tables": tables,
        "rows": sum(entry.rows for entry in manifest.tables.values()),
        "dense_tensors": len(manifest.dense),
        "dense_parameters": sum(_size(entry) for entry in manifest.dense.values()),
        "metrics": dict(manifest.metrics or {}),
        "lib": dict(manifest.lib),
    }


def _inspect_table(manifest: Manifest, name: str, entry: TableEntry) -> dict[str, Any]:
    files = [file for what in ("table", "admission", "tombstones") for file in files_of(manifest, what, name)]
    return {
        "rows": entry.rows,
        "dim": entry.dim,
        "dtype": entry.dtype,
        "optimizer": entry.optimizer,
        "state": dict(entry.state_widths),
        "initializer": entry.initializer,
        "t": entry.t,
        "tombstones": entry.tombstones,
        "bytes": sum(manifest.files[file].bytes for file in files),
        "counters": _counters(entry),
    }


def _counters(entry: TableEntry) -> Mapping[str, Any]:
    return (entry.states[0].get("counters") or {}) if entry.states else {}


def _size(entry: Mapping[str, Any]) -> int:
    size = 1
    for extent in entry["shape"]:
        size *= extent
    return size
