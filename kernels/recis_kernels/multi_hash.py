"""Map each id to up to four buckets by four different linear hashes, so that two ids seldom share all of them.

    out[k] = ((x * mul_k mod p_k) + p_k) mod p_k mod bucket_k      k < 4
    mul = 1, 3, 5, 7;   p_k = largest prime <= 29, 47, 67, 83 times bucket_k

The product wraps like int64 and mod is C's remainder, so the middle step makes it non-negative. All columns of a call are
one concatenation (see columns.py) with their own buckets. Cost: two divisions per output.
Source: RecIS 1.0 (alibaba/RecIS), whose numbers these are; the composition of partial embeddings is the caller's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from recis_kernels.calibration import current
from recis_kernels.columns import (
    block_table,
    check_columns,
    column_of_program,
    parameter_of_column,
    run_columns,
    values_of_program,
)
from recis_kernels.dispatch import Impl, choose, jit, launch, njit, tl

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
    outputs = [len(one) for one in hashes]
    numbers = [number for one in hashes for h in one for number in (h.multiplier, h.prime, h.num_buckets)]
    flat = (_op if torch.compiler.is_compiling() else _run)(ids, column_offsets, outputs, numbers, impl)
    sizes = [stop - start for start, stop in pairwise(column_offsets)]
    parts = flat.split([count * size for count, size in zip(outputs, sizes, strict=True)])
    return [part.view(count, size) for part, count, size in zip(parts, outputs, sizes, strict=True)]


def _run(
    ids: Tensor, column_offsets: Sequence[int], outputs: Sequence[int], numbers: Sequence[int], impl: str
) -> Tensor:
    """Return all outputs one after another, column by column; `numbers` are the (multiplier, prime, buckets) of each."""
    version = choose(impl, ids, triton=_triton, numba=_numba, torch=_torch, reference=_reference)  # type: ignore[arg-type]
    return version(ids, column_offsets, outputs, numbers)


_op = torch.library.custom_op("recis::multi_hash", _run, mutates_args=())


@_op.register_fake
def _(ids, column_offsets, outputs, numbers, impl):
    return ids.new_empty(_starts(column_offsets, outputs)[-1])


def _starts(column_offsets: Sequence[int], outputs: Sequence[int]) -> list[int]:
    """Return where each column's outputs start, and at the end their total."""
    sizes = (count * (stop - start) for count, (start, stop) in zip(outputs, pairwise(column_offsets), strict=True))
    return list(accumulate(sizes, initial=0))


def _per_column(outputs: Sequence[int], numbers: Sequence[int]) -> list[np.ndarray]:
    """Return per column its parameters, int64 [K, 3]."""
    table = np.array(numbers, dtype=np.int64).reshape(-1, 3)
    return np.split(table, list(accumulate(outputs))[:-1]) if outputs else []


def _reference(ids: Tensor, column_offsets: Sequence[int], outputs: Sequence[int], numbers: Sequence[int]) -> Tensor:
    out = []
    for column, table in enumerate(_per_column(outputs, numbers)):
        part = ids[column_offsets[column] : column_offsets[column + 1]].tolist()
        out += [_one_reference(value, *one) for one in table.tolist() for value in part]
    return torch.tensor(out, dtype=torch.int64, device=ids.device)


def _one_reference(value: int, multiplier: int, prime: int, num_buckets: int) -> int:
    product = (value * multiplier + 2**63) % 2**64 - 2**63
    remainder = abs(product) % prime * (-1 if product < 0 else 1)
    return (remainder + prime) % prime % num_buckets


def _torch(ids: Tensor, column_offsets: Sequence[int], outputs: Sequence[int], numbers: Sequence[int]) -> Tensor:
    out = [ids.new_empty(0)]
    for column, table in enumerate(_per_column(outputs, numbers)):
        part = ids[column_offsets[column] : column_offsets[column + 1]]
        # torch's remainder is already in [0, p): what the C form reaches by adding p
        out += [part * multiplier % prime % buckets for multiplier, prime, buckets in table.tolist()]
    return torch.cat(out)


def _numba(ids: Tensor, column_offsets: Sequence[int], outputs: Sequence[int], numbers: Sequence[int]) -> Tensor:
    source, starts = ids.contiguous().numpy(), _starts(column_offsets, outputs)
    out = torch.empty(starts[-1], dtype=torch.int64)
    tables, flat = _per_column(outputs, numbers), out.numpy()
    targets = [
        flat[start:stop].reshape(len(one), -1) for one, (start, stop) in zip(tables, pairwise(starts), strict=True)
    ]

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


def _triton(ids: Tensor, column_offsets: Sequence[int], outputs: Sequence[int], numbers: Sequence[int]) -> Tensor:
    starts = _starts(column_offsets, outputs)
    out = ids.new_empty(starts[-1])
    rows = np.zeros((3 * len(MULTIPLIERS), len(outputs)), dtype=np.int64)  # row 3 k + j: number j of output k
    for column, table in enumerate(_per_column(outputs, numbers)):
        rows[: table.size, column] = table.reshape(-1)
    parameters = (outputs, starts[:-1], *rows.tolist())
    block = current().block_items
    table, programs = block_table(column_offsets, parameters, block, ids.device)
    launch(_multi_hash_kernel, (programs,), ids.contiguous(), table, out, len(outputs), BLOCK=block, num_warps=4)
    return out


@jit
def _multi_hash_kernel(ids_ptr, table_ptr, out_ptr, num_columns, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    column = column_of_program(table_ptr, program, num_columns)
    place, mask = values_of_program(table_ptr, program, column, num_columns, BLOCK)
    ids = tl.load(ids_ptr + place, mask=mask, other=0)
    width = num_columns + 1
    first, last = tl.load(table_ptr + width + column), tl.load(table_ptr + width + column + 1)
    target = parameter_of_column(table_ptr, column, num_columns, 1) + place - first
    for k in range(parameter_of_column(table_ptr, column, num_columns, 0)):
        numbers_ptr = table_ptr + (4 + 3 * k) * width + column
        prime = tl.load(numbers_ptr + width)
        rest = ids * tl.load(numbers_ptr) % prime  # C's remainder: the sign of the product
        rest = tl.where(rest < 0, rest + prime, rest)
        tl.store(out_ptr + target + k * (last - first), rest % tl.load(numbers_ptr + 2 * width), mask=mask)


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
