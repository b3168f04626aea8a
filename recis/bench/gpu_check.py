"""Everything that only a GPU can tell, in one command that can be stopped and goes on: tests, sanitizer, benchmarks.

    recis gpu-check --out DIR [--max-minutes N]        or, from a plain checkout:
    PYTHONPATH=.:kernels python -m recis.bench.gpu_check --out DIR

Each step is a process of its own with a time limit, so a crash or a hang costs that step alone. DIR/gpu-check.json and
DIR/gpu-check.md are written anew after every step, whole or not at all. A step that ended, well or badly, is not run again
until its code changes: its key is a hash of the kernels, of its own files and of the device. Needs torch, triton, numba
and pytest; what else is missing is named.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from recis.bench import gpu_options
from recis.bench.gpu_report import to_markdown

ROOT = Path(__file__).resolve().parents[2]
JSON_NAME, MARKDOWN_NAME = "gpu-check.json", "gpu-check.md"
OK, FAILED, USAGE, PARTLY = 0, 1, 2, 3  # as in recis.cli
NEEDED = ("torch", "triton", "numba", "pytest")
OPTIONAL = ("hypothesis", "pytest_benchmark", "pyarrow", "torchrec", "fbgemm_gpu")
FIRST_TESTS = ("test_hash_index", "test_embedding_bag", "test_sparse_update", "test_row_grads", "test_unique_ids")
SANITIZED = (
    "find",
    "find_or_insert",
    "pooled-D64-fp32-zipf",
    "update-row-wise-adagrad-D64",
    "unique_ids",
    "attention-jagged",
    "linear_cross_entropy-V32k-T4k",
)
TEST_LIMIT_S, SANITIZER_LIMIT_S, BENCH_LIMIT_S = 300, 240, 240
KEPT_OUTPUT = 4000  # characters of a failed step's output, its end

Kind = Literal["test", "sanitizer", "bench"]
Status = Literal["passed", "failed", "timeout", "missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One process: what it runs, how long it may take, and the files that its result depends on.

    Attributes:
        missing: why it cannot run here; it is then recorded and not started.
        writes_json: the command takes `--json FILE`, and what it writes there is kept.
    """

    name: str
    kind: Kind
    command: tuple[str, ...]
    limit_s: float
    depends_on: tuple[Path, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    missing: str = ""
    writes_json: bool = False


class Results:
    """The result files of one folder, read at the start and written after every step."""

    def __init__(self, out: Path, environment: dict[str, Any]) -> None:
        self.out = out
        self.environment = environment
        self._lock = Lock()
        out.mkdir(parents=True, exist_ok=True)
        path = out / JSON_NAME
        self.steps: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                self.steps = {step["name"]: step for step in json.loads(path.read_text())["steps"]}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: is no result of gpu-check ({error}); name another folder") from error

    def add(self, record: dict[str, Any]) -> None:
        """Keep what a step gave and write both files."""
        with self._lock:
            self.steps[record["name"]] = record
            content = {
                "format": "recis-gpu-check",
                "written_at": _now(),
                "environment": self.environment,
                "steps": list(self.steps.values()),
            }
            _write_whole(self.out / JSON_NAME, json.dumps(content, indent=1) + "\n")
            _write_whole(self.out / MARKDOWN_NAME, to_markdown(content))


def environment() -> dict[str, Any]:
    """Return device, versions and commit of this checkout, and what is not installed."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "cpus": len(os.sched_getaffinity(0))}
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if found["device"] is not None:
        properties = torch.cuda.get_device_properties(0)
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["cuda"] = torch.version.cuda
        found["driver"] = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    for name in (*NEEDED, *OPTIONAL):
        try:
            found[name] = version(name.replace("_", "-"))
        except PackageNotFoundError:
            found[name] = "installed" if find_spec(name) else None
    found["missing"] = [name for name in (*NEEDED, *OPTIONAL) if found[name] is None]
    found["commit"] = _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    return found


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def make_steps(device: str = "cuda") -> list[Step]:
    """Return all steps of this checkout, most important first: tests, sanitizer, benchmarks."""
    from recis.bench.gpu_cases import CASES

    here = (ROOT / "tests" / "conftest.py", ROOT / "tests" / "kernels" / "conftest.py", ROOT / "tests/kernel_device.py")
    bench = (*sorted((ROOT / "recis" / "bench").glob("*cases.py")), ROOT / "recis" / "bench" / "inputs.py")
    rank = {name: number for number, name in enumerate(FIRST_TESTS)}
    files = sorted(
        (ROOT / "tests" / "kernels").glob("test_*.py"), key=lambda path: (rank.get(path.stem, len(rank)), path.stem)
    )
    pytest_options = ("-q", "-ra", "-p", "no:cacheprovider", "--kernel-device", device)
    steps = [
        Step(
            name=f"test:{path.stem}",
            kind="test",
            command=(sys.executable, "-m", "pytest", *pytest_options, str(path.relative_to(ROOT))),
            limit_s=TEST_LIMIT_S,
            depends_on=(path, *here),
        )
        for path in files
    ]
    case = (sys.executable, "-m", "recis.bench.gpu_cases", "--device", device)
    tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    steps += [
        Step(
            name=f"sanitizer:{check}:{name}",
            kind="sanitizer",
            command=(
                tool or "",
                "--tool",
                check,
                "--error-exitcode",
                "9",
                *case,
                name,
                "--size",
                "small",
                "--check-only",
            ),
            limit_s=SANITIZER_LIMIT_S,
            depends_on=bench,
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # one allocation each, so that its ends are guarded
            missing="" if tool else "compute-sanitizer is not installed",
        )
        for name in SANITIZED
        for check in ("memcheck", "racecheck")
    ]
    steps += [
        Step(
            name=f"bench:{name}",
            kind="bench",
            command=(*case, name),
            limit_s=BENCH_LIMIT_S,
            depends_on=bench,
            writes_json=True,
        )
        for name in CASES
    ]
    return steps


def key_of(step: Step, device: str | None) -> str:
    """Return what the step's result depends on, as a hash: kernels, its own files, its command and the device."""
    digest = hashlib.sha256()
    for path in (*sorted((ROOT / "kernels" / "recis_kernels").glob("*.py")), *step.depends_on):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update("\0".join((*step.command[1:], str(device))).encode())
    return digest.hexdigest()[:16]


def run_step(step: Step) -> dict[str, Any]:
    """Run one step to its end or its limit and return its record, without key."""
    record: dict[str, Any] = {"name": step.name, "kind": step.kind, "at": _now()}
    if step.missing:
        return {**record, "status": "missing", "seconds": 0.0, "summary": step.missing}
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, **step.env, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    env.pop("TRITON_INTERPRET", None)  # compiled kernels are what is asked about
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        command = (*step.command, "--json", str(result)) if step.writes_json else step.command
        code, output = _run_limited(command, env, step.limit_s)
        if result.exists():
            record["results"] = json.loads(result.read_text())
    record["seconds"] = round(time.monotonic() - begin, 1)
    record["status"] = _status(code, record.get("results"))
    record["summary"] = _summary(step, code, output)
    if record["status"] in ("failed", "timeout"):
        record["output"] = output[-KEPT_OUTPUT:]
    return record


def _run_limited(command: Sequence[str], env: dict[str, str], limit_s: float) -> tuple[int | None, str]:
    """Return exit code (None: it ran past its limit and was ended with its children) and output of a command."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        return None, output
    except BaseException:
        os.killpg(process.pid, 9)
        raise
    return process.returncode, output


def _status(code: int | None, results: dict[str, Any] | None) -> Status:
    if code is None:
        return "timeout"
    if code != 0:
        return "failed"
    return "missing" if results and all("missing" in r and "p50_ms" not in r for r in results.values()) else "passed"


def _summary(step: Step, code: int | None, output: str) -> str:
    """Return one line: pytest's own, or the last line that says something."""
    if code is None:
        return f"ended after {step.limit_s:.0f} s"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if step.kind == "test":
        counts = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|error|skipped)", line)]
        return counts[-1] if counts else f"exit code {code}: {lines[-1] if lines else 'no output'}"
    if code == 0:
        return "ok"
    return f"exit code {code}: {lines[-1][:200] if lines else 'no output'}"


