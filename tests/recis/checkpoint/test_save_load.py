"""Save and load: every byte comes back; subsets, names, parts and states; what does not fit is named with a way out."""

import json
import sys

import pytest
import torch

from recis.checkpoint import Saver, Target, load, load_latest, read_manifest, save, verify
from recis.checkpoint import parts as parts_module
from recis.embedding import CountMin, TableConfig
from recis.embedding.admission import AfterSightings
from recis.errors import CheckpointError
from recis.optim.config import Adagrad, Adam, Sgd


def state_of(value):
    return {
        "optim": {"dense": {"state": {"w": {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}}, "groups": [1, 2]}},
        "rng": {"torch": torch.arange(5, dtype=torch.uint8)},
        "metrics": {"auc": {"sums": torch.tensor([value])}},
    }


def test_everything_comes_back(kit, tmp_path):
    tables = kit.table_set(kit.item_config(), TableConfig(name="user/é", features=("u",), embedding_dim=2))
    kit.fill(tables["item"], kit.extremes)
    kit.fill(tables["user/é"], [4, 2])
    dense = {"w": torch.rand(2, 3), "flags": torch.tensor([True, False]), "scalar": torch.tensor(2.5)}
    more = {"reader": {"lanes": [[0, 1]]}, "schedules": {"t": 3}, "trainer": {"best": float("nan")}}
    path = save(tmp_path, kit.boundary(tables, 12, dense=dense, trees=state_of(2.0), metrics={"auc": 0.75}, **more))
    assert path.name == "step_000000012"
    assert verify(path) == []

    fresh = kit.table_set(kit.item_config(), TableConfig(name="user/é", features=("u",), embedding_dim=2))
    kit.fill(fresh["item"], [1, 2, 3], seed=5)  # goes away
    into = {name: torch.zeros_like(value) for name, value in dense.items()}
    loaded = load(path, into=kit.target(fresh, into))
    for name in tables.tables:
        kit.same_rows(fresh[name], tables[name])
    for name in dense:
        assert torch.equal(into[name], dense[name])
    assert loaded.manifest.step == 12
    assert loaded.reader == more["reader"]
    assert loaded.schedules == more["schedules"]
    assert loaded.trainer["best"] != loaded.trainer["best"]
    assert loaded.metrics == {"auc": 0.75}
    assert torch.equal(loaded.trees["metrics"]["auc"]["sums"], torch.tensor([2.0]))
    assert loaded.trees["optim"]["dense"]["groups"] == [1, 2]


def test_manifest_of_the_format(kit, tmp_path):
    tables = kit.table_set()
    kit.fill(tables["item"], kit.extremes)
    path = save(tmp_path, kit.boundary(tables, 3, seed=7, clock_s=1_700_000_000, dense={"w": torch.zeros(2)}))
    body = json.loads((path / "MANIFEST.json").read_text())
    assert (body["kind"], body["base"], body["world_size"], body["seed"]) == ("full", None, 1, 7)
    assert body["clock_s"] == 1_700_000_000
    assert body["dense"] == {"w": {"shape": [2], "dtype": "F32"}}
    table = body["tables"]["item"]
    assert (table["dim"], table["dtype"], table["rows"], table["tombstones"]) == (3, "F32", 7, 0)
    assert table["optimizer"]["kind"] == "Adam"
    files = set(body["files"])
    assert {"config.json", "dense-00000-of-00001.safetensors", "table-item-00000-of-00001-000.safetensors"} <= files
    fields = parts_module.read_fields(path / "table-item-00000-of-00001-000.safetensors")
    assert set(fields) == {"ids", "weight", "state.m", "state.v", "last_seen", "count"}
    assert fields["ids"].tolist() == kit.extremes


def test_many_small_parts(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "PART_BYTES", 1000)
    monkeypatch.setattr(sys.modules["recis.checkpoint.save"], "GENTLE_READ_ROWS", 7)
    tables = kit.table_set()
    kit.fill(tables["item"], range(500))
    saver = Saver(tmp_path)  # in the background rows are read a few at a time
    saver.save(kit.boundary(tables))
    path = saver.wait()
    saver.close()
    assert path is not None
    names = parts_module.files_of(read_manifest(path), "table", "item")
    assert len(names) > 20
    assert verify(path) == []
    fresh = kit.table_set()
    load(path, into=kit.target(fresh))
    kit.same_rows(fresh["item"], tables["item"])


def test_equal_tables_give_equal_files(kit, tmp_path):
    first, second = kit.table_set(), kit.table_set()
    kit.fill(first["item"], range(100))
    kit.fill(second["item"], range(100))
    second["item"].remove(torch.arange(50))  # rows end in other places
    rows = first["item"].export()
    second["item"].import_rows({name: values[:50].flip(0) for name, values in rows.items()})
    a, b = save(tmp_path / "a", kit.boundary(first)), save(tmp_path / "b", kit.boundary(second))
    name = "table-item-00000-of-00001-000.safetensors"
    assert (a / name).read_bytes() == (b / name).read_bytes()


