"""Unsigned modulo of ids: conformance values, limits, many columns in one call."""

import pytest
import torch

from recis_kernels.id_mod import id_mod

IMPLS = ["numba", "torch", "triton", "reference"]


@pytest.mark.parametrize("impl", IMPLS)
def test_conformance_values(impl):  # A7
    ids = torch.tensor([1001, -1, -5, 2**62])
    assert id_mod(ids, (0, 4), [1000], impl=impl).tolist() == [1, 615, 611, 904]
    fused = id_mod(torch.tensor([-1, 7, -5]), (0, 2, 3), [10, 7], impl=impl)
    assert fused.tolist() == [5, 7, 4]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("modulus", [1, 2, 3, 64, 1000, 2**40, 2**62 + 1, 2**63 - 1])
def test_limits(impl, modulus):
    numbers = [0, 1, -1, 2**63 - 1, -(2**63), *torch.randint(-(2**62), 2**62, (50,)).tolist()]
    got = id_mod(torch.tensor(numbers), (0, len(numbers)), [modulus], impl=impl)
    assert got.tolist() == [number % 2**64 % modulus for number in numbers]


def test_columns_across_threads_and_empty_columns():
    ids = torch.randint(-(2**62), 2**62, (100_000,))
    columns, moduli = (0, 0, 50_001, 50_001, 100_000), [3, 1000, 9, 77]
    want = id_mod(ids, columns, moduli, impl="torch")
    before = ids.clone()
    assert torch.equal(id_mod(ids, columns, moduli, impl="numba"), want)
    assert torch.equal(ids, before)
    assert id_mod(ids[:0], (0,), []).tolist() == []


def test_many_programs_per_column_and_empty_columns():
    ids = torch.randint(-(2**62), 2**62, (6000, 2))[:, 1]
    columns, moduli = (0, 0, 1, 2500, 2500, 2500, 4548, 6000, 6000), [3, 1000, 64, 7, 9, 2**62 + 1, 77, 5]
    want = id_mod(ids, columns, moduli, impl="reference")
    assert torch.equal(id_mod(ids, columns, moduli, impl="triton"), want)
    assert id_mod(ids[:0], (0, 0), [3], impl="triton").tolist() == []
    assert id_mod(ids[:0], (0,), [], impl="triton").tolist() == []


def launches() -> None:
    id_mod(torch.arange(5), (0, 2, 5), [7, 8], impl="triton")


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_node_of_torch_compile(impl):
    ids = torch.tensor([-1, 7, -5])
    torch.library.opcheck(torch.ops.recis.id_mod.default, (ids, [0, 2, 3], [10, 7], impl))
    compiled = torch.compile(
        lambda ids: id_mod(ids, (0, 2, 3), [10, 7], impl=impl), fullgraph=True, backend="aot_eager"
    )
    assert compiled(ids).tolist() == [5, 7, 4]


@pytest.mark.parametrize("modulus", [0, -3, 2**63])
def test_wrong_moduli_are_refused(modulus):
    with pytest.raises(ValueError, match=r"in \[1, 2\*\*63\)"):
        id_mod(torch.tensor([1]), (0, 1), [modulus])


def test_wrong_ids_are_refused():
    with pytest.raises(ValueError, match="int64"):
        id_mod(torch.tensor([1], dtype=torch.int32), (0, 1), [3])
    with pytest.raises(ValueError, match="from 0 to 1"):
        id_mod(torch.tensor([1]), (0, 2), [3])
