"""The recipe that tests of several ranks train: kill_recipe in 8 parts, with faults that a file tells its hook to make."""

import errno
import json
import os
import signal
import time
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import kill_recipe

from recis.distributed.config import Parallel
from recis.errors import DataError
from recis.io import DataConfig
from recis.trainer import TrainConfig

PARTS = 8
MAX_STEPS = 6
SAMPLES = 220  # not a multiple of the batch: the last step of the epoch is uneven


@dataclass(frozen=True)
class Faults:
    """At one step on one rank: kill, hang, fail, or break the save that follows. `plan` is removed when it has acted."""

    plan: str

    def on_step_end(self, state: Any) -> None:
        path = Path(self.plan)
        rank = int(os.environ.get("RANK", "0"))
        try:
            plan = json.loads(path.read_text())
        except FileNotFoundError:  # another rank has had its fault
            return
        if plan["step"] != state.step or plan["rank"] != rank:
            return
        path.unlink()
        kind = plan["kind"]
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "hang":
            _hang()
        elif kind == "fail":
            raise DataError("a made-up fault", file="clicks.parquet", row=3)
        elif kind == "stop":
            state.stop_reason = "asked to"
        else:
            _break_next_save(kind)


def _hang() -> None:
    """Do nothing for ever, and mind no signal but SIGKILL."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    while True:
        time.sleep(60)


def _break_next_save(kind: str) -> None:
    """Let this rank be lost, or its disk be full, in the middle of writing its files of the next checkpoint."""
    saving: Any = import_module("recis.checkpoint.save")  # the package's own `save` is a function
    write = saving.write_parts

    def broken(*args: Any, **options: Any) -> Any:
        write(*args, **options)
        if kind == "lost_in_save":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, "No space left on device")

    saving.write_parts = broken


def recipe(
    *,
    data: str | None,
    out: Path,
    parts: int | None = PARTS,
    deltas: int = 0,
    timeout: float = 60.0,
    faults: str = "",
    deterministic: bool = True,
) -> TrainConfig:
    """Return the run; `data` is a folder that kill_recipe.write_data made."""
    if "JOB_TORCH" in os.environ:  # a rank that has another torch than it seems
        runs: Any = import_module("recis.runs")
        runs.versions = lambda: {"recis": "0", "torch": os.environ["JOB_TORCH"], "Python": "3"}
    config = kill_recipe.recipe(data=data, out=out, delta_saves=deltas)
    assert isinstance(config.train_data, DataConfig)
    files = replace(config.train_data, batch_size=48, num_lanes=24, shuffle_rows=96)
    return replace(
        config,
        name="job",
        train_data=files,
        eval_data=replace(files, batch_size=96),
        accumulate_steps=1,
        max_steps=MAX_STEPS,
        eval_every_steps=None,
        monitor=None,
        save_every_steps=2,
        keep_checkpoints=3,
        log_every_steps=1,
        parallel=Parallel(parts=parts, timeout_s=timeout),
        hooks=(Faults(faults),) if faults else (),
        deterministic=deterministic,
    )
