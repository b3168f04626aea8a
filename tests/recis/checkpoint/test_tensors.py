"""Tensor files: both ways with the safetensors package, every type, damage, and a disk that is full."""

import errno
import hashlib
import os

import pytest
import safetensors.torch
import torch

from recis.checkpoint.tensors import hash_file, read_tensors, write_bytes, write_tensors
from recis.errors import CheckpointError

TENSORS = {
    "weight": torch.arange(6, dtype=torch.float32).view(3, 2),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "ids": torch.tensor([-(2**63), 0, 2**63 - 1]),
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.tensor([1, 2, 255], dtype=torch.uint8),
    "words": torch.tensor([1, 2**32 - 1], dtype=torch.uint32),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "strided": torch.arange(6).view(2, 3).t(),
}


def same(have, want):
    assert have.keys() == want.keys()
    for name in want:
        assert have[name].dtype == want[name].dtype, name
        assert torch.equal(have[name], want[name]), name


def test_round_trip(tmp_path):
    entry = write_tensors(tmp_path / "a.safetensors", TENSORS, metadata={"tree": "{}"}, slices=(3, 9), rows=3)
    tensors, metadata = read_tensors(tmp_path / "a.safetensors")
    same(tensors, TENSORS)
    assert metadata == {"tree": "{}"}
    content = (tmp_path / "a.safetensors").read_bytes()
    assert entry.bytes == len(content)
    assert entry.sha256 == hashlib.sha256(content).hexdigest()
    assert (entry.slices, entry.rows) == ((3, 9), 3)
    assert hash_file(tmp_path / "a.safetensors") == (entry.bytes, entry.sha256)


def test_bool_is_stored_as_bool(tmp_path):  # conformance A39
    write_tensors(tmp_path / "a", {"flags": TENSORS["flags"]})
    assert b'"dtype":"BOOL"' in (tmp_path / "a").read_bytes()


def test_safetensors_reads_ours(tmp_path):
    write_tensors(tmp_path / "a", TENSORS)
    same(safetensors.torch.load_file(tmp_path / "a"), {name: value.contiguous() for name, value in TENSORS.items()})


def test_we_read_theirs(tmp_path):
    theirs = {name: value.contiguous() for name, value in TENSORS.items()}
    safetensors.torch.save_file(theirs, tmp_path / "a", metadata={"k": "v"})
    tensors, metadata = read_tensors(tmp_path / "a")
    same(tensors, TENSORS)
    assert metadata == {"k": "v"}


def test_equal_tensors_give_equal_files(tmp_path):
    first = write_tensors(tmp_path / "a", TENSORS)
    second = write_tensors(tmp_path / "b", dict(reversed(TENSORS.items())))
    assert first == second


def test_type_that_cannot_be_saved(tmp_path):
    with pytest.raises(CheckpointError, match=r"torch\.complex64 cannot be saved"):
        write_tensors(tmp_path / "a", {"x": torch.zeros(1, dtype=torch.complex64)})


@pytest.mark.parametrize("size", [0, 4, 8, 40, -1])
def test_truncated(tmp_path, size):
    write_tensors(tmp_path / "a", TENSORS)
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match=str(tmp_path / "a")):
        read_tensors(tmp_path / "a")


def test_header_that_points_outside(tmp_path):
    header = b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}  '
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="malformed header"):
        read_tensors(tmp_path / "a")


def test_an_existing_file_is_never_overwritten(tmp_path):
    write_bytes(tmp_path / "a", b"first")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_bytes(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"


def test_full_disk(tmp_path, monkeypatch):
    written = 0
    write = os.write

    def full(descriptor, piece):
        nonlocal written
        if written + len(piece) > 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        written += len(piece)
        return write(descriptor, piece)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CheckpointError, match=r"No space left on device, needs .* kB.*free space"):
        write_tensors(tmp_path / "a", {"x": torch.zeros(10_000)})


def test_short_writes_are_continued(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, piece: write(descriptor, piece[:7]))
    entry = write_tensors(tmp_path / "a", TENSORS)
    monkeypatch.undo()
    assert hash_file(tmp_path / "a") == (entry.bytes, entry.sha256)


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(CheckpointError, match="name a folder that can be written"):
        write_tensors(tmp_path / "a" / "b", TENSORS)
