"""Plans by hand: statistics of ids, the memory account, placements, refusals."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recis.distributed import plan, simulate
from recis.distributed.costs import OPS, Costs, LinkCost, OpCost
from recis.distributed.id_statistics import IdStatistics, statistics_of, zipf_exponent
from recis.distributed.placement import DATA_PARALLEL, SLICED, Use, place_table
from recis.distributed.plan import fullest_rows, make_plan
from recis.distributed.replay import Replay
from recis.distributed.shape import ModelShape, TableShape, index_bytes, plain_shape
from recis.distributed.trace import Trace, TraceStep, TraceWriter
from recis.errors import ConfigError
from recis_kernels.philox import hash64

BY_HAND = Costs(
    machine="by hand",
    measured_at="2026-11-29T00:00:00+00:00",
    threads=1,
    load_average=(0.0, 0.0),
    copy_gb_per_s=1.0,
    roofline_at="2026-11-29T00:00:00+00:00",
    ops={name: OpCost(item_s=1e-8) for name in OPS},
    link=LinkCost(latency_s=1e-4, gather_latency_s=1e-4, gb_per_s=1.0, between="nobody"),
)


def test_statistics_of_a_sample():
    first, second = np.array([1, 1, 2, 3]), np.array([1, 4, 5, 6])
    seen = statistics_of(first, second, 8)
    assert (seen.positions, seen.distinct_half, seen.distinct, seen.most) == (8, 3, 6, 3 / 8)
    assert seen.rows_at(8)[0] == 6
    assert seen.rows_at(32)[0] == 24  # from 3 to 6 ids as samples double: they grow in proportion
    assert replace(seen, distinct_half=6).rows_at(1000)[0] == 6  # no new ids in the second half
    assert math.isnan(seen.zipf)
    assert zipf_exponent(np.round(1e6 * np.arange(1, 200) ** -1.1)) == pytest.approx(1.1, abs=1e-3)


@pytest.mark.parametrize("world_size", [2, 7, 64])
def test_the_fullest_rank_is_below_its_bound(world_size):
    ids = hash64(torch.arange(100_000))
    replay = Replay(plain_shape(("ids",), dim=8), world_size)
    whole = ids.numel() // world_size * world_size
    replay.step(TraceStep({"ids": ids[:whole]}, {"ids": torch.arange(whole + 1)}, whole))
    bound, mean = fullest_rows(whole, world_size), whole / world_size
    assert replay.rows.max() <= bound + 2 * math.sqrt(mean)
    assert mean < bound < mean + 5 * math.sqrt(mean) + whole / 65536


def planned(tmp_path: Path, **given: Any) -> plan.Plan:
    """Return the plan of a trace of one table over four ranks."""
    ids = hash64(torch.from_numpy((5000 ** np.random.default_rng(0).random(1024)).astype(np.int64)))
    with TraceWriter(tmp_path / "t.parquet", replace(plain_shape(("item",), dim=16), batch_size=8)) as writer:
        writer.write({"item": ids}, {"item": torch.arange(257) * 4})
    trace = Trace(tmp_path / "t.parquet")
    shape = {"dense_parameters": 100, "optimizer_numbers": 200} | given.pop("shape", {})
    trace.shape = replace(trace.shape, **shape)
    result = simulate.simulate(trace, world_size=4, costs=BY_HAND)
    seen = {"item": IdStatistics(samples=256, positions=1024, distinct_half=300, distinct=500, zipf=1.0, most=0.1)}
    settings = {"rows": {"item": (1_000_000, "as given")}, "program_bytes": 1_000_000, "memory_limit": None} | given
    return make_plan("by hand", result, seen, **settings)


def test_memory_adds_up(tmp_path):
    found = planned(tmp_path)
    account = {line.name: line.num_bytes for line in found.lines_of_memory}
    most = fullest_rows(1_000_000, 4)
    assert 250_000 < most < 252_000
    assert account["rows of 'item'"] == most * 96  # 64 + 4 + pad + 16, to a multiple of 32
    assert account["index of 'item'"] == index_bytes(most) == 2**19 * 16
    assert account["dense part"] == 4 * (100 + 100 + 200)
    assert account["dense gradients, flat"] == 1600
    volumes = found.simulation.most_of_lookups[0]
    pairs = volumes["asked"] + volumes["served"]
    exchange = pairs * 128 + pairs * 32 + pairs * 24 + 2 * 4 * 8
    assert account["exchange of lookup 0"] == exchange
    assert found.memory_bytes == sum(account.values())
    assert found.fits is None


def test_a_dealt_dense_part_counts_by_its_share(tmp_path):
    def account(**given: Any) -> dict[str, int]:
        return {line.name: line.num_bytes for line in planned(tmp_path, shape=given).lines_of_memory}

    whole = account()
    found = account(dense_at_once=70)
    assert "dense part" not in found
    assert found["dense part, dealt"] == 4 * (100 + 100 + 200) // 4
    assert found["dense weights, gathered"] == 4 * 70
    assert found["dense gradients, whole"] == 4 * (70 + 70)
    several = account(dense_at_once=70, dense_grads_whole=True)  # micro-batches collect theirs before any travels
    assert several["dense gradients, whole"] == 4 * (100 + 70)
    assert {name: found.get(name) for name in whole if not name.startswith("dense")} == {
        name: size for name, size in whole.items() if not name.startswith("dense")
    }
    phases = planned(tmp_path, shape={"dense_at_once": 70}).simulation.plain.phases
    seconds, sent, _ = phases["dense weights"]
    assert seconds == pytest.approx(2 * BY_HAND.all_gather(100, 4))  # 25 numbers of each rank, twice
    assert sent == 2 * 100 * 3
    assert "sums of dense gradients" not in phases
    limited = planned(tmp_path, shape={"dense_at_once": 70}, memory_limit=20_000_000)
    fixed = sum(size for name, size in found.items() if name in ("program", "exchange of lookup 0"))
    fixed += found["dense weights, gathered"] + found["dense gradients, whole"]
    assert limited.least_world == math.ceil(4 * (sum(found.values()) - fixed) / (20_000_000 - fixed))


def test_what_does_not_fit_is_refused(tmp_path):
    whole = planned(tmp_path)
    assert planned(tmp_path, memory_limit=whole.memory_bytes).fits
    small = planned(tmp_path, memory_limit=whole.memory_bytes / 2)
    assert small.fits is False
    assert small.least_world is not None
    assert small.least_world > 4
    verdict = list(plan.lines(small))[-1]
    assert verdict.startswith("REFUSED: ")
    assert f"about {small.least_world} ranks would fit it" in verdict
    assert plan.metrics(small)["fits"] == 0
    hopeless = planned(tmp_path, memory_limit=500_000)
    assert "no number of ranks helps" in list(plan.lines(hopeless))[-1]
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(ConfigError, match="--memory-per-rank must be above 0 GB"):
            planned(tmp_path, memory_limit=wrong)


def table(**given: Any) -> TableShape:
    return TableShape(**({"name": "t", "dim": 16, "state": (("h", 1),)} | given))


def test_small_tables_are_proposed_on_every_rank():
    use = Use(rows=100, asked=50, tables_beside=1, travel_item=4)
    small = place_table(table(), use, world_size=8, share=0.2, costs=BY_HAND, free_bytes=None)
    assert small.proposed.name == DATA_PARALLEL
    assert "'t': data-parallel (--set parallel.places.data_parallel=t)" in next(iter(small.lines()))
    by_name = {place.name: place for place in small.places}
    assert by_name[SLICED].seconds == pytest.approx(4 * 7 * 1e-4 + 7 / 8 * 50 * (12 + 128) / 1e9)
    assert by_name[DATA_PARALLEL].seconds == pytest.approx(2 * 7 * 1e-4 + 7 / 8 * 100 * (128 + 4) / 1e9)
    assert by_name[DATA_PARALLEL].memory_bytes == 0.2 * 100 * 96 + 3 * 100 * 64
    assert by_name[SLICED].memory_bytes == 0.2 * 100 * 96
    large = place_table(table(), replace(use, rows=10**8), world_size=8, share=0.125, costs=BY_HAND, free_bytes=None)
    assert large.proposed.name == SLICED
    full = place_table(table(), use, world_size=8, share=0.2, costs=BY_HAND, free_bytes=9599)
    assert full.proposed.name == SLICED  # 100 rows of 96 B do not fit beside the rest
    assert large.setting is None
    assert place_table(table(), use, world_size=1, share=1, costs=BY_HAND, free_bytes=None).proposed.name == SLICED


def test_shapes_of_other_dtypes():
    row = table(dtype="bfloat16", dim=10, state=(("m", 10), ("v", 10)))
    assert row.row_text() == "10 x 2 weights + 80 state + 8 id + 8 counters + 12 padding = 128 B"
    shape = ModelShape(tables=(row,), features={"f": 0}, lookups=(("f",),), rows_item=4)
    assert shape.row_item(0) == 2
    assert replace(shape, tables=(table(),)).row_item(0) == 4
