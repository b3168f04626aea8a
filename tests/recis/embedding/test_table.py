"""One table: keys, rows, duplicates, read-only lookups, limits, default rows, edits by hand (A25-A33, A38, B5, B6)."""

import random

import pytest
import torch

from recis.embedding import AfterSightings, Constant, HashTable, Normal, TableConfig, TableSet, Uniform
from recis.optim import Adagrad, Adam
from recis_kernels.philox import table_key
from recis_kernels.row_init import initial_values

LIMITS = (-(2**63), -2, -1, 0, 2**63 - 1)


def table_set(*names, seed=7, block_rows=None, deterministic=True, **changes) -> TableSet:
    configs = [
        TableConfig(**{"name": name, "features": (f"{name}_f",), "embedding_dim": 4, **changes}) for name in names
    ]
    return TableSet(configs, seed=seed, block_rows=block_rows, deterministic=deterministic)


def one_table(**changes) -> HashTable:
    return table_set("item", **changes)["item"]


def ids_of(*values):
    return torch.tensor(values, dtype=torch.int64)


def first_values(table, ids):
    key = table.store.keys[table.number : table.number + 1]
    return initial_values(ids, table.config.embedding_dim, key, table.config.initializer.spec())


def test_same_id_in_several_tables_of_one_store():  # A25
    tables = table_set("t0", "t1", "t2", "t3")
    far = 5 + 2**52
    rows = [
        int(tables[name].lookup(ids_of(row_id), train=True, step=1)[1])
        for name, row_id in (("t3", 5), ("t0", far), ("t0", 5), ("t3", -1))
    ]
    assert len(tables.stores) == 1
    assert len(set(rows)) == 4
    assert tables["t0"].ids().tolist() == [5, far]
    assert tables["t3"].ids().tolist() == [-1, 5]
    assert tables["t1"].ids().tolist() == []


def test_unknown_ids_inserted_values_and_a_mix_in_request_order():  # A27
    table = one_table()
    fresh, given = torch.arange(2048) * 7, -1 - torch.arange(2048)
    rows, _ = table.lookup(fresh, train=True, step=1)
    assert torch.equal(rows, first_values(table, fresh))
    assert torch.equal(table.ids(), fresh)
    values = torch.randn(2048, 4)
    table.insert(given, values)
    mixed = torch.cat([given, fresh])[torch.randperm(4096)]
    rows, numbers = table.lookup(mixed, train=False, step=1)
    want = torch.where((mixed < 0)[:, None], values[(-1 - mixed).clamp(min=0)], first_values(table, mixed))
    assert torch.equal(rows, want)
    assert int(numbers.unique().numel()) == 4096


def test_rows_keep_their_address_when_a_block_is_added():  # A28
    table = one_table(block_rows=1024)
    rows, numbers = table.lookup(torch.arange(2048), train=True, step=1)
    blocks = table.store.blocks
    before = blocks.pointers.tolist()
    assert len(before) == 2
    table.lookup(ids_of(2048), train=True, step=2)
    assert blocks.pointers.tolist()[:2] == before
    assert len(blocks.blocks) == 3
    again, numbers_again = table.lookup(torch.arange(2048), train=False, step=2)
    assert torch.equal(again, rows)
    assert torch.equal(numbers_again, numbers)


def test_row_numbers_are_unique_and_stable():  # A29
    table = one_table()
    _, first = table.lookup(ids_of(10, 20, 30), train=True, step=1)
    _, second = table.lookup(ids_of(20, 40, 10, 50), train=True, step=2)
    assert second[[2, 0]].tolist() == first[:2].tolist()
    assert len({*first.tolist(), *second.tolist()}) == 5
    assert table.find(ids_of(10, 99)).tolist() == [int(first[0]), -1]


def test_insert_with_a_repeated_id_shares_a_row():  # A30
    table = one_table()
    table.insert(ids_of(7, 7, 8), torch.tensor([[1.0] * 4, [2.0] * 4, [3.0] * 4]))
    assert table.ids().tolist() == [7, 8]
    assert int(table.find(ids_of(7, 7)).unique().numel()) == 1
    assert table.export()["weight"][:, 0].tolist() == [2.0, 3.0]


def test_clear_gives_a_fresh_table():  # A31
    tables = table_set("item", "user", admission=AfterSightings(2))
    for step in (1, 2):
        for table in tables:
            table.lookup(ids_of(1, 2, 3), train=True, step=step)
        tables.end_step(step)
    tables["item"].clear()
    assert tables["item"].counters().to_dict() | {"capacity": 0} == dict.fromkeys(
        tables["item"].counters().to_dict(), 0
    )
    assert tables["user"].size == 3
    rows, numbers = tables["item"].lookup(ids_of(1, 2), train=True, step=3)
    assert numbers.tolist() == [-1, -1]  # its sightings are gone too
    assert bool((rows == 0).all())
    assert tables["item"].counters().rejected == 2


