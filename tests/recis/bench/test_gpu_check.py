"""gpu-check's machinery with steps of a line each: results after every step, going on, limits, and the command's ends."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from recis.bench import gpu_check
from recis.bench.gpu_check import Results, Step, key_of, make_steps, run_step, run_steps
from recis.cli import main

ROOT = Path(__file__).parents[3]


def step(name, code="print('3 passed in 0.1s')", *, kind: gpu_check.Kind = "test", limit_s=20.0, **more) -> Step:
    return Step(name=name, kind=kind, command=(sys.executable, "-c", code), limit_s=limit_s, **more)


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "out", {"device": "a GPU", "missing": ["hypothesis"]})


def read(results):
    content = json.loads((results.out / "gpu-check.json").read_text())
    return {record["name"]: record for record in content["steps"]}


def test_a_step_that_passes_and_one_that_fails(results):
    steps = [step("test:good"), step("test:bad", "print('1 failed, 2 passed in 3s'); raise SystemExit(1)")]
    assert run_steps(steps, results, say=lambda line: None) == []
    records = read(results)
    assert records["test:good"]["status"] == "passed"
    assert records["test:good"]["summary"] == "3 passed in 0.1s"
    assert records["test:bad"]["status"] == "failed"
    assert "1 failed" in records["test:bad"]["output"]
    page = (results.out / "gpu-check.md").read_text()
    assert "| test:bad | failed |" in page
    assert "Not installed: hypothesis." in page
    assert sorted(path.name for path in results.out.iterdir()) == ["gpu-check.json", "gpu-check.md"]


def test_a_hang_costs_its_limit_and_takes_its_children_along(results, tmp_path):
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(60)"
    )
    begin = time.monotonic()
    run_steps([step("test:hangs", code, limit_s=2), step("test:next")], results, say=lambda line: None)
    assert time.monotonic() - begin < 30
    records = read(results)
    assert records["test:hangs"]["status"] == "timeout"
    assert records["test:hangs"]["summary"] == "ended after 2 s"
    assert records["test:next"]["status"] == "passed"
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "\nState:\tZ" not in status.read_text()


def test_files_are_whole_after_every_step(results):
    seen = []
    run_steps([step("test:a"), step("test:b")], results, say=lambda line: seen.append(sorted(read(results))))
    assert seen == [["test:a"], ["test:a", "test:b"]]


def test_goes_on_where_it_stopped(results, tmp_path):
    counter = tmp_path / "runs"
    code = f"open({str(counter)!r}, 'a').write('x'); raise SystemExit(1)"
    own = tmp_path / "test_it.py"
    own.write_text("one")
    steps = [step("test:counted", code, depends_on=(own,))]
    run_steps(steps, results, say=lambda line: None)
    again = Results(results.out, results.environment)
    said = []
    run_steps([*steps, step("test:new")], again, say=said.append)
    assert counter.read_text() == "x"
    assert said[0] == "test:counted: kept, failed"
    assert set(read(results)) == {"test:counted", "test:new"}
    own.write_text("two")
    run_steps(steps, Results(results.out, results.environment), say=lambda line: None)
    assert counter.read_text() == "xx"


def test_the_key_follows_kernels_command_and_device(monkeypatch, tmp_path):
    kernels = tmp_path / "kernels" / "recis_kernels"
    kernels.mkdir(parents=True)
    (kernels / "op.py").write_text("a")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    one = step("test:a")
    keys = [key_of(one, "H100"), key_of(one, "H200"), key_of(replace(one, command=("x", "y")), "H100")]
    (kernels / "op.py").write_text("b")
    keys.append(key_of(one, "H100"))
    assert len(set(keys)) == 4
    assert key_of(one, "H100") == keys[3]


def test_the_deadline_leaves_steps_out(results):
    now = iter([0.0, 5.0, 10.0, 15.0])
    steps = [step("bench:a", kind="bench"), step("bench:b", kind="bench"), step("bench:c", kind="bench")]
    left = run_steps(steps, results, deadline_s=10.0, clock=lambda: next(now), say=lambda line: None)
    assert left == ["bench:c"]
    assert set(read(results)) == {"bench:a", "bench:b"}


def test_tests_run_together_and_benchmarks_alone(results, tmp_path):
    """Two tests wait for each other's file; a benchmark that ran beside them would see fewer than two."""
    wait = (
        "import time, pathlib\n"
        "d = pathlib.Path({d!r})\n"
        "(d / '{me}').touch()\n"
        "for _ in range(400):\n"
        "    if (d / '{other}').exists(): break\n"
        "    time.sleep(0.05)\n"
        "else: raise SystemExit(1)"
    )
    count = f"import pathlib; assert len(list(pathlib.Path({str(tmp_path)!r}).glob('done-*'))) == 2"
    both = [
        step(
            f"test:{me}",
            wait.format(d=str(tmp_path), me=f"at-{me}", other=f"at-{other}") + f"\n(d / 'done-{me}').touch()",
        )
        for me, other in (("a", "b"), ("b", "a"))
    ]
    run_steps([step("bench:c", count, kind="bench"), *both], results, jobs=2, say=lambda line: None)
    assert {record["status"] for record in read(results).values()} == {"passed"}


