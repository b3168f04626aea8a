"""Which checkpoints of a run are whole, and what stands in them beside Hugging Face's files.

    mark_complete(folder, {"config": .., "reserve_taken": 12})       last of all, by renaming into place
    folder, state = last_complete(run)                               None where there is none

Hugging Face writes a checkpoint file by file; a process that is killed leaves one without `relevance.json`. Such a folder is
moved out of the way when the run goes on, and the one before it is used. Source: ours.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recis.errors import CheckpointError

STATE_NAME = "relevance.json"


def mark_complete(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a checkpoint; from now on it counts as whole."""
    write_json(folder / STATE_NAME, state)


def last_complete(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest whole checkpoint of a run with its state, and remove cut-off ones behind it.

    Raises:
        CheckpointError: the state of a whole checkpoint cannot be read.
    """
    found = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for folder in found:
        path = folder / STATE_NAME
        if not path.exists():
            shutil.rmtree(folder)
            continue
        try:
            return folder, json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error}); delete this checkpoint to use the one before"
            ) from None
    return None


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that the file is either whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
