"""Which files a config means, the units they are read in, and whether they are still the same files.

A path is a file, a folder (every file of the format below it; names beginning with "_" or "." are left out) or a glob, on
any file system fsspec knows. Files are sorted by path. The file list, (path, bytes, rows) per file, is what all ranks
compare and what a resumed run is checked against: a changed list would give some samples twice and others never.
"""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import IO, Any, Protocol

import fsspec
import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from recis.errors import ConfigError, DataError

SUFFIXES = {
    "parquet": (".parquet", ".pq", ".parq"),
    "orc": (".orc",),
    "csv": (".csv", ".tsv", ".txt"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
MIB = 2**20

FileList = list[list[Any]]  # [path, bytes, rows or None] per file: JSON-able


@dataclass(frozen=True, slots=True)
class File:
    """One file and the file system it lies on."""

    url: str
    """As the user would write it; what messages show."""
    path: str
    """As the file system wants it."""
    size: int
    filesystem: fsspec.AbstractFileSystem = field(repr=False, compare=False)

    @property
    def is_local(self) -> bool:
        """Whether Arrow can open it without fsspec."""
        return isinstance(self.filesystem, LocalFileSystem)

    @property
    def compression(self) -> str | None:
        """fsspec's name of the compression that the suffix tells; None: not compressed."""
        return "infer" if self.url.endswith(COMPRESSED) else None

    def open_arrow(self) -> pa.NativeFile:
        """Open for Arrow's readers.

        Raises:
            DataError: the file cannot be opened.
        """
        try:
            return pa.OSFile(self.path) if self.is_local else pa.PythonFile(self.filesystem.open(self.path, "rb"), "r")
        except OSError as error:
            raise DataError(f"cannot be opened: {error}", file=self.url) from error

    def open_bytes(self) -> IO[bytes]:
        """Open for Python, decompressed.

        Raises:
            DataError: the file cannot be opened.
        """
        try:
            return self.filesystem.open(self.path, "rb", compression=self.compression)  # type: ignore[return-value]
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be opened: {error}", file=self.url) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What one lane reads in one go: a row group, a stripe, a byte range, a range of rows."""

    file: File
    index: int
    """Which of the file's units, from 0."""
    label: str
    """In words, for messages: "row group 3"."""
    rows: int | None
    """None where only reading tells (a stream)."""
    decoded_bytes: int
    """About how much memory its needed columns take as a whole."""
    open_bytes: int
    """About how much memory reading it holds beside the rows that were read."""
    start: int = 0
    """First byte, or first row, of a range."""
    stop: int | None = None
    """End of the range; None: to the end."""
    times: tuple[int, int] | None = None
    """Least and greatest value of the time column in nanoseconds since 1970, when the file says so."""


class Format(Protocol):
    """How the files of one format are cut into units and read."""

    def inspect(self, file: File) -> tuple[pa.Schema, list[Unit]]:
        """Return the names and types in a file and its units that have rows; DataError when it cannot be read."""
        ...

    def read(self, unit: Unit, sources: Sequence[str], *, first_row: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the named columns from `first_row` of the unit on, in batches of about `batch_rows` rows."""
        ...


def resolve(paths: Sequence[str], format_name: str, *, missing_ok: bool = False) -> list[File]:
    """Return the files that `paths` mean, sorted by path.

    Raises:
        DataError: a path leads to no file, or a file is empty (left out with missing_ok, as a watched folder needs).
        ConfigError: a file is named twice.
    """
    found: dict[str, File] = {}
    for path in paths:
        for file in _expand(path, format_name, missing_ok=missing_ok):
            if file.url in found:
                raise ConfigError(f"{file.url} is named twice: by {path!r} and by a path before it; leave one out")
            if file.size == 0 and not missing_ok:
                raise DataError("the file is empty (0 bytes)", file=file.url, option="remove it, or write it again")
            found[file.url] = file
    return [found[url] for url in sorted(found)]


def _expand(path: str, format_name: str, *, missing_ok: bool) -> list[File]:
    try:
        filesystem, inside = url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise DataError(f"no file system for this path: {error}", file=path) from error
    inside = str(inside)
    if isinstance(filesystem, LocalFileSystem):
        prefix = ""
    else:
        prefix = path.split("://", 1)[0] + "://" if "://" in path else ""
    try:
        infos = _list(filesystem, inside, format_name)
    except FileNotFoundError:
        infos = []
    except OSError as error:
        raise DataError(f"cannot be listed: {error}", file=path) from error
    if not infos and not missing_ok:
        raise DataError(
            f"no {format_name} file there",
            file=path,
            option=f"give a file, a folder with *{SUFFIXES[format_name][0]}, or a glob",
        )
    return [File(_url(prefix, info["name"]), info["name"], int(info["size"] or 0), filesystem) for info in infos]


def _list(filesystem: fsspec.AbstractFileSystem, inside: str, format_name: str) -> list[dict[str, Any]]:
    """Name, size and type of each file that a path means."""
    if any(mark in inside for mark in "*?["):
        globbed: Any = filesystem.glob(inside, detail=True)
        return [info for info in globbed.values() if info["type"] == "file"]
    if filesystem.isdir(inside):
        below: Any = filesystem.find(inside, detail=True)
        return [info for name, info in below.items() if _is_data(posixpath.relpath(name, inside), format_name)]
    return [filesystem.info(inside)]


def _url(prefix: str, name: str) -> str:
    return prefix + name.removeprefix(prefix).lstrip("/") if prefix else name


def _is_data(relative: str, format_name: str) -> bool:
    """Whether a file below a folder belongs to the data: its suffix fits and no part of its path is hidden."""
    if any(part.startswith(("_", ".")) for part in relative.split("/")):
        return False
    plain = relative
    if format_name in ("csv", "jsonl") and relative.endswith(COMPRESSED):
        plain = posixpath.splitext(relative)[0]
    return plain.endswith(SUFFIXES[format_name])


def file_list(units: Sequence[Unit]) -> FileList:
    """Return [path, bytes, rows] of each file of the units, in order."""
    rows: dict[str, list[Any]] = {}
    for unit in units:
        entry = rows.setdefault(unit.file.url, [unit.file.url, unit.file.size, 0])
        entry[2] = None if unit.rows is None or entry[2] is None else entry[2] + unit.rows
    return list(rows.values())


def fingerprint(files: FileList) -> str:
    """Return the SHA-256 of a file list, hexadecimal."""
    digest = sha256()
    for path, size, rows in files:
        digest.update(f"{path}\0{size}\0{rows}\n".encode())
    return digest.hexdigest()


def check_same_files(mine: FileList, theirs: FileList, *, whose: str) -> None:
    """Raise DataError that names the first difference between two file lists.

    Args:
        mine: what this reader found.
        theirs: what it is compared with.
        whose: what `theirs` is, in words ("the checkpoint", "rank 3").
    """
    way_out = "put the files back, or start a new run on the new ones"
    for number, (ours, other) in enumerate(zip(mine, theirs, strict=False)):
        if list(ours) == list(other):
            continue
        if ours[0] != other[0]:
            problem = f"file {number} of the list is {ours[0]!r} here and {other[0]!r} in {whose}"
            raise DataError(problem, file=ours[0], option=way_out)
        for what, here, there in (("bytes", ours[1], other[1]), ("rows", ours[2], other[2])):
            if here != there:
                raise DataError(f"{here} {what} here, {there} in {whose}", file=ours[0], option=way_out)
    if len(mine) != len(theirs):
        longer, where = (mine, "here only") if len(mine) > len(theirs) else (theirs, f"in {whose} only")
        first = longer[min(len(mine), len(theirs))][0]
        problem = f"{len(mine)} files here, {len(theirs)} in {whose}; the first that differs is {where}"
        raise DataError(problem, file=first, option=way_out)
