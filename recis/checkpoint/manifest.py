"""The manifest: what a checkpoint folder holds, written last; a folder with a whole manifest is a whole checkpoint.

    run/step_000001000/MANIFEST.json   {"format": "recis-checkpoint", "version": 1, "step": 1000, "kind": "full", ...}

Every other file is named in it with its size and SHA-256. The manifest guards itself with `checksum`, the SHA-256 of
the rest of it as canonical JSON (sorted keys, no blanks). The SHA-256 of the file's bytes is the checkpoint's identity:
a delta names its base by it.

A row belongs to slice `hash64(id) & 0xffff`. Rank r of W owns a contiguous range of the 65536 slices, the first
65536 mod W ranks one slice more. Table parts never cross a rank's range, so any number of ranks can read what it needs.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from recis.errors import CheckpointError

FORMAT = "recis-checkpoint"
VERSION = 1
MANIFEST_NAME = "MANIFEST.json"
NUM_SLICES = 65536
TMP_PREFIX = ".tmp-"
_STEP_FOLDER = re.compile(r"step_(\d{9,})")

Kind = Literal["full", "delta"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What a delta is a difference to.

    Attributes:
        step: step of the base.
        manifest_sha256: SHA-256 of the bytes of the base's MANIFEST.json.
    """

    step: int
    manifest_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint: size, SHA-256 and, for a part of a table, its rows and the slices [first, stop)."""

    bytes: int
    sha256: str
    slices: tuple[int, int] | None = None
    rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TableEntry:
    """One table of a checkpoint.

    Attributes:
        dim: D.
        dtype: safetensors name of the weight's type, "F32" or "BF16".
        rows: rows in the files of this checkpoint (of a delta: rows touched since its base).
        optimizer: JSON of the row optimizer.
        initializer: JSON of the initializer.
        t: optimizer steps of the table so far.
        tombstones: ids evicted since the base; 0 in a full checkpoint.
        state_widths: state vector -> its width, in row order.
        states: what the table says about itself beside its rows (t, counters, eviction clocks), JSON, one per rank.
    """

    dim: int
    dtype: str
    rows: int
    optimizer: Any
    initializer: Any
    t: int
    tombstones: int = 0
    state_widths: Mapping[str, int] = field(default_factory=dict)
    states: list[Any] = field(default_factory=list)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the table's files: weight, states, id, last_seen, count."""
        return self.dim * (2 if self.dtype == "BF16" else 4) + 4 * sum(self.state_widths.values()) + 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of MANIFEST.json.

    Attributes:
        step: optimizer updates so far.
        world_size: ranks that wrote it.
        files: every file but this one.
        dense: shape and dtype of each tensor outside the tables.
        reader: position in the training data.
        schedules: states of the learning-rate schedules.
        metrics: values of the newest evaluation.
        trainer: the trainer's own position: best value so far and the like.
        lib: versions of what wrote it.
    """

    step: int
    world_size: int
    kind: Kind
    base: Base | None
    seed: int
    clock_s: int
    files: Mapping[str, FileEntry]
    tables: Mapping[str, TableEntry]
    dense: Mapping[str, Any]
    reader: Any
    schedules: Any
    metrics: Any
    trainer: Any
    lib: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.bytes for entry in self.files.values())

    def to_bytes(self) -> bytes:
        """Return the file's content, checksum included."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "world_size": self.world_size,
            "kind": self.kind,
            "base": None if self.base is None else asdict(self.base),
            "seed": self.seed,
            "clock_s": self.clock_s,
            "files": {name: _without_none(asdict(entry)) for name, entry in sorted(self.files.items())},
            "tables": {name: asdict(entry) for name, entry in sorted(self.tables.items())},
            "dense": dict(self.dense),
            "reader": self.reader,
            "schedules": self.schedules,
            "metrics": self.metrics,
            "trainer": self.trainer,
            "lib": dict(self.lib),
        }
        body["checksum"] = _checksum(body)
        return (json.dumps(body, indent=1, allow_nan=False) + "\n").encode()


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check the manifest of a checkpoint folder.

    Raises:
        CheckpointError: there is none, it is not JSON, of another format or a newer version, or fails its checksum.
    """
    return parse_manifest(manifest_bytes(checkpoint), checkpoint / MANIFEST_NAME)


def manifest_bytes(checkpoint: Path) -> bytes:
    """Return the raw bytes of a checkpoint's manifest; CheckpointError when it cannot be read."""
    path = checkpoint / MANIFEST_NAME
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read ({reason}); a checkpoint is a folder step_<number> with a {MANIFEST_NAME}"
        ) from error


def manifest_sha256(checkpoint: Path) -> str:
    """Return the identity of a checkpoint: the SHA-256 of its manifest's bytes."""
    return hashlib.sha256(manifest_bytes(checkpoint)).hexdigest()


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """Turn the bytes of MANIFEST.json into a Manifest; `path` is only for messages. Raises as read_manifest."""
    try:
        body = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: not whole JSON ({error}); the checkpoint is damaged, take another") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        found = body.get("format") if isinstance(body, dict) else type(body).__name__
        raise CheckpointError(f"{path}: format must be {FORMAT!r}; got {found!r}")
    version = body.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r}, this recis reads up to version {VERSION}; "
            "load it with the release that wrote it, or upgrade recis"
        )
    stated = body.pop("checksum", None)
    if stated != _checksum(body):
        raise CheckpointError(f"{path}: checksum does not match its content; the manifest was edited or is damaged")
    try:
        return _from_body(body)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: field {error} is missing or malformed; the manifest is damaged") from error


def _from_body(body: dict[str, Any]) -> Manifest:
    for name in body["files"]:
        if "/" in name or name.startswith("."):
            raise KeyError(f"files[{name!r}]")
    files = {
        name: FileEntry(**{**entry, "slices": tuple(entry["slices"]) if "slices" in entry else None})
        for name, entry in body["files"].items()
    }
    return Manifest(
        step=body["step"],
        world_size=body["world_size"],
        kind=body["kind"],
        base=None if body["base"] is None else Base(**body["base"]),
        seed=body["seed"],
        clock_s=body["clock_s"],
        files=files,
        tables={name: TableEntry(**entry) for name, entry in body["tables"].items()},
        dense=body["dense"],
        reader=body["reader"],
        schedules=body["schedules"],
        metrics=body["metrics"],
        trainer=body["trainer"],
        lib=body["lib"],
    )


def _checksum(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _without_none(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if value is not None}


def rank_slices(rank: int, world_size: int) -> tuple[int, int]:
    """Return the slices [first, stop) that a rank owns; the first 65536 mod W ranks own one more.

    Raises:
        ValueError: rank is not in [0, world_size).
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size); got rank {rank} of {world_size}")
    size, longer = divmod(NUM_SLICES, world_size)
    first = rank * size + min(rank, longer)
    return first, first + size + (1 if rank < longer else 0)


def step_folder(step: int) -> str:
    """Return the folder name of a checkpoint of that step."""
    return f"step_{step:09d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Return the folders of a run that are named like a checkpoint and have a manifest, oldest first.

    Left-overs of killed saves (`.tmp-…`) are never among them.
    """
    found = []
    if run.is_dir():
        for folder in run.iterdir():
            match = _STEP_FOLDER.fullmatch(folder.name)
            if match and folder.is_dir() and (folder / MANIFEST_NAME).exists():
                found.append((int(match[1]), folder))
    return [folder for _, folder in sorted(found)]
