"""FBGEMM tables with a fixed vocabulary against our tables and a float64 reference; and what FBGEMM cannot do on a CPU."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from recis.embedding import EmbeddingBagCollection, Feature, TableConfig, TableSet, Tile
from recis.errors import ConfigError
from recis.jagged import KeyedJaggedTensor
from recis.optim import Adagrad, Adam, AdamW, Ftrl, RowWiseAdagrad, Sgd, SparseOptimizer

pytestmark = pytest.mark.torchrec
OPTIMIZERS = [Sgd(lr=0.1), Adagrad(lr=0.1, h0=0.1), RowWiseAdagrad(lr=0.1, eps=1e-6), Adam(lr=0.01, betas=(0.8, 0.9))]
VOCABULARY = {"item": torch.tensor([9, -(2**63), 2**40, 0, 5]), "shop": torch.tensor([2, 1])}
DIMS = {"item": 4, "shop": 8}
POOLING = {"shop": "mean", "item": "sum", "seen": "mean"}
TABLE = {"shop": "shop", "item": "item", "seen": "item"}
by_name = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)


@pytest.fixture(autouse=True)
def _installed():
    """Skip without it; imported here and not above, so that tests of other parts are collected without it."""
    pytest.importorskip("fbgemm_gpu")


def tables(optimizer: Any, **settings: Any) -> list[TableConfig]:
    """Return two tables whose features interleave in the batch."""
    return [
        TableConfig(name="shop", features=(Feature("shop", "mean"),), embedding_dim=8, optimizer=optimizer, **settings),
        TableConfig(
            name="item", features=("item", Feature("seen", "mean")), embedding_dim=4, optimizer=optimizer, **settings
        ),
    ]


def batch(step: int, *, weighted: bool, unknown: bool) -> KeyedJaggedTensor:
    """Return a batch of known ids, and of one that is in no vocabulary if asked; some bags are empty."""
    generator = torch.Generator().manual_seed(step)
    features, weights = {}, {}
    for key in ("item", "shop", "seen"):
        ids = torch.cat([VOCABULARY[TABLE[key]], torch.tensor([-77])]) if unknown else VOCABULARY[TABLE[key]]
        sizes = torch.randint(0, 5, (6,), generator=generator).tolist()
        features[key] = [ids[torch.randint(0, ids.numel(), (size,), generator=generator)].tolist() for size in sizes]
        weights[key] = [(torch.rand(size, generator=generator) + 0.2).tolist() for size in sizes]
    return KeyedJaggedTensor.from_lists(features, weights=weights if weighted else None)


def loss(vectors: dict[str, Tensor]) -> Tensor:
    """Return a loss whose gradient differs between features, bags and columns."""
    terms = [(value * value + value * torch.arange(value.shape[1])).sum() for _, value in sorted(vectors.items())]
    return torch.stack(terms).sum()


class Reference:
    """Tables as dense float64 weights, pooled bag by bag; rows of the batch are updated by the equations as written."""

    def __init__(self, optimizer: Any, weights: dict[str, Tensor], ids: dict[str, Tensor]) -> None:
        self.optimizer, self.t = optimizer, 0
        self.weights = {name: value.double().requires_grad_() for name, value in weights.items()}
        self.place = {name: {row_id: row for row, row_id in enumerate(values.tolist())} for name, values in ids.items()}
        start = getattr(optimizer, "h0", 0.0)
        self.h = {name: torch.full_like(value, start).detach() for name, value in self.weights.items()}
        self.v = {name: torch.zeros_like(value).detach() for name, value in self.weights.items()}

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        out = {}
        for key in POOLING:
            bags, place, weights = features[key], self.place[TABLE[key]], self.weights[TABLE[key]]
            rows = []
            for start, stop in pairwise(bags.offsets.tolist()):
                given = torch.ones(stop - start) if bags.weights is None else bags.weights[start:stop]
                total = weights.new_zeros(weights.shape[1])
                for row_id, factor in zip(bags.flat_values[start:stop].tolist(), given.tolist(), strict=True):
                    total = total + factor * weights[place[row_id]] if row_id in place else total
                mean = POOLING[key] == "mean" and stop > start
                rows.append(total / float(given.double().sum()) if mean else total)
            out[key] = torch.stack(rows)
        return out

    def step(self, features: KeyedJaggedTensor) -> None:
        loss(self.forward(features)).backward()
        self.t += 1
        for name, weights in self.weights.items():
            ids = {row_id for key in POOLING if TABLE[key] == name for row_id in features[key].flat_values.tolist()}
            rows = torch.tensor(sorted(self.place[name][row_id] for row_id in ids if row_id in self.place[name]))
            assert weights.grad is not None
            g, h, v, o = weights.grad[rows], self.h[name], self.v[name], self.optimizer
            if isinstance(o, Adam):
                h[rows] = o.betas[0] * h[rows] + (1 - o.betas[0]) * g
                v[rows] = o.betas[1] * v[rows] + (1 - o.betas[1]) * g * g
                root = (v[rows] / (1 - o.betas[1] ** self.t)).sqrt() + o.eps
                change = h[rows] / (1 - o.betas[0] ** self.t) / root
            elif isinstance(o, Adagrad):
                h[rows] += (g * g).mean(1, keepdim=True) if isinstance(o, RowWiseAdagrad) else g * g
                change = g / (h[rows].sqrt() + o.eps)
            else:
                change = g
            with torch.no_grad():
                weights[rows] -= o.lr * change
            weights.grad = None


@pytest.mark.filterwarnings("ignore:table '(item|shop)' is full:RuntimeWarning")
@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@by_name
def test_equals_ours_and_float64(optimizer, weighted, unknown):
    """Forward and three updates: FBGEMM, our tables, and float64 from the same first weights."""
    from recis.torchrec import StaticEmbeddingBagCollection

    static = StaticEmbeddingBagCollection(tables(optimizer), VOCABULARY, seed=5)
    first = {name: static.export(name) for name in VOCABULARY}
    reference = Reference(
        optimizer,
        {name: fields["weight"] for name, fields in first.items()},
        {name: fields["ids"] for name, fields in first.items()},
    )
    limited = [replace(config, max_rows=VOCABULARY[config.name].numel()) for config in tables(optimizer)]
    ours = EmbeddingBagCollection(limited, seed=5)  # full from the start: ids outside the vocabulary stay outside
    for table in ours.table_set:
        table.import_rows(first[table.name])
    rows = SparseOptimizer(ours)
    for step in (1, 2, 3):
        features = batch(step, weighted=weighted, unknown=unknown)
        want, mine, theirs = reference.forward(features), ours(features), static(features)
        assert list(theirs) == ["shop", "item", "seen"]
        for key, value in want.items():
            torch.testing.assert_close(theirs[key].double(), value.detach(), rtol=2e-5, atol=1e-6)
            torch.testing.assert_close(theirs[key], mine[key], rtol=2e-5, atol=1e-6)
        loss(mine).backward()
        rows.step()
        ours.end_step(step)
        loss(theirs).backward()
        reference.step(features)
    for name in VOCABULARY:
        got, mine = static.export(name), ours.table_set[name].export()
        torch.testing.assert_close(got["weight"].double(), reference.weights[name].detach(), rtol=1e-4, atol=1e-5)
        for field, value in got.items():
            torch.testing.assert_close(value, mine[field], rtol=1e-4, atol=1e-5)


def test_first_weights_are_those_of_a_dynamic_table():
    from recis.torchrec import StaticEmbeddingBagCollection

    configs = tables(RowWiseAdagrad(lr=0.1))
    static, ours = StaticEmbeddingBagCollection(configs, VOCABULARY, seed=5), TableSet(configs, seed=5)
    for name, ids in VOCABULARY.items():
        rows, _ = ours[name].lookup(ids, train=True, step=1)
        exported = static.export(name)
        assert torch.equal(exported["ids"], ids.sort().values)
        assert torch.equal(exported["weight"], rows.detach()[ids.argsort()])


@by_name
def test_rows_go_there_and_back_with_their_state(optimizer):
    """Two steps here, two in FBGEMM, one here again: the same as five here."""
    from recis.torchrec import StaticEmbeddingBagCollection

    def step_on(collection: EmbeddingBagCollection, steps: range) -> None:
        sparse = SparseOptimizer(collection)
        for step in steps:
            loss(collection(batch(step, weighted=False, unknown=False))).backward()
            sparse.step()
            collection.end_step(collection.table_set.step + 1)

    stayed, left = (EmbeddingBagCollection(tables(optimizer), seed=5) for _ in range(2))
    step_on(stayed, range(1, 6))
    step_on(left, range(1, 3))
    static = StaticEmbeddingBagCollection.from_collection(left)
    for step in (3, 4):
        loss(static(batch(step, weighted=False, unknown=False))).backward()
    back = EmbeddingBagCollection(tables(optimizer), seed=5)
    static.write_into(back.table_set)
    step_on(back, range(5, 6))
    for table in stayed.table_set:
        want, got = table.export(), back.table_set[table.name].export()
        for field in ("ids", "weight", *(name for name in want if name.startswith("state."))):
            torch.testing.assert_close(got[field], want[field], rtol=1e-4, atol=1e-6)
        assert back.table_set[table.name].t == table.t == 5


@by_name
def test_state_dict_keeps_rows_state_and_ids(optimizer):
    from recis.torchrec import StaticEmbeddingBagCollection

    one, other = (StaticEmbeddingBagCollection(tables(optimizer), VOCABULARY, seed=seed) for seed in (5, 6))
    loss(one(batch(1, weighted=False, unknown=False))).backward()
    other.load_state_dict(one.state_dict())
    for static in (one, other):
        loss(static(batch(2, weighted=True, unknown=False))).backward()
    for name in VOCABULARY:
        for field, value in one.export(name).items():
            assert torch.equal(value, other.export(name)[field]), (name, field)


@by_name
def test_learning_rate_and_gradients_of_weights(optimizer):
    from recis.torchrec import StaticEmbeddingBagCollection

    static, ours = (
        StaticEmbeddingBagCollection(tables(optimizer), VOCABULARY, seed=5),
        EmbeddingBagCollection(tables(optimizer), seed=5),
    )
    static.set_lr("item", 0.0)
    before = static.export("item")["weight"]
    features, found = batch(1, weighted=True, unknown=False), []
    for collection in (static, ours):
        assert features.weights is not None
        weights = features.weights.clone().requires_grad_()
        given = KeyedJaggedTensor(
            features.keys, features.values, features.lengths, weights=weights, stride=features.stride
        )
        loss(collection(given)).backward()
        found.append(weights.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert torch.equal(static.export("item")["weight"], before)
    with pytest.raises(KeyError, match="no table 'itm'; did you mean 'item'"):
        static.set_lr("itm", 0.1)


@pytest.mark.parametrize(
    ("optimizer", "h"), [(RowWiseAdagrad(lr=0.1), 1.0 + 1.0), (Adam(lr=0.1), None)], ids=["fused", "Adam"]
)
def test_two_lookups_before_a_backward(optimizer, h):
    """FBGEMM updates once per lookup (h = 1 + 1), Adam here once for both (v of a gradient of 2)."""
    from recis.torchrec import StaticEmbeddingBagCollection

    config = TableConfig(name="t", features=("f",), embedding_dim=4, optimizer=optimizer)
    static = StaticEmbeddingBagCollection([config], {"t": torch.tensor([1])}, seed=1)
    ids = KeyedJaggedTensor.from_lists({"f": [[1]]})
    (static(ids)["f"] + static(ids)["f"]).sum().backward()
    if h is None:
        assert static.export("t")["state.v"][0, 0].item() == pytest.approx(0.001 * 2**2)
    else:
        assert static.export("t")["state.h"].item() == pytest.approx(h)


def test_fbgemm_has_no_adam_on_the_cpu():
    """Why Adam runs in the dense form: neither the constructor nor the library has it."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    build: Any = SplitTableBatchedEmbeddingBagsCodegen
    shape = [(10, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)]
    with pytest.raises(AssertionError, match="adam is not supported in CPU mode"):
        build(shape, optimizer=EmbOptimType.ADAM)
    known = set(torch._C._dispatch_get_all_op_names())
    assert "fbgemm::split_embedding_backward_codegen_rowwise_adagrad_cpu" in known
    assert "fbgemm::split_embedding_backward_codegen_adam_cpu" not in known
    # and its SGD takes a weight decay without using it, which is why ours refuses one
    decayed = build(shape, optimizer=EmbOptimType.EXACT_SGD, learning_rate=0.1, weight_decay=0.5)
    weights = decayed.split_embedding_weights()[0].fill_(1.0)
    decayed(torch.tensor([1]), torch.tensor([0, 1])).sum().backward()
    assert weights[1, 0].item() == pytest.approx(0.9)  # 0.85 with it


