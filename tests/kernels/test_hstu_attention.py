"""Pointwise attention of HSTU: against the float64 reference, a dense formula in torch, and by hand."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import recis_kernels
from recis_kernels import attention_cpu
from recis_kernels.attention_inputs import TimeBias
from recis_kernels.hstu_attention import hstu_attention
from recis_kernels.jagged import lengths_to_offsets

# bf16: weights and slopes are rounded to 2**-9 before the second product, and so is the result
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float64: 1e-10}
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
NAMES = ("out", "query", "key", "value", "position", "time")


def leaves_of(rows: Rows) -> Rows:
    query, key, value = (part.detach().clone().requires_grad_() for part in rows)
    return query, key, value


def run(impl, rows, offsets, *, position=None, time=None, **options):
    """Return the output and the gradient of each differentiable input that is there."""
    leaves = leaves_of(rows)
    tables = {}
    if position is not None:
        tables["position_bias"] = position.clone().requires_grad_()
    if time is not None:
        tables["time"] = replace(time, table=time.table.clone().requires_grad_())
    out = hstu_attention(*leaves, offsets, impl=impl, **tables, **options)
    torch.manual_seed(3)
    out.backward(torch.randn(out.shape).to(out.dtype))
    found = {"out": out.detach(), **{n: leaf.grad for n, leaf in zip(NAMES[1:4], leaves, strict=True)}}
    if position is not None:
        found["position"] = tables["position_bias"].grad
    if time is not None:
        found["time"] = tables["time"].table.grad
    return found


def compare(got, want, dtype):
    assert got.keys() == want.keys()
    for name, ours in got.items():
        assert ours is not None
        theirs = want[name]
        if theirs is None:  # the reference has no sequence to differentiate
            theirs = torch.zeros_like(ours)
        scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0  # tables sum over many pairs
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(
            ours, theirs, rtol=tolerance, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


CASES = {
    "own length": {"lengths": [5, 33, 1, 0, 12], "dims": (7, 3)},
    "max length": {"lengths": [40, 2, 1], "dims": (16, 16), "max_length": 50},
    "not causal": {"lengths": [3, 36], "dims": (4, 5), "causal": False, "width": 7},
    "position": {"lengths": [3, 37, 0, 9], "dims": (5, 9), "width": 13},
    "time": {"lengths": [9, 33, 1], "dims": (8, 8), "buckets": 6},
    "targets": {"lengths": [9, 36, 1, 4, 0], "targets": [3, 34, 1, 0, 0], "dims": (4, 4), "width": 9, "buckets": 4},
    "many targets": {"lengths": [100], "targets": [70], "dims": (4, 4), "width": 151, "buckets": 3, "heads": 1},
    "many targets, not causal": {"lengths": [98], "targets": [60], "dims": (4, 4), "causal": False, "width": 41},
    "targets, not causal": {"lengths": [5, 34], "targets": [5, 2], "dims": (4, 4), "causal": False},
    "one sequence": {"lengths": [70], "targets": [8], "dims": (65, 33), "width": 21, "heads": 1},
    "scale": {"lengths": [4, 7], "dims": (3, 3), "scale": -1.5, "heads": 3},
    "nothing": {"lengths": [], "dims": (4, 4)},
    "empty sequences": {"lengths": [0, 0], "dims": (4, 4), "width": 3, "buckets": 2},
}


def build(case, dtype) -> tuple[Rows, torch.Tensor, dict[str, Any]]:
    case = dict(case)
    heads, (key_dim, value_dim) = case.get("heads", 2), case["dims"]
    num_items = sum(case["lengths"])
    query, key, value = (torch.randn(num_items, heads, dim).to(dtype) for dim in (key_dim, key_dim, value_dim))
    options: dict[str, Any] = {name: case[name] for name in ("causal", "scale", "max_length") if name in case}
    if "targets" in case:
        options["num_targets"] = torch.tensor(case["targets"])
    if "width" in case:
        options["position"] = torch.randn(heads, case["width"])
    if "buckets" in case:
        options["time"] = TimeBias(
            table=torch.randn(heads, case["buckets"]),
            boundaries=torch.tensor([-40, -3, 0, 2, 9, 50, 51, 300])[: case["buckets"] - 1],
            query_times=torch.randint(-100, 100, (num_items,)).sort().values,
        )
    return (query, key, value), lengths_to_offsets(torch.tensor(case["lengths"], dtype=torch.int64)), options


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(impl, name):
    rows, offsets, options = build(CASES[name], torch.float32)
    compare(run(impl, rows, offsets, **options), run("reference", rows, offsets, **options), torch.float32)


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_bf16_matches_reference(impl):
    rows, offsets, options = build(CASES["targets"], torch.bfloat16)
    got, want = (run(version, rows, offsets, **options) for version in (impl, "reference"))
    assert [got[name].dtype for name in NAMES] == [torch.bfloat16] * 4 + [torch.float32] * 2
    compare(got, want, torch.bfloat16)


@pytest.mark.parametrize("causal", [False, True])
def test_small_cpu_tiles_change_nothing(monkeypatch, causal):
    case = {"lengths": [70, 69, 68, 7, 7, 6, 300], "dims": (5, 4), "width": 31, "buckets": 5, "heads": 3}
    rows, offsets, options = build({**case, "targets": [8, 0, 60, 7, 3, 1, 100], "causal": causal}, torch.float64)
    want = run("numba", rows, offsets, **options)
    compare(want, run("reference", rows, offsets, **options), torch.float64)
    monkeypatch.setattr(attention_cpu, "TILE", 2000)
    monkeypatch.setattr(attention_cpu, "GROUP_ROWS", 160)
    compare(run("numba", rows, offsets, **options), want, torch.float64)


def test_matches_a_dense_formula():
    rows, offsets, _ = build({"lengths": [1, 20, 7], "dims": (16, 16)}, torch.float32)
    got = hstu_attention(*rows, offsets, max_length=32)
    for lo, hi in pairwise(offsets.tolist()):
        query, key, value = (part[lo:hi].transpose(0, 1) for part in rows)
        want = (F.silu(query @ key.mT / 4) / 32).tril() @ value
        torch.testing.assert_close(got[lo:hi], want.transpose(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["numba", "triton", "reference"])
def test_by_hand(impl):
    """Scores are those of the bias alone: silu(0) = 0, silu(b) = b / (1 + exp(-b))."""
    zeros, offsets = torch.zeros(4, 1, 1), torch.tensor([0, 3, 4])
    value = torch.tensor([[[1.0]], [[10.0]], [[100.0]], [[7.0]]])
    table = torch.tensor([[9.0, 3.0, 2.0]])  # ahead, at itself, before (and farther)
    ahead, own, before = F.silu(table[0]).tolist()

    def attend(**options):
        out = hstu_attention(zeros, zeros, value, offsets, position_bias=table, impl=impl, **options)
        return out.flatten()

    want = torch.tensor([own, before + 10 * own, 11 * before + 100 * own, 7 * own])
    torch.testing.assert_close(attend(), want / torch.tensor([3.0, 3.0, 3.0, 1.0]))
    torch.testing.assert_close(attend(max_length=5), want / 5)
    # the last two of the first sequence are targets: the third item no longer sees the second
    want[2] = before + 100 * own
    torch.testing.assert_close(attend(max_length=5, num_targets=torch.tensor([2, 0])), want / 5)
    want = torch.tensor([own + 110 * ahead, before + 10 * own, before + 100 * own, 7 * own])
    torch.testing.assert_close(attend(max_length=5, num_targets=torch.tensor([2, 0]), causal=False), want / 5)


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_large_scores_are_safe(impl):
    rows, offsets, options = build({"lengths": [3, 40], "dims": (4, 4), "scale": 400.0}, torch.float32)
    got, want = run(impl, rows, offsets, **options), run("reference", rows, offsets, **options)
    for name, ours in got.items():
        torch.testing.assert_close(ours, want[name], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_nan_stays_in_its_sequence(impl):
    rows, offsets, options = build({"lengths": [6, 7, 5, 6], "dims": (4, 4), "width": 5}, torch.float32)
    for part in rows:
        part[0] = torch.nan
        part[-1] = torch.nan
    got = run(impl, rows, offsets, **options)
    want = run("reference", rows, offsets, **options)
    for name in NAMES[:4]:
        torch.testing.assert_close(got[name][6:18], want[name][6:18], rtol=1e-4, atol=1e-4)
        assert got[name][:6].isnan().any()


def test_gradcheck():
    rows, offsets, options = build(
        {"lengths": [3, 0, 4], "dims": (3, 2), "buckets": 3, "targets": [1, 0, 2]}, torch.float64
    )
    rows = leaves_of(rows)
    position = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    table = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def op(query, key, value, position, table):
        time = replace(options["time"], table=table)
        targets = options["num_targets"]
        return hstu_attention(query, key, value, offsets, num_targets=targets, position_bias=position, time=time)

    assert torch.autograd.gradcheck(op, (*rows, position, table))


def test_op_is_a_node_of_torch_compile():
    rows, offsets, options = build(CASES["targets"], torch.float32)
    rows = leaves_of(rows)
    time, targets = options["time"], options["num_targets"]
    table, position = time.table.requires_grad_(), options["position"].requires_grad_()
    times = (table, time.boundaries, time.query_times, time.query_times)
    query, key, value = rows
    op = torch.ops.recis.hstu_attention.default
    torch.library.opcheck(op, (query, key, value, offsets, position, *times, targets, True, 0.5, 0, "numba"))
    torch.library.opcheck(op, (query, key, value, offsets, None, None, None, None, None, None, False, 0.5, 9, "numba"))

    def fn(query, key, value, offsets, position, table):
        bias = TimeBias(table=table, boundaries=times[1], query_times=times[2])
        out = hstu_attention(query, key, value, offsets, num_targets=targets, position_bias=position, time=bias)
        return out.square()

    leaves = (*rows, position, table)
    want = torch.autograd.grad(fn(query, key, value, offsets, position, table).sum(), leaves)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(query, key, value, offsets, position, table).sum(), leaves)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_wrong_inputs_are_refused():
    rows, offsets, _ = build({"lengths": [3, 2], "dims": (4, 3)}, torch.float32)
    query, key, value = rows
    with pytest.raises(ValueError, match=r"query must be \[L, H, D\] float32"):
        hstu_attention(query[0], key, value, offsets)
    with pytest.raises(ValueError, match=r"key must have 5 rows as query has; got 4"):
        hstu_attention(query, key[1:], value[1:], offsets)
    with pytest.raises(ValueError, match=r"offsets must be \[B \+ 1\] int64"):
        hstu_attention(*rows, offsets.int())
    with pytest.raises(ValueError, match=r"max_length must be at least 0"):
        hstu_attention(*rows, offsets, max_length=-1)
    with pytest.raises(ValueError, match=r"num_targets must be \[2\] int64; got \(3,\)"):
        hstu_attention(*rows, offsets, num_targets=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"float64 attention runs on the CPU only"):
        hstu_attention(query.double(), key.double(), value.double(), offsets, impl="triton")


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize("targets", [[4, 0], [0, -1]], ids=str)
def test_wrong_target_counts_are_refused(impl, targets):
    rows, offsets, _ = build({"lengths": [3, 2], "dims": (4, 3)}, torch.float32)
    with (
        recis_kernels.checks(),
        pytest.raises(ValueError, match="num_targets must lie between 0 and the length of its sequence"),
    ):
        hstu_attention(*rows, offsets, num_targets=torch.tensor(targets), impl=impl)


def launches() -> None:
    """Run every Triton kernel, per dtype, tile size and switch."""
    for dtype, dim in ((torch.float32, 64), (torch.bfloat16, 64), (torch.bfloat16, 128)):
        for both in (False, True):
            options = {"width": 5, "buckets": 4, "targets": [1, 2]} if both else {}
            rows, offsets, options = build({"lengths": [3, 2], "dims": (dim, dim), "heads": 1, **options}, dtype)
            run("triton", rows, offsets, **options)
    for dtype in (torch.float32, torch.bfloat16):
        rows, offsets, options = build({"lengths": [3, 2], "dims": (256, 256), "width": 5, "buckets": 9}, dtype)
        run("triton", rows, offsets, **options)
        rows, offsets, options = build({"lengths": [3, 2], "dims": (3, 20), "causal": False, "width": 1}, dtype)
        run("triton", rows, offsets, **options)
