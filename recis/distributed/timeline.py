"""What a rank did when, as a Chrome trace: open `timeline-0.json` in chrome://tracing or https://ui.perfetto.dev.

    row "compute"    forward, backward, update; and "wait for X": how long this rank stood still until X was there
    row "transport"  X from its start until it was taken: what lies beside compute cost nothing

Times are microseconds since the Unix epoch by the clock of the rank's machine.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMPUTE, TRANSPORT = 0, 1


class Timeline:
    """Spans of one rank; nothing is noted while `is_on` is False.

    Args:
        rank: whose.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.is_on = False
        self.events: list[dict[str, Any]] = []

    @staticmethod
    def now() -> float:
        """Return seconds since the epoch."""
        return time.time()

    @contextmanager
    def span(self, name: str, **more: Any) -> Iterator[None]:
        """Note what the block takes in the row "compute"."""
        begun = self.now()
        try:
            yield
        finally:
            self._note(name, COMPUTE, begun, self.now(), more)

    def travelled(self, what: str, begun: float, waited_from: float) -> None:
        """Note a journey that began at `begun`, was waited for from `waited_from`, and is over now."""
        ended = self.now()
        self._note(what, TRANSPORT, begun, ended, {})
        self._note(f"wait for {what}", COMPUTE, waited_from, ended, {})

    def _note(self, name: str, row: int, begun: float, ended: float, more: dict[str, Any]) -> None:
        if self.is_on:
            span = {"name": name, "ph": "X", "ts": round(begun * 1e6), "dur": round((ended - begun) * 1e6)}
            self.events.append({**span, "pid": self.rank, "tid": row, "args": more})

    def write(self, path: Path) -> None:
        """Write the spans so far."""
        names = [
            {"name": "thread_name", "ph": "M", "pid": self.rank, "tid": row, "args": {"name": name}}
            for row, name in ((COMPUTE, "compute"), (TRANSPORT, "transport"))
        ]
        rank = {"name": "process_name", "ph": "M", "pid": self.rank, "args": {"name": f"rank {self.rank}"}}
        path.write_text(json.dumps({"traceEvents": [rank, *names, *self.events], "displayTimeUnit": "ms"}) + "\n")
