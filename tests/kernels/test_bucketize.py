"""Bucketize: boundaries belong to the bucket above, NaN to the last; even, skewed and equal boundaries; any dtype."""

import math

import pytest
import torch

from recis_kernels.bucketize import Boundaries, bucketize

IMPLS = ["numba", "torch", "triton", "reference"]
CASES = {
    "none": [],
    "one": [0.5],
    "equal": [0.7] * 6,
    "even": [i / 10 for i in range(100)],
    "skewed": [0.0, *[1e-9 * i for i in range(60)], 2.0, 1e6, 1e30],
    "huge": [-1.5e308, 0.0, 1.5e308],
    "dense": sorted(math.sin(i) for i in range(9000)),
}


@pytest.mark.parametrize("impl", IMPLS)
def test_conformance_values(impl):  # A11, A12
    hundreds = [Boundaries([0, 100, 200])]
    values = torch.tensor([-1, 0, 0.5, 10, 11.6, 200, 201])
    assert bucketize(values, (0, 7), hundreds, impl=impl).tolist() == [0, 1, 1, 1, 1, 3, 3]
    special = bucketize(torch.tensor([math.nan, math.inf, -math.inf]), (0, 3), hundreds, impl=impl)
    assert special.dtype == torch.int64
    assert special.tolist() == [3, 3, 0]


@pytest.mark.parametrize("impl", ["numba", "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(impl, dtype, name):
    boundaries = [Boundaries(CASES[name]), Boundaries([1.0, 2.5])]
    on_boundary = torch.tensor(CASES[name][:50], dtype=torch.float64).clamp(-1e18, 1e18)
    limits = torch.tensor([-1e18, 1e18, 0.0, 2.5, 2.0, 3.0], dtype=torch.float64)
    values = torch.cat([on_boundary, limits, torch.randn(70, dtype=torch.float64) * 3]).to(dtype)
    if dtype.is_floating_point:
        values = torch.cat([values, torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)])
    columns = (0, values.numel() - 20, values.numel())
    got = bucketize(values, columns, boundaries, impl=impl)
    assert torch.equal(got, bucketize(values, columns, boundaries, impl="reference"))


def test_a_value_written_like_the_boundary_is_on_it():
    assert bucketize(torch.tensor([0.7, 0.1]), (0, 2), [Boundaries([0.1, 0.7])]).tolist() == [2, 1]


@pytest.mark.parametrize("impl", IMPLS)
def test_integers_decide_exactly(impl):
    big = 2**60
    values = torch.tensor([big - 1, big, big + 1, -(2**63), 2**63 - 1])
    assert bucketize(values, (0, 5), [Boundaries([0.5, float(big), 1e300])], impl=impl).tolist() == [1, 2, 2, 0, 2]


def test_threads_and_columns_agree():
    values, boundaries = torch.randn(200_000), [Boundaries([-0.5, 0.5]), Boundaries(CASES["even"])]
    got = bucketize(values, (0, 131_073, 200_000), boundaries)
    assert torch.equal(got, bucketize(values, (0, 131_073, 200_000), boundaries, impl="torch"))


@pytest.mark.parametrize("impl", IMPLS)
def test_values_apart_and_no_values(impl):
    values = torch.randn(3000, 2)[:, 1]
    columns, boundaries = (0, 10, 10, 3000), [Boundaries([0.0]), Boundaries([]), Boundaries(CASES["even"])]
    got = bucketize(values, columns, boundaries, impl=impl)
    assert torch.equal(got, bucketize(values.contiguous(), columns, boundaries, impl="reference"))
    assert bucketize(values[:0], (0, 0), [Boundaries([1.0])], impl=impl).tolist() == []
    assert bucketize(values[:0], (0,), [], impl=impl).tolist() == []


def launches() -> None:
    for dtype in (torch.float32, torch.float64, torch.int64):
        values = torch.zeros(3, dtype=dtype)
        bucketize(values, (0, 1, 3), [Boundaries([]), Boundaries([1.0])], impl="triton")


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_node_of_torch_compile(impl):
    boundaries = [Boundaries([0.0, 1.0]), Boundaries([0.5])]
    values = torch.tensor([0.5, -1.0, 1.0])
    grids = [one.grids[torch.float32] for one in boundaries]
    numbers, cells = [grid.numbers for grid in grids], [grid.cells for grid in grids]
    lows, scales = [grid.low for grid in grids], [grid.scale for grid in grids]
    torch.library.opcheck(torch.ops.recis.bucketize.default, (values, [0, 2, 3], numbers, cells, lows, scales, impl))
    compiled = torch.compile(
        lambda values: bucketize(values, (0, 2, 3), boundaries, impl=impl), fullgraph=True, backend="aot_eager"
    )
    assert compiled(values).tolist() == [1, 0, 1]


@pytest.mark.parametrize("numbers", [[1.0, 0.0], [math.nan], [0.0, math.inf]], ids=str)
def test_wrong_boundaries_are_refused(numbers):
    with pytest.raises(ValueError, match="boundaries must"):
        Boundaries(numbers)


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match="float32, float64 or int64"):
        bucketize(torch.zeros(2, 2), (0, 2), [Boundaries([])])
    with pytest.raises(ValueError, match="one parameter each"):
        bucketize(torch.zeros(2), (0, 2), [])
