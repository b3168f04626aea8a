"""kill -9 `recis train` at random moments, `--resume` it, and end in the bytes of the run that nobody killed.

Forty kills: at random events, inside saves and between them (writes, fsyncs, renames, deletions, ends of steps), and at
random times. Compared: every file of the final checkpoint (tables, dense weights, optimizer, metric states, random
generators), its manifest (reader position, schedules, best value; not the clock) and the metrics log. Seeded; the numbers
of events are those of the straight run.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from integration.kill_recipe import write_data

from recis.checkpoint import Manifest, latest, list_checkpoints, read_manifest, verify
from recis.checkpoint.manifest import MANIFEST_NAME
from recis.trainer.log import read_log

KILLS_PER_RUN = 10
RUNS = [(0, True), (0, False), (2, True), (2, False)]  # (delta_saves, async_save): 40 kills


class Server:
    """Talks to run_server.py."""

    def __init__(self, log: Path, warm_up: list[str]) -> None:
        root = Path(__file__).parents[2]
        path = os.pathsep.join(map(str, (root, root / "kernels", root / "tests")))
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "integration.run_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        self._ask({"warm_up": warm_up})

    def run(self, argv: list[str], die: dict[str, Any] | None) -> dict[str, Any]:
        """Run one training process to its end, or to its death."""
        return self._ask({"argv": argv, "die": die, "log": str(self.log)})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the server died: {self.tail()}"
        return json.loads(answer)

    def tail(self) -> str:
        """Return the end of what the runs printed."""
        return self.log.read_text()[-3000:] if self.log.exists() else ""

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "clicks")


@pytest.fixture(scope="module")
def server(tmp_path_factory, data) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    running = Server(folder / "log.txt", train(data, folder / "run", 2, True))
    yield running
    running.close()


def train(data: Path, out: Path, delta_saves: int, async_save: bool) -> list[str]:
    """Return the command that starts a run, or goes on with the one in `out`."""
    settings = ["--set", f"delta_saves={delta_saves}", "--set", f"async_save={async_save}"]
    resume = ["--resume"] if out.exists() else []
    return ["train", "integration.kill_recipe:recipe", "--data", str(data), "--out", str(out), *settings, *resume]


def content(checkpoint: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint, but for the manifest, which knows the time."""
    files = [path for path in sorted(checkpoint.iterdir()) if path.name != MANIFEST_NAME]
    return {path.name: path.read_bytes() for path in files}


def manifest_of(checkpoint: Path) -> Manifest:
    """Return the manifest without what depends on time: the clock, and the base's hash, which covers its clock."""
    manifest = read_manifest(checkpoint)
    base = manifest.base and replace(manifest.base, manifest_sha256="")
    return replace(manifest, clock_s=0, base=base)


def values(run: Path) -> list[dict[str, Any]]:
    """Return the metrics log without what depends on time."""
    return [
        {key: value for key, value in line.items() if key != "samples_per_s"}
        for line in read_log(run / "metrics.jsonl")
    ]


@pytest.mark.parametrize(("delta_saves", "async_save"), RUNS)
def test_killed_and_resumed_equals_straight(server, data, tmp_path, delta_saves, async_save):
    kill_and_resume(server, data, tmp_path, delta_saves, async_save, seed=0, num_kills=KILLS_PER_RUN)


@pytest.mark.parametrize("event", range(1, 7))
def test_killed_at_the_very_start(server, data, tmp_path, event):
    """Before a first checkpoint, even before the folder says which run it is: --resume starts from the beginning."""
    run = tmp_path / "run"
    assert os.WIFSIGNALED(server.run(train(data, run, 0, False), {"event": event})["status"]), server.tail()
    assert os.WIFSIGNALED(server.run(train(data, run, 0, False), {"event": 60})["status"]), server.tail()
    assert (run / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize(("delta_saves", "async_save"), RUNS)
def test_many_kills(server, data, tmp_path, delta_saves, async_save, seed):
    kill_and_resume(server, data, tmp_path, delta_saves, async_save, seed=seed, num_kills=20)


def kill_and_resume(server, data, tmp_path, delta_saves, async_save, *, seed, num_kills):
    chance = random.Random(f"{delta_saves} {async_save} {seed}")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    started = time.monotonic()
    done = server.run(train(data, straight, delta_saves, async_save), None)
    assert done["status"] == 0, server.tail()
    seconds, events = time.monotonic() - started, done["events"]
    assert events > 200  # or the moments to choose from are not what they are said to be

    kills, resumes = 0, 0
    while kills < num_kills:
        if chance.random() < 0.75:
            die: dict[str, Any] = {"event": chance.randrange(1, events // 3)}
        else:
            die = {"seconds": chance.uniform(0.05, 0.6) * seconds}
        status = server.run(train(data, killed, delta_saves, async_save), die)["status"]
        resumes += 1
        if status == 0:  # it reached the end first: start another run
            same_runs(killed, straight)
            killed = tmp_path / f"killed{resumes}"
            continue
        assert os.WIFSIGNALED(status), server.tail()
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
        if list_checkpoints(killed):
            assert latest(killed) == list_checkpoints(killed)[-1]  # no half-written folder ever has a checkpoint's name
    assert server.run(train(data, killed, delta_saves, async_save), None)["status"] == 0, server.tail()
    same_runs(killed, straight)


def same_runs(have: Path, want: Path) -> None:
    first, second = latest(have), latest(want)
    assert first is not None
    assert second is not None
    assert first.name == second.name
    got, wanted = content(first), content(second)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name] == wanted[name], f"{name} differs after kills"
    assert manifest_of(first) == manifest_of(second)
    assert values(have) == values(want)
    assert [path.name for path in list_checkpoints(have)] == [path.name for path in list_checkpoints(want)]
    assert not list(have.glob(".tmp-*"))
    assert verify(have) == []
