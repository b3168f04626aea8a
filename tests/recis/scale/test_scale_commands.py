"""`recis plan` and `recis simulate` from the command line: recipes, traces, exit codes, one JSON object."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from recis.bench import stored
from recis.cli import main
from recis.distributed import costs as costs_file
from recis.distributed import measure
from recis.distributed.costs import OPS, Costs, LinkCost, OpCost
from recis.distributed.trace import Trace
from recis.embedding import EmbeddingBagCollection, TableConfig
from recis.errors import ConfigError
from recis.features import FeatureSpec
from recis.io import DataConfig, Follow, Ids, Label, TimeWindow
from recis.models.synthetic import SyntheticClicks
from recis.recipes import zoo
from recis.scale.cli import rows_of
from recis.scale.ids import ids_of
from recis.scale.planning import plan_recipe
from recis.scale.recipe import record
from recis.trainer import DenseAdagrad, TrainConfig
from recis.trainer.build import build_model, find_collections

DLRM = "recis.recipes.zoo:dlrm"
RECIPES = """
from torch import nn
from recis.embedding import EmbeddingBagCollection, TableConfig
from recis.features import FeatureSpec
from recis.io import DataConfig, Ids, Label
from recis.models.synthetic import SyntheticClicks
from recis.recipes import zoo
from recis.trainer import TrainConfig


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, batch):
        return self.layer(batch.dense)


def no_tables(*, data, out):
    return TrainConfig(name="no_tables", model=Dense, train_data=SyntheticClicks())


class OneTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = EmbeddingBagCollection([TableConfig(name="user", features=("user",), embedding_dim=4)], seed=0)

    def forward(self, batch):
        return self.rows(batch.sparse)["user"].sum(1, keepdim=True)


def one_file(*, data, out):
    columns = (Ids("user"), Label("click"))
    read = DataConfig(paths=(data,), format="parquet", columns=columns, batch_size=10, num_lanes=60)
    features = (FeatureSpec(name="user", kind="sparse"), FeatureSpec(name="click", kind="label"))
    return TrainConfig(name="one_file", model=OneTable, train_data=read, features=features)


