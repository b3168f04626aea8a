"""Vectors by id in files that are mapped and not read: what precompute writes, and arrays that others made.

    folder             MANIFEST.json, ids.npy int64 [N] ascending, rows.npy int64 [N], vectors.npy [R, D] (from precompute)
    states             the same and lengths.npy int64 [R]: text r has lengths[r] rows of vectors.npy (see recis.towers.cut)
    x.npy              vectors [N, D]; the ids in a second .npy, or none: row number = id
    x.safetensors      tensors `ids` int64 [N] and `vectors` [N, D]; metadata `version` where there is one

Everything that can be checked without reading the vectors is checked on opening; a file that fails leaves nothing behind.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis.errors import DataError

FORMAT, STATES_FORMAT, FORMAT_VERSION = "recis-vectors", "recis-states", 1
MANIFEST, IDS, ROWS, LENGTHS, VECTORS = "MANIFEST.json", "ids.npy", "rows.npy", "lengths.npy", "vectors.npy"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class VectorFileError(DataError):
    """A vector file that cannot be used: damaged, of another width, dtype, row count or version."""


@dataclass(frozen=True, slots=True)
class VectorFile:
    """Open vectors.

    Attributes:
        path: as given.
        version: the hash of the weights and settings that made them, or what the file says; "" where it says nothing.
        ids: [N] int64, ascending, distinct; None: row number = id.
        rows: [N] int64, the row of each id; None: the same place.
        vectors: [R, D] float16, bfloat16 or float32, mapped.
    """

    path: Path
    version: str
    ids: Tensor | None
    rows: Tensor | None
    vectors: Tensor

    @property
    def width(self) -> int:
        """D."""
        return self.vectors.shape[1]

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return (rows [L], found [L] bool) of ids [L] on the CPU; the row of an id that is not there is 0."""
        if self.ids is None:
            found = (ids >= 0) & (ids < len(self.vectors))
            return torch.where(found, ids, 0), found
        if len(self.ids) == 0:
            return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        place = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        found = self.ids[place] == ids
        rows = place if self.rows is None else self.rows[place]
        return torch.where(found, rows, 0), found

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return (vectors [L, D] float32, found [L] bool); zeros where an id is not there. Reads those rows alone."""
        rows, found = self.find(ids)
        if len(self.vectors) == 0:
            return torch.zeros(len(ids), self.width), found
        return self.vectors[rows].float() * found[:, None], found


def open_vectors(
    path: str | Path, *, ids: str | Path | None = None, width: int | None = None, version: str | None = None
) -> VectorFile:
    """Open a folder, a .npy or a .safetensors file.

    Args:
        path: see the head of this module.
        ids: .npy of int64 ids, for a .npy of vectors.
        width: D that is needed; None takes any.
        version: what is needed; None takes any.

    Raises:
        VectorFileError: see the class; the text says file, rule and value.
    """
    path = Path(path)
    if path.is_dir():
        found = _open_folder(path)
    elif path.suffix == ".npy":
        found = VectorFile(path, "", None if ids is None else _ids(_array(Path(ids)), Path(ids)), None, _npy(path))
    elif path.suffix == ".safetensors":
        found = _open_safetensors(path)
    else:
        raise VectorFileError("is no folder of vectors, .npy or .safetensors file", file=str(path))
    if ids is not None and path.suffix != ".npy":
        raise VectorFileError("has its own ids; leave `ids` out", file=str(path))
    if found.rows is None and found.ids is not None and len(found.ids) != len(found.vectors):
        raise VectorFileError(f"has {len(found.vectors)} vectors and {len(found.ids)} ids", file=str(path))
    if width is not None and found.width != width:
        raise VectorFileError(f"vectors have width {found.width}; {width} is needed", file=str(path))
    if version is not None and found.version != version:
        raise VectorFileError(
            f"vectors have version {found.version[:12]!r}; {version[:12]!r} is needed",
            file=str(path),
            option="make them again with the tower's present weights (recis towers precompute)",
        )
    if found.ids is None or found.rows is not None:
        return found
    order = found.ids.argsort()
    return _sorted(found, order)


def _sorted(found: VectorFile, order: Tensor) -> VectorFile:
    assert found.ids is not None
    ids = found.ids[order]
    if bool((ids.diff() == 0).any()):
        twice = int(ids[:-1][ids.diff() == 0][0])
        raise VectorFileError("an id has two vectors", file=str(found.path), value=twice)
    return VectorFile(found.path, found.version, ids, order, found.vectors)


def _open_folder(path: Path) -> VectorFile:
    manifest = read_manifest(path, FORMAT)
    ids, rows, vectors = read_arrays(path)
    said = (manifest["num_ids"], manifest["num_ids"], manifest["num_rows"], manifest["width"], manifest["dtype"])
    there = (len(ids), len(rows), *vectors.shape, str(vectors.dtype).removeprefix("torch."))
    if said != there:
        raise VectorFileError(f"ids, rows, vectors, width, dtype are {there}; the manifest says {said}", file=str(path))
    return VectorFile(path, manifest["version"], ids, rows, vectors)


def read_manifest(path: Path, kind: str) -> dict[str, Any]:
    """Return the manifest of a folder that a finished precompute wrote, its files of the size it says.

    Raises:
        VectorFileError: it has none, is of another kind, or a file was cut short.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    except OSError as error:
        raise VectorFileError(
            f"has no {MANIFEST}",
            file=str(path),
            option="it is the last file a finished precompute writes: run it again",
        ) from error
    except ValueError as error:
        raise VectorFileError(f"is not whole JSON ({error})", file=str(path / MANIFEST)) from error
    if manifest.get("format") != kind or manifest.get("format_version") != FORMAT_VERSION:
        raise VectorFileError(
            f"is no {kind} of version {FORMAT_VERSION}; it says {manifest.get('format')!r}", file=str(path / MANIFEST)
        )
    for name, size in manifest["bytes"].items():
        there = (path / name).stat().st_size if (path / name).exists() else None
        if there != size:
            raise VectorFileError(f"has {there} bytes; the manifest says {size}", file=str(path / name))
    return manifest


