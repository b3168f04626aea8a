"""Damage and failed saves: every flipped byte is named, the newest whole checkpoint is taken, nothing partial stays."""

import errno
import os
import resource
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recis.checkpoint import Saver, latest, list_checkpoints, load, load_latest, read_manifest, save, verify
from recis.checkpoint.tensors import read_tensors, write_tensors
from recis.errors import CheckpointError


def two_checkpoints(kit, run):
    tables = kit.table_set()
    kit.fill(tables["item"], [1, 2, 3])
    first = save(run, kit.boundary(tables, 1, dense={"w": torch.ones(3)}))
    kit.fill(tables["item"], [4], seed=1)
    second = save(run, kit.boundary(tables, 2, dense={"w": torch.ones(3)}))
    return first, second


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found_and_the_one_before_is_taken(kit, tmp_path_factory, caplog, data):
    run = tmp_path_factory.mktemp("run")
    first, second = two_checkpoints(kit, run)
    name = data.draw(st.sampled_from(sorted(path.name for path in second.iterdir() if path.name != "MANIFEST.json")))
    content = bytearray((second / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (second / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load(second, into=kit.target(kit.table_set(), {"w": torch.zeros(3)}))
    assert [fault for fault in verify(second) if name in fault]
    caplog.clear()
    assert latest(run) == first
    assert name in caplog.text
    assert "step_000000002 is skipped" in caplog.text


def test_a_damaged_load_leaves_the_target_alone(kit, tmp_path):
    _, second = two_checkpoints(kit, tmp_path)
    name = "table-item-00000-of-00001-000.safetensors"
    (second / name).write_bytes((second / name).read_bytes()[:-3])
    tables, dense = kit.table_set(), {"w": torch.zeros(3)}
    kit.fill(tables["item"], [99])
    with pytest.raises(CheckpointError, match="truncated or edited"):
        load(second, into=kit.target(tables, dense))
    assert tables["item"].ids().tolist() == [99]
    assert dense["w"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["MANIFEST.json", "dense-00000-of-00001.safetensors", "config.json"])
def test_fall_back(kit, tmp_path, name):
    first, second = two_checkpoints(kit, tmp_path)
    if name == "MANIFEST.json":
        (second / name).write_text((second / name).read_text()[:100])
    else:
        (second / name).unlink()
    loaded = load_latest(tmp_path, into=kit.target(kit.table_set(), {"w": torch.zeros(3)}))
    assert loaded is not None
    assert loaded.path == first


def test_none_is_whole(kit, tmp_path):
    for path in two_checkpoints(kit, tmp_path):
        (path / "config.json").write_text("edited")
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints is whole; the newest: .*config\.json"):
        latest(tmp_path)


def test_left_overs_are_not_checkpoints(kit, tmp_path):
    first, second = two_checkpoints(kit, tmp_path)
    second.rename(tmp_path / ".tmp-step_000000002-abcd")
    assert latest(tmp_path) == first


def test_verify_of_a_run_and_of_nothing(kit, tmp_path):
    _, second = two_checkpoints(kit, tmp_path)
    assert verify(tmp_path) == []
    (second / "stray").write_text("")
    assert verify(tmp_path) == [f"{second / 'stray'}: not in the manifest"]
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        verify(tmp_path / "nothing")


def rewrite(path, change):
    """Write a table file anew, with manifest and hashes that agree: only looking inside can find the fault."""
    import dataclasses

    name = "table-item-00000-of-00001-000.safetensors"
    fields, _ = read_tensors(path / name)
    (path / name).unlink()
    manifest = read_manifest(path)
    slices = manifest.files[name].slices
    entry = write_tensors(path / name, change(fields), slices=slices, rows=3)
    files = {**manifest.files, name: entry}
    (path / "MANIFEST.json").write_bytes(dataclasses.replace(manifest, files=files).to_bytes())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: {**f, "ids": torch.tensor([1, 1, 3])}, "has 1 ids twice"),
        (lambda f: {k: v[:2] for k, v in f.items()}, "has 2 rows, the manifest says 3"),
        (lambda f: {**f, "weight": f["weight"][:, :2]}, r"weight must be \('F32', \[3\]\) per row"),
        (lambda f: {k: v for k, v in f.items() if k != "state.m"}, r"state\.m must be .* got None"),
        (lambda f: {**f, "count": f["count"][:1]}, "one entry per id"),
    ],
    ids=["twice", "rows", "shape", "missing", "ragged"],
)
def test_verify_looks_inside(kit, tmp_path, change, text):
    import re

    tables = kit.table_set()
    kit.fill(tables["item"], [1, 2, 3])
    path = save(tmp_path, kit.boundary(tables))
    rewrite(path, change)
    faults = verify(path)
    assert any(re.search(text, fault) for fault in faults), faults


