"""Look at what a device computed without waiting for it: a copy to pinned memory, read once it has arrived.

    LateReading    the newest value of a tensor that only matters roughly: counts, of which the host keeps upper bounds
    LateFaults     numbers that ought to be 0; one that is not becomes an exception, named a step later

A copy queued behind the work of step s has arrived when the host is at the end of step s + 1, unless the device is further
behind; then it is looked at later, never waited for. On the CPU, where tests run the same code, it arrives at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Copy:
    """A tensor on its way to the host."""

    def __init__(self, values: Tensor) -> None:
        is_cuda = values.is_cuda
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=is_cuda)
        self._values.copy_(values, non_blocking=True)
        self._arrived: Any = None
        if is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    @property
    def has_arrived(self) -> bool:
        return self._arrived is None or self._arrived.query()

    def wait(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values


class LateReading:
    """One copy under way at a time, and a note of what the host knew when it was queued."""

    def __init__(self) -> None:
        self._copy: _Copy | None = None
        self._note: Any = None

    def start(self, values: Tensor, note: Any = None) -> None:
        """Queue a copy of the values, unless one is under way."""
        if self._copy is None:
            self._copy, self._note = _Copy(values), note

    def take(self) -> tuple[Tensor, Any] | None:
        """Return (values, note) once, when the copy has arrived; None before."""
        if self._copy is None or not self._copy.has_arrived:
            return None
        found = self._copy.wait(), self._note
        self.drop()
        return found

    def drop(self) -> None:
        """Forget the copy under way: exact values were read meanwhile."""
        self._copy = self._note = None


class LateFaults:
    """Counts of faults that were asked for and not looked at yet."""

    def __init__(self) -> None:
        self._asked: list[tuple[_Copy, Callable[[int], Exception]]] = []

    def ask(self, count: Tensor, explain: Callable[[int], Exception]) -> None:
        """Look at a count (one element) later; `explain(count)` makes the exception where it is not 0."""
        self._asked.append((_Copy(count), explain))

    def raise_found(self, *, wait: bool = False) -> None:
        """Raise for the oldest fault among the counts that have arrived; the others stay for the next call.

        wait: look at all of them, and wait for those under way: a host sync.
        """
        while self._asked and (wait or self._asked[0][0].has_arrived):
            copy, explain = self._asked.pop(0)
            count = int(copy.wait().numpy().sum())
            if count:
                raise explain(count)