REFUSED = [
    ({"embedding_dim": 6}, {}, "multiple of 4; got 6"),
    ({"dtype": "bfloat16"}, {}, "got dtype 'bfloat16'"),
    ({"unadmitted": "default_row"}, {}, "got unadmitted='default_row'"),
    ({"optimizer": Ftrl(lr=0.1)}, {}, r"do not run Ftrl\("),
    ({"optimizer": AdamW(lr=0.1)}, {}, r"do not run AdamW\("),
    ({"optimizer": Adam(lr=0.1, bias_correction="row")}, {}, r"do not run Adam\("),
    ({"optimizer": Sgd(lr=0.1, momentum=0.9)}, {}, r"do not run Sgd\("),
    ({"optimizer": Adagrad(lr=0.1, weight_decay=0.1)}, {}, r"weight_decay=0\.1 is refused"),
    ({"features": (Feature("f", Tile(2)),)}, {}, r"feature 'f' has pooling Tile\(n=2\)"),
    ({"features": (Feature("f", "none"),)}, {}, "feature 'f' has pooling 'none'"),
    ({}, {"u": torch.tensor([1])}, "table 't': no ids are given for it"),
]


@pytest.mark.parametrize(("settings", "ids", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_fbgemm_has_no_form_for_is_refused_by_name(settings, ids, message):
    from recis.torchrec import StaticEmbeddingBagCollection

    config = TableConfig(**({"name": "t", "features": ("f",), "embedding_dim": 4} | settings))
    with pytest.raises(ConfigError, match=message):
        StaticEmbeddingBagCollection([config], ids or {"t": torch.tensor([1])}, seed=1)


def test_empty_vocabulary_and_empty_batch():
    from recis.torchrec import StaticEmbeddingBagCollection

    configs = [TableConfig(name="t", features=("f",), embedding_dim=4)]
    static = StaticEmbeddingBagCollection(configs, {"t": torch.empty(0, dtype=torch.int64)}, seed=1)
    out = static(KeyedJaggedTensor.from_lists({"f": [[1, 2], []]}))
    assert out["f"].tolist() == [[0.0] * 4] * 2
    out["f"].sum().backward()
    assert static.export("t")["weight"].shape == (0, 4)
    assert static(KeyedJaggedTensor.from_lists({"f": []}, stride=0))["f"].shape == (0, 4)
    with pytest.raises(ValueError, match="the batch has no feature 'f'"):
        static(KeyedJaggedTensor.from_lists({"g": [[1]]}))
