"""roofline: limits measured on small buffers, the grid at sizes of a few rows, the page, the stored result, calibration."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree

import pytest
import torch

from recis.bench import calibrate, grid, harness, peers, probes, roofline, roofline_page, stored
from recis.bench.op_cases import Point, Work
from recis.cli import main
from recis_kernels import calibration
from recis_kernels.calibration import BUILT_IN

CPU = torch.device("cpu")
TINY = 2e-4


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """The user's cache folder is not the tests'; peers run in a process of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(peers, "_installed", lambda name: "ImportError: left out")
    calibration.of_this_machine.cache_clear()
    harness.copy_gb_per_s.cache_clear()
    yield
    calibration.of_this_machine.cache_clear()
    harness.copy_gb_per_s.cache_clear()


@pytest.fixture
def limits():
    return roofline.measure(CPU, scale=TINY)


# ---- limits


def test_limits_of_a_machine(limits):
    assert set(map(int, limits["gather_gb_per_s"])) == set(probes.GATHER_BYTES)
    numbers = [
        limits["copy_gb_per_s"],
        limits["read_gb_per_s"],
        limits["updates"]["per_s"],
        limits["find"]["keys_per_s"],
    ]
    assert all(number > 0 for number in (*numbers, *limits["gather_gb_per_s"].values()))
    assert "not atomic" in limits["updates"]["what"]
    assert limits["find"]["slots"] >= 2 * 64
    assert limits["versions"]["torch"] == torch.__version__
    assert datetime.fromisoformat(limits["measured_at"]).utcoffset() == timedelta(0)
    text = "\n".join(roofline_page.to_lines(limits))
    assert "gather,   32 B rows" in text
    assert "% of copy" in text


def test_gathered_rows_are_the_rows():
    table, rows = torch.randn(50, 8), torch.randint(50, (31,))
    out = torch.full((31, 8), torch.nan)
    probes.gather_rows(table, rows, out)
    assert out.equal(table[rows])


def test_the_gpu_probes_in_the_interpreter():
    table, rows, out = torch.randn(20, 8), torch.randint(20, (11,)), torch.full((11, 8), torch.nan)
    probes.launch(probes._gather_kernel, (3,), table, rows, out, 11, D=8, ROWS=4)
    assert out.equal(table[rows])
    words, places = torch.zeros(6), torch.tensor([0, 5, 5, 2, 5])
    probes.atomic_add(words, places)
    assert words.tolist() == [1, 0, 1, 0, 0, 3]


# ---- stored for the benchmarks


def test_benchmarks_read_a_fresh_result(limits, monkeypatch):
    quiet = {**limits, "load_average": [0.0, 0.0], "copy_gb_per_s": 123.0}
    path = stored.store(quiet, "cpu")
    assert json.loads(path.read_text()) == quiet
    assert stored.fresh("cpu") == quiet
    assert harness.copy_gb_per_s() == 123.0
    assert stored.fresh("cuda") is None


@pytest.mark.parametrize(
    "change",
    [
        {"load_average": [0.0, 1e6]},
        {"threads": 10_000},
        {"version": 2},
        {"measured_at": (datetime.now(UTC) - timedelta(hours=13)).isoformat()},
        {"measured_at": (datetime.now(UTC) + timedelta(hours=1)).isoformat()},
        {"measured_at": "yesterday"},
    ],
    ids=lambda change: "-".join(map(str, change)),
)
def test_what_is_not_fresh_is_measured_anew(limits, monkeypatch, change):
    stored.store({**limits, "load_average": [0.0, 0.0], "copy_gb_per_s": 123.0, **change}, "cpu")
    assert stored.fresh("cpu") is None
    monkeypatch.setattr(harness, "measure_copy", lambda device, size_mib: 7.0)
    assert harness.copy_gb_per_s() == 7.0


# ---- the grid


