"""The commands as a user types them: results, JSON, files, exit codes, help. Bad input: tests/integration/test_bad_input.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click_recipe
import pyarrow.parquet as pq
import pytest
from command import recis, same_end

from recis.checkpoint import list_checkpoints, read_manifest
from recis.errors import ConfigError
from recis.runs import open_run
from recis.trainer import Trainer

COMMANDS = ("demo", "train", "eval", "predict", "recommend", "inspect", "verify", "compact", "report")
JSON_KEYS = ["command", "model", "data", "n", "metrics", "versions"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return click_recipe.write(tmp_path_factory.mktemp("data") / "clicks.parquet", click_recipe.table())


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = recis("train", "click_recipe:clicks", "--data", data, "--out", folder)
    assert done.code == 0, done.err
    assert f"run folder: {folder}" in done.out
    assert "step 8: loss 0." in done.out
    return folder


# ---- help and usage


@pytest.mark.parametrize("command", [*COMMANDS, "bench report"])
def test_help_shows_an_example(command):
    done = recis(*command.split(), "--help")
    assert done.code == 0
    assert "example:" in done.out
    assert f"recis {command}" in done.out.split("example:")[1]
    assert "--debug" in done.out


def test_help_names_all_commands_and_exit_codes():
    done = recis("--help")
    assert done.code == 0
    assert all(f"    {command} " in done.out or f"    {command}\n" in done.out for command in (*COMMANDS, "bench"))
    assert "exit codes" in done.out
    assert recis("--version").out.startswith("recis ")


@pytest.mark.parametrize("argv", [(), ("nonsense",), ("train",), ("eval", "--run", "x"), ("bench",)], ids=str)
def test_wrong_arguments_are_usage(argv):
    assert recis(*argv).code == 2


def test_debug_shows_the_traceback(tmp_path):
    argv = ("eval", "--run", tmp_path / "none", "--data", "x.parquet")
    assert "Traceback" not in recis(*argv).err
    assert "Traceback" in recis(*argv, "--debug").err


# ---- train and resume


def test_run_folder(run):
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "recipe.json", "report.html", "predictions"} <= names
    assert [path.name for path in list_checkpoints(run)] == ["step_000000003", "step_000000006", "step_000000008"]
    assert not [name for name in names if name.startswith(".tmp")]
    assert pq.read_table(run / "predictions" / "eval.parquet").column_names == [
        "prediction",
        "label",
        "weight",
        "group",
    ]


def test_resume_of_a_finished_run_takes_what_was_asked_before(run):
    before = read_manifest(list_checkpoints(run)[-1]).files
    assert recis("train", "click_recipe:clicks", "--out", run, "--resume").code == 0
    assert read_manifest(list_checkpoints(run)[-1]).files == before


def test_settings_of_recipe_and_run(data, tmp_path):
    settings = ("--set", "batch=64", "--set", "max_steps=2", "--set", "model.tables.1.embedding_dim=4")
    done = recis(
        "train", "click_recipe:clicks", "--data", data, "--out", tmp_path / "run", *settings, "--set", "evaluated=no"
    )
    assert done.code == 0, done.err
    assert open_run(tmp_path / "run").trainer.config.train_data.batch_size == 64
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_000000002"]
    assert not (tmp_path / "run" / "predictions").exists()


def test_folder_without_a_name(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recis("train", "click_recipe:clicks", "--data", data, "--set", "max_steps=1").code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("click_recipe.clicks-2")


OWN = '''
"""A model of one's own, with our tables inside."""
import torch
from torch import nn

from click_recipe import COLUMNS, FEATURES
from recis import EmbeddingBagCollection, EmbeddingCollection, TableConfig, TrainConfig
from recis.io import DataConfig
from recis.metrics import ExactAuc


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.pooled = EmbeddingBagCollection([TableConfig(name="u", features=("user", "brand"), embedding_dim=5)], seed=3)
        self.rows = EmbeddingCollection([TableConfig(name="i", features=("items",), embedding_dim=3)], seed=3)
        self.gru = nn.GRU(3, 6, batch_first=True)
        self.norm = nn.BatchNorm1d(17)
        self.out = nn.Linear(17, 1)

    def forward(self, batch):
        pooled = self.pooled(batch.sparse)
        items = self.rows(batch.sparse)["items"].to_padded(max_length=4)
        last = self.gru(items)[0][:, -1]
        return self.out(self.norm(torch.cat([pooled["user"], pooled["brand"], last, batch.dense], dim=1)))


