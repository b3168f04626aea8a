"""One clock reading per optimizer step, for eviction by seconds.

The reading is taken when the step ends, is the same for all tables, never runs backwards, and is logged with its step: a
replay that feeds the log evicts alike.
"""

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

_LOGGED_STEPS = 100_000


class StepClock:
    """Readings of a clock by step.

    Args:
        read: returns seconds since the epoch; None: the system's time. Tests and replays give their own.

    Attributes:
        step, seconds: of the last reading; 0, 0 before the first.
        log: the last (step, seconds) pairs.
        agree: turns this process's reading into the one of all processes that share the tables; None: it is the only one.
    """

    def __init__(self, read: Callable[[], float] | None = None) -> None:
        self._read = time.time if read is None else read
        self.agree: Callable[[int], int] | None = None
        self.step = 0
        self.seconds = 0
        self.log: deque[tuple[int, int]] = deque(maxlen=_LOGGED_STEPS)

    def at(self, step: int) -> int:
        """Return the reading of this step in whole seconds; the clock is read at the first call for it."""
        if step != self.step or not self.log:
            reading = int(self._read())
            if self.agree is not None:
                reading = self.agree(reading)
            self.step, self.seconds = step, max(self.seconds, reading)
            self.log.append((step, self.seconds))
        return self.seconds

    def now(self) -> int:
        """Return a reading that belongs to no step, and is not logged: for rows written by hand between steps."""
        return max(self.seconds, int(self._read()))

    def state(self) -> dict[str, list]:
        """Return the log, JSON-able."""
        return {"log": [list(entry) for entry in self.log]}

    def load(self, state: dict[str, list]) -> None:
        """Set what `state` returned."""
        self.log = deque(((int(step), int(seconds)) for step, seconds in state["log"]), maxlen=_LOGGED_STEPS)
        self.step, self.seconds = self.log[-1] if self.log else (0, 0)


def low_seconds(seconds: Tensor) -> Tensor:
    """Return the low 32 bits of readings as the int32 with those bits: what a row keeps, good until 2106."""
    return torch.where(seconds >= 1 << 31, seconds - (1 << 32), seconds).to(torch.int32)


def low_second(seconds: int) -> int:
    """Return low_seconds of one reading."""
    return seconds - (1 << 32) if seconds >= 1 << 31 else seconds


def from_low_seconds(low: Tensor) -> Tensor:
    """Return the readings, int64, that low_seconds cut."""
    return low.long() & 0xFFFFFFFF
