"""Ids by owner: worked cases of both rules, and the reference on random and extreme ids."""

import pytest
import torch

from recis_kernels import ids_partition as module
from recis_kernels.ids_partition import ids_partition, slice_bounds, slice_of_id

IDS = torch.tensor([1, 65537, 2, 1, 40000])
IMPLS = pytest.mark.parametrize("impl", ["numba", "triton", "reference"])


@IMPLS
@pytest.mark.parametrize(
    ("rule", "num_ranks", "distinct", "counts", "inverse"),
    [
        ("mod", 2, [1, 65537, 2, 40000], [3, 1], [0, 1, 2, 0, 3]),
        ("mod", 4, [1, 65537, 2, 40000], [3, 0, 1, 0], [0, 1, 2, 0, 3]),
        ("hash", 2, [40000, 65537, 2, 1], [2, 2], [3, 1, 2, 3, 0]),
        ("hash", 4, [40000, 65537, 2, 1], [0, 2, 1, 1], [3, 1, 2, 3, 0]),
    ],
)
def test_worked_cases(impl, rule, num_ranks, distinct, counts, inverse):
    got = ids_partition(IDS, num_ranks, rule, impl=impl)
    assert got.ids.tolist() == distinct
    assert got.counts.tolist() == counts
    assert got.inverse.tolist() == inverse


def test_slices_and_bounds():
    assert slice_of_id(torch.tensor([1, 2, 65537, 40000, -1])).tolist() == [52012, 33767, 23617, 18545, 24353]
    assert slice_of_id(torch.tensor([65537, -1]), "mod").tolist() == [1, 65535]
    assert slice_bounds(3).tolist() == [0, 21846, 43691, 65536]
    assert slice_bounds(5).tolist()[-3:] == [39322, 52429, 65536]
    assert slice_bounds(1).tolist() == [0, 65536]


@pytest.mark.parametrize("rule", ["hash", "mod"])
@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_matches_reference(rule, num_ranks):
    extremes = torch.tensor([-(2**63), 2**63 - 1, -1, 0, 65536, -65536])
    batches = [
        torch.randint(-(2**63), 2**63 - 1, (3000,)).repeat(2),
        torch.arange(-700, 700) * 65536,  # one slice under "mod"
        extremes.repeat(2),
        extremes[:0],
        torch.full((3000,), -7),
    ]
    for ids in batches:
        got, want = ids_partition(ids, num_ranks, rule), ids_partition(ids, num_ranks, rule, impl="reference")
        for field in ("ids", "counts", "inverse"):
            assert getattr(got, field).dtype == getattr(want, field).dtype
            assert getattr(got, field).equal(getattr(want, field)), field
        assert got.ids[got.inverse.long()].equal(ids)
        assert int(got.counts.sum()) == got.ids.numel()


@pytest.mark.parametrize("rule", ["hash", "mod"])
@pytest.mark.parametrize("num_ranks", [1, 3, 65536])
def test_kernels_match_the_loops(rule, num_ranks):
    extremes = torch.tensor([-(2**63), 2**63 - 1, -1, 0, 65536, -65536])
    strided = torch.stack((torch.arange(-150, 150) * 65536, torch.zeros(300, dtype=torch.int64)), dim=1)[:, 0]
    one = torch.full((300,), -7)  # duplicates only
    for ids in (torch.randint(-(2**63), 2**63 - 1, (300,)).repeat(2), strided, extremes.repeat(2), one, extremes[:0]):
        got, want = (ids_partition(ids, num_ranks, rule, impl=impl) for impl in ("triton", "numba"))
        for field in ("ids", "counts", "inverse"):
            assert getattr(got, field).dtype == getattr(want, field).dtype
            assert getattr(got, field).equal(getattr(want, field)), field


def test_op_is_a_node_of_torch_compile():
    torch.library.opcheck(module._op, (IDS, slice_bounds(3), "hash", "numba"))

    def run(ids):
        part = ids_partition(ids, 3)
        return part.ids * 2, part.counts, part.inverse

    for got, want in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(IDS), run(IDS), strict=True):
        assert got.equal(want)


def launches() -> None:
    """Launch every kernel once or more, for compile_kernels.py."""
    for by_hash in (True, False):
        order, _ = module.ids_partition_triton.order_by_slice(IDS, by_hash)
        module.ids_partition_triton.through(IDS.int(), order)


def test_owners_get_even_shares():
    counts = ids_partition(torch.arange(200_000), 3).counts.double()
    assert counts.max() / counts.mean() <= 1.02


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((IDS.int(), 2), "ids must be int64"),
        ((IDS, 0), "num_ranks must be 1..65536; got 0"),
        ((IDS, 65537), "num_ranks must be 1..65536"),
        ((IDS, 2, "range"), "rule must be"),
    ],
)
def test_wrong_input_is_named(args, message):
    with pytest.raises(ValueError, match=message):
        ids_partition(*args)
