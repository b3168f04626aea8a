"""SparseOptimizer on real tables: equal to torch on a dense table, groups, accumulation, states, rows that must stay."""

import pytest
import torch

from recis.embedding import EmbeddingBagCollection, EmbeddingCollection, Feature, TableConfig, TableSet
from recis.embedding.initializers import Constant
from recis.errors import CheckpointError, ConfigError
from recis.jagged import KeyedJaggedTensor
from recis.optim import (
    Adagrad,
    Adam,
    AdamW,
    AdamWTF,
    Ftrl,
    RowOptimizer,
    RowWiseAdagrad,
    Sgd,
    SparseOptimizer,
    clip_grad_norm,
)
from recis.optim.apply import NonFiniteGradient

NUM_IDS = 12


def table(name="item", features=("f",), optimizer: RowOptimizer = Sgd(lr=0.1), **kind):  # noqa: B008  frozen
    return TableConfig(name=name, features=features, optimizer=optimizer, **{"embedding_dim": 4, **kind})


def batch_of(bags, *, keys=("f",)):
    """bags: one list of bags per key."""
    values = torch.tensor([i for key in bags for bag in key for i in bag], dtype=torch.int64)
    lengths = torch.tensor([len(bag) for key in bags for bag in key], dtype=torch.int64)
    return KeyedJaggedTensor(keys, values, lengths=lengths, stride=len(bags[0]))


def random_bags(num_samples, seed, *, num_keys=1):
    generator = torch.Generator().manual_seed(seed)

    def bag():
        size = int(torch.randint(0, 4, (1,), generator=generator))
        return torch.randint(0, NUM_IDS, (size,), generator=generator).tolist()

    return [[bag() for _ in range(num_samples)] for _ in range(num_keys)]


def weights_of(collection, name="item"):
    out = collection.table_set[name].export()
    return dict(zip(out["ids"].tolist(), out["weight"], strict=True))


