"""What the processes of one run do in turn: rank 0 writes, the others wait and read.

    with main_first():      rank 0 runs the block, then the others; what fails on rank 0 fails on all of them
        ...
    from_main(value)        rank 0's value on every rank: clocks differ, and ranks that part ways hang

Ranks are those of torchrun and accelerate, by their environment; a run of one process does nothing here. Rank 0 may sample for
hours while the others wait: a wait ends after WAIT, not after torch's ten or thirty minutes, and at once when a process dies.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

T = TypeVar("T")
WAIT = timedelta(days=1)


def num_ranks() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this is rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def on_cpu() -> bool:
    """Return whether several processes train on the CPU, over gloo; accelerate has to be told."""
    import torch

    return num_ranks() > 1 and not torch.cuda.is_available()


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block on rank 0, then on the others; an error of rank 0 is raised on all of them."""
    if num_ranks() == 1:
        yield
        return
    if not is_main():
        failure = from_main(cast(Exception | None, None))
        if failure is not None:
            raise failure
        yield
        return
    try:
        yield
    except Exception as error:
        from_main(_portable(error))
        raise
    from_main(None)


def from_main(value: T) -> T:
    """Return rank 0's value on every rank."""
    if num_ranks() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _connected()
    return broadcast_object_list([value])[0]


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if num_ranks() > 1:
        _connected().wait_for_everyone()


def _connected() -> Any:
    """Return accelerate's state; the first call connects the ranks, with our patience."""
    from accelerate import PartialState

    return PartialState(cpu=on_cpu(), timeout=WAIT)


def _portable(error: Exception) -> Exception:
    """Return an error that another process can raise: itself, or its text where it cannot be pickled."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    return error if type(copy) is type(error) else RuntimeError(f"rank 0: {type(error).__name__}: {error}")