def test_read_only_lookups_change_nothing_but_their_counter():  # A33, section 3
    table = one_table()
    table.lookup(ids_of(1, 2), train=True, step=1)
    table.end_step(1)
    before = table.export()
    rows, numbers = table.lookup(ids_of(2, 3, 3, 4), train=False, step=9)
    assert numbers[0] >= 0
    assert numbers[1:].tolist() == [-1, -1, -1]
    assert bool((rows[1:] == 0).all())
    table.end_step(9)
    after = table.export()
    assert all(torch.equal(before[name], after[name]) for name in before)
    counters = table.counters()
    assert (counters.default_reads, counters.found, counters.inserted, counters.size) == (3, 0, 2, 2)


def test_evicted_id_comes_back_with_initial_value_and_zero_state():  # A32, A33
    table = one_table(optimizer=Adam(lr=0.1))
    table.insert(ids_of(4, 5), torch.ones(2, 4), {"m": torch.ones(2, 4), "v": torch.ones(2, 4)})
    table.lookup(ids_of(4, 5), train=True, step=5)
    table.end_step(5)
    assert table.evict_older_than(5).tolist() == []
    assert table.evict_older_than(6).tolist() == [4, 5]
    assert table.counters().evicted == 2
    table.lookup(ids_of(4), train=True, step=6)
    out = table.export()
    assert torch.equal(out["weight"], first_values(table, ids_of(4)))
    assert bool((out["state.m"] == 0).all() & (out["state.v"] == 0).all())
    assert out["last_seen"].tolist() == [6]


def test_eviction_inside_a_step_counts_its_lookups_as_seen():
    table = one_table()
    table.lookup(ids_of(1, 2), train=True, step=1)
    table.end_step(1)
    table.lookup(ids_of(2), train=True, step=5)
    assert table.evict_older_than(5).tolist() == [1]
    table.end_step(5)
    assert table.export()["count"].tolist() == [2]


def test_optimizer_state_of_rows_that_came_without_it_is_initial():  # A38
    table = one_table(optimizer=Adagrad(lr=0.1, h0=0.25))
    table.insert(ids_of(1), torch.ones(1, 4))
    table.import_rows({"ids": ids_of(2, 3), "weight": torch.zeros(2, 4)})
    assert table.export()["state.h"].unique().tolist() == [0.25]
    table.insert(ids_of(1), torch.ones(1, 4), {"h": torch.full((1, 4), 9.0)})
    table.insert(ids_of(1), torch.zeros(1, 4))
    out = table.export()
    assert out["state.h"][0].tolist() == [9.0] * 4  # an insert without state leaves that of an existing row
    assert out["weight"][0].tolist() == [0.0] * 4


