"""Read and write tensor files in the safetensors format, in one pass, hashed on the way.

    8 bytes: N, little endian | N bytes JSON {"name": {"dtype", "shape", "data_offsets"}, "__metadata__": {...}} | data

Written here and not through the safetensors package because a table's part is hashed while it is written and read
without a second copy; files of either side are read by the other (a test holds that). Cost: SHA-256, about 1.4 GB/s per
core with SHA instructions, next to which write and read from the page cache are small.
"""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis.checkpoint.manifest import FileEntry
from recis.errors import CheckpointError

_NAME_OF = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}
_DTYPE_OF = {name: dtype for dtype, name in _NAME_OF.items()}
_WRITE_BYTES = 1 << 20  # a piece is hashed and then written: small enough to be still in cache


def dtype_name(dtype: torch.dtype) -> str:
    """Return the format's name of a type ("F32"); CheckpointError when the format has none."""
    if dtype not in _NAME_OF:
        raise CheckpointError(f"dtype {dtype} cannot be saved; use one of {', '.join(map(str, _NAME_OF))}")
    return _NAME_OF[dtype]


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    slices: tuple[int, int] | None = None,
    rows: int | None = None,
) -> FileEntry:
    """Write a new file with `tensors`, fsync it and return its manifest entry.

    Args:
        path: must not exist.
        tensors: name -> tensor on the CPU; the format orders them by falling item size, then name.
        metadata: strings kept in the file's header.
        slices, rows: passed into the entry, for a part of a table.

    Raises:
        CheckpointError: a type that the format lacks; the disk is full or the folder cannot be written.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in ordered:
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start 8-byte aligned
    digest = hashlib.sha256()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            written = _write(descriptor, len(text).to_bytes(8, "little") + text, digest)
            for _, tensor in ordered:
                written += _write(descriptor, _bytes_of(tensor), digest)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise storage_error(error, path, needed=offset) from error
    return FileEntry(bytes=written, sha256=digest.hexdigest(), slices=slices, rows=rows)


def write_bytes(path: Path, content: bytes) -> FileEntry:
    """Write a small new file, fsync it and return its entry. Raises as write_tensors."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            digest = hashlib.sha256()
            written = _write(descriptor, content, digest)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise storage_error(error, path, needed=len(content)) from error
    return FileEntry(bytes=written, sha256=digest.hexdigest())


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole file: its tensors, all views of one buffer, and its metadata.

    Raises:
        CheckpointError: the file cannot be read or is not in the format.
    """
    try:
        buffer = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); take another checkpoint") from error
    header, start = _header(buffer, path)
    metadata = header.pop("__metadata__", {})
    data = torch.from_numpy(buffer)[start:]
    tensors = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = _DTYPE_OF[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if not 0 <= begin <= end <= data.numel() or (end - begin) != int(np.prod(shape)) * dtype.itemsize:
                raise ValueError(f"{begin}:{end} of {data.numel()} bytes for shape {shape}")
            piece = data[begin:end]
            if piece.data_ptr() % dtype.itemsize:  # a file of another writer may not be aligned
                piece = piece.clone()
            tensors[name] = piece.view(dtype).view(shape)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: tensor {name!r} has a malformed header ({error})") from error
    return tensors, metadata


def _header(buffer: np.ndarray, path: Path) -> tuple[dict[str, Any], int]:
    size = int.from_bytes(buffer[:8].tobytes(), "little") if buffer.size >= 8 else -1
    if not 0 <= size <= buffer.size - 8:
        raise CheckpointError(f"{path}: truncated, {buffer.size} bytes do not hold the file's header; take another")
    try:
        header = json.loads(buffer[8 : 8 + size].tobytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error}); the file is damaged") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object; the file is damaged")
    return header, 8 + size


def hash_file(path: Path) -> tuple[int, str]:
    """Return (bytes, SHA-256) of a file as it is on disk; CheckpointError when it cannot be read."""
    digest = hashlib.sha256()
    size = 0
    buffer = memoryview(bytearray(_WRITE_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size += count
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return size, digest.hexdigest()


def storage_error(error: OSError, path: Path, *, needed: int | None = None) -> CheckpointError:
    """Return the one-line form of a failed write: what was written where, why it failed, what to do."""
    need = ""
    if needed:
        need = f", needs {needed / 1e6:.1f} MB" if needed >= 1e5 else f", needs {needed / 1e3:.1f} kB"
    reason = error.strerror or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        way_out = "free space or lower keep_checkpoints, then resume; earlier checkpoints are untouched"
    else:
        way_out = "name a folder that can be written; earlier checkpoints are untouched"
    return CheckpointError(f"{path}: cannot write ({reason}{need}); {way_out}")


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def _write(descriptor: int, content: bytes | memoryview, digest: Any) -> int:
    view = memoryview(content)
    for start in range(0, len(view), _WRITE_BYTES):
        piece = view[start : start + _WRITE_BYTES]
        digest.update(piece)
        while len(piece):  # a write may be short when the disk fills up
            piece = piece[os.write(descriptor, piece) :]
    return len(view)