def talkative(*, data, out):
    print("a recipe that prints")
    return zoo.dlrm(data=data, out=out, num_samples=512)
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """Stand in an empty folder with costs by hand and a few recipes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    costs = Costs(
        machine="by hand",
        measured_at="2026-11-29T00:00:00+00:00",
        threads=1,
        load_average=(0.0, 0.0),
        copy_gb_per_s=10.0,
        roofline_at="2026-11-29T00:00:00+00:00",
        ops={name: OpCost(fixed_s=1e-5, item_s=5e-8, passes=2.0) for name in OPS},
        link=LinkCost(latency_s=5e-5, gather_latency_s=5e-5, gb_per_s=1.0, between="nobody"),
    )
    costs_file.store(costs, tmp_path / "costs.json")
    (tmp_path / "scale_recipes.py").write_text(RECIPES)


def run(line: str) -> int:
    """Run a command line and return its exit code."""
    return main(line.split())


def test_a_plan_that_fits(capsys):
    assert run(f"plan {DLRM} --world 4 --memory-per-rank 64 --costs costs.json --samples 2000") == 0
    out = capsys.readouterr().out
    for word in ("4 ranks, 64 samples per rank", "rows of 'user'", "dense part", "fits: ", "sliced", "costs: by hand"):
        assert word in out
    assert "200 distinct ids in the sample" not in out  # 2,000 of 32,768 samples: rows are extrapolated
    assert "distinct ids in 2," in out


def test_a_plan_deals_the_dense_part(capsys):
    command = f"plan {DLRM} --world 4 --costs costs.json --samples 1000 --json --set deterministic=false"
    plans = {}
    for dealt in ("false", "true"):
        assert run(f"{command} --set parallel.shard_dense={dealt} --set parallel.unit_parameters=1000") == 0
        found = json.loads(capsys.readouterr().out)
        plans[dealt] = {line["name"]: line["bytes"] for line in found["memory"]}
    assert plans["true"]["dense part, dealt"] == -(-plans["false"]["dense part"] // 16) * 4
    assert plans["true"]["dense weights, gathered"] <= plans["false"]["dense gradients, flat"] / 4


def test_a_plan_that_cannot_fit(capsys):
    command = f"plan {DLRM} --world 2 --memory-per-rank 4 --rows item=2e9 --costs costs.json --samples 1000"
    assert run(f"{command} --json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["command"], found["model"], found["metrics"]["fits"]) == ("plan", DLRM, 0.0)
    (rows,) = [line for line in found["memory"] if line["name"] == "rows of 'item'"]
    assert rows["bytes"] / 96 == pytest.approx(1e9, rel=1e-3)
    assert rows["arithmetic"].endswith("2,000,000,000 rows as given")
    assert found["verdict"].startswith("REFUSED: ")
    assert found["placements"]["item"]["proposed"] == "sliced"
    assert found["metrics"]["memory_bytes"] == sum(line["bytes"] for line in found["memory"])


def test_stdout_is_the_plan_alone(capsys):
    assert run("plan scale_recipes:talkative --world 2 --costs costs.json --json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["command"] == "plan"
    assert "a recipe that prints" in printed.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("plan demoo --world 2", "no recipe 'demoo'; did you mean 'demo'?"),
        (f"plan {DLRM} --world 0", "--world must be 1..4096 ranks; got 0"),
        (f"plan {DLRM} --world 4097", "--world must be 1..4096 ranks; got 4097"),
        (f"plan {DLRM} --world 2 --memory-per-rank 0", "--memory-per-rank must be above 0 GB; got 0"),
        (f"plan {DLRM} --world 2 --memory-per-rank -1", "--memory-per-rank must be above 0 GB; got -1"),
        (f"plan {DLRM} --world 2 --rows itm=5", "no table 'itm'; did you mean 'item'?"),
        (f"plan {DLRM} --world 2 --rows item=none", "--rows 'item=none': must be TABLE=N"),
        (f"plan {DLRM} --world 4096 --set num_samples=512", "512 samples are less than one step of 4,096 ranks"),
        (f"plan {DLRM} --world 2 --samples 1", "--samples must be at least 2; got 1"),
        (f"plan {DLRM} --world 2 --link-gb-per-s 0", "--link-gb-per-s must be above 0"),
        ("plan scale_recipes:no_tables --world 2", "recipe 'no_tables' has no tables"),
        ("simulate --world 2", "--trace FILE is needed"),
        ("simulate --world 5000 --trace none.parquet", "--world must be 1..4096 ranks; got 5000"),
    ],
)
def test_refusals(capsys, line, message):
    assert run(f"{line} --costs costs.json") == 2
    assert message in capsys.readouterr().err


def test_data_faults_have_code_1(capsys):
    assert run("simulate --world 2 --trace none.parquet") == 1
    assert "none.parquet: no such file; write one with recis simulate --record RECIPE" in capsys.readouterr().err


def test_record_and_replay(capsys):
    assert run(f"simulate --record {DLRM} --trace t.parquet --samples 2048") == 0
    assert "t.parquet: 2,048 samples (the first), 3 tables" in capsys.readouterr().err
    trace = Trace(Path("t.parquet"))
    assert trace.shape.batch_size == 256
    assert trace.shape.lookups == (("user_id", "item_id", "clicked_items", "category", "clicked_categories"),)
    assert trace.shape.dense_parameters == 1513
    assert trace.shape.optimizer_numbers == 2 * 1513  # AdamW: two moments
    assert max(trace.shape.dense_s) > 0
    assert run("simulate --world 4 --trace t.parquet --hot-ids 10 --costs costs.json --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["world_size"] == 4
    assert found["metrics"]["steps"] == 2
    assert found["metrics"]["hot_rows_sent_bytes"] < found["metrics"]["rows_sent_bytes"]
    assert found["tables"].keys() == {"user", "item", "category"}
    assert run("simulate --world 1024 --trace t.parquet --batch 2") == 0
    assert "no times: give --costs" in capsys.readouterr().out  # this user never measured
    assert run(f"plan {DLRM} --world 2 --trace t.parquet --costs costs.json") == 0
    assert "32,768 ids in 32,768 samples" not in capsys.readouterr().out


def test_what_a_trace_holds_is_what_batches_hold(tmp_path):
    config = zoo.dlrm(data=None, out=tmp_path, num_samples=600)
    record(config, tmp_path / "t.parquet", dense=False)
    table = pq.read_table(tmp_path / "t.parquet")
    batches = list(SyntheticClicks(num_samples=600, seed=0))
    for name in table.column_names:
        want = []
        for batch in batches:
            bags = batch.sparse[name]
            assert isinstance(bags.values, torch.Tensor)
            want += [part.tolist() for part in bags.values.split(bags.lengths.tolist())]
        assert table[name].to_pylist() == want


def test_a_model_that_makes_ids_of_its_own_is_run(tmp_path):
    """SASRec looks up shifted sequences and candidates under a name that no batch has."""
    config = zoo.sasrec(data=None, out=tmp_path, num_samples=256)
    facts = record(config, tmp_path / "t.parquet", dense=False)
    model = build_model(config)
    collections = find_collections(model)
    batch = next(iter(config.train_data))
    ids = ids_of(config, model, collections, batch)
    assert ids.runs_model
    assert facts.shape.features.keys() == ids.features.keys()
    assert len(ids.lookups) >= 1
    values, offsets = ids.take(batch)
    for name in values:
        assert offsets[name].numel() == batch.num_samples + 1
        assert int(offsets[name][-1]) == values[name].numel() > 0
    asked = set(torch.cat(list(values.values())).tolist())
    assert set(batch.sparse["items"].flat_values.tolist()) <= asked | set(
        batch.sparse["next_items"].flat_values.tolist()
    )
    assert Trace(tmp_path / "t.parquet").num_samples == 256


class TwoSets(nn.Module):
    """Two collections, each with tables of its own, over one feature; and one table that two collections share."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = EmbeddingBagCollection([TableConfig(name="wide", features=("item_id",), embedding_dim=1)], seed=0)
        deep = [
            TableConfig(name="deep", features=("item_id",), embedding_dim=4),
            TableConfig(name="user", features=("user_id",)),
        ]
        self.deep = EmbeddingBagCollection(deep, seed=0)

    def forward(self, batch):
        rows = {**self.deep(batch.sparse), "wide": self.wide(batch.sparse)["item_id"]}
        return sum(value.sum(1, keepdim=True) for value in rows.values())


