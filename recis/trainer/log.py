"""metrics.jsonl: one JSON object per line, in the order of training; NaN is written as null.

    {"kind": "train", "step": 50, "loss": 0.61, "auc": 0.7, "samples": 204800, "samples_per_s": 81000.0}
    {"kind": "eval", "step": 100, "loss": 0.60, "auc": 0.72}

On resume the file is cut back to the step of the checkpoint, so that no step is in it twice. A line that a kill left
unfinished is cut off too.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class MetricsLog:
    """Appends lines to a file; `path` None writes nowhere."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file: TextIO | None = None

    def cut_back(self, step: int, eval_step: int | None) -> int:
        """Drop lines after `step`, evaluations after `eval_step` and an unfinished line; return how many are left."""
        if self.path is None or not self.path.exists():
            return 0
        self.close()
        kept = [line for line in self.path.read_text().splitlines(keepends=True) if _is_kept(line, step, eval_step)]
        part = self.path.with_suffix(".tmp")
        part.write_text("".join(kept))
        part.replace(self.path)
        return len(kept)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line and hand it to the system, so that a kill loses nothing."""
        if self.path is None:
            return
        if self._file is None:
            self._file = self.path.open("a")
        self._file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Put the lines on the disk: called before a checkpoint, so that none that it counts can be lost."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; the next write opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a metrics.jsonl; an unfinished last line is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if _step_of(line) < math.inf]


def _is_kept(line: str, step: int, eval_step: int | None) -> bool:
    at = _step_of(line)
    if at <= step and json.loads(line).get("kind") == "eval":
        return eval_step is not None and at <= eval_step
    return at <= step


def _step_of(line: str) -> float:
    """Return the step of a line; infinity for one that is not whole."""
    if not line.endswith("\n"):
        return math.inf
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
