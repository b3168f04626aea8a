"""The step path of tables with device="cuda": nothing is read on the host, no launch mixes devices. No GPU is needed."""

from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda

from recis.embedding import EmbeddingBagCollection, Feature, TableConfig, TableSet, Tile, TtlSteps, WithProbability
from recis.embedding.row_owners import DeviceRowOwners
from recis.jagged import KeyedJaggedTensor
from recis.optim import Adam, SparseOptimizer, clip_grad_norm

DIM = 4


class HostCounts:
    """Steps per table, for `RowStore.t`, which is made inside the fake but lies on the host."""

    def __init__(self, num_tables: int) -> None:
        self.counts = [0] * num_tables

    def __iadd__(self, more: int) -> "HostCounts":
        self.counts = [count + more for count in self.counts]
        return self

    def tolist(self) -> list[int]:
        return self.counts


def build(**more: Any) -> TableSet:
    features = (("a", Feature("b", "mean")), (Feature("c", Tile(2)),))
    configs = [
        TableConfig(name=name, features=part, embedding_dim=DIM, **more)
        for name, part in zip("xy", features, strict=True)
    ]
    tables = TableSet(configs, seed=1, device="cuda", block_rows=8)
    for store in tables.stores:
        store.t = HostCounts(store.num_tables)  # pyright: ignore[reportAttributeAccessIssue]
    return tables


def backward(tables: TableSet) -> None:
    """Give every view a gradient, which autograd does in C++, with a real device."""
    for store in tables.stores:
        for record in store._records:
            assert record.grads is not None
            for view in record.grads.views:
                num_grads = view.inverse.numel() if view.per_position else view.offsets.numel() - 1
                view.add_grad(torch.ones(num_grads, DIM, device="cuda"))


def run_steps(tables: TableSet, parts: int) -> None:
    pooled = EmbeddingBagCollection(tables)
    sparse = SparseOptimizer([pooled])
    batch = KeyedJaggedTensor(
        ("a", "b", "c"),
        torch.zeros(20, dtype=torch.int64, device="cuda"),
        lengths=torch.ones(9, dtype=torch.int64, device="cuda"),
        weights=torch.ones(20, device="cuda"),
        stride=3,
    )
    with torch.no_grad():
        for step in (1, 2):
            for _ in range(parts):
                pooled(batch)
            backward(tables)
            clip_grad_norm([], [pooled], 1.0)
            sparse.step()
            pooled.end_step(step)
        pooled(batch)
        pooled.end_step(3)  # without a gradient: metadata alone
        pooled.eval()
        pooled(batch)


@pytest.mark.parametrize("parts", [1, 2], ids="{} parts".format)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"dtype": "bfloat16", "optimizer": Adam(lr=0.1)},
        {"max_rows": 9, "unadmitted": "default_row", "train_default_row": True},
        {"admission": WithProbability(0.5)},
    ],
    ids=str,
)
def test_nothing_waits(monkeypatch, more, parts):
    with fake_cuda(monkeypatch) as launched:
        with monkeypatch.context() as building:  # which may wait, for the default rows
            building.setattr(DeviceRowOwners, "_counts", lambda self: (0, 0))
            tables = build(**more)
        run_steps(tables, parts)
    assert {"_hash_publish_kernel", "_init_rows_kernel", "_update_rows_kernel", "_embedding_bag_kernel"} <= set(
        launched
    )


def test_what_waits_is_found(monkeypatch):
    with fake_cuda(monkeypatch):
        tables = build(eviction=(TtlSteps(2),))
        with pytest.raises(Exception, match=r"_local_scalar_dense|nonzero"):
            run_steps(tables, 1)
