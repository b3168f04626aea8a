"""The manifest: round trip, its own checksum, versions, owner slices, and which folders count as checkpoints."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recis.checkpoint.manifest import (
    MANIFEST_NAME,
    NUM_SLICES,
    Base,
    FileEntry,
    Manifest,
    TableEntry,
    list_checkpoints,
    manifest_sha256,
    parse_manifest,
    rank_slices,
    read_manifest,
    step_folder,
)
from recis.checkpoint.parts import slice_of
from recis.errors import CheckpointError

MANIFEST = Manifest(
    step=1000,
    world_size=2,
    kind="delta",
    base=Base(step=900, manifest_sha256="ab" * 32),
    seed=7,
    clock_s=1_700_000_000,
    files={"table-item-00000-of-00002-000.safetensors": FileEntry(bytes=5, sha256="c", slices=(0, 32768), rows=1)},
    tables={"item": TableEntry(dim=64, dtype="F32", rows=5, optimizer={"lr": 0.1}, initializer={}, t=9, tombstones=2)},
    dense={"w": {"shape": [2, 3], "dtype": "F32"}},
    reader={"lanes": [[0, 1, 2]]},
    schedules={},
    metrics={"auc": 0.5},
    trainer=None,
    lib={"torch": "2.13.0"},
)


def parse(content: bytes) -> Manifest:
    return parse_manifest(content, Path("run") / MANIFEST_NAME)


def test_round_trip():
    assert parse(MANIFEST.to_bytes()) == MANIFEST


def test_fields_of_the_format():
    body = json.loads(MANIFEST.to_bytes())
    assert body["format"] == "recis-checkpoint"
    assert body["version"] == 1
    assert body["tables"]["item"]["tombstones"] == 2
    assert body["files"]["table-item-00000-of-00002-000.safetensors"]["bytes"] == 5


@given(st.integers(0, len(MANIFEST.to_bytes()) - 1), st.integers(0, 7))
def test_every_flipped_bit_is_found(position, bit):
    content = bytearray(MANIFEST.to_bytes())
    content[position] ^= 1 << bit
    try:
        got = parse(bytes(content))
    except (CheckpointError, UnicodeDecodeError):
        return
    assert got == MANIFEST  # white space outside strings may change without a change of content


@pytest.mark.parametrize("size", [0, 1, 100, -2])
def test_truncated(size):
    with pytest.raises(CheckpointError, match="not whole JSON"):
        parse(MANIFEST.to_bytes()[:size])


def test_newer_version_says_what_to_do():
    body = json.loads(MANIFEST.to_bytes())
    body["version"] = 2
    with pytest.raises(CheckpointError, match=r"version 2.*up to version 1.*upgrade recis"):
        parse(json.dumps(body).encode())


def test_other_format():
    with pytest.raises(CheckpointError, match="must be 'recis-checkpoint'; got 'zip'"):
        parse(b'{"format": "zip"}')


def test_file_outside_the_folder_is_refused():
    bad = replace(MANIFEST, files={"../../etc/passwd": FileEntry(bytes=1, sha256="x")})
    with pytest.raises(CheckpointError, match="malformed"):
        parse(bad.to_bytes())


def test_no_manifest(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(tmp_path)


def test_slices_by_hand():  # conformance A23
    assert [rank_slices(rank, 3) for rank in range(3)] == [(0, 21846), (21846, 43691), (43691, 65536)]
    assert [rank_slices(rank, 5) for rank in (3, 4)] == [(39322, 52429), (52429, 65536)]


@given(st.integers(1, 70_000))
def test_slices_cover_everything_once(world_size):
    ranges = [rank_slices(rank, world_size) for rank in range(min(world_size, 50))]
    assert ranges[0][0] == 0
    assert rank_slices(world_size - 1, world_size)[1] == NUM_SLICES
    assert all(stop == first for (_, stop), (first, _) in pairwise(ranges))
    assert all(0 <= stop - first - NUM_SLICES // world_size <= 1 for first, stop in ranges)


def test_rank_outside():
    with pytest.raises(ValueError, match="rank 3 of 3"):
        rank_slices(3, 3)


def test_slice_of_by_hand():  # conformance B7
    assert slice_of(torch.tensor([1, 2, 65537, 40000, -1])).tolist() == [52012, 33767, 23617, 18545, 24353]


def test_list_checkpoints(tmp_path):
    for name in (step_folder(20), step_folder(3), step_folder(2_000_000_000), ".tmp-step_000000004-ab", "step_5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST_NAME).write_bytes(MANIFEST.to_bytes())
    (tmp_path / step_folder(7)).mkdir()  # no manifest: not a checkpoint
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step_000000003",
        "step_000000020",
        "step_2000000000",
    ]
    assert list_checkpoints(tmp_path / "nothing") == []
    assert len(manifest_sha256(tmp_path / step_folder(3))) == 64