def test_results_of_a_benchmark_are_kept(results):
    result = {
        "case": "find | 8 keys",
        "p20_ms": 1.5,
        "p50_ms": 2.0,
        "p80_ms": 2.5,
        "items_per_s": 3e9,
        "gb_per_s": 96.0,
        "share_of_copy": 0.5,
        "copy_gb_per_s": 192.0,
        "peak_mib": 3.0,
        "launches": 1,
        "host_syncs": 0,
        "peers": {"torch": {"p50_ms": 4.0}, "other": {"error": "no"}},
        "targets": {"share_of_copy": {"target": 0.65, "met": False}},
    }
    code = f"import json, sys; json.dump({ {'find': result} }, open(sys.argv[-1], 'w'))"
    run_steps([step("bench:find", code, kind="bench", writes_json=True)], results, say=lambda line: None)
    assert read(results)["bench:find"]["results"]["find"]["p50_ms"] == 2.0
    page = (results.out / "gpu-check.md").read_text()
    assert (
        "| find: find \\| 8 keys | 2.000 (1.500-2.500) | 3,000.0 | 96 | 50% | torch: 4.000; other: no | 1, 0 | 3 | "
        ">= 65% of copy: MISSED |"
    ) in page
    assert "Copy bandwidth, measured in each run: 192 to 192 GB/s." in page


def test_an_op_without_a_triton_version_is_missing_not_failed(results):
    code = "import json, sys; json.dump({'x': {'missing': 'not available'}}, open(sys.argv[-1], 'w'))"
    run_steps([step("bench:x", code, kind="bench", writes_json=True)], results, say=lambda line: None)
    assert read(results)["bench:x"]["status"] == "missing"
    assert "- x: not available" in (results.out / "gpu-check.md").read_text()


def test_a_tool_that_is_not_there_is_named():
    record = run_step(step("sanitizer:memcheck:find", kind="sanitizer", missing="compute-sanitizer is not installed"))
    assert (record["status"], record["summary"]) == ("missing", "compute-sanitizer is not installed")


def test_a_step_killed_in_the_middle_leaves_no_record(results, monkeypatch):
    """As Ctrl-C would: the step before is kept, the interrupted one runs again next time."""
    run_steps([step("bench:a", kind="bench")], results, say=lambda line: None)

    def interrupted(command, env, limit_s):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "_run_limited", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_steps([step("bench:b", kind="bench")], results, say=lambda line: None)
    assert set(read(results)) == {"bench:a"}


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "gpu-check.json").write_text("[]")
    with pytest.raises(ValueError, match=r"gpu-check\.json: is no result of gpu-check"):
        Results(tmp_path, {})


def test_adding_from_two_threads(results):
    threads = [
        threading.Thread(
            target=results.add,
            args=({"name": f"test:{n}", "kind": "test", "status": "passed", "seconds": 1.0, "summary": "ok"},),
        )
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read(results)) == 8


def test_the_steps_of_this_checkout():
    steps = make_steps()
    names = [one.name for one in steps]
    assert len(set(names)) == len(names)
    assert names[0] == "test:test_hash_index"
    assert {one.kind for one in steps} == {"test", "sanitizer", "bench"}
    files = {path.stem for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    assert {name.removeprefix("test:") for name in names if name.startswith("test:")} == files
    assert [one.kind for one in steps] == sorted((one.kind for one in steps), key=["test", "sanitizer", "bench"].index)
    assert all(path.exists() for one in steps for path in one.depends_on)
    assert "--kernel-device" in steps[0].command


def test_without_a_gpu(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["gpu-check", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("recis gpu-check: no CUDA device here; run it on a machine with")
    assert not (tmp_path / "out").exists()


def test_dry_run_lists_the_steps(capsys, tmp_path):
    assert main(["gpu-check", "--out", str(tmp_path / "out"), "--dry-run", "--only", "bench:find"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "bench:find  (at most 240 s)"
    assert all("bench:find" in line for line in printed)
    assert main(["gpu-check", "--out", str(tmp_path), "--only", "nothing"]) == 2
    assert "no step's name contains --only 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "code"), [("passed", 0), ("failed", 1), ("left out", 3)])
def test_exit_codes(monkeypatch, tmp_path, status, code):
    monkeypatch.setattr(gpu_check, "environment", lambda: {"device": "a GPU"})
    monkeypatch.setattr(
        gpu_check,
        "make_steps",
        lambda: [step("bench:a", "raise SystemExit(1)" if status == "failed" else "", kind="bench")],
    )
    minutes = ["--max-minutes", "0"] if status == "left out" else []
    assert gpu_check.main(["--out", str(tmp_path), *minutes]) == code


def test_from_a_plain_checkout_without_optional_packages(tmp_path):
    """With the needed packages alone: everything else refuses to be imported."""
    blocked = [
        "pyarrow",
        "hypothesis",
        "pytest_benchmark",
        "torchrec",
        "fbgemm_gpu",
        "safetensors",
        "fsspec",
        "matplotlib",
    ]
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "recis.bench.gpu_check", "--out", str(tmp_path / "out"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert "test:test_hash_index" in done.stdout