def test_features_of_several_tables(tmp_path):
    config = TrainConfig(
        name="two", model=TwoSets, train_data=SyntheticClicks(num_samples=256), dense_optimizer=DenseAdagrad()
    )
    shape = record(config, tmp_path / "t.parquet").shape
    assert [table.name for table in shape.tables] == ["wide", "deep", "user"]
    assert shape.lookups == (("item_id",), ("item_id@deep",), ("user_id",))
    assert {name: shape.tables[number].name for name, number in shape.features.items()} == {
        "item_id": "wide",
        "item_id@deep": "deep",
        "user_id": "user",
    }
    assert len({table.store for table in shape.tables}) == 3
    assert shape.dense_parameters == shape.optimizer_numbers == 0


def test_a_machine_is_measured_once(capsys, monkeypatch, tmp_path):
    """All of it but the roofline, at a hundredth of the size: ops here, the link between two processes."""
    monkeypatch.setattr(measure, "NUM_ROWS", 2000)
    monkeypatch.setattr(measure, "CASES", ((64, 16), (640, 16), (640, 64)))
    monkeypatch.setattr(stored, "fresh", lambda device: {"copy_gb_per_s": 7.0, "measured_at": "today"})
    assert run("simulate --measure --json") == 0
    printed = json.loads(capsys.readouterr().out)
    kept = costs_file.default_path()
    assert str(kept).startswith(str(tmp_path))  # the user's cache folder
    costs = costs_file.load(kept)
    assert json.loads(json.dumps(costs.to_json())) == json.loads(kept.read_text()) == printed
    assert (costs.copy_gb_per_s, costs.roofline_at) == (7.0, "today")
    assert costs.link.between == "two processes of one machine"
    assert min(costs.link.latency_s, costs.link.gather_latency_s, costs.link.gb_per_s) > 0
    assert run(f"plan {DLRM} --world 2 --samples 600") == 0  # finds them without being told
    assert "copy 7.0 GB/s" in capsys.readouterr().out


