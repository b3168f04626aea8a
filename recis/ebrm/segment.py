"""One immutable piece of the cache: rows of (entity, logit) by query, in four memory-mapped arrays and a manifest.

    query_hash.npy  u64 [Q]      ascending                 offsets.npy  i64 [Q + 1]
    entity.npy      u32 [P]      ascending in each row     logit.npy    f16 [P]
    manifest.json   format, model version, count and hash of the vocabulary, counts, sha256 of each array, what it replaces

6 bytes per pair and 16 per query. A segment is written into a folder of its own that then gets its name by one rename.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recis.errors import RecisError

FORMAT = 1
ARRAYS = {"query_hash": np.uint64, "offsets": np.int64, "entity": np.uint32, "logit": np.float16}
MANIFEST_KEYS = (
    "model_version",
    "vocabulary_count",
    "vocabulary_sha256",
    "num_queries",
    "num_pairs",
    "sha256",
    "replaces",
)
TMP_PREFIX = ".tmp-"
_CHUNK = 1 << 24


class CacheVersionError(RecisError, ValueError):
    """A cache of another model version, vocabulary or format."""


class CacheCorruptError(RecisError, ValueError):
    """A segment that is cut off or whose bytes are not those that were written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows of pairs by query, as a segment holds them.

    Attributes:
        query_hash: [Q] uint64, ascending.
        offsets: [Q + 1] int64.
        entity: [P] uint32, ascending in each row.
        logit: [P] float16.
    """

    query_hash: np.ndarray
    offsets: np.ndarray
    entity: np.ndarray
    logit: np.ndarray

    def row(self, query_hash: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (entity, logit) of a query; empty where there is none."""
        place = int(np.searchsorted(self.query_hash, np.uint64(query_hash)))
        if place == len(self.query_hash) or int(self.query_hash[place]) != query_hash:
            return self.entity[:0], self.logit[:0]
        first, last = int(self.offsets[place]), int(self.offsets[place + 1])
        return self.entity[first:last], self.logit[first:last]

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.entity)


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Rows of a folder and its manifest."""

    folder: Path
    rows: Rows
    manifest: dict[str, Any]


def write_segment(
    parent: Path,
    name: str,
    rows: Rows,
    *,
    model_version: str,
    vocabulary_count: int,
    vocabulary_sha256: str,
    replaces: Sequence[str] = (),
) -> Path:
    """Write rows as the segment `parent/name`; it appears whole, by one rename, or not at all. Returns the folder."""
    tmp = parent / f"{TMP_PREFIX}{name}-{secrets.token_hex(4)}"
    tmp.mkdir(parents=True)
    hashes = {}
    for key, dtype in ARRAYS.items():
        path = tmp / f"{key}.npy"
        with path.open("wb") as stream:
            np.save(stream, np.ascontiguousarray(getattr(rows, key), dtype=dtype))
            stream.flush()
            os.fsync(stream.fileno())
        hashes[key] = sha256_of(path)
    manifest = {
        "format": FORMAT,
        "model_version": model_version,
        "vocabulary_count": vocabulary_count,
        "vocabulary_sha256": vocabulary_sha256,
        "num_queries": len(rows.query_hash),
        "num_pairs": rows.num_pairs,
        "sha256": hashes,
        "replaces": list(replaces),
    }
    with (tmp / "manifest.json").open("w") as stream:
        json.dump(manifest, stream)
        stream.flush()
        os.fsync(stream.fileno())
    final = parent / name
    tmp.rename(final)
    _sync(parent)
    return final


def open_segment(folder: Path, *, verify: bool = True) -> Segment:
    """Map the arrays of a segment.

    Args:
        folder: the segment.
        verify: compare the sha256 of every array (reads them whole, about a second per GB); else sizes only.

    Raises:
        CacheCorruptError: no or a broken manifest, an array that is missing, cut off, or not what was written.
        CacheVersionError: another format.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        version = manifest["format"]
        missing = [key for key in MANIFEST_KEYS if key not in manifest] if version == FORMAT else []
        if missing or (version == FORMAT and set(ARRAYS) - set(manifest["sha256"])):
            raise ValueError(f"it lacks {', '.join(missing) or 'hashes'}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheCorruptError(
            f"cache segment {folder}: manifest.json cannot be read ({error}); delete the folder"
        ) from error
    if version != FORMAT:
        raise CacheVersionError(f"cache segment {folder} has format {version}; this version reads format {FORMAT}")
    arrays = {name: _map(folder / f"{name}.npy", manifest, name, verify) for name in ARRAYS}
    sizes = {"query_hash": manifest["num_queries"], "offsets": manifest["num_queries"] + 1}
    for name, array in arrays.items():
        size = sizes.get(name, manifest["num_pairs"])
        if array.shape != (size,) or array.dtype != ARRAYS[name]:
            raise CacheCorruptError(
                f"cache segment {folder}: {name}.npy must be [{size}] {np.dtype(ARRAYS[name])}; "
                f"it is {array.shape} {array.dtype}: delete the folder"
            )
    return Segment(folder=folder, rows=Rows(**arrays), manifest=manifest)


def remove_segment(folder: Path) -> None:
    """Delete a segment so that a kill on the way leaves a left-over, and not half a segment."""
    doomed = folder.parent / f"{TMP_PREFIX}removed-{folder.name}-{secrets.token_hex(4)}"
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def merge_rows(parts: Sequence[Rows]) -> Rows:
    """Return all pairs of some rows as one; of a pair in several parts the last part's logit stays."""
    if not parts:
        parts = [Rows(**{name: np.zeros(int(name == "offsets"), dtype) for name, dtype in ARRAYS.items()})]
    query = np.concatenate([np.repeat(part.query_hash, np.diff(part.offsets)) for part in parts])
    entity = np.concatenate([part.entity for part in parts])
    logit = np.concatenate([part.logit for part in parts])
    order = np.lexsort((entity, query))  # stable: parts keep their order within a pair
    query, entity, logit = query[order], entity[order], logit[order]
    last = np.ones(len(query), dtype=bool)
    last[:-1] = (query[1:] != query[:-1]) | (entity[1:] != entity[:-1])
    query, entity, logit = query[last], entity[last], logit[last]
    hashes, counts = np.unique(query, return_counts=True)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Rows(query_hash=hashes.astype(np.uint64), offsets=offsets, entity=entity, logit=logit)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _map(path: Path, manifest: dict[str, Any], name: str, verify: bool) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CacheCorruptError(f"cache segment {path.parent}: {path.name} is cut off or missing ({error})") from error
    if verify and sha256_of(path) != manifest["sha256"][name]:
        raise CacheCorruptError(
            f"cache segment {path.parent}: {path.name} does not hash to what its manifest says; delete the folder"
        )
    return np.asarray(array)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
