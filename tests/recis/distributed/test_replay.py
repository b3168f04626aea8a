"""A replayed trace against real exchanges of the same ids: volumes, owners, rows and bytes of memory; and by hand."""

import multiprocessing
import socket
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import ThreadRanks, on_ranks
from torch import Tensor

from recis.distributed.ranks import Ranks
from recis.distributed.replay import Replay, Volumes
from recis.distributed.shape import ModelShape, owners_bytes, plain_shape, sightings_bytes, table_shape
from recis.distributed.tables import share_tables
from recis.distributed.trace import Trace, TraceStep, TraceWriter
from recis.embedding import AfterSightings, EmbeddingBagCollection, TableConfig, TableSet
from recis.errors import ConfigError
from recis.jagged import KeyedJaggedTensor
from recis.optim import SparseOptimizer
from recis_kernels.ids_partition import slice_bounds, slice_of_id

FEATURES = {"user": ("user",), "item": ("item", "seen"), "shop": ("shop",)}
DIMS = {"user": 4, "item": 4, "shop": 6}


def configs(**given: Any) -> list[TableConfig]:
    """Return two tables of one store and one of another."""
    return [
        TableConfig(name=name, features=features, embedding_dim=DIMS[name], **given)
        for name, features in FEATURES.items()
    ]


def shape_of(tables: list[TableConfig]) -> ModelShape:
    """Return the shape of one collection over the tables."""
    stores = {"user": 0, "item": 0, "shop": 1}
    names = [table.name for table in tables]
    return ModelShape(
        tables=tuple(table_shape(table, store=stores[table.name]) for table in tables),
        features={f: names.index(table) for table in names for f in FEATURES[table]},
        lookups=(("user", "item", "seen"), ("shop",)),
    )


def made_step(seed: int, samples: int, most: int = 40) -> TraceStep:
    """Return ids of some samples: bags of 0 to 3 of few ids, which ranks have in common."""
    draw = torch.Generator().manual_seed(seed)
    values, offsets = {}, {}
    for name in ("user", "item", "seen", "shop"):
        lengths = torch.randint(0, 4, (samples,), generator=draw)
        offsets[name] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        values[name] = torch.randint(-most, most, (int(lengths.sum()),), generator=draw) * 2**33
    return TraceStep(values, offsets, samples)


def batch_of(ids: TraceStep, rank: int, world_size: int) -> KeyedJaggedTensor:
    """Return a rank's samples of a step."""
    each = ids.num_samples // world_size
    keys = tuple(ids.values)
    values, lengths = [], []
    for name in keys:
        cut = ids.offsets[name][rank * each : (rank + 1) * each + 1]
        values.append(ids.values[name][int(cut[0]) : int(cut[-1])])
        lengths.append(cut.diff())
    return KeyedJaggedTensor(keys=keys, values=torch.cat(values), lengths=torch.cat(lengths), stride=each)


class Counted:
    """Counts what all-to-alls of any Ranks send to others and receive from them, by the words of their names."""

    def __init__(self, ranks: Ranks) -> None:
        self.bytes: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        plain, rank = ranks.start_all_to_all, ranks.rank

        def counting(given: Tensor, send: Any, receive: Any, what: str, **more: Any) -> Any:
            each = given.element_size() * int(np.prod(given.shape[1:]))
            kind = what.split(" of table")[0].split(" for table")[0]
            self.bytes[kind][0] += each * (sum(send) - send[rank])
            self.bytes[kind][1] += each * (sum(receive) - receive[rank])
            return plain(given, send, receive, what, **more)

        ranks.start_all_to_all = counting  # type: ignore[method-assign]


def real(ranks: Ranks, steps: list[TraceStep], **settings_: Any) -> dict[str, Any]:
    """Train on a rank's samples; return bytes per step and kind, rows and bytes of memory."""
    counted = Counted(ranks)
    table_set = TableSet(configs(**settings_), seed=1)
    share_tables(table_set, ranks)
    collection = EmbeddingBagCollection(table_set)
    optimizer = SparseOptimizer([collection])
    seen = []
    for number, ids in enumerate(steps, start=1):
        counted.bytes.clear()
        torch.stack(
            [v.sum() for v in collection(batch_of(ids, ranks.rank, ranks.world_size)).values()]
        ).sum().backward()
        optimizer.step()
        table_set.end_step(number)
        seen.append({kind: tuple(both) for kind, both in counted.bytes.items()})
    stores = table_set.stores
    return {
        "sent": seen,
        "rows": [table.size for table in table_set],
        "row_bytes": sum(store.num_bytes for store in stores),
        "index": sum(store.index.num_bytes() for store in stores),
        "owners": sum(store.owners.owner.nbytes for store in stores),
    }