def test_rows_as_text():
    assert rows_of(["item=2e9", "user=1_000", "a=b=3"]) == {"item": 2_000_000_000, "user": 1000, "a=b": 3}
    for wrong in ("item", "item=", "=5", "item=0", "item=-2", "item=x", "item=inf"):
        with pytest.raises(ConfigError, match="must be TABLE=N"):
            rows_of([wrong])


class OneTable(nn.Module):
    """One pooled feature, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = EmbeddingBagCollection([TableConfig(name="user", features=("user",), embedding_dim=4)], seed=0)

    def forward(self, batch):
        return self.rows(batch.sparse)["user"].sum(1, keepdim=True)


def test_windows_and_watched_folders(tmp_path):
    """A window is no epoch, and nobody waits for files that may come."""
    days = np.repeat(np.arange(4) * 86_400, 25)
    table = pa.table({"user": np.arange(100), "click": np.zeros(100), "time": days})
    pq.write_table(table, tmp_path / "clicks.parquet")
    data = DataConfig(
        paths=(f"{tmp_path}/clicks.parquet",), format="parquet", columns=(Ids("user"), Label("click")), batch_size=10
    )
    features = (FeatureSpec(name="user", kind="sparse"), FeatureSpec(name="click", kind="label"))
    config = TrainConfig(name="kept", model=OneTable, train_data=data, features=features)
    whole = record(config, tmp_path / "t.parquet", dense=False)
    assert (whole.samples, whole.epoch_samples, whole.is_whole) == (100, 100, True)
    cut = replace(data, window=TimeWindow(start=0, stop=4 * 86_400, seconds=86_400, column="time", unit="s"))
    windows = record(replace(config, train_data=cut), tmp_path / "t.parquet", dense=False)
    assert (windows.samples, windows.epoch_samples, windows.is_whole) == (100, None, True)
    watched = record(replace(config, train_data=replace(data, follow=Follow())), tmp_path / "t.parquet", dense=False)
    assert watched.samples == 100


@pytest.mark.parametrize(
    ("world_size", "settings", "message"),
    [
        (3, (), "training would refuse this: batch_size=10 must be a multiple of ranks times micro-batches, 3 x 1"),
        (
            5,
            ("train_data.num_lanes=4",),
            "training would refuse this: 5 ranks need at least as many lanes; num_lanes=4",
        ),
        (20, (), "batch_size=10 gives less than one sample per rank"),
        (
            5,
            ("parallel.parts=4",),
            "training would refuse this: parallel.parts=4 must be a multiple of the 5 processes",
        ),
        (
            2,
            ("parallel.shard_dense=true",),
            "training would refuse this: parallel.shard_dense: gradients are added in an",
        ),
        (2, ("accumulate_steps=5",), "accumulate_steps=5: planned as one lookup of the whole step"),
    ],
)
def test_what_training_would_refuse_is_noted(tmp_path, world_size, settings, message):
    pq.write_table(pa.table({"user": np.arange(100), "click": np.zeros(100)}), tmp_path / "clicks.parquet")
    found = plan_recipe(
        "scale_recipes:one_file",
        world_size=world_size,
        data=str(tmp_path / "clicks.parquet"),
        settings=settings,
        costs=tmp_path / "costs.json",
    )
    assert message in "\n".join(found.notes)
