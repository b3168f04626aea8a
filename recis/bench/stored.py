"""The newest measurement of this machine, in the user's cache folder: what `recis roofline` left for the benchmarks.

One JSON file per machine and kind of device. It counts as fresh for twelve hours, for the same number of threads, and
only if the machine was not busy while it was taken: a share of a limit must be a share of today's limit.
"""

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from recis_kernels import calibration
from recis_kernels.threads import num_threads

FORMAT, VERSION = "recis-roofline", 1
FRESH = timedelta(hours=12)


def path_of(device_type: str) -> Path:
    """Return where the measurement of this machine's CPU or GPU is kept."""
    slug = calibration.machine_slug(calibration.machine_name())
    return calibration.cache_folder() / f"roofline-{device_type}-{slug}.json"


def store(result: dict[str, Any], device_type: str) -> Path:
    """Keep a measurement, whole or not at all, and return its file."""
    path = path_of(device_type)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)
    return path


def fresh(device_type: str, now: datetime | None = None) -> dict[str, Any] | None:
    """Return the measurement of this machine if it counts as fresh; None where there is none."""
    try:
        result = json.loads(path_of(device_type).read_text())
        age = (now or datetime.now(UTC)) - datetime.fromisoformat(result["measured_at"])
        same = result["format"] == FORMAT and result["version"] == VERSION and result["threads"] == num_threads()
        quiet = max(result["load_average"]) <= len(os.sched_getaffinity(0))
    except (OSError, ValueError, KeyError, TypeError):  # absent, or of another release: measured anew
        return None
    return result if same and quiet and timedelta(0) <= age <= FRESH else None
