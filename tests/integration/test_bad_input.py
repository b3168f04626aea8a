"""Bad input to the commands: one line that names file, row or feature and the way out, and nothing half-made left behind.

Each test runs the command as a user does, and looks at what is on the disk afterwards: a run that was there before must
still be usable, byte for byte, and a run that failed must leave nothing that a later one would take for good.
"""

import json
import logging
import math
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
import pyarrow as pa
import pytest
from command import Done, recis

from recis.checkpoint import list_checkpoints, read_manifest
from recis.checkpoint.manifest import MANIFEST_NAME
from recis.io.parquet import ParquetFormat
from recis.trainer import DenseAdamW

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


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_end(run: Path, other: Path) -> None:
    """The newest checkpoints are equal in every byte of every tensor and in the reader's position."""
    ours, theirs = (read_manifest(list_checkpoints(folder)[-1]) for folder in (run, other))
    assert ours.step == theirs.step
    assert ours.reader == theirs.reader
    for name in {*ours.files, *theirs.files} - {"config.json"}:
        assert ours.files[name].sha256 == theirs.files[name].sha256, name


def flip_bit(path: Path, place: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 4
    path.write_bytes(bytes(data))


# ---- data


def changed(column: str, row: int, value: object, kind: pa.DataType | None = None) -> pa.Table:
    """Return good rows with one value replaced."""
    rows = click_recipe.table()
    values = rows[column].to_pylist()
    values[row] = value
    return rows.set_column(rows.column_names.index(column), column, pa.array(values, kind))


BAD_DATA = {
    "wrong column": (
        click_recipe.table().rename_columns(["user", "items", "brand", "prices", "click"]),
        r"column 'price': the file has no such column; did you mean 'prices'\?",
    ),
    "text for numbers": (
        click_recipe.table(price=[f"{n} EUR" for n in range(256)]),
        r"column 'price': .*string.*Strings\('price'\)",
    ),
    "numbers with a fraction for ids": (click_recipe.table(user=[0.5] * 256), r"column 'user': .*double.*"),
    "NaN": (changed("price", 230, math.nan), r"row group 2, row 30, column 'price', value nan: NaN or infinite .*skip"),
    "infinite": (changed("price", 101, -math.inf), r"row group 1, row 1, column 'price', value -inf: NaN or infinite"),
    "null": (changed("price", 7, None), r"row group 0, row 7, column 'price': a null, .*; set default=\.\.\. for"),
    "label outside its range": (
        changed("click", 255, 2),
        r"row group 2, row 55, column 'click', value 2.0: label outside \[0.0, 1.0\]; set Label\('click', low=",
    ),
    "outside the domain of a feature": (changed("price", 3, -1.5), r"row 3.*'price'.*-1.5"),
    "no rows": (click_recipe.table(0), r"no rows at all in 1 files"),
}


@pytest.mark.parametrize("case", BAD_DATA)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_bad_values(case, command, finished, tmp_path):
    rows, message = BAD_DATA[case]
    path = click_recipe.write(tmp_path / "bad.parquet", rows)
    before = content(finished)
    done = train(path, tmp_path / "run") if command == "train" else recis("eval", "--run", finished, "--data", path)
    assert done.code == 1
    assert str(path) in done.error
    assert re.search(message, done.error)
    assert content(finished) == before
    if (
        command == "train" and (tmp_path / "run").exists()
    ):  # the fault came after some steps: what is whole stays usable
        assert recis("verify", tmp_path / "run").code == 0
        assert recis("eval", "--run", tmp_path / "run", "--data", finished.parent / "none").code == 2


def test_a_fault_after_some_steps_leaves_whole_checkpoints(good, tmp_path):
    path = click_recipe.write(tmp_path / "bad.parquet", changed("click", 250, 7))
    assert train(path, tmp_path / "run", "--set", "evaluated=no").code == 1
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step_000000003", "step_000000006"]
    assert recis("verify", tmp_path / "run").code == 0
    assert recis("eval", "--run", tmp_path / "run", "--data", good).code == 0
    click_recipe.write(path, click_recipe.table())  # other bytes than those the position in the checkpoint is about
    done = train(path, tmp_path / "run", "--resume")
    assert done.code == 1
    assert re.search(rf"{path}: \d+ bytes here, \d+ in the checkpoint; put the files back, or start a new", done.error)


@pytest.mark.parametrize("name", ["bad.parquet", "bad.orc", "bad.csv", "bad.jsonl"])
@pytest.mark.parametrize("kind", ["garbage", "empty", "missing"])
def test_bad_files(finished, tmp_path, name, kind):
    path = tmp_path / name
    if kind != "missing":
        path.write_bytes(b"" if kind == "empty" else b"\x00\xff\xfe garbage \x80" * 40)
    done = recis("predict", "--run", finished, "--data", path, "--out", tmp_path / "out.parquet")
    assert done.code == (2 if kind == "missing" else 1)
    assert str(path) in done.error
    assert {"empty": "the file is empty (0 bytes); remove it", "missing": "no such file", "garbage": ""}[
        kind
    ] in done.error
    assert not (tmp_path / "out.parquet").exists()
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize("damage", ["truncated", "page"])
def test_a_damaged_parquet_file(good, tmp_path, damage):
    path = tmp_path / "bad.parquet"
    data = good.read_bytes()
    path.write_bytes(
        data[:-100] if damage == "truncated" else data[:60] + bytes(b ^ 0x55 for b in data[60:400]) + data[400:]
    )
    done = train(path, tmp_path / "run")
    assert done.code == 1
    assert re.search(rf"{path}.*cannot be read as Parquet: .*; write the file again; it is damaged", done.error)
    assert not (tmp_path / "run").exists()


def test_a_negative_length(good, tmp_path, monkeypatch):
    read = ParquetFormat.read

    def damaged(self, unit, sources, **more):
        for batch in read(self, unit, sources, **more):
            offsets = pa.array([0, 3, 1, *([4] * (batch.num_rows - 2))], pa.int32())
            broken = pa.Array.from_buffers(
                pa.list_(pa.int64()), batch.num_rows, [None, offsets.buffers()[1]], children=[pa.array([1, 2, 3, 4])]
            )
            place = batch.schema.names.index("items")
            columns = [broken if index == place else column for index, column in enumerate(batch.columns)]
            yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names)

    monkeypatch.setattr(ParquetFormat, "read", damaged)
    done = train(good, tmp_path / "run")
    assert done.code == 1
    assert f"{good}, row group 0, column 'items': a list of negative length; write the file again" in done.error
    assert not (tmp_path / "run").exists()


