"""Crosses: conformance keys, order, duplicates, weights, buckets; numba against plain Python."""

import pytest
import torch

from recis_kernels.dispatch import Impl
from recis_kernels.feature_cross import feature_cross
from recis_kernels.id_mod import id_mod
from recis_kernels.jagged import lengths_to_offsets

IMPLS: list[Impl] = ["numba", "triton", "reference"]


def _cross(rows_a, rows_b, *, num_buckets=None, weights_a=None, weights_b=None, impl: Impl = "auto"):
    def flat(rows):
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        return torch.tensor([value for row in rows for value in row], dtype=torch.int64), lengths_to_offsets(lengths)

    a, a_offsets = flat(rows_a)
    b, b_offsets = flat(rows_b)
    return feature_cross(
        a,
        a_offsets,
        b,
        b_offsets,
        (0, len(rows_a)),
        [num_buckets],
        a_weights=None if weights_a is None else torch.tensor([w for row in weights_a for w in row]),
        b_weights=None if weights_b is None else torch.tensor([w for row in weights_b for w in row]),
        impl=impl,
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_conformance_values(impl):  # A9, A10
    crossed = _cross([[1], [2], [3]], [[1], [2], [3]], impl=impl)
    assert crossed.values.tolist() == [5425063201540042216, -4861409480480049614, 1479261497018993783]
    assert id_mod(crossed.values, (0, 3), [1000]).tolist() == [216, 2, 783]
    assert _cross([[1], [2], [3]], [[1], [2], [3]], num_buckets=1000, impl=impl).values.tolist() == [216, 2, 783]
    crossed = _cross([[1001], [1002], [1003]], [[1], [2], [3]], impl=impl)
    assert crossed.values.tolist() == [-7808879811642834040, -4967483181219983279, 1752425377096056168]
    crossed = _cross([[1], [2]], [[2], [1]], impl=impl)
    assert crossed.values.tolist() == [2346165840139155392, -1274954391096260390]


@pytest.mark.parametrize("impl", IMPLS)
def test_order_duplicates_and_weights_by_hand(impl):
    one = {(x, y): _cross([[x]], [[y]]).values.item() for x in (5, 3) for y in (8, 9)}
    crossed = _cross(
        [[5, 3, 5], []],
        [[8, 9, 8], [8]],
        weights_a=[[2.0, 3.0, 50.0], []],
        weights_b=[[0.5, 1.0, 7.0], [1.0]],
        impl=impl,
    )
    assert crossed.values.tolist() == [one[5, 8], one[5, 9], one[3, 8], one[3, 9]]  # a-major, first occurrence
    assert crossed.offsets.tolist() == [0, 4, 4]
    assert crossed.weights is not None
    assert crossed.weights.tolist() == [1.0, 2.0, 1.5, 3.0]  # a duplicate keeps its first weight
    half = _cross([[5, 3]], [[8]], weights_a=[[2.0, 3.0]], impl=impl)
    assert half.weights is not None
    assert half.weights.tolist() == [2.0, 3.0]


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize("num_buckets", [None, 0, 1000])
def test_matches_reference(num_buckets, impl):
    torch.manual_seed(5)
    sizes = [0, 1, 5, 31, 32, 33, 40, 200, 2, 0]  # both ways of finding duplicates
    rows_a = [torch.randint(-20, 20, (size,)).tolist() for size in sizes]
    rows_b = [torch.randint(-(2**62), 2**62, (1 + size % 7,)).tolist() * 2 for size in sizes]
    weights = [torch.rand(size).tolist() for size in sizes]
    got = _cross(rows_a, rows_b, num_buckets=num_buckets, weights_a=weights, impl=impl)
    want = _cross(rows_a, rows_b, num_buckets=num_buckets, weights_a=weights, impl="reference")
    assert torch.equal(got.values, want.values)
    assert torch.equal(got.offsets, want.offsets)
    torch.testing.assert_close(got.weights, want.weights, rtol=0, atol=0)
    if num_buckets is not None:
        assert got.values.min() >= 0


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_many_pairs_in_one_call_on_threads(impl):
    torch.manual_seed(6)
    third = 1000 if impl == "numba" else 10
    lengths = torch.randint(0, 50 if impl == "numba" else 9, (3 * third,))
    ids = torch.randint(0, 30, (int(lengths.sum()),))
    offsets = lengths_to_offsets(lengths)
    rows = (0, third, third, 3 * third)
    both = feature_cross(ids, offsets, ids, offsets, rows, [None, 5, 7], impl=impl)
    assert both.offsets[-1] == both.values.numel()
    border = offsets[third]
    part = ids[:border], offsets[: third + 1]
    first = feature_cross(*part, *part, (0, third), [None], impl="numba")
    assert torch.equal(both.values[: first.values.numel()], first.values)
    assert int(both.values[first.values.numel() :].max()) < 7
    assert both.weights is None


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_batch_one_huge_row_and_tensors_apart(impl):
    crossed = _cross([], [], impl=impl)
    assert crossed.values.tolist() == []
    assert crossed.offsets.tolist() == [0]
    crossed = _cross([[], [1]], [[2], []], weights_a=[[], [1.0]], impl=impl)
    assert crossed.weights is not None
    assert (crossed.values.tolist(), crossed.offsets.tolist(), crossed.weights.tolist()) == ([], [0, 0, 0], [])
    ids, offsets = torch.tensor([[4, 9]] * 600)[:, 0], torch.tensor([0, 600, 600], dtype=torch.int32)
    other = torch.arange(900).view(450, 2)[:, 1]
    halves = torch.tensor([0.5, 3.0]).repeat(600).view(600, 2)[:, 0]
    others = torch.tensor([0, 450, 450])
    crossed = feature_cross(ids, offsets, other, others, (0, 2), [None], a_weights=halves, impl=impl)
    assert crossed.offsets.tolist() == [0, 450, 450]
    assert crossed.weights is not None
    assert crossed.weights.tolist() == [0.5] * 450
    assert crossed.values[1].item() == _cross([[4]], [[3]], impl=impl).values.item()


def launches() -> None:
    for dtype in (torch.int64, torch.int32):
        ids, offsets = torch.arange(4), torch.tensor([0, 2, 4], dtype=dtype)
        none, weights = None, torch.ones(4)
        for each in (none, weights):
            feature_cross(ids, offsets, ids, offsets, (0, 1, 2), [None, 7], a_weights=each, impl="triton")


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize("weighted", [False, True])
def test_node_of_torch_compile(impl, weighted):
    ids, offsets = torch.tensor([5, 3, 5, 8]), torch.tensor([0, 3, 4])
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0]) if weighted else None
    arguments = ids, offsets, ids, offsets, [0, 1, 2], [-1, 7], weights, weights, impl
    torch.library.opcheck(torch.ops.recis.feature_cross.default, arguments)

    def run(ids):
        crossed = feature_cross(
            ids, offsets, ids, offsets, (0, 1, 2), [None, 7], a_weights=weights, b_weights=weights, impl=impl
        )
        return crossed.values + 1, crossed.offsets, ids if crossed.weights is None else crossed.weights

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(ids)
    assert all(torch.equal(got, want) for got, want in zip(compiled, run(ids), strict=True))


def test_wrong_arguments_are_refused():
    ids, offsets = torch.tensor([1, 2]), torch.tensor([0, 2])
    with pytest.raises(ValueError, match="must be equal"):
        feature_cross(ids, offsets, ids, torch.tensor([0, 1, 2]), (0, 1), [None])
    with pytest.raises(ValueError, match="a must be int64 ids"):
        feature_cross(ids.float(), offsets, ids, offsets, (0, 1), [None])
    with pytest.raises(ValueError, match="b_weights must be fp32"):
        feature_cross(ids, offsets, ids, offsets, (0, 1), [None], b_weights=torch.ones(3))
