"""Softmax attention over variable-length sequences: against the float64 reference, torch's own attention, and by hand."""

import math
import mmap
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import recis_kernels
from recis_kernels import attention_cpu, attention_triton
from recis_kernels.attention_inputs import TimeBias
from recis_kernels.jagged import lengths_to_offsets
from recis_kernels.jagged_attention import jagged_attention

# bf16: weights and slopes are rounded to 2**-9 before the second product, and so is the result
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float64: 1e-10}
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
NAMES = ("out", "query", "key", "value", "position", "time")


def offsets_of(lengths: list[int]) -> torch.Tensor:
    return lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64))


def make_time(num_queries: int, num_keys: int, num_heads: int, num_buckets: int = 6) -> TimeBias:
    return TimeBias(
        table=torch.randn(num_heads, num_buckets),
        boundaries=torch.tensor([-40, -3, 0, 2, 9, 50, 51, 300])[: num_buckets - 1],
        query_times=torch.randint(-100, 100, (num_queries,)),
        key_times=torch.randint(-100, 100, (num_keys,)),
    )


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
    out = jagged_attention(*leaves, offsets, impl=impl, **tables, **options)
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
    "plain": {"lengths": [5, 33, 1, 0, 12], "dims": (7, 3)},
    "causal": {"lengths": [40, 2, 1], "dims": (16, 16), "causal": True},
    "position": {"lengths": [3, 37, 0, 9], "dims": (5, 9), "width": 13, "causal": True},
    "position past the longest": {"lengths": [34, 4], "dims": (3, 4), "width": 91},
    "one distance": {"lengths": [4, 33], "dims": (2, 2), "width": 1},
    "time": {"lengths": [9, 33, 1], "dims": (8, 8), "buckets": 6, "causal": True},
    "one bucket": {"lengths": [3, 5], "dims": (4, 4), "buckets": 1},
    "both": {"lengths": [35, 1, 6], "dims": (4, 6), "width": 7, "buckets": 4, "causal": True},
    "cross": {"lengths": [3, 0, 34, 4, 2], "key_lengths": [36, 4, 5, 0, 1], "dims": (6, 4), "width": 9, "buckets": 3},
    "causal cross": {"lengths": [36, 3, 33], "key_lengths": [5, 35, 33], "dims": (4, 4), "width": 5, "causal": True},
    "one sequence": {"lengths": [70], "dims": (65, 33), "width": 21, "heads": 1, "causal": True},
    "scale": {"lengths": [4, 7], "dims": (3, 3), "scale": -1.5, "heads": 3},
    "nothing": {"lengths": [], "dims": (4, 4), "width": 3, "buckets": 2},
    "nothing at all": {"lengths": [], "dims": (4, 4)},
    "empty sequences": {"lengths": [0, 0], "dims": (4, 4), "width": 3, "buckets": 2},
}


def build(case, dtype) -> tuple[Rows, torch.Tensor, dict[str, Any]]:
    case = dict(case)
    key_lengths = case.get("key_lengths", case["lengths"])
    heads, (key_dim, value_dim) = case.get("heads", 2), case["dims"]
    num_queries, num_keys = sum(case["lengths"]), sum(key_lengths)
    shapes = ((num_queries, key_dim), (num_keys, key_dim), (num_keys, value_dim))
    query, key, value = (torch.randn(length, heads, dim).to(dtype) for length, dim in shapes)
    options: dict[str, Any] = {name: case[name] for name in ("causal", "scale") if name in case}
    if "key_lengths" in case:
        options["key_offsets"] = offsets_of(key_lengths)
    if "width" in case:
        options["position"] = torch.randn(heads, case["width"])
    if "buckets" in case:
        options["time"] = make_time(num_queries, num_keys, heads, case["buckets"])
    return (query, key, value), offsets_of(case["lengths"]), options


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(impl, name):
    rows, offsets, options = build(CASES[name], torch.float32)
    compare(run(impl, rows, offsets, **options), run("reference", rows, offsets, **options), torch.float32)


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_bf16_matches_reference(impl):
    rows, offsets, options = build(CASES["both"], torch.bfloat16)
    got, want = (run(version, rows, offsets, **options) for version in (impl, "reference"))
    assert [got[name].dtype for name in NAMES] == [torch.bfloat16] * 4 + [torch.float32] * 2
    compare(got, want, torch.bfloat16)