# ---- arguments


def test_unknown_recipe(tmp_path):
    for name, way_out in (
        ("dmeo", "no recipe 'dmeo'; did you mean 'demo'?"),
        ("no_such_module:run", "cannot be imported: No module named 'no_such_module'"),
        ("click_recipe:clikcs", "has no attribute 'clikcs'"),
        ("click_recipe:COLUMNS", "COLUMNS is a tuple, not a function"),
        ("click_recipe:table", "the function must take data and out as keywords; it lacks data, out"),
    ):
        done = recis("train", name, "--out", tmp_path / "run")
        assert done.code == 2
        assert way_out in done.error
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_step=3", "TrainConfig has no field 'max_step'; did you mean 'max_steps'?"),
        ("train_data.batch=3", "DataConfig has no field 'batch'"),
        ("max_steps=soon", "'soon' is not a number"),
        ("max_steps=0", "max_steps must be at least 1 or None; got 0"),
        ("evaluated=perhaps", "'perhaps' is not true or false"),
        ("max_steps", "write it as name=value"),
    ],
)
def test_unknown_setting(good, tmp_path, setting, message):
    done = train(good, tmp_path / "run", "--set", setting)
    assert done.code == 2
    assert message in done.error
    assert setting.split("=")[0] in done.error
    assert not (tmp_path / "run").exists()


def test_out_that_is_not_empty(good, run, tmp_path):
    before = content(run)
    done = train(good, run)
    assert done.code == 2
    assert f"--out {run}: the folder is not empty (it has config.json); add --resume to go on" in done.error
    assert content(run) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert train(good, tmp_path / "mine").code == 2
    done = train(good, tmp_path / "mine", "--resume")
    assert done.code == 2
    assert "no run here, it has no recipe.json" in done.error
    assert content(tmp_path / "mine") == {"notes.txt": b"mine"}


def test_resume_with_another_config(good, run, tmp_path, monkeypatch):
    before = content(run)
    other = click_recipe.write(tmp_path / "other.parquet", click_recipe.table())
    for argv, difference in (
        (("--data", good, "--set", "batch=64"), 'settings.batch: "(absent)" -> "64"'),
        (("--data", other), f'data: "{str(good)[:20]}'),
    ):
        done = recis("train", RECIPE, "--out", run, "--resume", *argv)
        assert done.code == 2
        assert difference in done.error
        assert "start a new run" in done.error
    done = recis("train", "click_recipe:two_tasks", "--out", run, "--resume")
    assert (done.code, "recipe: " in done.error) == (2, True)

    monkeypatch.setattr(click_recipe, "DenseAdamW", lambda lr: DenseAdamW(lr=50 * lr))
    done = recis("train", RECIPE, "--out", run, "--resume")
    assert done.code == 2
    assert "the run there has another config: dense_optimizer.lr: 0.01 -> 0.5" in done.error
    assert content(run) == before


@pytest.mark.parametrize("command", ["eval", "predict", "inspect", "verify", "compact", "report"])
@pytest.mark.parametrize("what", ["missing", "empty", "file"])
def test_not_a_run(good, tmp_path, command, what):
    path = tmp_path / "x"
    if what == "empty":
        path.mkdir()
    elif what == "file":
        path.write_text("")
    argv = {"eval": ("--data", good), "predict": ("--data", good, "--out", tmp_path / "out.parquet")}.get(command, ())
    done = recis(command, *(("--run",) if argv else ()), path, *argv)
    assert done.code in (1, 2)
    assert str(path) in done.error
    assert path.is_dir() == (what == "empty")
    assert not (tmp_path / "out.parquet").exists()


# ---- output


def test_unwritable_output(good, run, tmp_path):
    (tmp_path / "file").write_text("")
    before = content(run)
    for out in (tmp_path / "file" / "run", Path("/proc/run"), tmp_path / "file"):
        done = train(good, out)
        assert done.code in (1, 2)
        assert str(out) in done.error
        assert "name a" in done.error
        for name in ("predict", "report"):
            data = ("--data", good) if name == "predict" else ()
            where = ("--run", run) if name == "predict" else (run,)
            done = recis(name, *where, *data, "--out", out / "below" / "x")
            assert done.code in (1, 2)
            assert str(out) in done.error
    assert (tmp_path / "file").read_text() == ""
    assert content(run) == before


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
