"""What a checkpoint takes out of a table and puts back: by owners, by other names, as deltas (B20, B22, A39, B6)."""

import pytest
import torch

from recis.embedding import (
    AfterSightings,
    EmbeddingBagCollection,
    HashTable,
    TableConfig,
    TableSet,
    TtlSeconds,
    TtlSteps,
)
from recis.errors import CheckpointError
from recis.jagged import KeyedJaggedTensor
from recis.optim import Adam
from recis_kernels.philox import hash64


def one_table(name="item", *, clock=None, **changes) -> HashTable:
    config = TableConfig(**{"name": name, "features": ("f",), "embedding_dim": 3, "optimizer": Adam(lr=0.1), **changes})
    return TableSet([config], seed=7, clock=clock)[name]


def filled(ids, table=None):
    table = one_table() if table is None else table
    count = len(ids)
    table.import_rows(
        {
            "ids": torch.tensor(ids),
            "weight": torch.randn(count, 3),
            "state.m": torch.randn(count, 3),
            "state.v": torch.rand(count, 3),
            "last_seen": torch.arange(count, dtype=torch.int32),
            "count": torch.arange(count, dtype=torch.int32) + 1,
        }
    )
    return table


def assert_equal_rows(got, want):
    assert list(got) == list(want)
    for name in want:
        assert got[name].dtype == want[name].dtype
        assert torch.equal(got[name].view(torch.uint8), want[name].view(torch.uint8)), name


