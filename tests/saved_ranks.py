"""Save the tables of several ranks in one process, as a job of them would: every rank its files, then one manifest."""

from collections.abc import Sequence
from pathlib import Path

from recis.checkpoint import Boundary
from recis.checkpoint.folder import make_tmp
from recis.checkpoint.save import capture, commit_checkpoint, write_rank
from recis.embedding import TableSet


def save_ranks(run: Path, step: int, ranks: Sequence[TableSet]) -> Path:
    """Return the checkpoint of a step; ranks[r] are the tables of rank r."""
    captured = [capture(Boundary(step=step, table_sets=[tables], reader={"rank": 0})) for tables in ranks]
    tmp = make_tmp(run, f"step_{step:09d}")
    reports = [write_rank(item, tmp, rank=rank, world_size=len(ranks)) for rank, item in enumerate(captured)]
    for item in captured:
        for snapshot in item.tables.values():
            snapshot.close()
    return commit_checkpoint(captured[0], tmp, run, reports)