def run_steps(
    steps: Iterable[Step],
    results: Results,
    *,
    deadline_s: float = float("inf"),
    jobs: int = 1,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Run what has no result for the present code yet; return the names of steps that the deadline left out.

    Tests run `jobs` at a time; everything that is timed, or watched by the sanitizer, runs alone.
    """
    device = results.environment.get("device")
    todo = []
    for step in steps:
        key = key_of(step, device)
        if results.steps.get(step.name, {}).get("key") == key:
            say(f"{step.name}: kept, {results.steps[step.name]['status']}")
        else:
            todo.append((step, key))
    left_out = []

    def run(step: Step, key: str) -> None:
        if clock() >= deadline_s:
            left_out.append(step.name)
            return
        record = {**run_step(step), "key": key}
        results.add(record)
        say(f"{step.name}: {record['status']}, {record['seconds']:.0f} s, {record['summary']}")

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        list(pool.map(lambda item: run(*item), (item for item in todo if item[0].kind == "test")))
    for step, key in todo:
        if step.kind != "test":
            run(step, key)
    return left_out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 (a step failed), 2 (no GPU, a wrong argument) or 3 (time ran out before the end)."""
    parser = argparse.ArgumentParser(
        prog="python -m recis.bench.gpu_check", description="Tests, sanitizer and benchmarks of a GPU."
    )
    gpu_options(parser)
    return run_command(parser.parse_args(argv))


def run_command(args: argparse.Namespace) -> int:
    """Do what the arguments say."""
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking:
        print(f"recis gpu-check: needs {', '.join(lacking)}: pip install {' '.join(lacking)}", file=sys.stderr)
        return USAGE
    if args.jobs < 1:
        print(f"recis gpu-check: --jobs must be at least 1; got {args.jobs}", file=sys.stderr)
        return USAGE
    steps = [step for step in make_steps() if args.only is None or args.only in step.name]
    if not steps:
        print(f"recis gpu-check: no step's name contains --only {args.only!r}; --dry-run lists them", file=sys.stderr)
        return USAGE
    if args.dry_run:
        for step in steps:
            print(f"{step.name}  (at most {step.limit_s:.0f} s{f'; {step.missing}' if step.missing else ''})")
        return OK
    found = environment()
    if found["device"] is None:
        print(
            "recis gpu-check: no CUDA device here; run it on a machine with an NVIDIA GPU, or list the steps with --dry-run",
            file=sys.stderr,
        )
        return USAGE
    deadline = float("inf") if args.max_minutes is None else time.monotonic() + 60 * args.max_minutes
    results = Results(args.out, found)
    say = partial(print, flush=True)
    left_out = run_steps(steps, results, deadline_s=deadline, jobs=args.jobs, say=say)
    failed = [step.name for step in steps if results.steps.get(step.name, {}).get("status") in ("failed", "timeout")]
    print(f"{results.out / MARKDOWN_NAME}: {len(steps) - len(left_out)} of {len(steps)} steps, {len(failed)} failed")
    if failed:
        return FAILED
    return PARTLY if left_out else OK


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(f".tmp-{path.name}")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