@pytest.mark.parametrize("dim", [64, 129, 256])
def test_wide_heads(dim):
    rows, offsets, options = build({"lengths": [18, 3], "dims": (dim, 8), "causal": True, "heads": 1}, torch.float32)
    compare(run("triton", rows, offsets, **options), run("reference", rows, offsets, **options), torch.float32)
    rows, offsets, options = build({"lengths": [18, 3], "dims": (8, dim), "causal": True, "heads": 1}, torch.float32)
    compare(run("triton", rows, offsets, **options), run("reference", rows, offsets, **options), torch.float32)


@pytest.mark.parametrize("causal", [False, True])
def test_small_cpu_tiles_change_nothing(monkeypatch, causal):
    """Tiles of some rows of one head, groups of one and of several sequences."""
    lengths = [70, 69, 68, 7, 7, 6, 300]
    rows, offsets, options = build(
        {"lengths": lengths, "dims": (5, 4), "width": 31, "buckets": 5, "causal": causal, "heads": 3}, torch.float64
    )
    want = run("numba", rows, offsets, **options)
    compare(want, run("reference", rows, offsets, **options), torch.float64)
    monkeypatch.setattr(attention_cpu, "TILE", 2000)
    monkeypatch.setattr(attention_cpu, "GROUP_ROWS", 160)
    compare(run("numba", rows, offsets, **options), want, torch.float64)


def test_partial_tables_in_turns_change_nothing(monkeypatch):
    rows, offsets, options = build({"lengths": [40, 3], "dims": (4, 4), "width": 9, "buckets": 3}, torch.float32)
    want = run("triton", rows, offsets, **options)
    monkeypatch.setattr(attention_triton, "_PARTIAL_BYTES", 200)
    got = run("triton", rows, offsets, **options)
    compare(got, want, torch.float32)


@pytest.mark.parametrize("causal", [False, True])
def test_matches_torch(causal):
    lengths = [1, 20, 7]
    rows, offsets, _ = build({"lengths": lengths, "dims": (16, 16)}, torch.float32)
    got = jagged_attention(*rows, offsets, causal=causal)
    for lo, hi in pairwise(offsets.tolist()):
        query, key, value = (part[lo:hi].transpose(0, 1)[None] for part in rows)
        want = F.scaled_dot_product_attention(query, key, value, is_causal=causal)[0].transpose(0, 1)
        torch.testing.assert_close(got[lo:hi], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["numba", "triton", "reference"])
def test_by_hand(impl):
    """Equal products: the weights are those of the biases alone."""
    query, key = torch.zeros(3, 1, 1), torch.zeros(3, 1, 1)
    value, offsets = torch.tensor([[[8.0]], [[16.0]], [[5.0]]]), torch.tensor([0, 2, 3])
    out = jagged_attention(query, key, value, offsets, impl=impl)
    assert out.flatten().tolist() == [12.0, 12.0, 5.0]
    out = jagged_attention(query, key, value, offsets, causal=True, impl=impl)
    assert out.flatten().tolist() == [8.0, 12.0, 5.0]
    table = torch.tensor([[0.0, 0.0, math.log(3.0)]])  # the key before counts three times
    out = jagged_attention(query, key, value, offsets, causal=True, position_bias=table, impl=impl)
    torch.testing.assert_close(out.flatten(), torch.tensor([8.0, 10.0, 5.0]))
    table = torch.tensor([[math.log(7.0), 0.0, 0.0]])  # and now the key ahead counts seven times
    out = jagged_attention(query, key, value, offsets, position_bias=table, impl=impl)
    torch.testing.assert_close(out.flatten(), torch.tensor([15.0, 12.0, 5.0]))
    time = TimeBias(
        table=torch.tensor([[0.0, math.log(3.0)]]),
        boundaries=torch.tensor([60]),
        query_times=torch.tensor([100, 160, 0]),  # 60 is on the boundary: the bucket above it
    )
    out = jagged_attention(query, key, value, offsets, causal=True, time=time, impl=impl)
    torch.testing.assert_close(out.flatten(), torch.tensor([8.0, 10.0, 5.0]))