TORCH = [
    (Sgd(lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    (Adagrad(lr=0.1), lambda p: torch.optim.Adagrad(p, lr=0.1)),
    (Adam(lr=0.01), lambda p: torch.optim.SparseAdam(p, lr=0.01)),
]


@pytest.mark.parametrize(("config", "build"), TORCH, ids=["momentum", "adagrad", "adam"])
def test_equal_to_torch_with_every_row_touched(config, build):
    """Every id occurs in every step, so a lazy row optimizer and a dense one do the same."""
    collection = EmbeddingBagCollection([table(optimizer=config)], seed=3)
    every = [[list(range(NUM_IDS)), *random_bags(5, 0)[0]]]
    collection(batch_of(every))
    collection.end_step(1)
    weights = weights_of(collection)
    dense = torch.nn.EmbeddingBag(NUM_IDS, 4, mode="sum", include_last_offset=True, sparse=isinstance(config, Adam))
    dense.weight.data = torch.stack([weights[i] for i in range(NUM_IDS)])
    mine, theirs = SparseOptimizer(collection), build(list(dense.parameters()))
    for t in range(4):
        batch, pull = batch_of([[list(range(NUM_IDS)), *random_bags(5, t)[0]]]), torch.randn(6, 4)
        (collection(batch)["f"] * pull).sum().backward()
        mine.step()
        collection.end_step(t + 2)
        theirs.zero_grad()
        (dense(batch.values, batch.offsets) * pull).sum().backward()
        theirs.step()
    got = weights_of(collection)
    torch.testing.assert_close(
        torch.stack([got[i] for i in range(NUM_IDS)]), dense.weight.detach(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (Sgd(lr=0.1, momentum=0.9, weight_decay=0.01), [0.433165389, -0.253464680]),
        (Adagrad(lr=0.1, weight_decay=0.01), [0.357701083, -0.280779865]),
        (RowWiseAdagrad(lr=0.1), [0.375019087, -0.255642024]),
        (Adam(lr=0.01, weight_decay=0.01), [0.477998008, -0.241693180]),
        (AdamW(lr=0.01, weight_decay=0.1), [0.476773820, -0.241183351]),
        (AdamWTF(lr=0.01, weight_decay=0.01, eps=1e-3), [0.467065245, -0.236079961]),
        (Ftrl(lr=0.1, beta=1.0, l1=0.05, l2=0.1), [0.023360119, -0.056010644]),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list) else "",
)
def test_worked_examples_through_the_table(config, want):
    """B15 after three steps, from the public classes."""
    collection = EmbeddingBagCollection([table(optimizer=config, embedding_dim=2)], seed=3)
    collection.table_set["item"].insert(torch.tensor([7]), torch.tensor([[0.5, -0.25]]))
    optimizer = SparseOptimizer(collection)
    for step, gradient in enumerate([[0.1, -0.2], [0.3, 0.1], [-0.2, 0.4]], 1):
        (collection(batch_of([[[7]]]))["f"] * torch.tensor(gradient)).sum().backward()
        optimizer.step()
        collection.end_step(step)
    assert weights_of(collection)[7].tolist() == pytest.approx(want, abs=1e-6)


def one_row(config, *, value=1.0, ids=(5,)):
    collection = EmbeddingBagCollection([table(optimizer=config, embedding_dim=1, initializer=Constant(value))], seed=3)
    return collection, SparseOptimizer(collection), batch_of([[list(ids)]])


def test_a_row_first_touched_late():
    """A37: t is the table's, or the row's own."""
    table_steps, row_steps = Adam(lr=1e-3), Adam(lr=1e-3, bias_correction="row")
    for config, want in ((table_steps, 0.99951555), (row_steps, 0.999)):
        collection, optimizer, late = one_row(config)
        for step in range(1, 10):
            collection(batch_of([[[1]]]))["f"].sum().backward()
            optimizer.step()
            collection.end_step(step)
        collection(late)["f"].sum().backward()
        optimizer.step()
        assert weights_of(collection)[5].item() == pytest.approx(want, abs=1e-7)


def test_duplicates_are_summed_before_the_update():
    """B16: one id at two positions with gradients .1 and .2."""
    collection, optimizer, _ = one_row(Adagrad(lr=0.1))
    out = collection(batch_of([[[5], [5]]]))["f"]
    (out * torch.tensor([[0.1], [0.2]])).sum().backward()
    optimizer.step()
    assert weights_of(collection)[5].item() == pytest.approx(0.9, abs=1e-6)


def test_untouched_rows_keep_their_bytes():
    collection = EmbeddingBagCollection([table(optimizer=AdamW(lr=0.1))], seed=3)
    optimizer = SparseOptimizer(collection)
    collection(batch_of([[[1, 2, 3]]]))["f"].sum().backward()
    optimizer.step()
    collection.end_step(1)
    before = collection.table_set["item"].export()
    collection(batch_of([[[2]]]))["f"].sum().backward()
    optimizer.step()
    collection.end_step(2)
    after = collection.table_set["item"].export()
    for name, value in after.items():
        same = [torch.equal(new, old) for new, old in zip(value, before[name], strict=True)]
        assert same == [True, name == "ids", True], name
    assert after["last_seen"].tolist() == [1, 2, 1]
    assert after["count"].tolist() == [1, 2, 1]


def test_every_table_is_a_group_and_schedulers_work():
    tables = [
        table("a", ("f",), Sgd(lr=1.0)),
        table("b", ("g",), Sgd(lr=2.0)),
        table("c", ("h",), Sgd(lr=4.0, momentum=0.5)),
    ]
    collection = EmbeddingBagCollection(
        [
            TableConfig(
                name=t.name, features=t.features, embedding_dim=1, optimizer=t.optimizer, initializer=Constant(0.0)
            )
            for t in tables
        ],
        seed=1,
    )
    optimizer = SparseOptimizer(collection)
    assert [group["name"] for group in optimizer.param_groups] == optimizer.table_names
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"a": 1.0, "b": 2.0, "c": 4.0}
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    batch = batch_of([[[1]], [[1]], [[1]]], keys=("f", "g", "h"))
    for step in (1, 2):
        torch.cat(list(collection(batch).values())).sum().backward()
        optimizer.step()
        collection.end_step(step)
        scheduler.step()
    assert weights_of(collection, "a")[1].item() == -1.5
    assert weights_of(collection, "b")[1].item() == -3.0
    assert weights_of(collection, "c")[1].item() == -4.0 - 2.0 * 1.5


@pytest.mark.parametrize("config", [Sgd(lr=0.1, momentum=0.5), RowWiseAdagrad(lr=0.1), AdamW(lr=0.1)], ids=repr)
def test_accumulation_is_the_big_batch_bit_for_bit(config):
    """B19 with several features of one table, and a sequence feature on the same rows."""
    results = []
    bags = random_bags(8, 1, num_keys=3)
    pulls = torch.randn(3, 8, 4)
    for cuts in ([(0, 8)], [(0, 3), (3, 8)], [(0, 1), (1, 2), (2, 6), (6, 8)]):
        features = (Feature("f", "sum"), Feature("g", "mean"), Feature("h", "none"))
        tables = TableSet([table(features=features, optimizer=config)], seed=3)
        pooled, sequences = EmbeddingBagCollection(tables), EmbeddingCollection(tables)
        optimizer = SparseOptimizer([pooled, sequences], accumulate_steps=len(cuts))
        for step in (1, 2):
            for low, high in cuts:
                optimizer.zero_grad()
                part = batch_of([key[low:high] for key in bags], keys=("f", "g", "h"))
                out, rows = pooled(part), sequences(part)["h"]
                bag = torch.arange(high - low).repeat_interleave(rows.lengths)
                loss = (out["f"] * pulls[0, low:high]).sum() + (out["g"] * pulls[1, low:high]).sum()
                (loss + (rows.values * pulls[2, low:high][bag]).sum()).backward()
                optimizer.step()
            pooled.end_step(step)
            assert tables.stores[0].t.tolist() == [step]
        results.append(tables["item"].export())
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


def test_micro_batches_of_unequal_size_by_hand():
    """B19: 1 sample with gradient 6, 3 samples with 2 each; a mean over all four gives 3."""
    collection, _, _ = one_row(Sgd(lr=1.0), value=0.0)
    optimizer = SparseOptimizer(collection, accumulate_steps=2)
    for bags, gradient in (([[5]], 6.0), ([[5], [5], [5]], 2.0)):
        (collection(batch_of([bags]))["f"] * gradient / 4).sum().backward()
        optimizer.step()
    assert weights_of(collection)[5].item() == -3.0
    collection.end_step(1)
    out = collection.table_set["item"].export()
    assert out["count"].tolist() == [4]


def test_zero_grad_forgets_and_keeps_while_accumulating():
    collection, optimizer, batch = one_row(Sgd(lr=1.0), value=0.0)
    collection(batch)["f"].sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert weights_of(collection)[5].item() == 0.0
    collection.end_step(1)
    twice = SparseOptimizer(collection, accumulate_steps=2)
    for _ in range(2):
        twice.zero_grad()
        collection(batch)["f"].sum().backward()
        twice.step()
    assert weights_of(collection)[5].item() == -2.0


def test_backward_twice_through_one_graph_adds():
    collection, optimizer, batch = one_row(Sgd(lr=1.0), value=0.0)
    loss = collection(batch)["f"].sum()
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert weights_of(collection)[5].item() == -2.0


def test_closure():
    collection, optimizer, batch = one_row(Sgd(lr=1.0), value=2.0)

    def closure():
        loss = collection(batch)["f"].sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 2.0
    assert weights_of(collection)[5].item() == 1.0


@pytest.mark.parametrize("skip", [False, True])
def test_a_gradient_that_is_not_finite(skip):
    collection, _, _ = one_row(Sgd(lr=1.0), value=0.0)
    optimizer = SparseOptimizer(collection, skip_nonfinite=skip)
    out = collection(batch_of([[[5], [6]]]))["f"]
    (out * torch.tensor([[float("nan")], [1.0]])).sum().backward()
    if skip:
        optimizer.step()
        assert optimizer.num_skipped == 1
    else:
        with pytest.raises(NonFiniteGradient, match="table 'item', id 5, step 1"):
            optimizer.step()
    assert {row_id: weight.item() for row_id, weight in weights_of(collection).items()} == {5: 0.0, 6: -1.0}


def test_clipping_leaves_out_rows_that_are_skipped():
    collection, _, _ = one_row(Sgd(lr=1.0), value=0.0)
    optimizer = SparseOptimizer(collection, skip_nonfinite=True)
    out = collection(batch_of([[[5], [6]]]))["f"]
    (out * torch.tensor([[float("inf")], [4.0]])).sum().backward()
    assert clip_grad_norm([], collection, 2.0, skip_nonfinite=True).item() == 4.0
    optimizer.step()
    assert weights_of(collection)[6].item() == pytest.approx(-2.0, abs=1e-5)


def test_state_dict_round_trip():
    collection, optimizer, batch = one_row(AdamW(lr=0.1))
    optimizer.param_groups[0]["lr"] = 0.05
    collection(batch)["f"].sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    other = SparseOptimizer(collection)
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 0.05
    assert other.param_groups[0]["betas"] == (0.9, 0.999)
    assert other.state_dict() == state
    stranger, strange, _ = one_row(AdamW(lr=0.1))
    del stranger
    with pytest.raises(CheckpointError, match="tables"):
        strange.load_state_dict({"groups": {"user": {}}, "calls": 0, "num_skipped": 0})


def test_stores_are_found_inside_a_model():
    tables = TableSet([table("a", ("f",)), table("b", ("g",), Sgd(lr=0.5))], seed=1)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = torch.nn.ModuleList([EmbeddingBagCollection(tables, features=["f"])])
            self.deep = torch.nn.Sequential(torch.nn.Linear(1, 1), EmbeddingBagCollection(tables, features=["g"]))

    assert SparseOptimizer(Model()).table_names == ["a", "b"]
    assert SparseOptimizer(torch.nn.Linear(2, 2)).table_names == []
    SparseOptimizer(torch.nn.Linear(2, 2)).step()
    with pytest.raises(ConfigError, match="expected an embedding collection or a TableSet; got int"):
        SparseOptimizer([3])
    with pytest.raises(ConfigError, match="accumulate_steps must be at least 1"):
        SparseOptimizer(Model(), accumulate_steps=0)


def test_bfloat16_rows_learn_steps_below_their_resolution():
    """1 - 0.001 rounds back to 1 in bf16; at random, a tenth of 4096 rows moves by the next number below, 2**-8."""
    collection = EmbeddingBagCollection(
        [table(optimizer=Sgd(lr=0.001), embedding_dim=1, dtype="bfloat16", initializer=Constant(1.0))], seed=3
    )
    optimizer = SparseOptimizer(collection)
    collection(batch_of([[list(range(4096))]]))["f"].sum().backward()
    optimizer.step()
    weights = torch.stack(list(weights_of(collection).values())).float()
    assert set(weights.flatten().tolist()) == {1.0, 1.0 - 2**-8}
    assert weights.mean().item() == pytest.approx(0.999, abs=1e-4)
