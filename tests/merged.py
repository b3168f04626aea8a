"""A checkpoint as one set of tensors, whatever number of ranks wrote it: what equality over world sizes compares."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recis.checkpoint import list_checkpoints, read_manifest, resolve_chain
from recis.checkpoint.load import read_tree
from recis.checkpoint.parts import files_of, read_fields, read_tombstones
from recis.checkpoint.tensors import read_tensors


def merged(checkpoint: Path) -> dict[str, Any]:
    """Return {name: tensor or value} of rows by ascending id, counts of admission, dense part, optimizer, positions."""
    manifest = read_manifest(checkpoint)
    out: dict[str, Any] = {"step": manifest.step, "metrics": dict(manifest.metrics)}
    for name, entry in manifest.tables.items():
        rows = _sorted(_rows(checkpoint, name))
        out |= {f"{name}.{key}": value for key, value in rows.items()}
        sightings: dict[str, list[Tensor]] = {}
        for file in files_of(manifest, "admission", name):
            for key, value in read_tensors(checkpoint / file)[0].items():
                sightings.setdefault(key, []).append(value)
        counted = {key: torch.cat(parts) for key, parts in sightings.items() if key.startswith("sightings.")}
        if counted:
            order = counted["sightings.ids"].argsort()
            out |= {f"{name}.{key}": value[order] for key, value in counted.items()}
        counters = [state["counters"] for state in entry.states]
        out |= {f"{name}.counters.{key}": sum(item[key] for item in counters) for key in counters[0]}
        out[f"{name}.t"] = entry.t
    for file in manifest.files:
        if file.startswith("dense-"):
            out |= {f"dense.{key}": value for key, value in read_tensors(checkpoint / file)[0].items()}
    optimizer = read_tree(checkpoint, manifest, "optim")
    for parameter, state in optimizer["dense"]["state"].items():
        out |= {f"optim.{parameter}.{key}": value for key, value in state.items()}
    reader = dict(manifest.reader)
    out["reader"] = {key: reader[key] for key in ("epoch", "rows", "lanes", "files")}
    run = dict(manifest.trainer["run"])
    out |= {f"run.{key}": run[key] for key in ("step", "samples", "best", "best_step", "last_eval_step", "window_loss")}
    return out


def newest(run: Path) -> Path:
    """Return the newest checkpoint of a run."""
    return list_checkpoints(run)[-1]


def _rows(checkpoint: Path, table: str) -> dict[str, Tensor]:
    rows: dict[int, dict[str, Tensor]] = {}
    for path in resolve_chain(checkpoint):
        manifest = read_manifest(path)
        for gone in read_tombstones(path, manifest, table).tolist():
            rows.pop(gone, None)
        for file in files_of(manifest, "table", table):
            fields = read_fields(path / file)
            for place, number in enumerate(fields["ids"].tolist()):
                rows[number] = {key: value[place].clone() for key, value in fields.items()}
    columns = next(iter(rows.values()), {})
    return {key: torch.stack([row[key] for row in rows.values()]) for key in columns}


def _sorted(fields: dict[str, Tensor]) -> dict[str, Tensor]:
    order = fields["ids"].argsort() if fields else None
    return {key: value[order] for key, value in fields.items()}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of what is not equal, bit for bit."""
    names = sorted({*one, *other})
    return [name for name in names if not _same(one.get(name), other.get(name))]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and _bits(one) == _bits(other)
    return type(one) is type(other) and one == other


def _bits(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