@pytest.mark.parametrize("impl", ["numba", "triton", "reference"])
def test_last_query_stands_at_the_last_key(impl):
    key, value = torch.zeros(3, 1, 1), torch.tensor([[[3.0]], [[6.0]], [[12.0]]])
    out = jagged_attention(
        torch.zeros(2, 1, 1), key, value, torch.tensor([0, 2]), key_offsets=torch.tensor([0, 3]), causal=True, impl=impl
    )
    assert out.flatten().tolist() == [4.5, 7.0]
    out = jagged_attention(
        torch.zeros(4, 1, 1), key, value, torch.tensor([0, 4]), key_offsets=torch.tensor([0, 3]), causal=True, impl=impl
    )
    assert out.flatten().tolist() == [0.0, 3.0, 4.5, 7.0]  # the first query stands before all keys


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_large_scores_are_safe(impl):
    rows, offsets, options = build({"lengths": [3, 40], "dims": (4, 4), "causal": True, "scale": 400.0}, torch.float32)
    got, want = run(impl, rows, offsets, **options), run("reference", rows, offsets, **options)
    torch.testing.assert_close(got["out"], want["out"], rtol=1e-3, atol=1e-3)
    assert all(bool(part.isfinite().all()) for part in got.values())


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_a_large_bias_of_a_short_sequence_is_safe(impl):
    """Queries of the padding of a group of sequences would overflow exp(score)."""
    rows, offsets, options = build({"lengths": [9, 8, 9], "dims": (4, 4), "width": 3}, torch.float32)
    options["position"] = torch.full((2, 3), 200.0)
    compare(run(impl, rows, offsets, **options), run("reference", rows, offsets, **options), torch.float32)


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


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_strided_rows(impl):
    packed, offsets = torch.randn(11, 3, 2, 4), offsets_of([4, 0, 7])
    parts = [packed[:, i] for i in range(3)]
    wide = [torch.randn(11, 4, 2).transpose(1, 2) for _ in range(3)]
    for rows in (parts, wide):
        query, key, value = rows
        out = jagged_attention(query, key, value, offsets, impl=impl)
        query, key, value = (part.contiguous() for part in rows)
        want = jagged_attention(query, key, value, offsets, impl=impl)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_rows_beyond_two_to_the_31_numbers(impl):
    """Rows far apart in memory that is mapped lazily; only their own pages are touched."""
    stride, num_rows = 1 << 24, 130
    memory = torch.frombuffer(mmap.mmap(-1, 4 * stride * num_rows), dtype=torch.float32)
    assert stride * (num_rows - 1) > 2**31
    packed = memory.as_strided((num_rows, 3, 1, 4), (stride, 4, 4, 1))
    packed.copy_(torch.randn(packed.shape))
    offsets = offsets_of([64, 0, num_rows - 64])
    found = []
    for rows in (packed, packed.contiguous()):
        query, key, value = (part.detach().requires_grad_() for part in rows.unbind(1))
        assert query.stride(0) == rows.stride(0)
        out = jagged_attention(query, key, value, offsets, causal=True, impl=impl)
        found.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    for far, near in zip(*found, strict=True):
        torch.testing.assert_close(far, near, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_cpu_scores_exist_a_tile_at_a_time_and_are_hardly_padded(monkeypatch, causal):
    sizes, original = [], attention_cpu._scores

    def watched(*args):
        scores, buckets = original(*args)
        sizes.append(scores.numel())
        return scores, buckets

    monkeypatch.setattr(attention_cpu, "_scores", watched)
    monkeypatch.setattr(attention_cpu, "TILE", 8192)
    lengths = [700, 650, *[3] * 40, *range(1, 90)]
    rows, offsets, _ = build({"lengths": lengths, "dims": (4, 4), "heads": 3}, torch.float32)
    jagged_attention(*rows, offsets, causal=causal)
    num_pairs = 3 * sum(length * (length + 1) // 2 if causal else length * length for length in lengths)
    assert max(sizes) <= 8192
    assert num_pairs <= sum(sizes) < 1.3 * num_pairs


def test_gradcheck():
    rows, offsets, _ = build({"lengths": [3, 0, 4], "dims": (3, 2)}, torch.float64)
    rows = leaves_of(rows)
    position, time = torch.randn(2, 5, dtype=torch.float64, requires_grad=True), make_time(7, 7, 2, 4)
    table = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def op(query, key, value, position, table):
        time_bias = replace(time, table=table)
        return jagged_attention(query, key, value, offsets, causal=True, position_bias=position, time=time_bias)

    assert torch.autograd.gradcheck(op, (*rows, position, table))


def test_threads_do_not_change_table_gradients():
    rows, offsets, options = build({"lengths": [90, 4, 85], "dims": (8, 8), "width": 33, "buckets": 6}, torch.float64)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(run("numba", rows, offsets, **options))
    finally:
        torch.set_num_threads(threads)
    for name in NAMES:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-12, atol=1e-12)


def test_op_is_a_node_of_torch_compile():
    rows, offsets, options = build(CASES["both"], torch.float32)
    rows = leaves_of(rows)
    time = options["time"]
    table, position = time.table.requires_grad_(), options["position"].requires_grad_()
    times = (table, time.boundaries, time.query_times, time.key_times)
    query, key, value = rows
    op = torch.ops.recis.jagged_attention.default
    torch.library.opcheck(op, (query, key, value, offsets, offsets, position, *times, True, 0.5, "numba"))
    torch.library.opcheck(op, (query, key, value, offsets, offsets, None, None, None, None, None, False, 0.5, "numba"))

    def fn(query, key, value, offsets, position, table):
        bias = TimeBias(table=table, boundaries=times[1], query_times=times[2], key_times=times[3])
        return jagged_attention(query, key, value, offsets, causal=True, position_bias=position, time=bias).square()

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
        jagged_attention(query[0], key, value, offsets)
    with pytest.raises(ValueError, match=r"1 to 256 numbers"):
        jagged_attention(torch.zeros(5, 2, 257), torch.zeros(5, 2, 257), value, offsets)
    with pytest.raises(ValueError, match=r"key is torch.bfloat16"):
        jagged_attention(query, key.bfloat16(), value, offsets)
    with pytest.raises(ValueError, match=r"key must be \[L, 2, 4\]"):
        jagged_attention(query, key[:, :1], value, offsets)
    with pytest.raises(ValueError, match=r"value must be \[5, 2, D\]"):
        jagged_attention(query, key, value[1:], offsets)
    with pytest.raises(ValueError, match=r"offsets must be \[B \+ 1\] int64"):
        jagged_attention(*rows, offsets.int())
    with pytest.raises(ValueError, match=r"key_offsets must be \[3\]"):
        jagged_attention(*rows, offsets, key_offsets=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"an odd width; got \(2, 4\)"):
        jagged_attention(*rows, offsets, position_bias=torch.zeros(2, 4))
    time = make_time(5, 5, 2)
    with pytest.raises(ValueError, match=r"time.boundaries must be \[5\]"):
        jagged_attention(*rows, offsets, time=replace(time, boundaries=time.boundaries[1:]))
    with pytest.raises(ValueError, match=r"time.key_times must be \[5\]"):
        jagged_attention(*rows, offsets, time=replace(time, key_times=torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"float64 attention runs on the CPU only"):
        jagged_attention(query.double(), key.double(), value.double(), offsets, impl="triton")


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_wrong_contents_are_refused(impl):
    rows, _, _ = build({"lengths": [3, 2], "dims": (4, 3)}, torch.float32)
    time = make_time(5, 5, 2)
    with recis_kernels.checks():
        for offsets in ([0, 3], [1, 5], [0, 4, 3, 5], [0, 6]):
            with pytest.raises(ValueError, match=r"^offsets must ascend from 0 to 5"):
                jagged_attention(*rows, torch.tensor(offsets), impl=impl)
        flipped = replace(time, boundaries=time.boundaries.flip(0))
        with pytest.raises(ValueError, match=r"time.boundaries must ascend"):
            jagged_attention(*rows, torch.tensor([0, 5]), time=flipped, impl=impl)


def launches() -> None:
    """Run every Triton kernel, per dtype, tile size and switch."""
    for dtype, dim in ((torch.float32, 64), (torch.bfloat16, 64), (torch.bfloat16, 128)):
        for both in (False, True):
            options = {"width": 5, "buckets": 4, "causal": True} if both else {}
            rows, offsets, options = build({"lengths": [3, 2], "dims": (dim, dim), "heads": 1, **options}, dtype)
            run("triton", rows, offsets, **options)
    for dtype in (torch.float32, torch.bfloat16):
        rows, offsets, options = build(
            {"lengths": [3, 2], "dims": (256, 256), "heads": 2, "width": 5, "buckets": 9}, dtype
        )
        run("triton", rows, offsets, **options)
        rows, offsets, options = build({"lengths": [3, 2], "dims": (3, 20), "heads": 2, "width": 1}, dtype)
        run("triton", rows, offsets, **options)
