"""Map each id to up to four buckets by four different linear hashes, so that two ids seldom share all of them.

    out[k] = ((x * mul_k mod p_k) + p_k) mod p_k mod bucket_k      k < 4
    mul = 1, 3, 5, 7;   p_k = largest prime <= 29, 47, 67, 83 times bucket_k

The product wraps like int64 and mod is C's remainder, so the middle step makes it non-negative. All columns of a call are
one concatenation (see columns.py) with their own buckets. Cost: two divisions per output.
Source: RecIS 1.0 (alibaba/RecIS), whose numbers these are; the composition of partial embeddings is the caller's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from recis_kernels.columns import check_columns, run_columns
from recis_kernels.dispatch import Impl, choose, njit

MULTIPLIERS = (1, 3, 5, 7)
_PRIME_FACTORS = (29, 47, 67, 83)
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # decide primality of every number below 2**64


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearHash:
    """Parameters of one output."""

    multiplier: int
    prime: int
    num_buckets: int


def linear_hashes(num_buckets: Sequence[int]) -> tuple[LinearHash, ...]:
    """Return the parameters of the outputs for these bucket counts.

    Raises:
        ValueError: there are none or more than four, or a count is outside [1, 2**63 / 83).
    """
    if not 1 <= len(num_buckets) <= len(MULTIPLIERS):
        raise ValueError(f"num_buckets must name 1 to {len(MULTIPLIERS)} counts; got {len(num_buckets)}")
    for buckets in num_buckets:
        if not 1 <= buckets < 2**63 // _PRIME_FACTORS[-1]:
            raise ValueError(f"num_buckets must be in [1, {2**63 // _PRIME_FACTORS[-1]}); got {buckets}")
    return tuple(
        LinearHash(multiplier=multiplier, prime=_prime_at_most(factor * buckets), num_buckets=buckets)
        for multiplier, factor, buckets in zip(MULTIPLIERS, _PRIME_FACTORS, num_buckets, strict=False)
    )


def multi_hash(
    ids: Tensor, column_offsets: Sequence[int], hashes: Sequence[Sequence[LinearHash]], *, impl: Impl = "auto"
) -> list[Tensor]:
    """Return per column c its outputs, int64 [K_c, L_c]; row k is hashes[c][k] of the column's ids.

    Args:
        ids: int64 [L].
        column_offsets: C + 1 ints, see columns.py.
        hashes: per column what linear_hashes returns.

    Raises:
        ValueError: ids is not int64 [L], or columns and hashes do not fit together.
    """
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 [L]; got {tuple(ids.shape)} {ids.dtype}")
    check_columns(ids.shape[0], column_offsets, len(hashes))
    return choose(impl, ids, numba=_numba, torch=_torch, reference=_reference)(ids, column_offsets, hashes)


def _reference(ids: Tensor, column_offsets: Sequence[int], hashes: Sequence[Sequence[LinearHash]]) -> list[Tensor]:
    out = []
    for column, parameters in enumerate(hashes):
        part = ids[column_offsets[column] : column_offsets[column + 1]].tolist()
        rows = [[_one_reference(value, parameter) for value in part] for parameter in parameters]
        out.append(torch.tensor(rows, dtype=torch.int64, device=ids.device).view(len(parameters), len(part)))
    return out


def _one_reference(value: int, parameter: LinearHash) -> int:
    product = (value * parameter.multiplier + 2**63) % 2**64 - 2**63
    remainder = abs(product) % parameter.prime * (-1 if product < 0 else 1)
    return (remainder + parameter.prime) % parameter.prime % parameter.num_buckets


def _torch(ids: Tensor, column_offsets: Sequence[int], hashes: Sequence[Sequence[LinearHash]]) -> list[Tensor]:
    out = []
    for column, parameters in enumerate(hashes):
        part = ids[column_offsets[column] : column_offsets[column + 1]]
        # torch's remainder is already in [0, p): what the C form reaches by adding p
        out.append(torch.stack([part * one.multiplier % one.prime % one.num_buckets for one in parameters]))
    return out


def _numba(ids: Tensor, column_offsets: Sequence[int], hashes: Sequence[Sequence[LinearHash]]) -> list[Tensor]:
    source = ids.contiguous().numpy()
    sizes = [stop - start for start, stop in pairwise(column_offsets)]
    out = [torch.empty(len(one), size, dtype=torch.int64) for one, size in zip(hashes, sizes, strict=True)]
    tables = [np.array([(h.multiplier, h.prime, h.num_buckets) for h in one], dtype=np.int64) for one in hashes]
    targets = [one.numpy() for one in out]

    def loop(column: int, start: int, stop: int) -> None:
        first = column_offsets[column]
        _hash(source[start:stop], targets[column][:, start - first : stop - first], tables[column])

    run_columns(loop, ids.shape[0], column_offsets, min_items=4096)
    return out


@njit
def _hash(source, target, table):
    for k in range(table.shape[0]):
        multiplier, prime, buckets = table[k]
        for i in range(source.shape[0]):
            product = source[i] * multiplier
            rest = product - product // prime * prime  # floor division, so in [0, prime)
            target[k, i] = rest % buckets


def _prime_at_most(limit: int) -> int:
    while not _is_prime(limit):
        limit -= 1
    return limit


def _is_prime(number: int) -> bool:
    """Miller-Rabin with witnesses that are exact below 2**64."""
    if number < 2:
        return False
    for prime in _WITNESSES:
        if number % prime == 0:
            return number == prime
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(_passes(number, witness, odd, twos) for witness in _WITNESSES)


def _passes(number: int, witness: int, odd: int, twos: int) -> bool:
    power = pow(witness, odd, number)
    if power in (1, number - 1):
        return True
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False
