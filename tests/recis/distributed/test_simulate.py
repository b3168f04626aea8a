"""Costs, times of a step, plans and placements: worked by hand; refusals; and what a big world takes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recis.distributed import costs as costs_file
from recis.distributed import measure, simulate
from recis.distributed.costs import OPS, Costs, LinkCost, OpCost
from recis.distributed.replay import VOLUMES, Replay, Volumes
from recis.distributed.shape import plain_shape, shape_from_json
from recis.distributed.step_time import hidden_s, phases_of_step
from recis.distributed.trace import Trace, TraceStep, TraceWriter
from recis.errors import ConfigError, DataError
from recis_kernels.philox import hash64

BY_HAND = Costs(
    machine="by hand",
    measured_at="2026-11-29T00:00:00+00:00",
    threads=1,
    load_average=(0.0, 0.0),
    copy_gb_per_s=1.0,  # a pass of 1 B is 1 ns
    roofline_at="2026-11-29T00:00:00+00:00",
    ops={name: OpCost(fixed_s=1.0, item_s=10.0, passes=1e9) for name in OPS},  # and here of 1 s
    link=LinkCost(latency_s=100.0, gather_latency_s=200.0, gb_per_s=1e-9, between="nobody"),
)


def write_trace(path: Path, bags: dict[str, list[list[int]]], **note: Any) -> Path:
    """Write lists of ids as a trace of tables of width 2, noted if `note` says something."""
    arrays = {name: pa.array(each, pa.list_(pa.int64())) for name, each in bags.items()}
    if not note:
        pq.write_table(pa.table(arrays), path)
        return path
    with TraceWriter(path, replace(plain_shape(tuple(bags), dim=2), **note)) as writer:
        values = {
            name: torch.tensor([one for bag in each for one in bag], dtype=torch.int64) for name, each in bags.items()
        }
        ends = {name: torch.tensor([0, *np.cumsum([len(bag) for bag in each])]) for name, each in bags.items()}
        writer.write(values, ends)
    return path


def popular_trace(path: Path, samples: int, per_bag: int = 4, rows: int = 5000) -> Path:
    """Write a trace of one feature whose k-th id is drawn as 1 / k."""
    drawn = rows ** np.random.default_rng(0).random(samples * per_bag)
    ids = hash64(torch.from_numpy(drawn.astype(np.int64)))
    with TraceWriter(path, replace(plain_shape(("item",), dim=16), batch_size=8)) as writer:
        writer.write({"item": ids}, {"item": torch.arange(samples + 1) * per_bag})
    return path


# ---- times


def test_seconds_of_phases_by_hand():
    """Two ranks; rank 0 looks up 3 ids (2 distinct), rank 1 one; each pair's owner is given."""
    shape = plain_shape(("ids",), dim=2)  # a row travels as 8 B and lies in 32 B: 8 + 4 state + 4 + 16
    assert shape.tables[0].row_bytes == 32
    volumes = Volumes(
        positions=np.array([3, 1]),
        asked=np.array([2, 1]),
        own=np.array([1, 0]),
        received=np.array([2, 1]),
        distinct=np.array([1, 1]),
        words_out=np.array([2, 2]),
        words_in=np.array([2, 2]),
        inserted=np.array([0, 1]),
        local=np.array([0, 0]),
    )
    shape = replace(shape, dense_parameters=3, dense_s=(5.0, 2.0))
    phases = {one.name: one for one in phases_of_step(shape, [volumes], BY_HAND, batch=7)}
    want = {
        "distinct ids": [1 + 30, 1 + 10],
        "numbers of ids": [100 + 8] * 2,
        "ids": [100 + 16] * 2,
        "lookup at owners": [1 + 20 + 2 * 8, (1 + 10 + 8) + (1 + 10 + 32)],
        "rows": [100 + 8] * 2,  # rank 0 serves one of rank 1's and asks for one
        "pooling": [1 + 30 + 3 * 8, 1 + 10 + 8],
        "weights and losses": [2 * (200 + 8)] * 2,
        "dense part": [5 + 14] * 2,
        "dense gradients": [100 + 8] * 2,  # a chunk of two numbers
        "sums of dense gradients": [200 + 8] * 2,
        "sums of gradients": [1 + 30 + 3 * 8, 1 + 10 + 8],
        "gradients": [100 + 8] * 2,
        "update at owners": [1 + 20 + 2 * 8 + 32, 1 + 10 + 8 + 32],
    }
    assert {name: one.seconds.tolist() for name, one in phases.items()} == want
    wall_s = {name: one.wall_s(None) for name, one in phases.items()}
    assert hidden_s(shape, wall_s) == 19  # of 224 s of numbers and ids, as long as the dense part takes
    assert hidden_s(shape, wall_s | {"dense part": 1000.0}) == 108 + 116
    assert hidden_s(replace(shape, overlap=False), wall_s) == 0
    assert phases["pooling"].wall_s(None) == 55
    assert phases["pooling"].wall_s(1) == 55 + 19
    assert phases["rows"].sent.tolist() == phases["rows"].received.tolist() == [8, 8]


