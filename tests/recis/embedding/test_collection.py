"""Collections: pooling and gradients against float64 torch, sequences, shared tables, a user's module (A20-A22, B24)."""

import pytest
import torch
from torch import nn

from recis.embedding import (
    AfterSightings,
    EmbeddingBagCollection,
    EmbeddingCollection,
    Feature,
    TableConfig,
    TableSet,
    Tile,
)
from recis.jagged import KeyedJaggedTensor
from recis_kernels.row_grads import reduce_lookups


def random_batch(lengths, *, num_ids=30, weighted=False, seed=0, keys=None):
    """lengths: {feature: bag sizes}."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.tensor([size for sizes in lengths.values() for size in sizes], dtype=torch.int64)
    values = torch.randint(-num_ids, num_ids, (int(flat.sum()),), generator=generator)
    weights = torch.rand(values.numel(), generator=generator) + 0.1 if weighted else None
    stride = len(next(iter(lengths.values())))
    batch = KeyedJaggedTensor(tuple(lengths), values, lengths=flat, weights=weights, stride=stride)
    return batch if keys is None else batch.permute([list(lengths).index(key) for key in keys])


def row_grads(store):
    """Return {row: summed gradient} of the lookups that wait for the optimizer."""
    summed = reduce_lookups(store.pending(), store.layout.dim)
    (view,) = summed.views
    assert view.grad is not None
    reached = view.inverse >= 0
    return {int(row): view.grad[u] * summed.scale for u, row in enumerate(summed.rows) if row >= 0 and reached[u]}


def reference(table, feature, part, *, vectors=None):
    """Return (weight [n, D] float64 leaf, pooled output) from exported rows, by torch's own EmbeddingBag."""
    out = table.export()
    weight = out["weight"].double().requires_grad_() if vectors is None else vectors
    index = torch.searchsorted(out["ids"], part.flat_values)
    mode, factors = "sum", None if part.weights is None else part.weights.double()
    if feature.pooling == "mean":
        ones = torch.ones(part.num_values, dtype=torch.float64) if factors is None else factors
        bag = torch.arange(part.num_bags).repeat_interleave(part.lengths)
        factors = ones / torch.zeros(part.num_bags, dtype=torch.float64).index_add(0, bag, ones)[bag]
    return weight, torch.nn.functional.embedding_bag(
        index, weight, part.offsets[:-1], mode=mode, per_sample_weights=factors
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dim", [1, 7, 64])
@pytest.mark.parametrize("lengths", [[3], [0, 4, 0], [1, 50, 2, 0, 1]], ids=lambda sizes: f"B{len(sizes)}L{sum(sizes)}")
def test_pooling_and_gradients_match_torch(weighted, dim, lengths):
    features = (Feature("sum", "sum"), Feature("mean", "mean"), "bare")
    collection = EmbeddingBagCollection([TableConfig(name="item", features=features, embedding_dim=dim)], seed=3)
    batch = random_batch(dict.fromkeys(("sum", "mean", "bare"), lengths), weighted=weighted)
    if batch.weights is not None:
        batch.weights.requires_grad_()
    out = collection(batch)
    upstream = {name: torch.randn(len(lengths), dim) for name in out}
    torch.stack([(out[name] * upstream[name]).sum() for name in out]).sum().backward()

    table = collection.table_set["item"]
    weights = None if batch.weights is None else batch.weights.detach().double().requires_grad_()
    exact = KeyedJaggedTensor(batch.keys, batch.values, lengths=batch.lengths, weights=weights, stride=batch.stride)
    vectors, loss = table.export()["weight"].double().requires_grad_(), torch.zeros((), dtype=torch.float64)
    for name, feature in collection.features.items():
        _, want = reference(table, feature, exact[name], vectors=vectors)
        torch.testing.assert_close(out[name].double(), want, rtol=1e-5, atol=1e-6)
        loss = loss + (want * upstream[name].double()).sum()
    loss.backward()
    got = row_grads(table.store)
    rows = table.find(table.ids())
    torch.testing.assert_close(
        torch.stack([got[int(row)] for row in rows]).double(), vectors.grad, rtol=1e-4, atol=1e-5
    )
    if batch.weights is not None and weights is not None:
        got_weights, want_weights = batch.weights.grad, weights.grad
        assert got_weights is not None
        torch.testing.assert_close(got_weights.double(), want_weights, rtol=1e-4, atol=1e-5)


def three_rows(features, **changes):
    """A table whose ids 1, 2, 3 hold the vectors (1, 1), (2, 2), (3, 3)."""
    config = TableConfig(name="item", features=features, embedding_dim=2, **changes)
    tables = TableSet([config], seed=1)
    tables["item"].insert(torch.tensor([1, 2, 3]), torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
    return tables


def test_weighted_sum_by_hand():  # A20
    tables = three_rows((Feature("f", "sum"),))
    weights = torch.tensor([2.0, 3.0, 0.5, 1.0])
    batch = KeyedJaggedTensor(("f",), torch.tensor([3, 1, 2, 1]), lengths=torch.tensor([1, 2, 1, 0]), weights=weights)
    out = EmbeddingBagCollection(tables)(batch)["f"]
    assert out.tolist() == [[6.0, 6.0], [4.0, 4.0], [1.0, 1.0], [0.0, 0.0]]
    out.sum().backward()
    got = row_grads(tables.stores[0])
    rows = tables["item"].find(torch.tensor([1, 2, 3])).tolist()
    assert [got[row].tolist() for row in rows] == [[4.0, 4.0], [0.5, 0.5], [2.0, 2.0]]


@pytest.mark.parametrize("repeat", [1, 25])
def test_weighted_mean_by_hand(repeat):  # A21: bags of 2 and of 50
    tables = TableSet([TableConfig(name="t", features=(Feature("f", "mean"),), embedding_dim=1)], seed=1)
    tables["t"].insert(torch.tensor([1, 2]), torch.tensor([[10.0], [20.0]]))
    ids = torch.tensor([1, 2] * repeat)
    lengths = torch.tensor([2 * repeat])
    collection = EmbeddingBagCollection(tables)
    weighted = KeyedJaggedTensor(("f",), ids, lengths=lengths, weights=torch.tensor([1.0, 3.0] * repeat))
    torch.testing.assert_close(collection(weighted)["f"], torch.tensor([[17.5]]))
    torch.testing.assert_close(collection(KeyedJaggedTensor(("f",), ids, lengths=lengths))["f"], torch.tensor([[15.0]]))


def test_weights_that_add_up_to_nothing_give_zeros_without_gradient():
    tables = three_rows((Feature("f", "mean"),))
    weights = torch.tensor([1.0, -1.0, 2.0], requires_grad=True)
    batch = KeyedJaggedTensor(("f",), torch.tensor([1, 2, 3]), lengths=torch.tensor([2, 1]), weights=weights)
    out = EmbeddingBagCollection(tables)(batch)["f"]
    assert out.tolist() == [[0.0, 0.0], [3.0, 3.0]]
    out.sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [0.0, 0.0, 0.0]
    got = row_grads(tables.stores[0])
    rows = tables["item"].find(torch.tensor([1, 2, 3])).tolist()
    assert [got[row].tolist() for row in rows] == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]


def test_tile_by_hand():  # A22
    tables = three_rows((Feature("f", Tile(3)), "other"))
    batch = KeyedJaggedTensor.from_lists({"f": [[1], [2, 3], [1, 2, 3, 3]], "other": [[1], [], []]})
    out = EmbeddingBagCollection(tables)(batch)
    assert out["f"].shape == (3, 3, 2)
    assert out["f"][:, :, 0].tolist() == [[1.0, 0.0, 0.0], [2.0, 3.0, 0.0], [1.0, 2.0, 3.0]]
    assert out["other"].tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    scale = torch.arange(1.0, 10.0).view(3, 3, 1)
    (out["f"] * scale).sum().backward()
    got = row_grads(tables.stores[0])
    rows = tables["item"].find(torch.tensor([1, 2, 3])).tolist()
    assert [got[row][0].item() for row in rows] == [1.0 + 7.0, 4.0 + 8.0, 5.0 + 9.0]  # the 4th of the last bag: nothing


def test_sequence_features_keep_lengths_and_weights():
    tables = TableSet(
        [TableConfig(name="item", features=(Feature("a", "none"), Feature("b", "none")), embedding_dim=3)], seed=1
    )
    collection = EmbeddingCollection(tables)
    batch = random_batch({"a": [2, 0, 3], "b": [0, 1, 1]}, weighted=True)
    out = collection(batch)
    assert list(out) == ["a", "b"]
    loss = torch.zeros(())
    want = {}
    for name in out:
        assert out[name].lengths.tolist() == batch[name].lengths.tolist()
        torch.testing.assert_close(out[name].weights, batch[name].weights, rtol=0, atol=0)
        table = tables["item"].export()
        assert torch.equal(out[name].values, table["weight"][torch.searchsorted(table["ids"], batch[name].flat_values)])
        upstream = torch.randn(out[name].values.shape)
        loss = loss + (out[name].values * upstream).sum()
        for row_id, grad in zip(batch[name].flat_values.tolist(), upstream, strict=True):
            want[row_id] = want.get(row_id, torch.zeros(3)) + grad
    loss.backward()
    got = row_grads(tables.stores[0])
    for row_id, grad in want.items():
        torch.testing.assert_close(got[int(tables["item"].find(torch.tensor([row_id])))], grad)


def test_one_table_serves_a_pooled_and_a_sequence_feature():
    tables = three_rows(("clicked", Feature("history", "none")))
    pooled, sequence = EmbeddingBagCollection(tables), EmbeddingCollection(tables)
    batch = KeyedJaggedTensor.from_lists({"history": [[1, 2]], "clicked": [[2, 3]]})
    (pooled(batch)["clicked"].sum() + 10 * sequence(batch)["history"].values.sum()).backward()
    got = row_grads(tables.stores[0])
    rows = tables["item"].find(torch.tensor([1, 2, 3])).tolist()
    assert [got[row].tolist() for row in rows] == [[10.0, 10.0], [11.0, 11.0], [1.0, 1.0]]
    tables.stores[0].drop_gradients()
    pooled.end_step(1)
    sequence.end_step(1)
    assert tables["item"].export()["count"].tolist() == [1, 2, 1]
    assert tables["item"].counters().found == 3


@pytest.mark.parametrize("keys", [None, ["y2", "x1", "unused", "y1", "x2"]])
def test_features_of_several_stores_in_any_order(keys):
    configs = [
        TableConfig(name="x", features=("x1", Feature("x2", "mean")), embedding_dim=4),
        TableConfig(name="y", features=("y1", "y2"), embedding_dim=8),
    ]
    collection = EmbeddingBagCollection(configs, seed=5)
    lengths = {"x1": [1, 2], "x2": [0, 3], "unused": [2, 2], "y1": [2, 0], "y2": [1, 1]}
    batch = random_batch(lengths, weighted=True, keys=keys)
    out = collection(batch)
    assert list(out) == ["x1", "x2", "y1", "y2"]
    for name, (feature, table) in collection.table_set.features.items():
        _, want = reference(table, feature, batch[name])
        torch.testing.assert_close(out[name].double(), want, rtol=1e-5, atol=1e-6)
    assert collection.table_set["x"].size + collection.table_set["y"].size == len(
        {("x" if name < "y" else "y", i) for name in out for i in batch[name].flat_values.tolist()}
    )


def test_trained_default_row_gets_the_gradients_of_all_unadmitted_ids():
    configs = [
        TableConfig(
            name=name,
            features=(name,),
            embedding_dim=2,
            admission=AfterSightings(2),
            unadmitted="default_row",
            train_default_row=trained,
        )
        for name, trained in (("a", True), ("b", False))
    ]
    collection = EmbeddingBagCollection(configs, seed=1)
    tables = collection.table_set
    tables["a"].insert(torch.tensor([7]), torch.ones(1, 2))
    tables["b"].insert(torch.tensor([7]), torch.ones(1, 2))
    batch = KeyedJaggedTensor.from_lists({"a": [[1, 2, 1], [7]], "b": [[1, 2], [7, 3]]})
    out = collection(batch)
    default = tables["a"].default_row
    torch.testing.assert_close(out["a"][0], 3 * default)
    torch.testing.assert_close(out["b"][1], 1 + tables["b"].default_row)
    (out["a"] * torch.tensor([[1.0], [10.0]])).sum().backward(retain_graph=True)
    got = row_grads(tables.stores[0])
    trained_row = int(tables.stores[0].defaults.rows[0])
    untrained_row = int(tables.stores[0].defaults.rows[1])
    assert got[trained_row].tolist() == [3.0, 3.0]
    assert got[int(tables["a"].find(torch.tensor([7])))].tolist() == [10.0, 10.0]
    assert untrained_row not in got
    tables.stores[0].drop_gradients()
    collection.end_step(1)
    state = tables["a"].admission_state()
    assert torch.equal(state["default.weight"][0], default)
    fresh = EmbeddingBagCollection(configs, seed=99).table_set["a"]
    fresh.load_admission_state(state)
    assert torch.equal(fresh.default_row, default)


def test_edges():  # B24
    config = TableConfig(name="t", features=(Feature("f", "mean"), Feature("g", Tile(2))), embedding_dim=3)
    collection = EmbeddingBagCollection([config], seed=1)
    none = torch.empty(0, dtype=torch.int64)

    empty = collection(KeyedJaggedTensor(("f", "g"), none, lengths=none, stride=0))
    assert empty["f"].shape == (0, 3)
    assert empty["g"].shape == (0, 2, 3)
    (empty["f"].sum() + empty["g"].sum()).backward()

    hollow = collection(KeyedJaggedTensor(("f", "g"), none, lengths=torch.zeros(8, dtype=torch.int64), stride=4))
    assert bool((hollow["f"] == 0).all())
    assert hollow["g"].shape == (4, 2, 3)
    (hollow["f"].sum() + hollow["g"].sum()).backward()

    single = collection(KeyedJaggedTensor.from_lists({"f": [[5]], "g": [[]]}))
    assert torch.equal(single["f"], collection.table_set["t"].export()["weight"])
    collection.table_set.stores[0].drop_gradients()
    collection.end_step(1)
    assert collection.table_set["t"].counters().inserted == 1

    no_features = EmbeddingBagCollection([TableConfig(name="t", features=())], seed=1)
    assert no_features(KeyedJaggedTensor((), none, lengths=none, stride=3)) == {}
    no_features.end_step(1)
    with pytest.raises(ValueError, match="offsets must start at 0"):
        KeyedJaggedTensor(("f",), torch.tensor([1, 2]), offsets=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="ids must be int64"):
        collection(KeyedJaggedTensor(("f", "g"), torch.zeros(2), lengths=torch.tensor([1, 1])))


class Ranker(nn.Module):
    """What a user writes: collections as submodules among others."""

    def __init__(self):
        super().__init__()
        tables = TableSet(
            [TableConfig(name="item", features=("item", Feature("history", "none")), embedding_dim=4)], seed=1
        )
        self.items = EmbeddingBagCollection(tables)
        self.history = EmbeddingCollection(tables)
        self.top = nn.Linear(8, 1)

    def forward(self, batch):
        history = self.history(batch)["history"].to_padded(max_length=3).sum(1)
        return self.top(torch.cat([self.items(batch)["item"], history], dim=1))


def test_inside_a_users_module():
    model = Ranker()
    batch = KeyedJaggedTensor.from_lists({"item": [[1], [2]], "history": [[2, 3], []]})
    assert list(model.state_dict()) == ["top.weight", "top.bias"]
    assert sum(p.numel() for p in model.parameters()) == 9
    model.load_state_dict(model.state_dict())
    model.eval()
    assert model(batch).shape == (2, 1)
    assert model.items.table_set["item"].size == 0
    model.train()
    model(batch).sum().backward()
    assert model.items.table_set["item"].size == 3
    assert len(row_grads(model.items.table_set.stores[0])) == 3
    assert "1 tables in 1 stores" in repr(model)
    assert model.top.weight.grad is not None


def test_lookup_without_backward_counts_but_waits_for_nothing():
    model = Ranker()
    batch = KeyedJaggedTensor.from_lists({"item": [[1], [2]], "history": [[2, 3], []]})
    with torch.no_grad():
        model(batch)
    tables = model.items.table_set
    assert tables.stores[0].pending() == []
    tables.end_step(1)
    out = tables["item"].export()
    assert out["count"].tolist() == [1, 2, 1]
    assert out["last_seen"].tolist() == [1, 1, 1]


def test_end_step_refuses_to_lose_gradients():
    model = Ranker()
    batch = KeyedJaggedTensor.from_lists({"item": [[1]], "history": [[2]]})
    model(batch).sum().backward()
    with pytest.raises(ValueError, match=r"'item' ends with gradients.*zero_grad"):
        model.items.end_step(1)


def test_backward_after_the_step_is_refused():
    model = Ranker()
    batch = KeyedJaggedTensor.from_lists({"item": [[1]], "history": [[2]]})
    loss = model(batch).sum()
    model.items.end_step(1)
    with pytest.raises(RuntimeError, match="whose step is over"):
        loss.backward()


@pytest.mark.filterwarnings("error:Dynamo does not know")
def test_compiled_models_look_up_outside_the_graph():
    model = Ranker()
    compiled = torch.compile(model, backend="eager")
    batch = KeyedJaggedTensor.from_lists({"item": [[1], [2]], "history": [[2, 3], []]})
    assert torch.equal(compiled(batch), model(batch))
    compiled(batch).sum().backward()
    assert len(row_grads(model.items.table_set.stores[0])) == 3
