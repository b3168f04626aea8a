"""Deltas: rows and tombstones since a base, applied to it they are the full export; chains, wrong bases, compaction."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recis.checkpoint import compact, load, read_manifest, resolve_chain, save, verify
from recis.checkpoint.parts import read_parts, read_tombstones
from recis.embedding import AfterSightings
from recis.errors import CheckpointError


def touch(tables, step, ids):
    """A training step that sees ids; metadata moves, weights do not."""
    tables["item"].lookup(torch.tensor(ids), train=True, step=step)
    tables.end_step(step)


def rows_of(path, table="item"):
    parts = list(read_parts(path, read_manifest(path), table))
    return torch.cat([part["ids"] for part in parts]).tolist() if parts else []


def six_steps(kit, run):
    """Conformance B22: base at step 4; steps 5 and 6 touch 1, 2, evict 3, insert 7, evict 9 and admit it again."""
    tables = kit.table_set()
    item = tables["item"]
    for step in (1, 2, 3):
        touch(tables, step, [1, 2, 3])
    touch(tables, 4, [1, 9, 5])
    base = save(run, kit.boundary(tables, 4, trainer=tables.state()))
    item.remove(torch.tensor([3, 9]))
    touch(tables, 5, [1, 7])
    touch(tables, 6, [2, 9])
    delta = save(run, kit.boundary(tables, 6, trainer=tables.state()), base=base)
    return tables, base, delta


def test_by_hand(kit, tmp_path):
    tables, base, delta = six_steps(kit, tmp_path)
    manifest = read_manifest(delta)
    assert manifest.base is not None
    assert (manifest.kind, manifest.base.step) == ("delta", 4)
    assert rows_of(delta) == [1, 2, 7, 9]
    assert read_tombstones(delta, manifest, "item").tolist() == [3, 9]
    assert manifest.tables["item"].tombstones == 2
    assert resolve_chain(delta) == [base, delta]
    assert verify(tmp_path) == []
    fresh = kit.table_set()
    load(delta, into=kit.target(fresh))
    kit.same_rows(fresh["item"], tables["item"])


def test_applied_twice(kit, tmp_path):
    tables, _, delta = six_steps(kit, tmp_path)
    fresh = kit.table_set()
    load(delta, into=kit.target(fresh))
    manifest = read_manifest(delta)
    (fields,) = read_parts(delta, manifest, "item")
    fresh["item"].apply_delta(read_tombstones(delta, manifest, "item"), fields)
    kit.same_rows(fresh["item"], tables["item"])


def test_on_another_base(kit, tmp_path):
    _, _, delta = six_steps(kit, tmp_path / "a")
    other = kit.table_set()
    kit.fill(other["item"], [1])
    wrong = save(tmp_path / "b", kit.boundary(other, 4))
    with pytest.raises(CheckpointError, match=rf"a delta on step 4 .*not on {wrong}.*base it was made for"):
        load([wrong, delta], into=kit.target(kit.table_set()))
    moved = tmp_path / "c" / delta.name
    moved.parent.mkdir()
    delta.rename(moved)
    with pytest.raises(CheckpointError, match=r"its base \(step 4.*put the base beside it"):
        load(moved, into=kit.target(kit.table_set()))
    with pytest.raises(CheckpointError, match="cannot stand alone"):
        load([moved], into=kit.target(kit.table_set()))


def test_full_checkpoint_in_the_middle(kit, tmp_path):
    _, base, _ = six_steps(kit, tmp_path)
    with pytest.raises(CheckpointError, match="a full checkpoint cannot follow"):
        load([base, base], into=kit.target(kit.table_set()))


def test_compact_equals_a_full_save(kit, tmp_path):
    tables, base, delta = six_steps(kit, tmp_path / "run")
    want = save(tmp_path / "full", kit.boundary(tables, 6, trainer=tables.state()))
    whole = compact(delta)
    assert whole == delta
    assert read_manifest(whole).kind == "full"
    assert verify(whole) == []
    names = sorted(path.name for path in want.iterdir() if path.name != "MANIFEST.json")
    assert sorted(path.name for path in whole.iterdir() if path.name != "MANIFEST.json") == names
    for name in names:
        assert (whole / name).read_bytes() == (want / name).read_bytes(), name
    assert compact(base) == base


def test_compact_into_another_folder(kit, tmp_path):
    tables, _, delta = six_steps(kit, tmp_path / "run")
    whole = compact(delta, tmp_path / "out")
    assert whole == tmp_path / "out" / "step_000000006"
    assert read_manifest(delta).kind == "delta"
    fresh = kit.table_set()
    load(whole, into=kit.target(fresh))
    kit.same_rows(fresh["item"], tables["item"])


def test_compact_does_not_take_a_base_away(kit, tmp_path):
    tables, _, delta = six_steps(kit, tmp_path)
    touch(tables, 7, [1])
    save(tmp_path, kit.boundary(tables, 7), base=delta)
    with pytest.raises(CheckpointError, match="step_000000007 stands on it"):
        compact(delta)


def test_compact_of_a_damaged_chain(kit, tmp_path):
    _, base, delta = six_steps(kit, tmp_path)
    (base / "config.json").write_text("edited")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        compact(delta)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


OPS = st.lists(
    st.tuples(
        st.sampled_from(["touch", "remove", "import", "delta"]), st.lists(st.integers(0, 12), min_size=1, unique=True)
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ops=OPS, admit_after=st.sampled_from([1, 2]))
def test_any_history(kit, tmp_path_factory, ops, admit_after):
    """Whatever happens between deltas: base + chain == the live tables == the compacted checkpoint."""
    run = tmp_path_factory.mktemp("run")
    config = kit.item_config(admission=AfterSightings(admit_after))
    tables = kit.table_set(config)
    newest = save(run, kit.boundary(tables, 0, trainer=tables.state()))
    step = 0
    for index, (op, ids) in enumerate([*ops, ("delta", [0])]):
        if op == "remove":
            tables["item"].remove(torch.tensor(ids))
        elif op == "import":
            kit.fill(tables["item"], ids, seed=index)
        else:
            step += 1
            touch(tables, step, ids)
            if op == "delta":
                newest = save(run, kit.boundary(tables, step, trainer=tables.state()), base=newest)
    fresh = kit.table_set(config)
    loaded = load(newest, into=kit.target(fresh))
    kit.same_rows(fresh["item"], tables["item"])
    fresh.load_state(loaded.trainer)
    have, want = (item["item"].counters().to_dict() for item in (fresh, tables))
    assert {**have, "capacity": 0} == {**want, "capacity": 0}  # how much is allocated is nobody's business
    again = kit.table_set(config)
    load(compact(newest, run / "out"), into=kit.target(again))
    kit.same_rows(again["item"], tables["item"])
    assert verify(run) == []