@pytest.mark.parametrize("initializer", [Uniform(-0.05, 0.05), Normal(0.0, 1.0), Constant(3.0)], ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_bytes_depend_on_seed_table_and_id_alone(initializer, dtype):  # B5
    def bytes_of(order, threads=1, seed=7, again=False):
        table = one_table(initializer=initializer, dtype=dtype, embedding_dim=9, seed=seed)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for step, batch in enumerate(order, start=1):
                table.lookup(batch, train=True, step=step)
            if again:
                table.remove(ids_of(2, 3))
                table.lookup(ids_of(3, 2), train=True, step=9)
        finally:
            torch.set_num_threads(before)
        return table.export()["weight"].view(torch.uint8)

    many = torch.arange(5000) * 3 - 700
    base = bytes_of([torch.cat([ids_of(3, 1, 2), many])])
    assert torch.equal(base, bytes_of([ids_of(2), ids_of(3, 1), many.flip(0)]))
    assert torch.equal(base, bytes_of([torch.cat([ids_of(3, 1, 2), many])], threads=2))
    assert torch.equal(base, bytes_of([torch.cat([ids_of(3, 1, 2), many])], again=True))
    if not isinstance(initializer, Constant):
        assert not torch.equal(base, bytes_of([torch.cat([ids_of(3, 1, 2), many])], seed=8))


def test_every_int64_is_a_legal_id():  # B6
    tables = table_set("a", "b")
    numbers = torch.cat([table.lookup(ids_of(*LIMITS), train=True, step=1)[1] for table in tables])
    assert int(numbers.unique().numel()) == 10
    tables.end_step(1)
    for table in tables:
        table.insert(ids_of(*LIMITS), torch.arange(20.0).view(5, 4) + 100 * table.number)
        assert table.ids().tolist() == sorted(LIMITS)
    tables["a"].remove(ids_of(-1))
    assert tables["a"].ids().tolist() == sorted({*LIMITS} - {-1})
    rows, _ = tables["a"].lookup(ids_of(*LIMITS), train=True, step=2)
    kept = torch.arange(20.0).view(5, 4)
    kept[2] = first_values(tables["a"], ids_of(-1))[0]
    assert torch.equal(rows, kept)
    other = table_set("a", "b")["b"]
    other.import_rows(tables["b"].export())
    assert other.ids().tolist() == sorted(LIMITS)
    assert torch.equal(other.export()["weight"], tables["b"].export()["weight"])


def test_deterministic_mode_gives_rows_in_ascending_id_order():
    table = one_table()
    ids = list(range(-50, 50))
    random.Random(0).shuffle(ids)
    _, numbers = table.lookup(torch.tensor(ids), train=True, step=1)
    order = torch.tensor(ids).argsort()
    assert numbers[order].tolist() == sorted(numbers.tolist())
    table.remove(torch.tensor(ids))
    _, numbers = table.lookup(torch.tensor(ids[:10]), train=True, step=2)
    again = one_table(deterministic=False)
    again.lookup(torch.tensor(ids), train=True, step=1)
    assert len(set(numbers.tolist())) == 10
    assert torch.equal(again.export()["weight"], first_values(again, again.ids()))


def test_max_rows_is_a_promise_and_warns():
    table = one_table(max_rows=3)
    rows, numbers = table.lookup(ids_of(9, 1, 5, 7, 7), train=True, step=1)
    assert (numbers < 0).tolist() == [True, False, False, False, False]
    assert bool((rows[0] == 0).all())
    with pytest.warns(RuntimeWarning, match=r"'item' is full: 1 ids met max_rows=3.*LruCapacity"):
        table.end_step(1)
    counters = table.counters()
    assert (counters.inserted, counters.full, counters.size, counters.capacity) == (3, 1, 3, 3)
    with pytest.raises(ValueError, match="would pass max_rows=3"):
        table.insert(ids_of(100), torch.zeros(1, 4))
    table.remove(ids_of(1))
    assert table.lookup(ids_of(9), train=True, step=2)[1] >= 0


@pytest.mark.filterwarnings("ignore:table 'item' is full")
def test_counters_add_up_to_the_distinct_ids():
    torch.manual_seed(3)
    table = one_table(admission=AfterSightings(2), max_rows=20)
    seen, now = 0, table.counters()
    for step in range(1, 30):
        ids = torch.randint(0, 60, (25,))
        table.lookup(ids, train=True, step=step)
        seen += ids.unique().numel()
        now = table.counters()  # before the boundary already
        assert now.found + now.inserted + now.rejected + now.full == seen
        table.end_step(step)
        assert table.counters() == now
    assert min(now.found, now.inserted, now.rejected, now.full) > 0


def test_unadmitted_ids_read_the_default_row():
    table = one_table(unadmitted="default_row", admission=AfterSightings(3))
    default = table.default_row
    with pytest.raises(ValueError, match="has no default row"):
        _ = one_table().default_row
    want = initial_values(ids_of(0), 4, torch.tensor([table_key(7, "item/default")]), table.config.initializer.spec())[
        0
    ]
    assert torch.equal(default, want)
    for train in (True, False):
        rows, numbers = table.lookup(ids_of(5, 6), train=train, step=1)
        assert numbers.tolist() == [-1, -1]
        assert torch.equal(rows, default.expand(2, 4))
    table.end_step(1)
    assert table.size == 0
    assert table.ids().numel() == 0
    assert table.evict_older_than(100).numel() == 0
    assert torch.equal(table.lookup(ids_of(5), train=False, step=2)[0][0], default)


def test_wrong_arguments_are_named():
    table = one_table()
    with pytest.raises(ValueError, match=r"'item': ids must be int64 \[L\]"):
        table.lookup(torch.tensor([1.0]), train=True, step=1)
    with pytest.raises(ValueError, match=r"'item': weight must be \(2, 4\); got \(2, 3\)"):
        table.insert(ids_of(1, 2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"no field 'state.m', they have"):
        table.insert(ids_of(1), torch.zeros(1, 4), {"m": torch.zeros(1, 4)})
    with pytest.raises(ValueError, match="must be distinct; 3 repeats"):
        table.import_rows({"ids": ids_of(3, 1, 3), "weight": torch.zeros(3, 4)})


def test_steps_go_forward_and_match():
    table = one_table()
    table.lookup(ids_of(1), train=True, step=3)
    with pytest.raises(ValueError, match=r"end_step\(4\).*the step under way is 3"):
        table.end_step(4)
    with pytest.raises(ValueError, match="do not go back: step 2"):
        table.lookup(ids_of(1), train=True, step=2)
    table.lookup(ids_of(1), train=True, step=5)  # books step 3
    assert table.export()["last_seen"].tolist() == [3]
    table.end_step(5)
    assert table.export()["last_seen"].tolist() == [5]
    assert table.export()["count"].tolist() == [2]


def test_reserve_grows_nothing_later():
    table = one_table(block_rows=64)
    table.reserve(1000)
    blocks, slots = len(table.store.blocks.blocks), table.store.index.num_bytes()
    table.lookup(torch.arange(1000), train=True, step=1)
    assert (len(table.store.blocks.blocks), table.store.index.num_bytes()) == (blocks, slots)