def test_empty_table(kit, tmp_path):
    path = save(tmp_path, kit.boundary(kit.table_set()))
    assert verify(path) == []
    fresh = kit.table_set()
    kit.fill(fresh["item"], [1])
    load(path, into=kit.target(fresh))
    assert fresh["item"].size == 0


def test_load_under_another_name(kit, tmp_path):  # conformance A39
    tables = kit.table_set(TableConfig(name="ta", features=("x",), embedding_dim=3))
    kit.fill(tables["ta"], [1, 2, 70000])
    path = save(tmp_path, kit.boundary(tables))
    fresh = kit.table_set(TableConfig(name="tc", features=("x",), embedding_dim=3))
    load(path, into=kit.target(fresh), tables={"tc": "ta"}, parts={"weights"})
    assert fresh["tc"].ids().tolist() == [1, 2, 70000]
    assert torch.equal(fresh["tc"].export()["weight"], tables["ta"].export()["weight"])


def test_unknown_names_are_suggested(kit, tmp_path):
    path = save(tmp_path, kit.boundary(kit.table_set()))
    fresh = kit.table_set()
    with pytest.raises(CheckpointError, match="it has no table 'itme'; did you mean 'item'"):
        load(path, into=kit.target(fresh), tables={"item": "itme"})
    with pytest.raises(CheckpointError, match="no table 'itme' to load into; did you mean 'item'"):
        load(path, into=kit.target(fresh), tables={"itme": "item"})


def test_tables_of_one_side(kit, tmp_path):
    other = TableConfig(name="user", features=("u",), embedding_dim=2)
    tables = kit.table_set(kit.item_config(), other)
    kit.fill(tables["item"], [1, 2])
    path = save(tmp_path, kit.boundary(tables))
    fresh = kit.table_set()
    with pytest.raises(CheckpointError, match=r"its table 'user' is not in the model.*strict=False"):
        load(path, into=kit.target(fresh))
    load(path, into=kit.target(fresh), strict=False)
    kit.same_rows(fresh["item"], tables["item"])

    path = save(tmp_path / "less", kit.boundary(tables=fresh))
    more = kit.table_set(kit.item_config(), other)
    kit.fill(more["user"], [9])
    with pytest.raises(CheckpointError, match="it has no table 'user'"):
        load(path, into=kit.target(more))
    load(path, into=kit.target(more), strict=False)
    assert more["user"].ids().tolist() == [9]


def test_other_dim(kit, tmp_path):
    path = save(tmp_path, kit.boundary(kit.table_set()))
    fresh = kit.table_set(kit.item_config(embedding_dim=5))
    with pytest.raises(CheckpointError, match=r"table 'item' has rows of \[3\].*rows of \[5\]; set embedding_dim=3"):
        load(path, into=kit.target(fresh))


def test_other_dtype(kit, tmp_path):
    tables = kit.table_set()
    kit.fill(tables["item"], [1, 2, 3])
    path = save(tmp_path, kit.boundary(tables))
    half = kit.table_set(kit.item_config(dtype="bfloat16"))
    with pytest.raises(CheckpointError, match=r"F32 rows \[3, 3\].*BF16 rows.*cast=True"):
        load(path, into=kit.target(half))
    load(path, into=kit.target(half), cast=True)
    assert torch.equal(half["item"].export()["weight"], tables["item"].export()["weight"].bfloat16())
    path = save(tmp_path / "half", kit.boundary(half))
    again = kit.table_set(kit.item_config(dtype="bfloat16"))
    load(path, into=kit.target(again))
    kit.same_rows(again["item"], half["item"])


def test_weights_without_optimizer_state(kit, tmp_path):
    tables = kit.table_set()
    kit.fill(tables["item"], [1, 2])
    tables["item"].load_state({**tables["item"].state(), "t": 9})
    path = save(tmp_path, kit.boundary(tables))
    fresh = kit.table_set()
    load(path, into=kit.target(fresh), parts={"weights"})
    rows = fresh["item"].export()
    assert torch.equal(rows["weight"], tables["item"].export()["weight"])
    assert rows["state.m"].abs().sum() == 0
    assert fresh["item"].t == 0