@pytest.mark.parametrize("op", grid.OPS)
def test_every_op_of_the_grid_runs(op):
    """The first point of each op, with eight rows or so: built, checked, timed."""
    build, point = next(grid.points(op, "cpu", scale=TINY))
    record = grid.measure(build, replace(point, num_inputs=2), CPU, copy_gb_per_s=10.0)
    if "ModuleNotFoundError" in record.get("error", ""):
        pytest.skip(record["error"])
    assert "error" not in record, record
    assert record["p20_ms"] <= record["p50_ms"] <= record["p80_ms"]
    if record["gb_per_s"] is not None:
        assert record["share"] == pytest.approx(record["gb_per_s"] / 10)
    assert f"{record['p50_ms']:.3f} ms" in grid.line_of({"op": op, **record})


def test_the_grid_spans_dims_types_and_duplication():
    found = [point for op in grid.OPS for _, point in grid.points(op, "cpu")]
    assert {point.dim for point in found} >= {16, 64, 128}
    assert {point.dtype for point in found} == {torch.float32, torch.bfloat16}
    assert {point.distribution for point in found} >= {"uniform", "zipf"}
    assert {point.bag_length for point in found} >= {1, 5, 20, 50}
    assert 40 < len(found) < 120


def test_a_wrong_result_and_a_peer_that_cannot(monkeypatch):
    def build(point, device, impl):
        def fail(n):
            raise NotImplementedError("no bf16")

        return Work(
            case="x", run=lambda n: n, check=lambda: None, num_inputs=2, bytes_moved=8, items=1, peers={"p": fail}
        )

    record = grid.measure(build, Point(), CPU, 1.0)
    assert record["peers"] == {"p": {"error": "no bf16"}}
    assert "p: no bf16" in grid.line_of({"op": "x", **record})

    def wrong(point, device, impl):
        def check():
            raise AssertionError("rows differ")

        return replace_check(build(point, device, impl), check)

    assert grid.measure(wrong, Point(), CPU, 1.0)["error"] == "AssertionError: rows differ"


def replace_check(work, check):
    return replace(work, check=check)


# ---- the page


@pytest.fixture
def result(limits):
    timed = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "gb_per_s": 5.0, "share": 0.5, "items_per_s": 2e6}
    records = [
        {
            "op": "pooled",
            "case": "pooled D=64 <b>",
            "label": "D=64 <b>",
            **timed,
            "peers": {"torch": {**timed, "p50_ms": 4.0, "share": 0.25}},
        },
        {
            "op": "pooled",
            "case": "pooled D=128",
            "label": "D=128",
            **timed,
            "share": 1.25,
            "peers": {"other": {"error": "no"}},
        },
        {"op": "attention", "case": "jagged", "label": "jagged", **timed, "share": None, "gb_per_s": None, "peers": {}},
        {"op": "attention", "case": "hstu", "error": "ImportError: not there"},
    ]
    return {"limits": limits, "records": records, "missing": ["torchrec"], "load_average_at_end": 1.5}


def test_the_page_says_it_all(result):
    page = roofline_page.to_html(result)
    limits = result["limits"]
    for text in (
        limits["device"],
        limits["measured_at"],
        f"torch {torch.__version__}",
        "Not installed here: torchrec.",
    ):
        assert text in page
    assert "<b>" not in page.split("</style>")[1].replace("<div><b>", "")
    drawings = re.findall(r"<svg.*?</svg>", page)
    assert len(drawings) == 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert page.count('class="limit"') == 2  # random rows and pooled; attention is bound by arithmetic
    assert page.count('<rect class="ours"') == len(probes.GATHER_BYTES) + 3
    assert '<rect class="p0"' in page
    assert "ImportError: not there" in page
    assert "torch 2.00x; " not in page
    assert "torch 2.00x" in page
    assert not re.search(r"<script|https?://", page)


def test_bars_are_as_long_as_their_shares(result):
    page = roofline_page.to_html({**result, "records": result["records"][:2]})
    pooled = page[page.index("<h2>pooled") :]
    wide = [float(value) for value in re.findall(r'<rect class="\w+" x="330" y="[\d.]+" width="([\d.]+)"', pooled)]
    assert wide == pytest.approx([480 * 0.5 / 1.25, 480 * 0.25 / 1.25, 480], abs=0.1)
    limit = float(re.findall(r'class="limit" x1="([\d.]+)"', pooled)[0])
    assert limit == pytest.approx(330 + 480 / 1.25, abs=0.1)