def expected_bytes(volumes: tuple[Volumes, ...], rank: int) -> dict[str, tuple[int, int]]:
    """Return what a rank sends and receives in a step, by kind."""
    found: dict[str, list[int]] = {"ids": [0, 0], "rows": [0, 0], "gradients": [0, 0]}
    for one, dim in zip(volumes, (4, 6), strict=True):
        asks, serves = one.asked[rank] - one.own[rank], one.received[rank] - one.own[rank]
        for kind, (out, back) in {
            "ids": (8 * one.words_out[rank], 8 * one.words_in[rank]),
            "rows": (4 * dim * serves, 4 * dim * asks),
            "gradients": (4 * dim * asks, 4 * dim * serves),
        }.items():
            found[kind][0] += int(out)
            found[kind][1] += int(back)
    numbers = 8 * (len(volumes[0].asked) - 1) * len(FEATURES)  # of each table's pairs, to every other rank
    return {kind: (both[0], both[1]) for kind, both in found.items()} | {"numbers of ids": (numbers, numbers)}


def assert_same(results: list[dict[str, Any]], steps: list[TraceStep], world_size: int, **settings_: Any) -> None:
    """Assert that a replay of the steps says what the ranks did."""
    replay = Replay(shape_of(configs(**settings_)), world_size)
    for number, ids in enumerate(steps):
        volumes = replay.step(ids).plain
        for rank, result in enumerate(results):
            want = expected_bytes(volumes, rank)
            assert {kind: result["sent"][number][kind] for kind in want} == want
    parts = replay.parts_of_bytes()
    for rank, result in enumerate(results):
        assert result["rows"] == replay.rows[:, rank].tolist()
        assert result["row_bytes"] == parts["rows"][rank]
        assert result["index"] == parts["index"][rank]
        assert result["owners"] == parts["owners"][rank]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_volumes_and_memory_are_those_of_ranks(world_size):
    steps = [made_step(seed, 6 * world_size, 400) for seed in range(5)]
    results = on_ranks(world_size, lambda ranks: real(ranks, steps))
    assert_same(results, steps, world_size)


def test_rows_wait_for_admission():
    steps = [made_step(seed, 12) for seed in range(6)]
    results = on_ranks(3, lambda ranks: real(ranks, steps, admission=AfterSightings(4)))
    assert_same(results, steps, 3, admission=AfterSightings(4))
    assert 0 < sum(results[0]["rows"]) < sum(on_ranks(3, lambda ranks: real(ranks, steps))[0]["rows"])


