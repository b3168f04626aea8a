"""The progress line: step, loss, samples/s and the time left.

    step 1,200/5,000   loss 0.4312   81,204 samples/s   ETA 0:03:11

On a terminal the line is rewritten in place; elsewhere (a log file) a plain line is printed at each `every_steps`.
"""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from recis.trainer.state import RunState

REFRESH_S = 0.2  # a terminal is rewritten no oftener


class Progress:
    """Prints where a run stands; the rate is that of the last window, so that a slow start is forgotten.

    Args:
        every_steps: steps between plain lines when `stream` is no terminal.
        stream: where to print; None is standard error at the time of printing.
        clock: seconds, rising; for tests.
        note: a line to print when training starts.
    """

    def __init__(
        self,
        *,
        every_steps: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        note: str | None = None,
    ) -> None:
        self.every_steps = every_steps
        self._stream = stream
        self._clock = clock
        self._note = note
        self._window = (0.0, 0, 0)  # time, samples, step where the window began
        self._shown_s = -REFRESH_S
        self._open_line = False

    def on_train_start(self, state: RunState) -> None:
        """Print the note and start the clock."""
        if self._note is not None:
            (self._stream or sys.stderr).write(self._note + "\n")
        self._window = (self._now(state), state.samples, state.step)

    def on_step_end(self, state: RunState) -> None:
        """Print a line when one is due."""
        now = self._now(state)
        stream = self._stream or sys.stderr
        plain = state.step % self.every_steps == 0
        if stream.isatty():
            if now - self._shown_s >= REFRESH_S:
                self._shown_s = now
                stream.write("\r\x1b[2K" + self._line(state, now))
                stream.flush()
                self._open_line = True
        elif plain:
            stream.write(self._line(state, now) + "\n")
            stream.flush()
        if plain:
            self._window = (now, state.samples, state.step)

    def on_train_end(self, state: RunState) -> None:
        """Leave the last line standing."""
        if self._open_line:
            stream = self._stream or sys.stderr
            stream.write("\r\x1b[2K" + self._line(state, self._now(state)) + "\n")
            stream.flush()
            self._open_line = False

    def _now(self, state: RunState) -> float:
        return self._clock() - state.evaluation_s

    def _line(self, state: RunState, now: float) -> str:
        begun, samples, step = self._window
        seconds = now - begun
        parts = [f"step {state.step:,}" + (f"/{state.max_steps:,}" if state.max_steps else "")]
        if state.loss is not None:
            parts.append(f"loss {state.loss:.4f}")
        if seconds > 0 and state.step > step:
            parts.append(f"{(state.samples - samples) / seconds:,.0f} samples/s")
            if state.max_steps:
                parts.append(f"ETA {_clock_text((state.max_steps - state.step) * seconds / (state.step - step))}")
        return "   ".join(parts)


def _clock_text(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