def test_what_is_not_tables_takes_time_too():
    """Features and the trainer grow with the batch; side by side all that computes takes 1.5 times as long, messages do not."""
    none = np.array([0, 0])
    volumes = Volumes(**dict.fromkeys(VOLUMES, none))
    shape = replace(
        plain_shape(("ids",), dim=2), dense_s=(4.0, 1.0), trainer_s=(2.0, 0.5), features_s=(1.0, 0.25), small_gathers=3
    )
    costs = replace(BY_HAND, link=replace(BY_HAND.link, crowding=1.5))
    found = {one.name: one.seconds.tolist() for one in phases_of_step(shape, [volumes], costs, batch=8)}
    assert found["features"] == [1.5 * (1 + 2)] * 2
    assert found["trainer"] == [1.5 * (2 + 4)] * 2
    assert found["dense part"] == [1.5 * (4 + 8)] * 2
    assert found["weights and losses"] == [3 * (200 + 8)] * 2
    assert found["numbers of ids"] == [108] * 2
    alone = Volumes(**dict.fromkeys(VOLUMES, np.array([0])))
    found = {one.name: one.seconds.tolist() for one in phases_of_step(shape, [alone], costs, batch=8)}
    assert found["trainer"] == [6]
    assert shape_from_json(json.loads(json.dumps(shape.to_json()))) == shape
    older = {name: one for name, one in shape.to_json().items() if name not in ("trainer_s", "features_s")}
    assert shape_from_json(older) == replace(shape, trainer_s=(0.0, 0.0), features_s=(0.0, 0.0))


def test_crowding_by_hand():
    """Ten pieces make a step: one of them twice as long makes it a tenth longer, and the slower rank counts."""
    both = np.full((2, 40), 1.0)
    both[0, ::20] = both[1, 10::20] = 2.0
    both[1, 31:] = 9.0  # one step of four was disturbed
    assert measure.crowding(np.array([1.0, 1.0, 7.0]), both) == pytest.approx(1.1)
    assert measure.crowding(np.array([2.0]), both) == 1.0  # never less than alone


def test_copies_of_hot_ids_by_hand():
    replay = Replay(plain_shape(("ids",), dim=2), 2, hot_ids=1)
    ids = TraceStep({"ids": torch.tensor([5, 5])}, {"ids": torch.tensor([0, 1, 2])}, 2)
    replay.step(ids)
    hot = replay.step(ids).hot
    assert hot is not None
    phases = phases_of_step(replay.shape, hot, BY_HAND, batch=1, hot_per_table=replay.hot_per_table)
    last = phases[-1]
    assert last.name == "copies of hot ids"
    # each rank has room for one copy of its own: its sum and sightings to the owner, its new row to the other
    assert last.sent.tolist() == [12 + 8] * 2
    assert last.seconds.tolist() == [(100 + 12) + (200 + 8) + (1 + 20 + 2 * 8 + 32)] * 2
    assert sum(int(one.sent.sum()) for one in phases if one.name in ("ids", "rows", "gradients")) == 0


def test_one_rank_sends_nothing():
    shape = replace(plain_shape(("ids",), dim=2), dense_parameters=10)
    volumes = Replay(shape, 1).step(TraceStep({"ids": torch.tensor([1])}, {"ids": torch.tensor([0, 1])}, 1)).plain
    for phase in phases_of_step(shape, volumes, BY_HAND, batch=1):
        assert not phase.sent.any()
        is_exchange = phase.name in ("numbers of ids", "ids", "rows", "gradients", "dense gradients")
        assert not (is_exchange and phase.seconds.any())


@pytest.mark.parametrize(
    ("cost", "scale"),
    [(OpCost(fixed_s=1e-4, item_s=2e-8, passes=3.0), 10.0), (OpCost(item_s=1e-8), 5.0), (OpCost(passes=2.0), 1.0)],
)
def test_three_points_give_the_cost_back(cost, scale):
    def seconds(items: float, num_bytes: float) -> float:
        return cost.fixed_s + items * cost.item_s + cost.passes * num_bytes / (scale * 1e9)

    cases = [(4096, 4096 * 64), (65536, 65536 * 64), (65536, 65536 * 512)]
    found = measure.fitted([(items, held, seconds(items, held)) for items, held in cases], scale)
    for name in ("fixed_s", "item_s", "passes"):
        assert getattr(found, name) == pytest.approx(getattr(cost, name), rel=1e-6, abs=1e-12)


