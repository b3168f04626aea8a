"""The harness runs every implementation in every round, stores the contract's fields, and the report reads them back."""

import json
import time

import pytest

from recis.bench import harness, report
from recis.bench.harness import at_threads, compare, keep
from recis.errors import ConfigError


class FakeBenchmark:
    """Stands in for pytest-benchmark's fixture: counts what it was asked to time."""

    def __init__(self):
        self.extra_info = {}
        self.timed = 0

    def pedantic(self, target, setup, rounds, iterations):
        for _ in range(rounds):
            setup()
            target()
            self.timed += iterations


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(harness, "SETTLE_S", 0.0)
    monkeypatch.setattr(harness, "copy_gb_per_s", lambda device="cpu": 10.0)
    monkeypatch.setattr(harness, "MAX_SPREAD", 1e9)


def run_compare(quick_benchmark, **options):
    calls = []
    impls = {
        "ours": lambda: (calls.append("ours"), time.sleep(0.001)),
        "peer": lambda: (calls.append("peer"), time.sleep(0.003)),
    }
    info = compare(quick_benchmark, case="sleep", ours="ours", impls=impls, rounds=6, **options)
    return info, calls


def test_alternates_and_stores_the_contract(quick):
    benchmark = FakeBenchmark()
    info, calls = run_compare(benchmark, bytes_moved=10**6, items=1000, missing=["fbgemm"], targets={"peer": 2.0})
    assert benchmark.extra_info == info
    measured = calls[2 * harness.WARM_UP_ROUNDS : 2 * harness.WARM_UP_ROUNDS + 12]
    assert measured == ["ours", "peer", "peer", "ours"] * 3
    assert benchmark.timed == 5
    assert set(info) >= {"case", "device", "threads", "load_average", "results", "ratio_to", "missing"}
    assert set(info["results"]["ours"]) == {"p20_ms", "p50_ms", "p80_ms", "gb_per_s", "share_of_copy", "items_per_s"}
    assert info["ratio_to"]["peer"] > 1.5
    assert info["results"]["ours"]["items_per_s"] < 1000 / 0.001
    assert info["results"]["ours"]["share_of_copy"] == pytest.approx(info["results"]["ours"]["gb_per_s"] / 10, abs=1e-3)


def test_keeps_times_that_a_benchmark_took_itself(quick):
    benchmark = FakeBenchmark()
    seconds = {"cold": [0.002, 0.004, 0.006], "warm": [0.001]}
    info = keep(benchmark, case="requests", ours="cold", seconds=seconds, items=200, extra={"calls": 82})
    assert benchmark.extra_info == info
    assert info["results"]["cold"]["p50_ms"] == 4.0
    assert info["results"]["cold"]["items_per_s"] == 200 / 0.004
    assert (info["ratio_to"], info["calls"]) == ({"warm": 0.25}, 82)
    assert set(info) >= {"case", "device", "threads", "load_average", "results", "ratio_to", "missing", "spread"}
    with pytest.raises(ValueError, match="runs of 'hot'"):
        keep(benchmark, case="requests", ours="hot", seconds=seconds)


def test_repeats_while_the_machine_is_busy(quick, monkeypatch):
    monkeypatch.setattr(harness, "MAX_SPREAD", 0.0)
    info, _ = run_compare(FakeBenchmark())
    assert info["attempts"] == harness.MAX_ATTEMPTS


def test_short_jobs_run_often_in_their_turn(quick, monkeypatch):
    monkeypatch.setattr(harness, "time_once", lambda run, device: (run(), 0.008)[1])  # a turn of four calls takes 8 ms
    info, calls = run_compare(FakeBenchmark(), calls=4)
    assert calls[: 4 * 2] == ["ours"] * 4 + ["peer"] * 4
    assert info["calls"] == 4
    assert info["results"]["ours"]["p50_ms"] == 2.0


def test_unknown_ours_is_an_error():
    with pytest.raises(ValueError, match="'mine' must be one of"):
        compare(FakeBenchmark(), case="x", ours="mine", impls={"ours": lambda: None})


def test_at_threads_restores_the_count():
    import torch

    before = torch.get_num_threads()
    assert at_threads(1, torch.get_num_threads)() == 1
    assert torch.get_num_threads() == before


def test_report_tells_targets_met_missed_and_not_compared(quick, tmp_path):
    benchmark = FakeBenchmark()
    info, _ = run_compare(benchmark, items=1000, targets={"peer": 1.5, "fbgemm": 1.0, "items_per_s": 1e9})
    path = tmp_path / "bench.json"
    path.write_text(
        json.dumps({"benchmarks": [{"name": "test_sleep", "extra_info": info}, {"name": "plain", "extra_info": {}}]})
    )
    rows = report.load_rows(path)
    assert len(rows) == 1
    text = report.to_text(rows)
    assert "target peer >= 1.5x: met" in text
    assert "target fbgemm >= 1x: not compared" in text
    assert "target items_per_s >= 1000 M/s: MISSED" in text
    page = report.to_html(rows)
    assert page.count('class="bar ours"') == 1
    assert page.count("<tr>") == 2


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ('{"benchmarks": []}', "holds no result")])
def test_report_of_a_wrong_file(tmp_path, content, message):
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        report.load_rows(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        report.load_rows(tmp_path / "absent.json")