def run(*, data, out):
    files = DataConfig(paths=(data,), format="parquet", columns=COLUMNS, batch_size=64, num_lanes=1)
    make = (lambda: Net()) if MODEL == "lambda" else Net
    return TrainConfig(name="own", model=make, train_data=files, eval_data=files, features=FEATURES, metrics=(ExactAuc(),))
'''


@pytest.mark.parametrize("model", ["class", "lambda"])
def test_own_module_function_in_the_folder_the_user_stands_in(data, tmp_path, monkeypatch, model):
    name = f"own_{model}"
    (tmp_path / f"{name}.py").write_text(OWN + f"\n\nMODEL = {model!r}\n")
    monkeypatch.chdir(tmp_path)
    done = recis("train", f"{name}:run", "--data", data, "--out", "run")
    assert done.code == 0, done.err
    assert str(tmp_path) not in sys.path
    trained = json.loads(recis("eval", "--run", "run", "--data", data, "--json").out)["metrics"]
    assert trained["auc"] > 0.5
    assert f"auc {trained['auc']:.5g}" in done.out
    if model == "lambda":  # its config cannot be built from JSON, so the recipe is asked, and must not have changed
        sys.modules[name].__dict__["FEATURES"] = click_recipe.FEATURES[:-2] + click_recipe.FEATURES[-1:]
        changed = recis("eval", "--run", "run", "--data", data)
        assert changed.code == 2
        assert "now makes another model or other features than the run was trained with: features: [" in changed.error


def test_python_m_recis(data, tmp_path):
    (tmp_path / "mine.py").write_text(OWN + "\n\nMODEL = 'class'\n")
    command = [sys.executable, "-m", "recis", "train", "mine:run", "--data", str(data), "--out", "run"]
    shutil.copy(click_recipe.__file__, tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "run folder: run" in done.stdout


def test_stopped_by_the_user(data, tmp_path, monkeypatch):
    def stop(self, step, loss, num_samples):
        advance(self, step, loss, num_samples)
        if step == 5:
            raise KeyboardInterrupt

    advance = Trainer.advance
    monkeypatch.setattr(Trainer, "advance", stop)
    done = recis("train", "click_recipe:clicks", "--data", data, "--out", tmp_path / "run")
    assert done.code == 1
    assert done.err.endswith("stopped by the user; the last checkpoint is whole, go on with --resume\n")
    monkeypatch.undo()
    assert recis("train", "click_recipe:clicks", "--out", tmp_path / "run", "--resume").code == 0
    assert recis("train", "click_recipe:clicks", "--data", data, "--out", tmp_path / "straight").code == 0
    same_end(tmp_path / "run", tmp_path / "straight")


def test_the_demo_recipe(tmp_path):
    small = ("--set", "num_samples=6000", "--set", "num_users=300", "--set", "num_items=150")
    done = recis("train", "demo", "--out", tmp_path / "run", *small)
    assert done.code == 0, done.err
    assert "Bayes-optimal AUC of this test day 0.7" in done.out
    day = tmp_path / "run" / "data" / "day-07.parquet"
    result = json.loads(recis("eval", "--run", tmp_path / "run", "--data", day, "--json").out)
    assert result["n"] == pq.read_metadata(day).num_rows
    assert {"auc", "gauc", "ne", "logloss", "pcoc"} <= set(result["metrics"])
    scored = tmp_path / "scored.parquet"
    assert recis("predict", "--run", tmp_path / "run", "--data", day, "--out", scored).code == 0
    assert pq.read_schema(scored).names == [*pq.read_schema(day).names, "prediction"]


# ---- eval


def test_eval_json(run, data):
    done = recis("eval", "--run", run, "--data", data, "--json")
    assert done.code == 0
    result = json.loads(done.out)  # exactly one object, and nothing else on stdout
    assert list(result) == JSON_KEYS
    assert result["command"] == "eval"
    assert result["model"] == str(run)
    assert result["data"] == str(data)
    assert result["n"] == 256
    assert set(result["metrics"]) == {"loss", "auc", "logloss"}
    assert set(result["versions"]) == {"recis", "torch", "python"}
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["metrics"] == {key: last[key] for key in ("loss", "auc", "logloss")}


def test_eval_as_text(run, data):
    done = recis("eval", "--run", run, "--data", data)
    assert "256 samples" in done.out
    assert "auc" in done.out


def test_the_best_checkpoint_is_pointed_at(data, tmp_path):
    argv = ("train", "click_recipe:clicks", "--data", data, "--out", tmp_path / "run", "--set", "monitored=yes")
    assert recis(*argv).code == 0
    newest, best = tmp_path / "run" / "step_000000008", tmp_path / "run" / "step_000000004"
    done = recis("eval", "--run", tmp_path / "run", "--data", data)
    assert done.err == (f"weights of {newest}; the best evaluation was that of {best}: give it as --run to use those\n")
    done = recis("eval", "--run", best, "--data", data)
    assert done.err == f"weights of {best}\n"


def test_eval_without_a_value_is_null(run, tmp_path):
    one_class = click_recipe.write(tmp_path / "a.parquet", click_recipe.table(40, click=[0] * 40))
    result = json.loads(recis("eval", "--run", run, "--data", one_class, "--json").out)
    assert result["n"] == 40
    assert result["metrics"]["auc"] is None
    assert result["metrics"]["loss"] > 0


def test_eval_of_an_older_checkpoint(run, data):
    first, *_, last = list_checkpoints(run)
    old = json.loads(recis("eval", "--run", first, "--data", data, "--json").out)["metrics"]
    new = json.loads(recis("eval", "--run", last, "--data", data, "--json").out)["metrics"]
    assert old != new
    assert new == json.loads(recis("eval", "--run", run, "--data", data, "--json").out)["metrics"]


def test_what_a_recipe_prints_stays_off_stdout(run, data, monkeypatch):
    def noisy(run, path):
        print("a word from the recipe")
        return 3, {"recall@20": 0.5, "mrr": float("nan"), "ne": float("inf")}

    monkeypatch.setattr(click_recipe, "evaluate_file", noisy, raising=False)
    done = recis("eval", "--run", run, "--data", data, "--json")
    result = json.loads(done.out)
    assert (result["n"], result["metrics"]) == (3, {"recall@20": 0.5, "mrr": None, "ne": None})
    assert "a word from the recipe" in done.err


# ---- recommend


def test_recommend_is_the_recipe_s_own_affair(run, tmp_path, monkeypatch):
    users = tmp_path / "users.csv"
    users.write_text("CustomerID\n12\n")
    argv = ("recommend", "--run", run, "--users", users, "--out", tmp_path / "out.parquet")
    refused = recis(*argv)
    assert refused.code == 2
    assert "recommends nothing; use recis predict" in refused.error

    calls = []
    monkeypatch.setattr(
        click_recipe,
        "recommend_file",
        lambda run, users, *, k, out: calls.append((run.folder, users, k, out)) or (5 * k, 1),
        raising=False,
    )
    done = recis(*argv, "--k", 7)
    assert done.code == 0
    assert calls == [(run, users, 7, tmp_path / "out.parquet")]
    assert "35 rows; 1 users unknown" in done.out
    for wrong, text in (
        ((*argv, "--k", 0), "--k must be at least 1; got 0"),
        ((*argv[:3], "--users", tmp_path / "no.csv", *argv[5:]), "no such file"),
        ((*argv[:5], "--out", tmp_path / "no" / "x.parquet"), "is no folder; make it first"),
        ((*argv[:5], "--out", tmp_path), "is a folder; name a file"),
        ((*argv[:5], "--out", tmp_path / "top.csv"), "the output is a Parquet file; name it top.parquet"),
    ):
        done = recis(*wrong)
        assert done.code == 2
        assert text in done.error
    assert len(calls) == 1


# ---- inspect, verify, compact, report, bench


def test_inspect(run):
    done = recis("inspect", run)
    assert done.code == 0
    header, *rows = [line.split() for line in done.out.splitlines()[2:6]]
    assert header == ["table", "rows", "dim", "type", "optimizer", "size", "inserted", "rejected", "evicted", "full"]
    assert [row[0] for row in rows] == ["brand", "items", "user"]
    assert rows[0][1:5] == ["5", "4", "F32", "Adam(lr=0.01)"]
    summary = json.loads(recis("inspect", run, "--json").out)
    assert summary["step"] == 8
    assert summary["rows"] == sum(int(row[1]) for row in rows)
    assert json.loads(recis("inspect", list_checkpoints(run)[0], "--json").out)["step"] == 3


def test_verify(run):
    for path in (run, list_checkpoints(run)[0]):
        done = recis("verify", path)
        assert (done.code, done.out) == (0, f"{path}: ok\n")


def test_compact(data, tmp_path):
    argv = ("train", "click_recipe:clicks", "--data", data, "--set", "evaluated=no")
    assert recis(*argv, "--out", tmp_path / "deltas", "--set", "delta_saves=9").code == 0
    assert recis(*argv, "--out", tmp_path / "full").code == 0
    newest = list_checkpoints(tmp_path / "deltas")[-1]
    assert read_manifest(newest).kind == "delta"
    done = recis("compact", tmp_path / "deltas", "--out", tmp_path / "compacted")
    assert done.code == 0, done.err
    made = Path(done.out.strip())
    assert made.parent == tmp_path / "compacted"
    assert recis("verify", made).code == 0
    want = read_manifest(list_checkpoints(tmp_path / "full")[-1])
    assert {name: entry.rows for name, entry in read_manifest(made).tables.items()} == {
        name: entry.rows for name, entry in want.tables.items()
    }


def test_report(run, tmp_path):
    done = recis("report", run, "--out", tmp_path / "page.html")
    assert done.code == 0
    page = (tmp_path / "page.html").read_text()
    assert done.out.strip() == str(tmp_path / "page.html")
    for caption in ("Loss", "auc", "Calibration", "Rows per table", "Throughput"):
        assert f"<figcaption>{caption}</figcaption>" in page


def test_bench_report(tmp_path):
    result = {"p50_ms": 2.0, "items_per_s": 1e6, "share_of_copy": 0.5}
    info = {
        "case": "1000 keys",
        "ours": "numba",
        "device": "cpu",
        "results": {"numba": result, "peer": {**result, "p50_ms": 5.0}},
        "ratio_to": {"peer": 2.5},
        "missing": ["absent"],
        "targets": {"peer": 2.0, "items_per_s": 5e6},
        "load_average": 0.1,
        "spread": 1.1,
    }
    (tmp_path / "out.json").write_text(json.dumps({"benchmarks": [{"name": "find", "extra_info": info}]}))
    done = recis("bench", "report", tmp_path / "out.json", "--html", tmp_path / "bench.html")
    assert done.code == 0, done.err
    assert "peer: 2.50x our time" in done.out
    assert "target items_per_s >= 5 M/s: MISSED" in done.out
    assert "1000 keys" in (tmp_path / "bench.html").read_text()
    assert recis("bench", "report", tmp_path / "bench.html").code == 2
    (tmp_path / "other.json").write_text((tmp_path / "out.json").read_text())
    both = recis("bench", "report", tmp_path / "out.json", tmp_path / "other.json")
    assert both.code == 0, both.err
    assert [line for line in both.out.splitlines() if line.startswith("== ")] == [
        f"== {tmp_path / name}" for name in ("out.json", "other.json")
    ]
    assert both.out.count("peer: 2.50x our time") == 2


# ---- opening a run


def test_a_run_is_opened_by_its_config_alone(data, tmp_path, monkeypatch):
    argv = ("train", "click_recipe:clicks", "--data", data, "--out", tmp_path / "run", "--set", "max_steps=2")
    assert recis(*argv).code == 0
    (tmp_path / "run" / "recipe.json").unlink()  # as a run that was started from Python
    monkeypatch.setattr(click_recipe, "clicks", None)
    opened = open_run(tmp_path / "run")
    assert opened.recipe is None
    assert opened.measure(str(data))[0] == 256
    assert recis("recommend", "--run", tmp_path / "run", "--users", data, "--out", tmp_path / "x").code == 2


def test_features_other_than_those_of_the_checkpoint_are_refused(run):
    opened = open_run(run)
    changed = json.loads((run / "config.json").read_text())
    (price,) = (spec for spec in changed["features"] if spec["name"] == "price")
    price["ops"][0]["offset"] = 2.0
    copy = run.parent / "changed"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(changed))
    newest = list_checkpoints(run)[-1]
    (copy / newest.name).symlink_to(newest)
    with pytest.raises(ConfigError, match=r"trained with other features: features.3.ops.0.offset: 1.0 -> 2.0"):
        open_run(copy)
    assert opened.trainer.engine is not None