def read_arrays(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [N], rows [N] and vectors [R, D] of a folder, mapped."""
    return (_ids(_array(path / IDS), path / IDS), _ids(_array(path / ROWS), path / ROWS), _npy(path / VECTORS))


def read_lengths(path: Path) -> Tensor:
    """Return lengths [R] of a folder of states."""
    return _ids(_array(path / LENGTHS), path / LENGTHS)


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)  # "c": torch warns of memory it could not write to
    except (OSError, ValueError, EOFError) as error:
        raise VectorFileError(f"is no whole .npy file: {error}", file=str(path)) from error


def _ids(array: np.ndarray, path: Path) -> Tensor:
    if array.ndim != 1 or array.dtype != np.int64:
        raise VectorFileError(f"must be int64 [N]; got {array.dtype} {array.shape}", file=str(path))
    return torch.from_numpy(array)


def _npy(path: Path) -> Tensor:
    array = _array(path)
    if array.ndim != 2 or array.dtype not in (np.float16, np.float32):
        raise VectorFileError(
            f"vectors must be float16 or float32 [N, D]; got {array.dtype} {array.shape}", file=str(path)
        )
    return torch.from_numpy(array)


def _open_safetensors(path: Path) -> VectorFile:
    """Map both tensors: a header of 8 + n bytes says at which bytes each one lies."""
    try:
        with path.open("rb") as file:
            head_bytes = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(head_bytes if head_bytes < 2**26 else 0))
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise VectorFileError(f"is no whole safetensors file: {error}", file=str(path)) from error
    parts = {}
    for name, dtypes in (("ids", {"I64": torch.int64}), ("vectors", _DTYPES)):
        told = header.get(name)
        if told is None:
            raise VectorFileError(f"has no tensor {name!r}; there are {sorted(header)}", file=str(path))
        if told["dtype"] not in dtypes:
            raise VectorFileError(f"{name} must be {' or '.join(dtypes)}; got {told['dtype']}", file=str(path))
        dtype, (first, last) = dtypes[told["dtype"]], told["data_offsets"]
        num_bytes = math.prod(told["shape"]) * dtype.itemsize
        if last - first != num_bytes or 8 + head_bytes + last > size:
            raise VectorFileError(f"{name} needs {num_bytes} bytes up to {last}; the file is cut short", file=str(path))
        if num_bytes == 0:
            parts[name] = torch.zeros(told["shape"], dtype=dtype)
            continue
        mapped = np.memmap(path, mode="c", offset=8 + head_bytes + first, shape=(num_bytes,), dtype=np.uint8)
        parts[name] = torch.from_numpy(mapped).view(dtype).view(told["shape"])
    if parts["ids"].ndim != 1 or parts["vectors"].ndim != 2:
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        raise VectorFileError(f"needs ids [N] and vectors [N, D]; got {shapes}", file=str(path))
    return VectorFile(path, header.get("__metadata__", {}).get("version", ""), parts["ids"], None, parts["vectors"])
