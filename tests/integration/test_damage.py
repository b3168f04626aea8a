"""A full disk during a save and damaged checkpoints: one line, whole checkpoints only, and a run that goes on afterwards."""

import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import click_recipe
import pytest
from command import Done, content, recis, same_end

from recis.checkpoint import list_checkpoints, read_manifest
from recis.checkpoint.manifest import MANIFEST_NAME

RECIPE = "click_recipe:clicks"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return click_recipe.write(tmp_path_factory.mktemp("good") / "clicks.parquet", click_recipe.table())


@pytest.fixture(scope="module")
def finished(good, tmp_path_factory) -> Path:
    """A run with checkpoints 3, 6 and 8; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert recis("train", RECIPE, "--data", good, "--out", folder).code == 0
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def train(data: object, out: Path, *more: str) -> Done:
    return recis("train", RECIPE, "--data", data, "--out", out, *more)


def flip_bit(path: Path, place: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 4
    path.write_bytes(bytes(data))


# ---- a full disk


@contextmanager
def small_disk(folder: Path, size: int):
    """Mount a file system of `size` bytes; yields a function that makes it larger."""
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("async_save", ["true", "false"])
def test_full_disk_during_save(good, finished, tmp_path, async_save):
    checkpoint = sum(-(-len(data) // 4096) * 4096 for data in content(list_checkpoints(finished)[0]).values())
    with small_disk(tmp_path / "disk", int(1.8 * checkpoint)) as enlarge:
        out = tmp_path / "disk" / "run"
        done = train(good, out, "--set", f"async_save={async_save}")
        assert done.code == 1
        assert re.search(r"cannot write \(No space left on device.*free space .*then resume", done.error)
        assert str(out) in done.error
        assert [folder.name for folder in list_checkpoints(out)] == ["step_000000003"]
        assert not list(out.glob(".tmp*"))
        assert recis("verify", out).code == 0
        assert recis("inspect", out).code == 0
        enlarge(20 * checkpoint)
        assert recis("train", RECIPE, "--out", out, "--resume").code == 0
        same_end(out, finished)


def test_full_disk_at_every_size(good, tmp_path):
    """From no room at all upwards: one line each time, whole checkpoints only, and nothing that stops a later run."""
    with small_disk(tmp_path / "disk", 4096) as enlarge:
        out = tmp_path / "disk" / "run"
        for kib in (8, 16, 24, 48, 80, 120):
            enlarge(kib * 1024)
            done = train(good, out, "--resume")
            if done.code == 0:
                break
            assert done.code == 1
            assert "No space left on device" in done.error
            if list_checkpoints(out):
                assert recis("verify", out).code == 0
        enlarge(4 * 2**20)
        assert train(good, out, "--resume").code == 0
        assert recis("verify", out).code == 0


def test_full_disk_during_predict(good, finished, tmp_path):
    with small_disk(tmp_path / "disk", 4096):
        out = tmp_path / "disk" / "out.parquet"
        done = recis("predict", "--run", finished, "--data", good, "--out", out)
        assert done.code == 1
        assert re.search(rf"--out {out}: cannot be written \(.*No space left.*free space, or name another", done.error)
        assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.usefixtures("finished")  # by now all kernels are compiled: their cache must not meet the limit
def test_files_that_may_not_grow(good, tmp_path):
    """Without root: the system refuses to write beyond a size, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
    try:
        done = train(good, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.code == 1
    assert re.search(r"cannot write \(File too large", done.error)
    assert list_checkpoints(tmp_path / "run") == []
    assert train(good, tmp_path / "run", "--resume").code == 0
    assert recis("verify", tmp_path / "run").code == 0


# ---- checkpoints


def newer_version(path: Path) -> None:
    body = json.loads((path / MANIFEST_NAME).read_text())
    del body["checksum"]
    body["version"] = 99
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["checksum"] = sha256(canonical.encode()).hexdigest()
    (path / MANIFEST_NAME).write_text(json.dumps(body))


def truncated(path: Path) -> None:
    file = next(path.glob("table-user-*"))
    os.truncate(file, file.stat().st_size - 7)


DAMAGE = {
    "another version": (newer_version, r"version 99, this recis reads up to version 1; load it with the release"),
    "truncated": (truncated, r"table-user-.*has \d+ bytes, the manifest says \d+: truncated or edited"),
    "bit flipped in a table": (lambda path: flip_bit(next(path.glob("table-user-*"))), r"SHA-256 does not match"),
    "bit flipped in the manifest": (lambda path: flip_bit(path / MANIFEST_NAME), r"MANIFEST.json: "),
    "a file gone": (lambda path: next(path.glob("dense-*")).unlink(), r"dense-.*: missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoint(good, run, case, caplog):
    damage, message = DAMAGE[case]
    newest = list_checkpoints(run)[-1]
    damage(newest)
    verified = recis("verify", run)
    assert verified.code == 1
    assert "FAULTY" in verified.out
    assert re.search(message, verified.out)
    assert newest.name in verified.out

    alone = recis("eval", "--run", newest, "--data", good)  # asked for by name: no other one will do
    assert alone.code == 1
    assert re.search(message, alone.error)

    older = json.loads(recis("eval", "--run", list_checkpoints(run)[-2], "--data", good, "--json").out)["metrics"]
    with caplog.at_level(logging.WARNING, "recis"):
        fallen_back = recis("eval", "--run", run, "--data", good, "--json")
    assert fallen_back.code == 0
    assert json.loads(fallen_back.out)["metrics"] == older
    assert re.search(rf"checkpoint {newest.name} is skipped: .*{message}", caplog.text)

    assert recis("train", RECIPE, "--out", run, "--resume").code == 0  # back to step 6, and on to the end again
    assert recis("verify", run).code == 0


def test_resumed_after_damage_equals_the_straight_run(run, finished):
    flip_bit(next(list_checkpoints(run)[-1].glob("table-user-*")))
    assert recis("train", RECIPE, "--out", run, "--resume").code == 0
    same_end(run, finished)


def test_no_checkpoint_is_whole(good, run):
    for checkpoint in list_checkpoints(run):
        flip_bit(checkpoint / MANIFEST_NAME)
    before = content(run)
    for argv in (("eval", "--run", run, "--data", good), ("train", RECIPE, "--out", run, "--resume")):
        done = recis(*argv)
        assert done.code == 1
        assert "none of its 3 checkpoints is whole; the newest: " in done.error
        assert "restore one from a copy" in done.error
    assert content(run) == before


@pytest.mark.parametrize("name", ["config.json", "recipe.json"])
def test_damaged_papers_of_a_run(good, run, name):
    (run / name).write_text('{"name": "cl')
    done = recis("eval", "--run", run, "--data", good)
    assert done.code == 2
    assert re.search(rf"{run}/{name}: .*whole JSON", done.error)


def test_as_a_process(good, run):
    """What reaches a shell: exit codes, a warning about the fall-back on stderr, one line and no traceback."""
    flip_bit(next(list_checkpoints(run)[-1].glob("table-user-*")))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from recis.cli import main\n"
        "first = main(['eval', '--run', sys.argv[2], '--data', sys.argv[3], '--json'])\n"
        "sys.exit(10 * first + main(['verify', sys.argv[2]]))"
    )
    tests = str(Path(click_recipe.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, tests, str(run), str(good)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    result, *verified = done.stdout.splitlines()
    assert json.loads(result)["n"] == 256
    assert verified[0] == f"{run}: FAULTY"
    assert "checkpoint step_000000008 is skipped: " in done.stderr
    assert read_manifest(list_checkpoints(run)[-2]).step == 6
