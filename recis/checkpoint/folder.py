"""Folders of a run: a save grows in `.tmp-…`, appears under its name by one rename, and leaves by one rename too.

Killed at any instant, a run folder holds whole checkpoints and `.tmp-…` left-overs, nothing in between. Left-overs are
never read; `clean` removes them when the next run starts.
"""

import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from recis.checkpoint.manifest import TMP_PREFIX, list_checkpoints, manifest_sha256, read_manifest
from recis.checkpoint.tensors import storage_error
from recis.errors import CheckpointError


def make_tmp(run: Path, name: str) -> Path:
    """Create `run/.tmp-<name>-<nonce>` (and the run folder) and return it; CheckpointError when that fails."""
    folder = run / f"{TMP_PREFIX}{name}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    return folder


def commit(tmp: Path, final: Path) -> None:
    """Make a finished folder appear as `final`: fsync it, rename it, fsync the parent.

    A folder that already has the name (a broken checkpoint that a resumed run has reached again) is replaced.
    """
    try:
        sync_folder(tmp)
        if final.exists():
            remove(final)
        tmp.rename(final)
        sync_folder(final.parent)
    except OSError as error:
        raise storage_error(error, final) from error


def remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill on the way leaves a `.tmp-…` left-over and not half a checkpoint."""
    doomed = folder.parent / f"{TMP_PREFIX}removed-{folder.name}-{secrets.token_hex(4)}"
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean(run: Path) -> list[Path]:
    """Delete what killed saves left in a run folder and return it. No save may be under way there."""
    left_over = sorted(run.glob(f"{TMP_PREFIX}*")) if run.is_dir() else []
    for path in left_over:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return left_over


def rotate(run: Path, keep: int, protect: Iterable[Path] = ()) -> list[Path]:
    """Delete all but the `keep` newest checkpoints, `protect`, and the bases that a kept delta needs.

    Returns the deleted folders. A checkpoint whose manifest cannot be read counts as a checkpoint and is never a base.

    Raises:
        ValueError: keep < 1.
        CheckpointError: a folder cannot be deleted.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1; got {keep}")
    folders = list_checkpoints(run)
    by_hash = {manifest_sha256(folder): folder for folder in folders}
    wanted: set[Path] = set()
    waiting = [*folders[-keep:], *(path for path in protect if path in folders)]
    while waiting:
        folder = waiting.pop()
        if folder in wanted:
            continue
        wanted.add(folder)
        base = _base_hash(folder)
        if base in by_hash:
            waiting.append(by_hash[base])
    doomed = [folder for folder in folders if folder not in wanted]
    for folder in doomed:
        try:
            remove(folder)
        except OSError as error:
            raise storage_error(error, folder) from error
    return doomed


def _base_hash(folder: Path) -> str | None:
    try:
        base = read_manifest(folder).base
    except CheckpointError:  # damaged: nothing can be said about its base, and load_latest will name the damage
        return None
    return None if base is None else base.manifest_sha256


def sync_folder(folder: Path) -> None:
    """fsync a directory, so that the names in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
