"""Find the costs that an estimate is made from: a file that was named, this machine's own, or a short measurement now."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from recis.bench import roofline, stored
from recis.distributed import costs as costs_file
from recis.distributed.costs import Costs
from recis.distributed.measure import measure


def known(path: Path | None) -> Costs | None:
    """Return the costs in a named file, or else this machine's; None where it was never measured.

    Raises:
        ConfigError: the named file cannot be used, or this machine's is damaged.
    """
    if path is not None:
        return costs_file.load(path)
    own = costs_file.default_path()
    return costs_file.load(own) if own.is_file() else None


def measured(path: Path | None, say: Callable[[str], object]) -> Costs:
    """Measure this machine and keep the result; the copy bandwidth is the roofline's, if that is of today.

    Raises:
        ConfigError: the file cannot be written.
    """
    limits = stored.fresh("cpu")
    if limits is None:
        say("measuring copy, read and gather (recis roofline), about 10 s")
        limits = roofline.measure(torch.device("cpu"))
        stored.store(limits, "cpu")
    say("measuring the parts of a step and a link of two processes, about 10 s")
    found = measure(copy_gb_per_s=limits["copy_gb_per_s"], roofline_at=limits["measured_at"])
    target = costs_file.default_path() if path is None else path
    costs_file.store(found, target)
    say(f"costs kept in {target}")
    if max(found.load_average) > len(os.sched_getaffinity(0)):
        say(f"the machine was busy (load {max(found.load_average)}): measure again when it is idle")
    return found
