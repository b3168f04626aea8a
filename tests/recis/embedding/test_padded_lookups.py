"""The path of a table on a GPU, run by the interpreter: the bytes of the CPU's path, and faults named a step later."""

import warnings
from typing import Any

import pytest
import torch
from gpu_path import HostReads, take_gpu_path

from recis.embedding import (
    AfterSightings,
    CountMin,
    EmbeddingBagCollection,
    EmbeddingCollection,
    Feature,
    LruCapacity,
    TableConfig,
    TableSet,
    Tile,
    TtlSeconds,
    TtlSteps,
    WithProbability,
)
from recis.jagged import KeyedJaggedTensor
from recis.optim import Adam, SparseOptimizer, clip_grad_norm
from recis.optim.apply import NonFiniteGradient
from recis.optim.clip import NonFiniteNorm

FEATURES = ("a", Feature("b", "mean"))
OTHERS = (Feature("c", Tile(2)), Feature("d", "none"))


def table(name: str, features: Any, **more: Any) -> TableConfig:
    return TableConfig(name=name, features=features, embedding_dim=3, **more)


def both(**more: Any) -> tuple[TableConfig, TableConfig]:
    return table("x", FEATURES, **more), table("y", OTHERS, **more)


def random_batch(step: int, part: int) -> KeyedJaggedTensor:
    """Duplicates in and between features; more ids from step to step; step 2 is empty."""
    generator = torch.Generator().manual_seed(10 * step + part)
    num_samples = 3
    lengths = torch.randint(0, 4, (4 * num_samples,), generator=generator) * (step != 2)
    values = torch.randint(-6 * step, 6 * step, (int(lengths.sum()),), generator=generator)
    weights = torch.rand(values.numel(), generator=generator) + 0.1
    return KeyedJaggedTensor(tuple("abcd"), values, lengths=lengths, weights=weights, stride=num_samples)


def train(configs: Any, *, parts: int = 1, max_norm: float | None = None) -> list[Any]:
    """Return the outputs, the counters after each step, and at the end all that can be seen of the tables."""
    tables = TableSet(configs, seed=3, clock=iter(range(1000, 2000)).__next__, block_rows=8)
    pooled, vectors = EmbeddingBagCollection(tables), EmbeddingCollection(tables)
    sparse, seen = SparseOptimizer([pooled]), []
    for step in range(1, 4):
        sparse.zero_grad()
        for part in range(parts):
            batch = random_batch(step, part)
            out = {**pooled(batch), "d": vectors(batch)["d"].flat_values}
            torch.stack([vector.square().sum() + vector.sum() for vector in out.values()]).sum().backward()
            seen.append({name: vector.detach() for name, vector in out.items()})
        if max_norm is not None:
            seen.append(clip_grad_norm([], [pooled], max_norm).item())
        sparse.step()
        pooled.end_step(step)
        for one in tables:
            counters = one.counters().to_dict()
            seen.append({name: number for name, number in counters.items() if name != "capacity"})  # room in advance
    pooled.eval()
    seen.append(pooled(random_batch(9, 0)))
    for one in tables:
        seen += [one.find(one.ids()), one.export(), one.state(), one.admission_state()]
    return seen


