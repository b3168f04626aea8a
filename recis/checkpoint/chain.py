"""Which checkpoints a run has that can be trusted, and what a delta stands on.

A full checkpoint stands alone. A delta names its base by the SHA-256 of the base's manifest; the chain of a delta is the
full checkpoint it goes back to, then every delta up to itself. `latest` verifies chains, newest first.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from recis.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    list_checkpoints,
    manifest_sha256,
    read_manifest,
)
from recis.checkpoint.tensors import hash_file
from recis.errors import CheckpointError

_log = logging.getLogger("recis.checkpoint")
_HASH_THREADS = 2


def check_files(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Return one line per file of the manifest that is missing, of another size or of another SHA-256."""

    def check(name: str) -> str | None:
        entry = manifest.files[name]
        path = checkpoint / name
        if "/" in name or not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != entry.bytes:
            return f"{path}: has {path.stat().st_size} bytes, the manifest says {entry.bytes}: truncated or edited"
        _, sha256 = hash_file(path)
        return None if sha256 == entry.sha256 else f"{path}: SHA-256 does not match the manifest: damaged or edited"

    by_size = sorted(manifest.files, key=lambda name: -manifest.files[name].bytes)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return sorted(fault for fault in pool.map(check, by_size) if fault is not None)


def resolve_chain(checkpoint: Path) -> list[Path]:
    """Return [full checkpoint, delta, ..., checkpoint]; bases are looked for beside the checkpoint.

    Raises:
        CheckpointError: a manifest cannot be read, or a base is not there.
    """
    chain = [checkpoint]
    base = read_manifest(checkpoint).base
    while base is not None:
        found = [
            folder for folder in list_checkpoints(checkpoint.parent) if manifest_sha256(folder) == base.manifest_sha256
        ]
        if not found:
            raise CheckpointError(
                f"{chain[0]}: its base (step {base.step}, manifest {base.manifest_sha256[:12]}…) is not in "
                f"{checkpoint.parent}; put the base beside it, or take a full checkpoint"
            )
        chain.insert(0, found[0])
        base = read_manifest(found[0]).base
    return chain


def check_chain(chain: Sequence[Path]) -> list[Manifest]:
    """Return the manifests of a chain given by hand: a full checkpoint, then deltas each on the one before.

    Raises:
        CheckpointError: the first is a delta, a later one is not, or a delta stands on another base.
    """
    manifests = []
    previous: Path | None = None
    for path in chain:
        manifest = read_manifest(path)
        if previous is None and manifest.base is not None:
            raise CheckpointError(
                f"{path}: a delta on step {manifest.base.step} cannot stand alone; name its full checkpoint first"
            )
        if previous is not None:
            if manifest.base is None:
                raise CheckpointError(
                    f"{path}: a full checkpoint cannot follow {previous}; name deltas after the first"
                )
            have = manifest_sha256(previous)
            if manifest.base.manifest_sha256 != have:
                raise CheckpointError(
                    f"{path}: a delta on step {manifest.base.step} (manifest {manifest.base.manifest_sha256[:12]}…), "
                    f"not on {previous} (manifest {have[:12]}…); apply it to the base it was made for"
                )
        manifests.append(manifest)
        previous = path
    return manifests


def latest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run whose every byte is as it was written; None where a run has none at all.

    A broken one is skipped with a warning that names file and reason.

    Raises:
        CheckpointError: the run has checkpoints, but none is whole.
    """
    folders = list_checkpoints(run)
    whole: dict[Path, list[str]] = {}
    first_fault = ""
    for folder in reversed(folders):
        faults = _chain_faults(folder, whole)
        if not faults:
            return folder
        first_fault = first_fault or faults[0]
        _log.warning("checkpoint %s is skipped: %s", folder.name, "; ".join(faults))
    if folders:
        raise CheckpointError(
            f"{run}: none of its {len(folders)} checkpoints is whole; the newest: {first_fault}; restore one from a copy"
        )
    return None


def _chain_faults(folder: Path, known: dict[Path, list[str]]) -> list[str]:
    try:
        chain = resolve_chain(folder)
        for path in chain:
            if path not in known:
                known[path] = check_files(path, read_manifest(path))
    except CheckpointError as error:
        return [str(error)]
    return [fault for path in chain for fault in known[path]]


def as_checkpoint(path: Path) -> Path:
    """Return `path` when it is a checkpoint, or the newest whole one when it is a run.

    Raises:
        CheckpointError: it is neither.
    """
    if (path / MANIFEST_NAME).exists():
        return path
    newest = latest(path)
    if newest is None:
        raise CheckpointError(f"{path}: neither a checkpoint (no {MANIFEST_NAME}) nor a run with one (no step_*)")
    return newest
