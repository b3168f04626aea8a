"""Snapshots: what is read is the boundary, whatever training does meanwhile, and copies stay within their memory."""

import logging
import threading
import time

import pytest
import torch

from recis.embedding import AfterSightings, LruCapacity, TableConfig, TableSet, TableSnapshot, TtlSteps
from recis.optim import Adam


def table_set(**changes) -> TableSet:
    base = {"embedding_dim": 4, "optimizer": Adam(lr=0.1)}
    return TableSet(
        [TableConfig(**{"name": name, "features": (name,), **base, **changes}) for name in ("a", "b")], seed=7
    )


def fill(tables, num_rows=50):
    for table in tables:
        table.lookup(torch.arange(num_rows), train=True, step=1)
    tables.end_step(1)


def exports(tables):
    return {table.name: table.export() for table in tables}


def read_all(snapshot: TableSnapshot, rows_per_chunk=7):
    parts = list(snapshot.chunks(rows_per_chunk))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def train_on(tables, step, ids):
    """Overwrite rows the way the optimizer does: announce, then write."""
    for table in tables:
        _, numbers = table.lookup(ids, train=True, step=step)
        rows = numbers.unique()
        rows = rows[rows >= 0]
        table.store.before_write(rows)
        table.store.blocks.write(rows, {"weight": torch.full((rows.numel(), 4), float(step))})
    tables.end_step(step)


def assert_equal(got, want):
    assert list(got) == list(want)
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_the_boundary_is_read_while_training_goes_on():
    tables = table_set(eviction=(TtlSteps(3), LruCapacity(55)), admission=AfterSightings(1))
    fill(tables)
    want = exports(tables)
    before = {table.name: (table.state(), table.counters()) for table in tables}
    snapshots = tables.snapshot()
    parts = {name: [] for name in snapshots}
    readers = {name: snapshot.chunks(9) for name, snapshot in snapshots.items()}
    for step in range(2, 12):  # updates, evictions, row reuse and growth between chunks
        for name, reader in readers.items():
            parts[name] += [chunk for chunk in [next(reader, None)] if chunk is not None]
        train_on(tables, step, torch.randint(0, 90, (30,)))
    for name, reader in readers.items():
        parts[name] += list(reader)
        got = {field: torch.cat([part[field] for part in parts[name]]) for field in parts[name][0]}
        assert_equal(got, want[name])
        assert snapshots[name].state == before[name][0]
        snapshots[name].close()
    assert tables.stores[0].snapshot is None
    assert tables["a"].counters().evicted > 0


def test_writer_thread_against_training():
    tables = table_set()
    fill(tables, 4000)
    want = exports(tables)
    got, errors = {}, []
    snapshots = tables.snapshot(memory_mib=64)

    def write():
        try:
            for name, snapshot in snapshots.items():
                with snapshot:
                    got[name] = read_all(snapshot, rows_per_chunk=256)
        except BaseException as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    step = 2
    while writer.is_alive() and step < 500:
        train_on(tables, step, torch.randint(0, 6000, (500,)))
        step += 1
    writer.join()
    assert errors == []
    for name in want:
        assert_equal(got[name], want[name])
    assert tables.stores[0].snapshot is None


def test_training_waits_for_memory_and_says_so(caplog):
    tables = table_set(embedding_dim=512)  # rows of 6 KiB: 170 copies fit into 1 MiB
    for table in tables:
        table.lookup(torch.arange(300), train=True, step=1)
    tables.end_step(1)
    want = exports(tables)
    store = tables.stores[0]
    snapshots = tables.snapshot(memory_mib=1)
    protection = store.snapshot
    got = {}

    def write():
        time.sleep(0.2)
        for name, snapshot in snapshots.items():
            with snapshot:
                got[name] = read_all(snapshot, rows_per_chunk=50)

    writer = threading.Thread(target=write)
    with caplog.at_level(logging.WARNING):
        writer.start()
        rows = torch.cat([table.find(table.ids()) for table in tables])
        store.before_write(rows)
        store.blocks.write(rows, {"weight": torch.zeros(600, 512)})
        writer.join()
    assert "training waits for the checkpoint writer" in caplog.text
    assert "snapshot_memory_mib" in caplog.text
    assert protection is not None
    assert protection.waited_s > 0
    for name in want:
        assert_equal(got[name], want[name])


def test_an_abandoned_snapshot_lets_training_go_once_closed():
    tables = table_set()
    fill(tables)
    snapshots = tables.snapshot()
    with pytest.raises(ValueError, match="one save runs at a time"):
        tables.snapshot()
    for snapshot in snapshots.values():
        snapshot.close()
        snapshot.close()
    with pytest.raises(ValueError, match="snapshot of table 'a' is closed"):
        snapshots["a"].read(0, 1)
    again = tables.snapshot()
    assert_equal(read_all(again["a"]), tables["a"].export())
    with pytest.raises(ValueError, match="each of its rows once"):
        again["a"].read(0, 1)


def test_a_snapshot_needs_a_boundary():
    tables = table_set()
    tables["a"].lookup(torch.tensor([1]), train=True, step=1)
    with pytest.raises(ValueError, match=r"a snapshot needs the boundary.*end_step\(1\)"):
        tables.snapshot()


def test_a_delta_snapshot_holds_changes_and_tombstones():
    tables = table_set()
    fill(tables, 10)
    for table in tables:
        table.mark_base()
    tables["a"].remove(torch.tensor([4]))
    train_on(tables, 2, torch.tensor([3, 20]))
    snapshots = tables.snapshot(since_step=1)
    assert snapshots["a"].ids.tolist() == [3, 20]
    assert snapshots["a"].tombstones.tolist() == [4]
    assert snapshots["b"].tombstones.tolist() == []
    assert_equal(read_all(snapshots["a"]), tables["a"].export(since_step=1))


def test_empty_tables_have_snapshots_too():
    tables = table_set()
    snapshots = tables.snapshot()
    assert list(snapshots["a"].chunks()) == []
    assert snapshots["a"].num_rows == 0
    for snapshot in snapshots.values():
        snapshot.close()
    assert tables.stores[0].snapshot is None
