"""Multi-hash: parameters, values against Python ints, columns with different numbers of outputs."""

import pytest
import torch

from recis_kernels.multi_hash import LinearHash, linear_hashes, multi_hash


def test_parameters():  # A8
    four = linear_hashes([1000] * 4)
    assert [one.multiplier for one in four] == [1, 3, 5, 7]
    assert [one.prime for one in four] == [28979, 46997, 66977, 82997]
    assert [one.num_buckets for one in four] == [1000] * 4
    assert linear_hashes([1000, 500]) == (four[0], LinearHash(multiplier=3, prime=23497, num_buckets=500))
    assert linear_hashes([1])[0].prime == 29
    assert linear_hashes([2**31])[0].prime == 62277025777  # by sympy.prevprime(29 * 2**31 + 1)


@pytest.mark.parametrize("impl", ["numba", "torch", "triton", "reference"])
def test_by_hand(impl):
    (out,) = multi_hash(torch.tensor([28979, 28980, -1]), (0, 3), [linear_hashes([1000, 1000])], impl=impl)
    # 3 * 28979 - 46997 = 39940; -1 -> 28978; -3 -> 46994
    assert out.tolist() == [[0, 1, 978], [940, 943, 994]]


@pytest.mark.parametrize("impl", ["numba", "torch", "triton"])
def test_matches_reference_for_any_id(impl):
    ids = torch.cat([torch.tensor([0, -1, 2**63 - 1, -(2**63)]), torch.randint(-(2**63), 2**63 - 1, (9000,))])
    columns = (0, 5, 5, ids.numel())
    hashes = [linear_hashes([17, 10**9, 3, 2**40]), linear_hashes([5]), linear_hashes([100, 999])]
    got = multi_hash(ids, columns, hashes, impl=impl)
    want = multi_hash(ids, columns, hashes, impl="reference")
    assert [one.shape for one in got] == [(4, 5), (1, 0), (2, ids.numel() - 5)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("impl", ["numba", "torch", "triton"])
def test_nothing_to_hash_and_ids_apart(impl):
    none = torch.zeros(0, dtype=torch.int64)
    assert multi_hash(none, (0,), [], impl=impl) == []
    (empty,) = multi_hash(none, (0, 0), [linear_hashes([3, 4])], impl=impl)
    assert empty.shape == (2, 0)
    ids = torch.arange(20).view(10, 2)[:, 1]
    (got,) = multi_hash(ids, (0, 10), [linear_hashes([7])], impl=impl)
    (want,) = multi_hash(ids, (0, 10), [linear_hashes([7])], impl="reference")
    assert torch.equal(got, want)


def launches() -> None:
    multi_hash(torch.arange(5), (0, 2, 5), [linear_hashes([3, 4]), linear_hashes([5])], impl="triton")


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_node_of_torch_compile(impl):
    ids, hashes = torch.tensor([3, -1, 2**62]), [linear_hashes([3, 4]), linear_hashes([5])]
    torch.library.opcheck(
        torch.ops.recis.multi_hash.default, (ids, [0, 1, 3], [2, 1], [1, 83, 3, 3, 7, 4, 1, 5, 5], impl)
    )

    def run(ids):
        return multi_hash(ids, (0, 1, 3), hashes, impl=impl)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(ids)
    assert all(torch.equal(a, b) for a, b in zip(compiled, run(ids), strict=True))


@pytest.mark.parametrize("buckets", [[], [1] * 5, [0], [-2], [2**60]], ids=str)
def test_wrong_buckets_are_refused(buckets):
    with pytest.raises(ValueError, match="num_buckets must"):
        linear_hashes(buckets)


def test_wrong_ids_are_refused():
    with pytest.raises(ValueError, match="int64"):
        multi_hash(torch.tensor([1.0]), (0, 1), [linear_hashes([5])])