def test_full_disk(kit, tmp_path, monkeypatch):
    tables = kit.table_set()
    kit.fill(tables["item"], range(100))
    whole = save(tmp_path, kit.boundary(tables, 1))
    saver = Saver(tmp_path)
    write = os.write

    def full(descriptor, piece):
        if len(piece) > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, piece)

    monkeypatch.setattr(os, "write", full)
    saver.save(kit.boundary(tables, 2))
    with pytest.raises(CheckpointError, match=r"No space left on device.*earlier checkpoints are untouched"):
        saver.wait()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000001"]
    assert verify(whole) == []
    saver.save(kit.boundary(tables, 3))  # and the next one is fine again
    saver.close()
    assert latest(tmp_path) == tmp_path / "step_000000003"


def test_file_size_limit_of_the_system(kit, tmp_path):
    """The real thing: a child whose files may not pass 64 KiB."""
    child = (
        "import resource, signal, sys; from pathlib import Path; import torch\n"
        "from recis.checkpoint import Boundary, save; from recis.errors import CheckpointError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try: save(Path(sys.argv[1]), Boundary(step=1, dense={'w': torch.zeros(100_000)}))\n"
        "except CheckpointError as error: print(error)\n"
    )
    assert resource.RLIMIT_FSIZE is not None
    path = os.pathsep.join(item for item in sys.path if item)
    done = subprocess.run(
        [sys.executable, "-c", child, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_unwritable_run(kit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="name a folder that can be written"):
        save(tmp_path / "file" / "run", kit.boundary(kit.table_set()))


def test_a_save_shows_the_boundary_whatever_training_does_meanwhile(kit, tmp_path, monkeypatch):
    """Rows change while the writer is held back: the file has the values of the boundary."""
    tables = kit.table_set()
    kit.fill(tables["item"], range(1000))
    want = tables["item"].export()
    go = threading.Event()
    save_module = sys.modules["recis.checkpoint.save"]  # the package's `save` is the function
    parts = save_module._parts

    def held(*args, **more):
        go.wait(10)
        yield from parts(*args, **more)

    monkeypatch.setattr(save_module, "_parts", held)
    saver = Saver(tmp_path)
    dense = {"w": torch.ones(3)}
    saver.save(kit.boundary(tables, 1, dense=dense))
    dense["w"].zero_()
    kit.fill(tables["item"], range(500, 1500), seed=9)
    tables["item"].remove(torch.arange(100))
    go.set()
    path = saver.wait()
    assert path is not None
    saver.close()
    fresh, into = kit.table_set(), {"w": torch.zeros(3)}
    load(path, into=kit.target(fresh, into))
    have = fresh["item"].export()
    assert all(torch.equal(have[name], want[name]) for name in want)
    assert into["w"].tolist() == [1, 1, 1]


def test_rotation_and_the_best(kit, tmp_path):
    tables = kit.table_set()
    saver = Saver(tmp_path, keep=2, background=False)
    for step in range(1, 6):
        saver.save(kit.boundary(tables, step), protect=[2])
    saver.close()
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["2", "4", "5"]


def test_a_failed_save_closes_its_views(kit, tmp_path):
    tables = kit.table_set()
    kit.fill(tables["item"], [1])
    (tmp_path / "file").write_text("")
    saver = Saver(tmp_path / "file")
    for _ in range(2):  # an open view would make the second snapshot fail
        saver.save(kit.boundary(tables))
        with pytest.raises(CheckpointError, match="cannot write"):
            saver.wait()
    saver.close()
