"""Run `recis` commands without paying for imports each time: a child of this process per command, forked when asked.

Reads one JSON object per line from stdin, {"argv": ["train", ...], "die": null | {"event": n} | {"seconds": s}, "log": path};
answers with one, {"status": wait status, "events": n}. The first is {"warm_up": argv}, a command in this process itself.

A child that is told to die sends itself SIGKILL at its n-th event (the end of a step, or a call of the system that makes a
save: write, fsync, rename, replace, unlink, rmdir), or after s seconds. It is the real thing: no handler runs, no buffer is
flushed, threads stop where they are.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch

import recis.trainer.trainer as trainer_module
from recis.cli import main

EVENTS = ("write", "fsync", "rename", "replace", "unlink", "rmdir")


class Events:
    """Counts events and kills the process at one of them."""

    def __init__(self, die_at: int | None) -> None:
        self.count = 0
        self._die_at = die_at
        self._lock = threading.Lock()

    def happened(self) -> None:
        """Count one; SIGKILL when it is the one."""
        with self._lock:
            self.count += 1
            if self.count == self._die_at:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # the signal needs a moment; nothing may happen in it

    def watch(self, owner: Any, name: str) -> None:
        """Count calls of a function, before each."""
        call: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **more: Any) -> Any:
            self.happened()
            return call(*args, **more)

        setattr(owner, name, counted)


def run_child(request: dict[str, Any], report: int) -> None:
    """Run the command as the request says; never returns."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    die = request["die"] or {}
    events = Events(die.get("event"))
    for name in EVENTS:
        events.watch(os, name)
    events.watch(trainer_module.Trainer, "advance")
    if "seconds" in die:
        threading.Timer(die["seconds"], os.kill, (os.getpid(), signal.SIGKILL)).start()
    code = main(request["argv"])
    sys.stdout.flush()
    with os.fdopen(report, "w") as answer:
        answer.write(json.dumps({"events": events.count}))
    os._exit(code)


def warm_up(argv: list[str]) -> None:
    """Run once in this process: children inherit the compiled loops. One thread: none may run when it forks."""
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):
        assert main(argv) == 0
    assert threading.active_count() == 1, threading.enumerate()


def serve() -> None:
    """Serve requests until stdin ends."""
    warm_up(json.loads(sys.stdin.readline())["warm_up"])
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            try:
                run_child(request, write)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        os.close(write)
        with os.fdopen(read) as report:
            answer = report.read()
        _, status = os.waitpid(child, 0)
        print(json.dumps({"status": status, **(json.loads(answer) if answer else {"events": None})}), flush=True)


if __name__ == "__main__":
    serve()