def test_a_noisy_fit_stays_at_or_above_zero():
    found = measure.fitted([(10, 10.0, 5.0), (20, 20.0, 1.0), (20, 40.0, 0.5)], 1.0)
    assert min(found.fixed_s, found.item_s, found.passes) >= 0


def test_costs_are_measured_and_kept(tmp_path):
    ops = measure.measure_ops(10.0, scale=0.01)
    assert ops.keys() == OPS.keys()
    assert all(min(one.fixed_s, one.item_s, one.passes) >= 0 for one in ops.values())
    assert all(
        one.fixed_s + one.item_s + one.passes > 0 for name, one in ops.items() if name in ("dedup", "pool", "update")
    )
    kept = replace(BY_HAND, ops=ops)
    costs_file.store(kept, tmp_path / "costs.json")
    assert costs_file.load(tmp_path / "costs.json") == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "is of another release; measure with: recis simulate --measure"),
        ({"ops": {}}, "lacks or garbles"),
        ({"copy_gb_per_s": 0}, "negative or not finite"),
        ({"threads": None, "more": 1}, "lacks or garbles"),
    ],
)
def test_damaged_costs_are_refused(tmp_path, change, message):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(BY_HAND.to_json() | change))
    with pytest.raises(ConfigError, match=message):
        costs_file.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        costs_file.load(tmp_path / "none.json")


def test_another_network():
    other = BY_HAND.with_link(gb_per_s=12.5, latency_us=3.0)
    assert float(other.all_to_all(12.5e9, 5)) == pytest.approx(1 + 4 * 3e-6)
    assert BY_HAND.with_link(gb_per_s=None, latency_us=None) == BY_HAND
    for wrong in ({"gb_per_s": 0.0, "latency_us": None}, {"gb_per_s": None, "latency_us": math.nan}):
        with pytest.raises(ConfigError, match="must be above 0"):
            BY_HAND.with_link(**wrong)


# ---- simulation


def test_a_simulation_says_what_a_replay_counts(tmp_path):
    trace = Trace(popular_trace(tmp_path / "t.parquet", 8 * 16 * 4))
    result = simulate.simulate(trace, world_size=16, costs=BY_HAND, hot_ids=20)
    assert (result.batch, result.num_steps, result.counted_steps) == (8, 4, 3)
    replay, steps = Replay(trace.shape, 16), list(trace.steps(128))
    volumes = [replay.step(ids).plain[0] for ids in steps][1:]
    mean = np.mean([one.asked.mean() for one in volumes])
    assert result.asked == pytest.approx(mean)
    assert result.asked_per_table == pytest.approx((mean,))
    assert result.plain.balance["ids served as owner"].most == pytest.approx(
        np.mean([v.received.max() for v in volumes])
    )
    away = np.mean([(one.received - one.own).mean() for one in volumes])
    assert result.plain.phases["rows"][1] == pytest.approx(64 * away)
    assert (
        result.growth[-1].rows == replay.rows.sum() == torch.cat([one.values["item"] for one in steps]).unique().numel()
    )
    assert result.growth[-1].most_bytes == replay.table_bytes().max()
    assert [one.rows for one in result.growth] == sorted(one.rows for one in result.growth)
    assert result.hot is not None
    assert result.hot.phases["rows"][1] < result.plain.phases["rows"][1]
    assert result.hot.balance["ids served from copies"].mean > 0
    figures = simulate.metrics(result)
    assert json.loads(json.dumps(figures | simulate.to_json(result)))
    assert figures["step_s"] == pytest.approx(sum(seconds for seconds, _, _ in result.plain.phases.values()))
    text = "\n".join(simulate.lines(result))
    for word in ("16 ranks x 8 samples", "most/mean", "with copies of 20 hot ids", "step: ", "table 'item'"):
        assert word in text


def test_without_costs_there_are_no_times(tmp_path):
    result = simulate.simulate(Trace(popular_trace(tmp_path / "t.parquet", 64)), world_size=4)
    assert result.plain.step_s is None
    assert not [name for name in simulate.metrics(result) if name.endswith("_s")]
    assert "no times: give --costs" in "\n".join(simulate.lines(result))


def test_four_thousand_ranks(tmp_path):
    """Every rank looks up something, and all of their rows lie somewhere: sums over ranks meet."""
    trace = Trace(popular_trace(tmp_path / "t.parquet", 4096 * 2 * 2, rows=200_000))
    result = simulate.simulate(trace, world_size=4096, batch=2, costs=BY_HAND)
    assert result.rows.shape == (1, 4096)
    assert result.positions == 8
    served = result.plain.balance["ids served as owner"]
    assert served.mean == pytest.approx(result.asked)
    assert served.ratio > 2  # the most popular id has one owner
    assert result.plain.phases["numbers of ids"][1] == 8 * 4095


