"""The helper process of fleet.py: imports everything once, then forks ranks. Lines of JSON come and go on a socket."""

import json
import os
import signal
import socket
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

KILL_AFTER_S = 20.0  # torchrun waits 30 s


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1])).makefile("rw")
    _warm_up()
    for line in channel:
        request = json.loads(line)
        answer = _start(request) if "start" in request else _wait(request["wait"], request["timeout_s"])
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


def _warm_up() -> None:
    """Load what a run needs; by one thread, because a fork takes no other thread along."""
    import torch

    torch.set_num_threads(1)
    from recis.cli import main as recis

    kill_recipe: Any = import_module("kill_recipe")
    with tempfile.TemporaryDirectory() as name:
        data = kill_recipe.write_data(Path(name) / "data", num_samples=64)
        out = Path(name) / "run"
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
        argv = ["train", "kill_recipe:recipe", "--data", str(data), "--out", str(out)]
        code = recis([*argv, "--set", "parallel.parts=2", "--set", "max_steps=4"])
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        if code:
            raise SystemExit(f"the warm-up run of the fleet ended with {code}")


def _start(request: dict) -> list[int]:
    pids = []
    for number, rank in enumerate(request["start"]):
        pid = os.fork()
        if pid == 0:
            _become(rank, Path(request["folder"]), number, request["call"])
        pids.append(pid)
    return pids


def _become(rank: dict, folder: Path, number: int, call: str) -> None:
    """Be a rank: its variables, its output, the command, and the end that an interpreter has."""
    for kind, descriptor in (("out", 1), ("err", 2)):
        file = os.open(folder / f"{number}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.environ.update(rank["env"])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    module, _, function = call.partition(":")
    sys.exit(getattr(import_module(module), function)(rank["argv"]))


def _wait(pids: list[int], timeout_s: float) -> list[int]:
    """Return exit codes; -999 for a rank that had to be killed because the time was over."""
    codes: dict[int, int] = {}
    until, stopped = time.monotonic() + timeout_s, 0.0
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):  # as torchrun: SIGTERM to all others, SIGKILL to those that do not mind it
            number = 0 if stopped else signal.SIGTERM
            if stopped and time.monotonic() > stopped + KILL_AFTER_S:
                number = signal.SIGKILL
            stopped = stopped or time.monotonic()
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, number)
        if time.monotonic() > until:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = -999
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    main()
