"""Run folders: nothing half-written is ever seen, left-overs go, rotation keeps what is needed."""

import os
import signal
import subprocess
import sys

import pytest

from recis.checkpoint.folder import clean, commit, make_tmp, rotate
from recis.checkpoint.manifest import MANIFEST_NAME, Base, Manifest, list_checkpoints, manifest_sha256, step_folder
from recis.errors import CheckpointError


def write(run, step, base=None):
    folder = run / step_folder(step)
    folder.mkdir(parents=True)
    on = None if base is None else Base(step=base, manifest_sha256=manifest_sha256(run / step_folder(base)))
    manifest = Manifest(
        step=step,
        world_size=1,
        kind="full" if on is None else "delta",
        base=on,
        seed=0,
        clock_s=0,
        files={},
        tables={},
        dense={},
        reader=None,
        schedules=None,
        metrics={},
        trainer=None,
        lib={},
    )
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return folder


def steps(run):
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(run)]


def test_commit_makes_the_folder_appear(tmp_path):
    tmp = make_tmp(tmp_path / "run", "step_000000001")
    (tmp / MANIFEST_NAME).write_text("{}")
    assert steps(tmp_path / "run") == []
    commit(tmp, tmp_path / "run" / "step_000000001")
    assert steps(tmp_path / "run") == [1]
    assert not tmp.exists()


def test_commit_replaces_a_broken_one(tmp_path):
    old = write(tmp_path, 5)
    (old / "left").write_text("x")
    tmp = make_tmp(tmp_path, "step_000000005")
    (tmp / MANIFEST_NAME).write_text("new")
    commit(tmp, old)
    assert (old / MANIFEST_NAME).read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000005"]


def test_clean(tmp_path):
    write(tmp_path, 1)
    tmp = make_tmp(tmp_path, "step_000000002")
    (tmp / "file").write_text("x")
    (tmp_path / ".tmp-config.json").write_text("x")
    assert len(clean(tmp_path)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000001"]
    assert clean(tmp_path / "nothing") == []


def test_rotate_keeps_newest_and_protected(tmp_path):
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
    gone = rotate(tmp_path, 2, [tmp_path / step_folder(1), tmp_path / step_folder(99)])
    assert steps(tmp_path) == [1, 4, 5]
    assert [path.name for path in gone] == ["step_000000002", "step_000000003"]


def test_rotate_keeps_the_bases_of_deltas(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    write(tmp_path, 3, base=2)
    write(tmp_path, 4, base=3)
    rotate(tmp_path, 1)
    assert steps(tmp_path) == [2, 3, 4]


def test_rotate_survives_a_damaged_manifest(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 2) / MANIFEST_NAME).write_text("{")
    write(tmp_path, 3)
    rotate(tmp_path, 2)
    assert steps(tmp_path) == [2, 3]


def test_rotate_needs_one():
    with pytest.raises(ValueError, match="at least 1"):
        rotate(None, 0)  # type: ignore[arg-type]


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write \(Not a directory\)"):
        make_tmp(tmp_path / "file", "step_000000001")


def test_killed_while_deleting_leaves_no_half_checkpoint(tmp_path):
    """A child deletes a checkpoint of many files and is killed at its first unlink."""
    folder = write(tmp_path, 1)
    for index in range(50):
        (folder / f"f{index}").write_text("x")
    child = (
        "import os, signal, sys; from pathlib import Path; from recis.checkpoint import folder\n"
        "unlink = os.unlink\n"
        "def die(*a, **k): unlink(*a, **k); os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.unlink = die\n"
        f"folder.remove(Path({str(folder)!r}))\n"
    )
    path = os.pathsep.join(item for item in sys.path if item)
    done = subprocess.run([sys.executable, "-c", child], env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert steps(tmp_path) == []
    assert [item.name.startswith(".tmp-removed-") for item in tmp_path.iterdir()] == [True]
    clean(tmp_path)
    assert list(tmp_path.iterdir()) == []
