"""Rows of a table as files: each part written, hashed and read on its own.

    table-<name>-<rank>-of-<world size>-<part>.safetensors    ids I64 [n], weight [n, D], state.* [n, w], last_seen, count

A rank writes the rows whose slices it owns, in ascending id, PART_BYTES at a time; its slices stand in the manifest. A
reader with any number of ranks opens the parts whose slices meet its own range and drops the ids that do not. What a part
holds depends on the ids alone, so equal tables give equal files. Memory: two parts, one being hashed and written while the
next is read from the table.
"""

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, unquote

import torch
from torch import Tensor

from recis.checkpoint.manifest import NUM_SLICES, FileEntry, Manifest, rank_slices
from recis.checkpoint.tensors import read_tensors, write_tensors
from recis.errors import CheckpointError
from recis_kernels.philox import hash64

PART_BYTES = 16 << 20
PARTS_IN_FLIGHT = 2  # parts being written while the next is made
_NAME = re.compile(r"(?P<what>table|admission|tombstones)-(?P<table>.+)-\d{5}-of-\d{5}(-\d{3,})?\.safetensors")

Slices = tuple[int, int]
ALL_SLICES: Slices = (0, NUM_SLICES)


def slice_of(ids: Tensor) -> Tensor:
    """Return the slice, 0 .. 65535, of each id: the low 16 bits of its hash."""
    return hash64(ids) & (NUM_SLICES - 1)


def in_slices(ids: Tensor, slices: Slices) -> Tensor | None:
    """Return the positions of the ids in slices [first, stop); None when the range is all of them."""
    if slices == ALL_SLICES:
        return None
    owner = slice_of(ids)
    return ((owner >= slices[0]) & (owner < slices[1])).nonzero().squeeze(1)


def file_name(what: str, table: str, rank: int, world_size: int, part: int | None = None) -> str:
    """Return the name of a table's file; `what` is table, admission or tombstones."""
    end = "" if part is None else f"-{part:03d}"
    return f"{what}-{quote(table, safe='')}-{rank:05d}-of-{world_size:05d}{end}.safetensors"


def files_of(manifest: Manifest, what: str, table: str) -> list[str]:
    """Return the files of one kind that a checkpoint has for a table, in order of rank and part."""
    found = []
    for name in manifest.files:
        match = _NAME.fullmatch(name)
        if match and match["what"] == what and unquote(match["table"]) == table:
            found.append((len(name), name))  # part -1000 comes after -999
    return [name for _, name in sorted(found)]


def rows_per_part(row_bytes: int) -> int:
    """Return how many rows of that many bytes a part holds."""
    return max(1, PART_BYTES // row_bytes)


def write_parts(
    folder: Path,
    table: str,
    parts: Iterable[dict[str, Tensor]],
    *,
    rank: int,
    world_size: int,
    slices: Slices | None = None,
    pool: ThreadPoolExecutor,
) -> dict[str, FileEntry]:
    """Write each dict of fields, "ids" among them, into a file of its own; returns the manifest entries.

    The memory of a part is free again when PARTS_IN_FLIGHT more have been asked for. `slices`: those that the rank owns of
    this table; None: as `rank_slices` says.

    Raises:
        CheckpointError: an id is not the rank's, or a file cannot be written.
    """
    slices = rank_slices(rank, world_size) if slices is None else slices
    entries: dict[str, FileEntry] = {}
    waiting: list[tuple[str, Future[FileEntry]]] = []
    try:
        for part, fields in enumerate(parts):
            _check_owner(table, fields["ids"], slices, f"rank {rank} of {world_size}")
            name = file_name("table", table, rank, world_size, part)
            if len(waiting) == PARTS_IN_FLIGHT:
                done, future = waiting.pop(0)
                entries[done] = future.result()
            task = pool.submit(write_tensors, folder / name, fields, slices=slices, rows=fields["ids"].numel())
            waiting.append((name, task))
    finally:
        for name, future in waiting:
            entries[name] = future.result()
    return entries


def read_parts(
    checkpoint: Path,
    manifest: Manifest,
    table: str,
    *,
    slices: Slices = ALL_SLICES,
    pool: ThreadPoolExecutor | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield the fields of a table's rows in `slices`, part by part, "ids" among them.

    With a pool the next part is read while the caller works on one.

    Raises:
        CheckpointError: a file is missing or malformed.
    """
    names = [name for name in files_of(manifest, "table", table) if meets(manifest.files[name].slices, slices)]
    if pool is None:
        for name in names:
            yield read_fields(checkpoint / name, slices)
        return
    waiting = [pool.submit(read_fields, checkpoint / name, slices) for name in names[:2]]
    for index in range(len(names)):
        fields = waiting.pop(0).result()
        if index + 2 < len(names):
            waiting.append(pool.submit(read_fields, checkpoint / names[index + 2], slices))
        yield fields


def read_fields(path: Path, slices: Slices = ALL_SLICES) -> dict[str, Tensor]:
    """Return the fields of one part, of the ids in `slices` alone. Raises as read_parts."""
    fields, _ = read_tensors(path)
    if "ids" not in fields or any(field.shape[:1] != fields["ids"].shape for field in fields.values()):
        shapes = {name: tuple(field.shape) for name, field in fields.items()}
        raise CheckpointError(f"{path}: every field must have one entry per id; got {shapes}")
    picked = in_slices(fields["ids"], slices)
    return fields if picked is None else {name: field[picked] for name, field in fields.items()}


def read_tombstones(checkpoint: Path, manifest: Manifest, table: str, slices: Slices = ALL_SLICES) -> Tensor:
    """Return the ids [n] in `slices` that a delta says were evicted from a table since its base."""
    ids = [read_fields(checkpoint / name, slices)["ids"] for name in files_of(manifest, "tombstones", table)]
    return torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64)


def _check_owner(table: str, ids: Tensor, own: Slices, who: str) -> None:
    if own == ALL_SLICES:
        return
    first, stop = own
    slices = slice_of(ids)
    foreign = ((slices < first) | (slices >= stop)).nonzero()
    if foreign.numel():
        at = int(foreign[0, 0])
        raise CheckpointError(
            f"table {table!r}: id {int(ids[at])} has slice {int(slices[at])}, {who} owns "
            f"[{first}, {stop}); a rank saves the ids of its own slices only"
        )


def meets(part: Slices | None, slices: Slices) -> bool:
    """Return whether a file of the slices `part` (None: of any) may hold ids in `slices`."""
    return part is None or (part[0] < slices[1] and slices[0] < part[1])