def owners_of(ids, world_size):
    slices = hash64(ids) & 0xFFFF
    starts = torch.tensor([r * (65536 // world_size) + min(r, 65536 % world_size) for r in range(world_size)])
    return torch.searchsorted(starts, slices, right=True) - 1


def test_export_and_import_through_other_owners_keep_every_byte():  # B20
    first = filled([4, 2, 6, 1, 5, 3]).export()
    assert first["ids"].tolist() == [1, 2, 3, 4, 5, 6]
    parts = [first]
    held = {}
    for world_size in (2, 3, 1):
        ranks = [one_table() for _ in range(world_size)]
        for part in parts:
            owner = owners_of(part["ids"], world_size)
            for rank, table in enumerate(ranks):
                table.import_rows({name: values[owner == rank] for name, values in part.items()})
        parts = [table.export() for table in ranks]
        held[world_size] = [set(part["ids"].tolist()) for part in parts]
    assert held[2] == [{4, 5, 6}, {1, 2, 3}]
    assert held[3] == [{4, 6}, {2, 5}, {1, 3}]
    assert_equal_rows(parts[0], first)


def test_rows_load_into_a_table_of_another_name():  # A39
    source = filled([1, 2, 70000], one_table("ta"))
    target = one_table("tc")
    target.import_rows(source.export())
    assert_equal_rows(target.export(), source.export())
    target.remove(torch.tensor([2]))
    target.import_rows(source.export())
    assert_equal_rows(target.export(), source.export())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_field_survives(dtype):
    now = [1000]
    table = one_table(dtype=dtype, eviction=(TtlSeconds(500),), clock=lambda: now[0])
    for step in (1, 2):
        table.lookup(torch.tensor([step, 9]), train=True, step=step)
        now[0] += 100
        table.end_step(step)
    out = table.export()
    assert out["weight"].dtype == table.config.torch_dtype
    assert out["last_seen"].tolist() == [1, 2, 2]
    assert out["count"].tolist() == [1, 1, 2]
    assert out["last_seen_s"].tolist() == [1100, 1200, 1200]
    other = one_table(dtype=dtype, eviction=(TtlSeconds(500),))
    other.import_rows(out)
    assert_equal_rows(other.export(), out)
    plain = one_table(dtype=dtype)
    plain.import_rows(out)  # a table without a clock leaves the readings out
    assert "last_seen_s" not in plain.export()


def test_rows_without_metadata_count_as_seen_now():
    now = [5000]
    table = one_table(eviction=(TtlSeconds(10), TtlSteps(3)), clock=lambda: now[0])
    table.end_step(7)
    table.import_rows({"ids": torch.tensor([1]), "weight": torch.zeros(1, 3)})
    table.insert(torch.tensor([2]), torch.zeros(1, 3))
    out = table.export()
    assert (out["last_seen"].tolist(), out["count"].tolist(), out["last_seen_s"].tolist()) == (
        [8, 8],
        [0, 0],
        [5000, 5000],
    )
    table.end_step(8)
    assert table.size == 2


def test_state_and_sightings_resume_a_table():
    def run(table, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            table.lookup(torch.randint(0, 12, (5,), generator=generator), train=True, step=step)
            table.end_step(step)

    straight = one_table(admission=AfterSightings(2), eviction=(TtlSteps(4),))
    run(straight, range(1, 21))
    half = one_table(admission=AfterSightings(2), eviction=(TtlSteps(4),))
    run(half, range(1, 9))
    resumed = one_table(admission=AfterSightings(2), eviction=(TtlSteps(4),))
    resumed.import_rows(half.export())
    resumed.load_state(half.state())
    resumed.load_admission_state(half.admission_state())
    run(resumed, range(9, 21))
    assert_equal_rows(resumed.export(), straight.export())
    assert resumed.counters() == straight.counters()
    assert_equal_rows(resumed.admission_state(), straight.admission_state() | _log(resumed))
    assert straight.counters().evicted > 0


def _log(table):
    return {name: values for name, values in table.admission_state().items() if name.startswith("log.")}


def test_a_set_resumes_step_and_clock():
    now = [50]
    config = TableConfig(name="t", features=("f",), eviction=(TtlSeconds(9),))
    tables = TableSet([config], seed=1, clock=lambda: now[0])
    tables.end_step(1)
    now[0] = 57
    tables.end_step(2)
    assert tables.state() == {"step": 2, "clock": {"log": [[1, 50], [2, 57]]}}
    again = TableSet([config], seed=1, clock=lambda: 55)  # a clock behind the saved one does not turn time back
    again.load_state(tables.state())
    assert again.step == 2
    again["t"].lookup(torch.tensor([1]), train=True, step=3)
    again.end_step(3)
    assert again["t"].export()["last_seen_s"].tolist() == [57]


def test_delta_by_hand():  # B22
    table = one_table(eviction=(TtlSteps(5),))
    for step, ids in ((1, [3]), (4, [1, 2, 5, 9])):
        table.lookup(torch.tensor(ids), train=True, step=step)
        table.end_step(step)
    base, base_state = table.export(), table.state()
    table.mark_base()
    table.lookup(torch.tensor([1]), train=True, step=5)
    table.end_step(5)
    table.remove(torch.tensor([9]))
    table.lookup(torch.tensor([2, 7, 9]), train=True, step=6)
    table.end_step(6)  # 3 was last seen in step 1
    assert table.ids().tolist() == [1, 2, 5, 7, 9]
    rows, gone = table.export(since_step=4), table.tombstones()
    assert rows["ids"].tolist() == [1, 2, 7, 9]
    assert gone.tolist() == [3, 9]
    other = one_table()
    other.import_rows(base)
    other.load_state(base_state)
    for _ in range(2):
        other.apply_delta(gone, rows)
        assert_equal_rows(other.export(), table.export())


def test_rows_written_by_hand_are_in_the_next_delta():
    table = filled([1, 2, 3])
    table.mark_base()
    table.import_rows({name: values[1:2] for name, values in table.export().items()})
    table.insert(torch.tensor([8]), torch.zeros(1, 3))
    assert table.export(since_step=100)["ids"].tolist() == [2, 8]
    log = table.admission_state()
    resumed = filled([1, 2, 3, 8])
    resumed.load_state(table.state())
    resumed.load_admission_state(log)
    assert resumed.export(since_step=100)["ids"].tolist() == [2, 8]


def test_a_delta_needs_a_base():
    table = filled([1])
    for ask in (lambda: table.export(since_step=0), table.tombstones):
        with pytest.raises(ValueError, match=r"'item' has no base.*mark_base"):
            ask()


def test_broken_state_is_named():
    with pytest.raises(CheckpointError, match="'item': state lacks or garbles 'counters'"):
        one_table().load_state({"t": 1})


def test_step_boundaries_guard_loading():
    tables = TableSet([TableConfig(name="t", features=("f",))], seed=1)
    EmbeddingBagCollection(tables)(KeyedJaggedTensor.from_lists({"f": [[1]]}))
    with pytest.raises(ValueError, match="needs the boundary of a step"):
        tables.load_step(7)
    tables.end_step(1)
    tables.load_step(7)
    assert tables.step == 7
    EmbeddingBagCollection(tables)(KeyedJaggedTensor.from_lists({"f": [[2]]}))
    with pytest.raises(ValueError, match=r"end_step\(9\).*under way is 8"):
        tables.end_step(9)
    tables.end_step(8)
    assert tables["t"].export()["last_seen"].tolist() == [1, 8]
