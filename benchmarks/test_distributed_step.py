"""Loading a checkpoint of one process into one of two: what a rank reads, keeps and drops.

    make bench, or: pytest benchmarks/test_distributed_step.py --benchmark-json=out.json

A part of a file that one process wrote has rows of all slices: each of two ranks reads all of them and keeps half. Hashes are
not looked at again (the job verifies a checkpoint once, before its ranks load it). The peer loads the same rows without
picking: one process, the whole file, half as many rows in it. Target: 300 MB of kept rows per second and rank.
"""

import pytest
import torch

from recis.bench.harness import compare
from recis.checkpoint import Boundary, Target, load, save
from recis.embedding import TableConfig, TableSet
from recis_kernels.ids_partition import slice_bounds, slice_of_id

NUM_ROWS, DIM = 400_000, 64
MIN_BYTES_PER_S = 300e6


def table_set(ids: torch.Tensor | None = None) -> TableSet:
    """Return one table, with rows for the ids."""
    made = TableSet([TableConfig(name="item", features=("item",), embedding_dim=DIM)], seed=0)
    for part in () if ids is None else ids.split(100_000):
        made["item"].import_rows({"ids": part, "weight": torch.rand(part.numel(), DIM)})
    return made


@pytest.mark.parametrize("world_size", [2])
def test_reshard_load(benchmark, tmp_path, world_size):
    ids = torch.randperm(4 * NUM_ROWS, generator=torch.Generator().manual_seed(0))[:NUM_ROWS]
    whole = save(tmp_path / "whole", Boundary(step=1, table_sets=[table_set(ids)]))
    mine = ids[slice_of_id(ids) < slice_bounds(world_size)[1]]
    half = save(tmp_path / "half", Boundary(step=1, table_sets=[table_set(mine)]))
    into, peer = table_set(), table_set()

    def resharded() -> None:
        load(whole, into=Target(tables=into.tables), rank=0, world_size=world_size, verify=False)

    def straight() -> None:
        load(half, into=Target(tables=peer.tables), verify=False)

    resharded()
    straight()
    assert torch.equal(into["item"].ids(), mine.sort().values)
    assert torch.equal(into["item"].ids(), peer["item"].ids())
    row_bytes = 4 * DIM + 4 + 16
    compare(
        benchmark,
        case=f"{NUM_ROWS} rows D{DIM} of 1 process into rank 0 of {world_size}",
        ours="resharded",
        impls={"resharded": resharded, "rows as they are": straight},
        items=mine.numel(),
        rounds=30,
        targets={"items_per_s": MIN_BYTES_PER_S / row_bytes},
        extra={"row_bytes": row_bytes},
    )