def test_capacity_holds_rows(tmp_path):
    path = write_trace(tmp_path / "t.parquet", {"a": [[n] for n in range(400)]}, batch_size=50)
    trace = Trace(path)
    limited = replace(trace.shape.tables[0], capacity=100)
    trace.shape = replace(trace.shape, tables=(limited,))
    result = simulate.simulate(trace, world_size=2)
    assert result.rows.tolist() == [[50, 50]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"world_size": 2, "batch": 0}, "--batch must be at least 1; got 0"),
        ({"world_size": 2, "batch": 2, "max_steps": 0}, "--steps must be at least 1"),
        ({"world_size": 2, "batch": 2, "hot_ids": -1}, "--hot-ids must be at least 0"),
        ({"world_size": 5000, "batch": 1}, r"1\.\.4096 ranks; got 5000"),
        ({"world_size": 64, "batch": 1}, "12 samples are less than one step of 64 ranks x 1 samples"),
        ({"world_size": 2, "batch": 4, "hot_ids": 3}, "has one step of 8 samples"),
        ({"world_size": 2, "batch": 2, "cores": 0}, "--cores must be at least 1"),
    ],
)
def test_refused_simulations(tmp_path, given, message):
    trace = Trace(write_trace(tmp_path / "t.parquet", {"a": [[1]] * 12}))
    with pytest.raises(ConfigError, match=message):
        simulate.simulate(trace, **given)


# ---- traces that cannot be used


def test_bad_traces(tmp_path):
    path = tmp_path / "t.parquet"
    with pytest.raises(DataError, match="no such file; write one with recis simulate --record"):
        Trace(path)
    pq.write_table(pa.table({}), path)
    with pytest.raises(DataError, match="the trace has no columns"):
        Trace(path)
    for kind in (pa.int32(), pa.string(), pa.list_(pa.int32()), pa.list_(pa.float64())):
        pq.write_table(pa.table({"a": pa.array([], kind)}), path)
        with pytest.raises(DataError, match=r"column 'a': ids must be int64 or lists of int64; got"):
            Trace(path)
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), path)
    with pytest.raises(DataError, match="the trace is empty"):
        Trace(path)
    with pytest.raises(DataError, match="column 'A': no such column; there are 'a'"):
        Trace(path, columns=["A"])
    pq.write_table(pa.table({"a": pa.array([[1, None]], pa.list_(pa.int64()))}), path)
    with pytest.raises(DataError, match=r"column 'a': an id is missing \(null\)"):
        list(Trace(path).steps(1))
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="is no Parquet file"):
        Trace(path)
    with pytest.raises(ConfigError, match="--dim must be at least 1"):
        Trace(path, dim=0)


def test_columns_of_any_log(tmp_path):
    path = tmp_path / "log.parquet"
    columns = {
        "user": pa.array([7, 8]),
        "seen": pa.array([[1, 2], None], pa.list_(pa.int64())),
        "price": pa.array([0.5, 1.0]),
    }
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match="column 'price'"):
        Trace(path)
    trace = Trace(path, columns=["user", "seen"], dim=4)
    (step,) = trace.steps(2)
    assert step.values["user"].tolist() == [7, 8]
    assert step.values["seen"].tolist() == [1, 2]
    assert step.offsets["seen"].tolist() == [0, 2, 2]
    assert [table.dim for table in trace.shape.tables] == [4, 4]


def test_arrays_of_numpy(tmp_path):
    ids, lengths = np.arange(7), np.array([2, 0, 3, 2])
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(DataError, match=r"needs the lengths beside it, ids\.lengths\.npy"):
        Trace(tmp_path / "ids.npy")
    np.save(tmp_path / "ids.lengths.npy", lengths)
    first, second = Trace(tmp_path / "ids.npy").steps(2)
    assert first.values["ids"].tolist() == [0, 1]
    assert second.values["ids"].tolist() == [2, 3, 4, 5, 6]
    assert second.offsets["ids"].tolist() == [0, 3, 5]
    np.save(tmp_path / "ids.lengths.npy", lengths[:2])
    with pytest.raises(DataError, match="sum to the 7 ids; the sum is 2"):
        Trace(tmp_path / "ids.npy")
    np.save(tmp_path / "ids.npy", ids.astype(np.int32))
    with pytest.raises(DataError, match="must be int64, 1-D; got int32"):
        Trace(tmp_path / "ids.npy")
    with pytest.raises(ConfigError, match="--columns a"):
        Trace(tmp_path / "ids.npy", columns=["a"])
