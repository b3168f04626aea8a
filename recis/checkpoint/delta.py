"""Deltas: what changed since a base, and how a chain becomes one full checkpoint again.

A delta holds the rows that training touched (or a person wrote) since its base, and the ids that lost theirs: tombstones.
Everything that is small (dense tensors, optimizer, admission counts, reader) it holds whole. To apply it: take the
tombstones away, then write the rows; twice does no harm. An id that was evicted and came back is in both.
"""

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from recis.checkpoint.chain import check_chain, check_files, resolve_chain
from recis.checkpoint.folder import commit, make_tmp
from recis.checkpoint.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    list_checkpoints,
    manifest_sha256,
    read_manifest,
    step_folder,
)
from recis.checkpoint.parts import (
    files_of,
    read_fields,
    read_tombstones,
    rows_per_part,
    write_parts,
)
from recis.checkpoint.tensors import write_bytes
from recis.errors import CheckpointError


def compact(checkpoint: Path, out: Path | None = None) -> Path:
    """Merge a delta and its bases into one full checkpoint, equal to the one that a full save would have written.

    Args:
        checkpoint: the newest delta of a chain whose bases lie beside it.
        out: folder in which `step_<step>` appears; None replaces the delta where it is.

    Returns:
        The full checkpoint; `checkpoint` itself when it is one already and `out` is None.

    Raises:
        CheckpointError: a file of the chain is damaged; or another delta stands on `checkpoint` and would lose its base.
    """
    chain = resolve_chain(checkpoint)
    manifests = check_chain(chain)
    if len(chain) == 1 and out is None:
        return checkpoint
    faults = [fault for path, item in zip(chain, manifests, strict=True) for fault in check_files(path, item)]
    if faults:
        raise CheckpointError("; ".join(faults) + "; restore the file from a copy, or compact an older checkpoint")
    if out is None:
        _refuse_if_base(checkpoint)
    run = checkpoint.parent if out is None else out
    newest = manifests[-1]
    tmp = make_tmp(run, step_folder(newest.step))
    try:
        files, rows = _write_full(chain, manifests, tmp)
        tables = {name: replace(entry, rows=rows[name], tombstones=0) for name, entry in newest.tables.items()}
        merged = replace(newest, kind="full", base=None, files=files, tables=tables)
        write_bytes(tmp / MANIFEST_NAME, merged.to_bytes())
        final = run / step_folder(newest.step)
        commit(tmp, final)
        return final
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def _refuse_if_base(checkpoint: Path) -> None:
    identity = manifest_sha256(checkpoint)
    for other in list_checkpoints(checkpoint.parent):
        base = read_manifest(other).base
        if base is not None and base.manifest_sha256 == identity:
            raise CheckpointError(
                f"{checkpoint}: the delta {other.name} stands on it and would lose its base; compact {other.name}, "
                "or name another folder to write to"
            )


def _write_full(
    chain: Sequence[Path], manifests: Sequence[Manifest], tmp: Path
) -> tuple[dict[str, FileEntry], dict[str, int]]:
    path, newest = chain[-1], manifests[-1]
    files: dict[str, FileEntry] = {}
    rows: dict[str, int] = {}
    with ThreadPoolExecutor(2, thread_name_prefix="recis-save") as pool:
        for name, entry in newest.tables.items():
            parts = _merged_parts(chain, manifests, name, rows_per_part(entry.row_bytes))
            written = write_parts(tmp, name, parts, rank=0, world_size=1, pool=pool)
            rows[name] = sum(item.rows or 0 for item in written.values())
            files.update(written)
    for name, entry in newest.files.items():
        if not name.startswith(("table-", "tombstones-")):
            shutil.copyfile(path / name, tmp / name)
            files[name] = entry
    return files, rows


def _merged_parts(
    chain: Sequence[Path], manifests: Sequence[Manifest], table: str, part_rows: int
) -> Iterator[dict[str, Tensor]]:
    """Yield a table's rows after all deltas, ascending by id, `part_rows` at a time.

    Holds the ids of the whole table (24 bytes per row) and the rows of one part: a first pass finds out which file has the
    newest row of each id, the second reads each file's rows as they are wanted.
    """
    ids, files, places = _newest_rows(chain, manifests, table)
    paths = [
        path / name for path, item in zip(chain, manifests, strict=True) for name in files_of(item, "table", table)
    ]
    opened: dict[int, dict[str, Tensor]] = {}
    for start in range(0, ids.numel(), part_rows):
        span = slice(start, start + part_rows)
        wanted, owners = files[span], files[span].unique().tolist()
        opened = {owner: opened[owner] if owner in opened else read_fields(paths[owner]) for owner in owners}
        part: dict[str, Tensor] = {}
        for owner, fields in opened.items():
            here = (wanted == owner).nonzero().squeeze(1)
            for key, values in fields.items():
                if key not in part:
                    part[key] = values.new_empty((wanted.numel(), *values.shape[1:]))
                part[key][here] = values[places[span][here]]
        yield part


def _newest_rows(chain: Sequence[Path], manifests: Sequence[Manifest], table: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids that live after all deltas, ascending, with the file that has each one's row and its place there."""
    ids = torch.empty(0, dtype=torch.int64)
    files, places = ids.clone(), ids.clone()
    number = 0
    for path, manifest in zip(chain, manifests, strict=True):
        added = [(torch.empty(0, dtype=torch.int64), 0)]
        for name in files_of(manifest, "table", table):
            added.append((read_fields(path / name)["ids"], number))
            number += 1
        new_ids = torch.cat([item for item, _ in added])
        gone = torch.cat((new_ids, read_tombstones(path, manifest, table)))
        keep = ~torch.isin(ids, gone)
        ids = torch.cat((ids[keep], new_ids))
        files = torch.cat((files[keep], *(torch.full_like(item, file) for item, file in added)))
        places = torch.cat((places[keep], *(torch.arange(item.numel()) for item, _ in added)))
    order = torch.argsort(ids)
    return ids[order], files[order], places[order]