def require_same(got: Any, want: Any) -> None:
    if isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), (got, want)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for name in want:
            require_same(got[name], want[name])
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-12)  # a sum over more zeros adds in another order
    else:
        assert got == want


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "micro-batches, a norm below its limit": (both(), {"parts": 2, "max_norm": 1e9}),
    "bfloat16, Adam": (both(dtype="bfloat16", optimizer=Adam(lr=0.1)), {}),
    "max_rows": ((table("x", FEATURES, max_rows=7), table("y", OTHERS, max_rows=4)), {"parts": 2}),
    "default rows": (
        (
            table("x", FEATURES, max_rows=5, unadmitted="default_row", train_default_row=True),
            table("y", OTHERS, max_rows=5, unadmitted="default_row"),
        ),
        {},
    ),
    "probability": (both(admission=WithProbability(0.4)), {}),
    "sightings": (
        (
            table("x", FEATURES, admission=AfterSightings(2)),
            table("y", OTHERS, admission=AfterSightings(3, CountMin())),
        ),
        {},
    ),
    "eviction": (
        (table("x", FEATURES, eviction=(LruCapacity(6),)), table("y", OTHERS, eviction=(TtlSeconds(2), TtlSteps(2)))),
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_bytes_as_on_the_cpu(name, monkeypatch):
    configs, how = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a full table is said one step later
        want = train(configs, **how)
        take_gpu_path(monkeypatch)
        got = train(configs, **how)
    assert len(got) == len(want)
    for place, (one, other) in enumerate(zip(got, want, strict=True)):
        try:
            require_same(one, other)
        except AssertionError as error:
            raise AssertionError(f"entry {place} of {len(want)}: {error}") from error


def one_table(*, skip_nonfinite: bool = False, **more: Any) -> tuple[TableSet, EmbeddingBagCollection, SparseOptimizer]:
    tables = TableSet([table("x", (Feature("f", "mean"),), **more)], seed=3, block_rows=8)
    pooled = EmbeddingBagCollection(tables)
    return tables, pooled, SparseOptimizer([pooled], skip_nonfinite=skip_nonfinite)


def ids_of(*ids: int) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(("f",), torch.tensor(ids), lengths=torch.ones(len(ids), dtype=torch.int64))


@pytest.mark.parametrize(
    ("more", "waits"),
    [
        ({}, False),
        ({"max_rows": 30, "unadmitted": "default_row", "train_default_row": True}, False),
        ({"admission": WithProbability(0.5)}, False),
        ({"admission": AfterSightings(2)}, True),
        ({"eviction": (TtlSteps(2),)}, True),
    ],
    ids=str,
)
def test_which_steps_read_on_the_host(monkeypatch, more, waits):
    take_gpu_path(monkeypatch)
    _, pooled, sparse = one_table(**more)
    dense = torch.nn.Parameter(torch.ones(3))
    batches = [ids_of(*range(first, first + 8), first, first) for first in (0, 4, 16, 20)]
    for batch in batches:
        _ = batch.offsets  # made, and looked at, on the host
    with HostReads() as reads:
        for step in (1, 2):  # blocks hold 8 rows: the store grows inside
            for batch in batches[2 * step - 2 : 2 * step]:
                (pooled(batch)["f"] * dense).sum().backward()
            clip_grad_norm([dense], [pooled], 1.0)
            sparse.step()
            pooled.end_step(step)
    assert bool(reads.found) == waits, reads.found


def test_a_gradient_that_is_not_finite_is_named_later(monkeypatch):
    take_gpu_path(monkeypatch)
    tables, pooled, sparse = one_table()
    out = pooled(ids_of(7, 9))["f"]
    before = tables["x"].export()["weight"]
    (out * torch.tensor([[1.0], [torch.nan]])).sum().backward()
    sparse.step()
    with pytest.raises(NonFiniteGradient, match="table 'x', id 9, step 1; these rows were left"):
        pooled.end_step(1)
    after = tables["x"].export()["weight"]
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_rows_that_are_skipped_are_counted_on_the_device(monkeypatch):
    take_gpu_path(monkeypatch)
    _, pooled, sparse = one_table(skip_nonfinite=True)
    for step in (1, 2):
        (pooled(ids_of(7, 9, 8))["f"] * torch.tensor([[1.0], [torch.nan], [torch.inf]])).sum().backward()
        sparse.step()
        pooled.end_step(step)
    assert sparse.num_skipped == 4
    assert sparse.state_dict()["num_skipped"] == 4


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_scales_as_on_the_cpu(monkeypatch, max_norm):
    results = []
    for path in ("cpu", "gpu"):
        if path == "gpu":
            take_gpu_path(monkeypatch)
        tables, pooled, sparse = one_table()
        dense = torch.nn.Parameter(torch.ones(3))
        for ids in ((7, 9), (9, 8)):
            (pooled(ids_of(*ids))["f"] * dense).sum().backward()
        norm = clip_grad_norm([dense], [pooled], max_norm)
        sparse.step()
        assert dense.grad is not None
        results.append((norm, dense.grad, tables["x"].export()["weight"]))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_a_norm_that_is_not_finite_changes_nothing_and_is_named_later(monkeypatch):
    take_gpu_path(monkeypatch)
    tables, pooled, sparse = one_table()
    dense = torch.nn.Parameter(torch.ones(3))
    out = pooled(ids_of(7, 9))["f"]
    before = tables["x"].export()["weight"]
    ((out * torch.tensor([[1.0], [torch.inf]])).sum() + dense.sum()).backward()
    assert not clip_grad_norm([dense], [pooled], 1.0).isfinite()
    assert dense.grad is not None
    assert dense.grad.tolist() == [0.0, 0.0, 0.0]
    sparse.step()
    with pytest.raises(NonFiniteNorm, match="table 'x', id 9, step 1; dense gradients were set to 0"):
        pooled.end_step(1)
    assert torch.equal(tables["x"].export()["weight"], before)


def test_offsets_that_end_before_the_ids_are_named_later(monkeypatch):
    take_gpu_path(monkeypatch)
    _, pooled, _ = one_table()
    # a batch from outside may do so; on the CPU the ids past the end are left out
    batch = KeyedJaggedTensor._trusted(("f",), torch.tensor([1, 2, 3]), offsets=torch.tensor([0, 1, 2]), stride=2)
    pooled(batch)
    with pytest.raises(ValueError, match="of a batch looked up in table 'x' end at 2, and there are 3 ids"):
        pooled.end_step(1)


def test_full_tables_are_said_a_step_later(monkeypatch):
    take_gpu_path(monkeypatch)
    tables, pooled, _ = one_table(max_rows=2)
    pooled(ids_of(1, 2, 3))
    pooled.end_step(1)
    pooled(ids_of(1))
    with pytest.warns(RuntimeWarning, match="table 'x' is full: 1 ids met max_rows=2"):
        pooled.end_step(2)
    assert tables["x"].ids().tolist() == [1, 2]


def test_counts_survive_a_clear_and_a_load(monkeypatch):
    take_gpu_path(monkeypatch)
    tables, pooled, _ = one_table()
    one = tables["x"]
    for step, ids in ((1, (1, 2, 3)), (2, (3, 4))):
        pooled(ids_of(*ids))
        pooled.end_step(step)
    state = one.state()
    assert (one.counters().found, one.counters().inserted) == (1, 4)
    one.clear()
    now = one.counters().to_dict()
    assert now == {**dict.fromkeys(now, 0), "capacity": now["capacity"]}
    pooled(ids_of(3))
    pooled.end_step(3)
    assert (one.counters().found, one.counters().inserted) == (0, 1)
    one.load_state(state)
    assert (one.counters().found, one.counters().inserted) == (1, 4)