def serve(rank: int, port: int, pipe: Any) -> None:
    """Be one of two processes."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    steps = [made_step(seed, 40) for seed in range(3)]
    pipe.send(real(Ranks(rank, 2, store=store, group=dist.group.WORLD), steps))
    dist.barrier()
    dist.destroy_process_group()


def test_volumes_are_those_of_two_processes():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes, children = [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        children.append(context.Process(target=serve, args=(rank, port, theirs), daemon=True))
        children[-1].start()
        pipes.append(ours)
    results = [pipe.recv() for pipe in pipes]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert_same(results, [made_step(seed, 40) for seed in range(3)], 2)


@settings(max_examples=40, deadline=None)
@given(
    bags=st.lists(st.lists(st.integers(-5, 5), max_size=5), min_size=1, max_size=30),
    world_size=st.integers(1, 6),
)
def test_pairs_against_sets(bags, world_size):
    bags = bags[: len(bags) // world_size * world_size]
    each = len(bags) // world_size
    lengths = torch.tensor([len(bag) for bag in bags], dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = torch.tensor([one for bag in bags for one in bag], dtype=torch.int64)
    if not each:
        return
    replay = Replay(plain_shape(("ids",), dim=8), world_size)
    (volumes,) = replay.step(TraceStep({"ids": values}, {"ids": offsets}, len(bags))).plain
    bounds = slice_bounds(world_size).tolist()
    slices = {one: int(slice_of_id(torch.tensor([one]))) for one in range(-5, 6)}
    owner = {one: max(r for r in range(world_size) if bounds[r] <= at) for one, at in slices.items()}
    asked = [set().union(*map(set, bags[rank * each : (rank + 1) * each])) for rank in range(world_size)]
    for rank in range(world_size):
        mine = [one for one in range(-5, 6) if owner[one] == rank]
        assert volumes.positions[rank] == sum(map(len, bags[rank * each : (rank + 1) * each]))
        assert volumes.asked[rank] == len(asked[rank])
        assert volumes.own[rank] == len(asked[rank].intersection(mine))
        assert volumes.received[rank] == sum(one in asked[other] for other in range(world_size) for one in mine)
        assert volumes.distinct[rank] == replay.rows[0, rank] == len(set().union(*asked).intersection(mine))
        parts = [len([one for one in asked[rank] if owner[one] == o]) for o in range(world_size) if o != rank]
        assert volumes.words_out[rank] == sum(part + -(-part // 2) for part in parts)


def test_hot_ids_stay_at_home():
    """Four ranks of one sample; 7 is asked for by all, 9 by two, the rest by one each."""
    bags = [[7, 9], [7, 9], [7, 1], [7, 2, 2]]
    values = torch.tensor([one for bag in bags for one in bag])
    offsets = torch.tensor([0, 2, 4, 6, 9])
    ids = TraceStep({"ids": values}, {"ids": offsets}, 4)
    replay = Replay(plain_shape(("ids",), dim=8), 4, hot_ids=2)
    first = replay.step(ids)
    assert first.hot is None
    assert first.plain[0].asked.tolist() == [2, 2, 2, 2]
    second = replay.step(ids)
    assert second.hot is not None
    assert second.hot[0].asked.tolist() == [0, 0, 1, 1]
    assert second.hot[0].local.tolist() == [2, 2, 1, 1]
    assert second.plain[0].asked.tolist() == [2, 2, 2, 2]
    assert second.hot[0].total("distinct") == second.hot[0].total("received") == 2
    assert replay.hot_per_table.tolist() == [2]
    assert replay.rows.sum() == 4  # owners keep the rows of hot ids too


def test_a_written_trace_replays_alike(tmp_path: Path):
    shape = shape_of(configs())
    steps = [made_step(seed, 12) for seed in range(3)]
    with TraceWriter(tmp_path / "t.parquet", shape) as writer:
        for ids in steps:
            writer.write(ids.values, ids.offsets)
    trace = Trace(tmp_path / "t.parquet")
    assert trace.shape == shape
    assert trace.num_samples == 36
    read = list(trace.steps(12))
    assert len(read) == 3
    for ours, theirs in zip(read, steps, strict=True):
        for name in shape.features:
            assert torch.equal(ours.values[name], theirs.values[name])
            assert torch.equal(ours.offsets[name], theirs.offsets[name])
    assert [step.num_samples for step in trace.steps(7)] == [7] * 5


def test_bytes_of_lists():
    assert [owners_bytes(n) for n in (0, 1024, 1025, 5000)] == [4096, 4096, 8192, 32768]
    assert sightings_bytes(0) == 0
    assert sightings_bytes(12) == 16 * 16 + 12 * 36
    assert sightings_bytes(13) == 32 * 16 + 13 * 36


@pytest.mark.parametrize("world_size", [0, -1, 4097])
def test_worlds_out_of_range(world_size):
    with pytest.raises(ConfigError, match=r"--world must be 1..4096 ranks"):
        Replay(plain_shape(("ids",), dim=8), world_size)


def test_thread_ranks_count_alike():
    """The counter of this file against the one of the thread ranks."""

    def work(ranks: ThreadRanks) -> tuple[int, int]:
        result = real(ranks, [made_step(0, 8)])
        return ranks.sent_bytes, sum(both[0] for both in result["sent"][0].values())

    for theirs, ours in on_ranks(2, work):
        assert theirs == ours > 0
