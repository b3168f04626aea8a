"""Training through collections: micro-batches end in the bits of the big batch, snapshots keep the boundary (B9, B19)."""

import pytest
import torch

from recis.embedding import (
    AfterSightings,
    EmbeddingBagCollection,
    EmbeddingCollection,
    Feature,
    TableConfig,
    TableSet,
    TtlSteps,
)
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.optim import Adam, RowWiseAdagrad, SparseOptimizer
from recis_kernels.row_grads import reduce_lookups


def random_batch(lengths, *, num_ids, seed):
    """lengths: {feature: bag sizes}; weighted."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.tensor([size for sizes in lengths.values() for size in sizes], dtype=torch.int64)
    values = torch.randint(-num_ids, num_ids, (int(flat.sum()),), generator=generator)
    weights = torch.rand(values.numel(), generator=generator) + 0.1
    stride = len(next(iter(lengths.values())))
    return KeyedJaggedTensor(tuple(lengths), values, lengths=flat, weights=weights, stride=stride)


def samples_of(feature, samples):
    lists = feature.to_lists()[samples]
    flat = feature.offsets.tolist()
    weights = feature.weights[flat[samples.start] : flat[samples.stop]]
    lengths = torch.tensor([len(row) for row in lists])
    return JaggedTensor(
        torch.tensor([i for row in lists for i in row], dtype=torch.int64), lengths=lengths, weights=weights
    )


@pytest.mark.parametrize("cuts", [[4], [1, 3], [2, 2], [1, 1, 1, 1]])
def test_micro_batches_give_the_bits_of_the_big_batch(cuts):
    features = ("a", Feature("b", "mean"))
    lengths = {"a": [3, 1, 0, 4], "b": [2, 2, 5, 1]}
    batch = random_batch(lengths, num_ids=4, seed=0)
    upstream = torch.randn(4, 10)

    def summed(sizes):
        collection = EmbeddingBagCollection([TableConfig(name="t", features=features, embedding_dim=5)], seed=1)
        start = 0
        for size in sizes:
            samples = slice(start, start + size)
            part = {name: samples_of(batch[name], samples) for name in lengths}
            out = collection(KeyedJaggedTensor.from_jagged(part))
            (torch.cat([out["a"], out["b"]], dim=1) * upstream[samples]).sum().backward()
            start += size
        table = collection.table_set["t"]
        merged = reduce_lookups(table.store.pending(), 5)
        sums = merged.views[0].grad
        assert sums is not None
        place_of_row = {row: place for place, row in enumerate(merged.rows.tolist())}
        grads = sums[[place_of_row[row] for row in table.find(table.ids()).tolist()]]
        table.store.drop_gradients()
        collection.end_step(1)
        return grads, table.export(), table.counters()

    want, rows, counters = summed([4])
    got, rows_cut, counters_cut = summed(cuts)
    assert torch.equal(got, want)
    assert counters == counters_cut
    assert all(torch.equal(rows[name], rows_cut[name]) for name in rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "optimizer", [Adam(lr=0.1, weight_decay=0.01), RowWiseAdagrad(lr=0.5)], ids=lambda o: type(o).__name__
)
def test_training_in_micro_batches_ends_in_the_same_bytes(optimizer, dtype):  # B9, B19
    def train(sizes):
        config = TableConfig(
            name="t",
            features=("a", Feature("b", "mean"), Feature("c", "none")),
            embedding_dim=6,
            dtype=dtype,
            optimizer=optimizer,
            admission=AfterSightings(2),
            eviction=(TtlSteps(2),),
        )
        tables = TableSet([config], seed=1)
        pooled, sequence = EmbeddingBagCollection(tables), EmbeddingCollection(tables)
        sparse = SparseOptimizer([pooled, sequence])
        for step in range(1, 8):
            lengths = {"a": [3, 1, 0, 4], "b": [2, 2, 5, 1], "c": [1, 0, 2, 2]}
            batch = random_batch(lengths, num_ids=20, seed=step)
            sparse.zero_grad()
            start = 0
            for size in sizes:
                samples = slice(start, start + size)
                part = KeyedJaggedTensor.from_jagged({name: samples_of(batch[name], samples) for name in lengths})
                out, vectors = pooled(part), sequence(part)["c"].flat_values
                ((out["a"] * out["b"]).sum() / 4 + vectors.square().sum() / 4).backward()
                start += size
            sparse.step()
            for collection in (pooled, sequence):
                collection.end_step(step)
        return tables["t"].export(), tables["t"].counters(), tables["t"].t

    rows, counters, t = train([4])
    for sizes in ([2, 2], [1, 3], [1, 1, 1, 1]):
        rows_cut, counters_cut, t_cut = train(sizes)
        assert (counters_cut, t_cut) == (counters, t) == (counters, 7)
        for name in rows:
            assert torch.equal(rows_cut[name].view(torch.uint8), rows[name].view(torch.uint8)), (sizes, name)
    assert min(counters.inserted, counters.rejected, counters.evicted, counters.found) > 0


def test_a_snapshot_keeps_the_boundary_through_updates():
    tables = TableSet([TableConfig(name="t", features=("f",), optimizer=Adam(lr=0.1))], seed=1)
    collection = EmbeddingBagCollection(tables)
    sparse = SparseOptimizer(collection)

    def step(number, ids):
        collection(KeyedJaggedTensor.from_lists({"f": [ids]}))["f"].sum().backward()
        sparse.step()
        collection.end_step(number)

    step(1, list(range(40)))
    want = tables["t"].export()
    with tables.snapshot()["t"] as snapshot:
        chunks = []
        for number, chunk in enumerate(snapshot.chunks(10), start=2):
            chunks.append(chunk)
            step(number, [7, 13, 25, 39, 100 + number])
    for name in want:
        assert torch.equal(torch.cat([chunk[name] for chunk in chunks]), want[name]), name
    assert not torch.equal(tables["t"].export()["weight"][:40], want["weight"])
