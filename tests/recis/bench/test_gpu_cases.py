"""Every job of the GPU table, at sizes the interpreter can do: built on the CPU, checked, timed and reported."""

import json
from dataclasses import replace

import pytest
import torch

from recis.bench import gpu_cases, peers
from recis.bench.gpu_cases import CASES, GpuCase, main, measure
from recis.bench.op_cases import Point, Work

CPU = torch.device("cpu")


@pytest.fixture
def no_peers(monkeypatch):
    """Importing them takes seconds and runs in a process of its own (marker torchrec)."""
    monkeypatch.setattr(peers, "_installed", lambda name: "ImportError: left out")


@pytest.mark.usefixtures("no_peers")
@pytest.mark.parametrize("name", CASES)
def test_case_on_the_cpu(name):
    """The version that the CPU picks gives what the job's check wants."""
    try:
        result = measure(CASES[name], CPU, small=True, impl="auto")
    except ImportError as error:
        pytest.skip(str(error))
    assert result["p50_ms"] > 0
    assert all("error" not in peer for peer in result["peers"].values()), result["peers"]


@pytest.mark.usefixtures("no_peers")
@pytest.mark.parametrize("name", CASES)
def test_case_in_the_interpreter(name, tmp_path):
    """The Triton version runs through the command as on a GPU."""
    out = tmp_path / "out.json"
    assert main([name, "--device", "cpu", "--size", "small", "--json", str(out)]) == 0
    result = json.loads(out.read_text())[name]
    if "missing" in result and isinstance(result["missing"], str):
        pytest.skip(result["missing"])
    assert result["share_of_copy"] is None or result["share_of_copy"] > 0
    assert set(result["targets"]) <= {"share_of_copy", "items_per_s", "p50_ms"}


def fake_case(check=lambda: None, **targets) -> GpuCase:
    def build(point, device, impl):
        calls = []
        return Work(case="nothing", run=calls.append, check=check, num_inputs=3, bytes_moved=10**9, items=5)

    return GpuCase(name="fake", build=build, full=Point(), small={}, **targets)


def test_targets_are_held_against_what_was_measured(monkeypatch, no_peers):
    monkeypatch.setattr(gpu_cases, "copy_gb_per_s", lambda *_: 1.0)
    result = measure(fake_case(least_share=1.0, least_items_per_s=1e30, most_ms=0.0), CPU, small=True)
    assert {name: target["met"] for name, target in result["targets"].items()} == {
        "share_of_copy": True,
        "items_per_s": False,
        "p50_ms": False,
    }


def test_wrong_results_are_not_timed(monkeypatch, capsys):
    def wrong():
        raise AssertionError("rows differ")

    monkeypatch.setattr(gpu_cases, "CASES", {"fake": fake_case(wrong)})
    assert main(["fake", "--device", "cpu"]) == 1
    assert json.loads(capsys.readouterr().out) == {"fake": {"error": "wrong result: rows differ"}}


def test_once_uses_no_input_twice():
    seen = []
    work = Work(case="", run=seen.append, check=lambda: None, num_inputs=8, bytes_moved=1, items=1, once=True)
    assert len(gpu_cases._times(work.run, work, CPU, rounds=30)) == 5
    assert seen == list(range(8))


def test_unknown_case(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fnid"])
    assert "no case 'fnid'; there are find" in capsys.readouterr().err


def test_missing_peers_are_named(no_peers):
    assert peers.missing() == ["fbgemm_gpu", "torchrec"]
    assert peers.of_op("pooled", Point(), CPU) == {}


@pytest.mark.torchrec
@pytest.mark.parametrize("name", ["pooled-D64-fp32-uniform", "step-row-wise-adagrad-D64", "jagged_to_padded"])
def test_installed_peers_run(name):
    case = replace(CASES[name], small={**CASES[name].small, "dim": 8})
    result = measure(case, CPU, small=True, impl="auto")
    assert result["missing"] == []
    assert {peer.split()[0] for peer in result["peers"]} >= {"fbgemm"}
    assert all(peer["p50_ms"] > 0 for peer in result["peers"].values())


def test_check_only_runs_every_input_and_times_nothing(capsys):
    assert main(["unique_ids", "--device", "cpu", "--size", "small", "--check-only"]) == 0
    printed = json.loads(capsys.readouterr().out)["unique_ids"]
    assert printed.get("checked") or "missing" in printed