def test_the_picture_or_why_not(result, tmp_path):
    path = tmp_path / "roofline.png"
    reason = roofline_page.write_picture(result, path)
    if reason is None:
        assert path.read_bytes().startswith(b"\x89PNG")
    else:
        assert reason == "matplotlib is not installed: pip install matplotlib"
        assert not path.exists()


# ---- the command


@pytest.fixture
def small(monkeypatch):
    """The command on tiny buffers."""
    whole, every = roofline.measure, grid.points
    monkeypatch.setattr(roofline, "measure", lambda device: whole(device, scale=TINY))
    monkeypatch.setattr(grid, "points", lambda op, kind, scale=1.0: list(every(op, kind, scale=TINY))[:1])


def test_command_prints_and_stores(small, capsys):
    assert main(["roofline", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "hash find" in printed
    assert stored.path_of("cpu").exists()
    assert str(stored.path_of("cpu")) in printed


def test_command_full(small, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(["roofline", "--device", "cpu", "--full", "--ops", "unique_ids,update", "--out", str(out), "--json"]) == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert [record["op"] for record in printed["records"]] == [
        "unique_ids",
        *(f"update {r}" for r in grid.op_cases.RULES),
    ]
    assert json.loads((out / "roofline.json").read_text())["limits"] == printed["limits"]
    assert (out / "roofline.html").read_text().startswith("<!doctype html>")
    assert set(printed["missing"]) == {"fbgemm_gpu", "torchrec"}


def test_command_calibrates(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "_on_cpu", lambda: {"thread_hand_over_us": 17.5})
    target = tmp_path / "mine.json"
    assert main(["roofline", "--device", "cpu", "--calibrate", "--calibration", str(target)]) == 0
    assert "thread_hand_over_us = 17.5 (built in: 30.0)" in capsys.readouterr().out
    table = calibration.load(target)
    assert (table.thread_hand_over_us, table.machine) == (17.5, calibration.machine_name())
    assert main(["roofline", "--device", "cpu", "--calibrate"]) == 0
    assert calibration.current().thread_hand_over_us == 17.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ops find", "--ops goes with --full; add it"),
        ("--calibration x.json", "--calibration goes with --calibrate; add it"),
        ("--full --ops find,nothing", "--ops: no op 'nothing'; there are find, "),
        ("--device cuda", "--device cuda: torch finds no GPU here"),
    ],
)
def test_wrong_options(options, message, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["roofline", *options.split()]) == 2
    assert message in capsys.readouterr().err


# ---- calibration


def test_pick_keeps_the_built_in_value_unless_another_is_clearly_faster(monkeypatch):
    times = {"65536": 1.0, "1024": 0.96, "2048": 0.99}
    monkeypatch.setattr(
        calibrate, "alternate", lambda impls, rounds, device: {name: [times[name]] * 3 for name in impls}
    )
    assert calibrate.pick("bucketed_sort_from_ids", (1024, 2048), lambda: None) == 65536
    times["1024"] = 0.9
    assert calibrate.pick("bucketed_sort_from_ids", (1024, 2048), lambda: None) == 1024


def test_pick_runs_under_each_candidate():
    seen = []
    calibrate.pick("block_items", (512,), lambda: seen.append(calibration.current().block_items), rounds=2)
    assert seen == [1024, 512, 1024, 512, 512, 1024]


def test_costs_are_plausible():
    assert 1.0 <= calibrate.hand_over_us(rounds=20) <= 1000.0
    assert calibrate.numba_from_items(rounds=3) in (0, *calibrate._SIZES)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert calibrate.hand_over_us() == BUILT_IN.thread_hand_over_us
    finally:
        torch.set_num_threads(before)
