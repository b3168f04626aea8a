"""What the processes of one run do in turn: rank 0 writes, the others wait and read.

    with main_first():      rank 0 runs the block, then the others
        ...

Ranks are those of torchrun and accelerate, by their environment; a run of one process does nothing here.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager


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
    """Run the block on rank 0, then on the others."""
    if num_ranks() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState(cpu=on_cpu()).main_process_first():
        yield