@pytest.mark.parametrize("optimizer", [Sgd(lr=0.1), Adagrad(lr=0.1, h0=0.5)], ids=["drop", "add"])
def test_other_optimizer(kit, tmp_path, optimizer):
    tables = kit.table_set()
    kit.fill(tables["item"], [1, 2])
    path = save(tmp_path, kit.boundary(tables))
    fresh = kit.table_set(kit.item_config(optimizer=optimizer))
    with pytest.raises(CheckpointError, match=r"optimizer state \{'m': 3, 'v': 3\}.*without the part 'optimizer'"):
        load(path, into=kit.target(fresh))
    load(path, into=kit.target(fresh), strict=False)
    rows = fresh["item"].export()
    assert torch.equal(rows["weight"], tables["item"].export()["weight"])
    if "state.h" in rows:
        assert torch.equal(rows["state.h"], torch.full((2, 3), 0.5))


def test_optimizer_added_to_a_table_without(kit, tmp_path):
    tables = kit.table_set(kit.item_config(optimizer=Sgd(lr=0.1)))
    kit.fill(tables["item"], [1, 2])
    path = save(tmp_path, kit.boundary(tables))
    fresh = kit.table_set(kit.item_config(optimizer=Adam(lr=0.1)))
    load(path, into=kit.target(fresh), strict=False)
    rows = fresh["item"].export()
    assert torch.equal(rows["weight"], tables["item"].export()["weight"])
    assert rows["state.v"].abs().sum() == 0


@pytest.mark.parametrize("counter", [None, CountMin(eps=0.1, delta=0.1)], ids=["exact", "sketch"])
def test_admission_counts(kit, tmp_path, counter):
    admission = AfterSightings(3) if counter is None else AfterSightings(3, counter)
    tables = kit.table_set(kit.item_config(admission=admission))
    item = tables["item"]
    for step in (1, 2):
        item.lookup(torch.tensor([4, 4, 8]), train=True, step=step)
        tables.end_step(step)
    path = save(tmp_path, kit.boundary(tables, 2, trainer=tables.state()))
    fresh = kit.table_set(kit.item_config(admission=admission))
    loaded = load(path, into=kit.target(fresh))
    fresh.load_state(loaded.trainer)
    have, want = fresh["item"].admission_state(), item.admission_state()
    names = [name for name in want if not name.startswith("log.")]
    assert names
    assert all(torch.equal(have[name], want[name]) for name in names)
    assert fresh["item"].counters() == item.counters()
    assert fresh.step == 2


def test_dense_that_does_not_fit(kit, tmp_path):
    path = save(tmp_path, kit.boundary(kit.table_set(), dense={"w": torch.ones(2), "b": torch.ones(1)}))
    tables = kit.table_set()
    with pytest.raises(CheckpointError, match=r"dense tensor 'w' is F32 \[2\], the model's is F32 \[3\]"):
        load(path, into=kit.target(tables, {"w": torch.ones(3), "b": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="no dense tensor 'ww'; did you mean 'w'"):
        load(path, into=kit.target(tables, {"ww": torch.ones(2), "b": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="its dense tensor 'b' is not in the model"):
        load(path, into=kit.target(tables, {"w": torch.ones(2)}))
    into = {"w": torch.zeros(2), "c": torch.zeros(1)}
    load(path, into=kit.target(tables, into), strict=False)
    assert (into["w"].tolist(), into["c"].tolist()) == ([1, 1], [0])


def test_dense_only(kit, tmp_path):
    tables = kit.table_set()
    kit.fill(tables["item"], [1])
    path = save(tmp_path, kit.boundary(tables, dense={"w": torch.ones(2)}, trees=state_of(1.0)))
    into = {"w": torch.zeros(2)}
    loaded = load(path, into=Target(dense=into), parts={"dense"})
    assert into["w"].tolist() == [1, 1]
    assert loaded.trees == {}
    assert loaded.reader is None


def test_same_name_in_two_table_sets(kit, tmp_path):
    from recis.checkpoint import Boundary

    with pytest.raises(CheckpointError, match="two table sets have a table 'item'"):
        save(tmp_path, Boundary(step=1, table_sets=[kit.table_set(), kit.table_set()]))


def test_tensors_are_refused_where_plain_values_belong(kit, tmp_path):
    with pytest.raises(CheckpointError, match="reader state holds tensors"):
        save(tmp_path, kit.boundary(kit.table_set(), reader={"x": torch.ones(1)}))
    assert list(tmp_path.iterdir()) == []


def test_latest_of_an_empty_run(kit, tmp_path):
    assert load_latest(tmp_path, into=kit.target(kit.table_set())) is None


def test_ages_count_on_in_a_new_run(kit, tmp_path):
    tables = kit.table_set()
    kit.fill(tables["item"], [1, 2, 3])
    path = save(tmp_path, kit.boundary(tables, 10))
    fresh = kit.table_set()
    load(path, into=kit.target(fresh), parts={"weights"}, rebase_steps=True)
    assert torch.equal(fresh["item"].export()["last_seen"], tables["item"].export()["last_seen"] - 10)
