"""Bad input to the commands: one line that names file, row or feature and the way out, and nothing half-made left behind.

Each test runs the command as a user does, and looks at what is on the disk afterwards: a run that was there before must
still be usable, byte for byte, and a run that failed must leave nothing that a later one would take for good.
"""

import math
import re
import shutil
from pathlib import Path

import click_recipe
import pyarrow as pa
import pytest
from command import Done, content, recis

from recis.checkpoint import list_checkpoints
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
