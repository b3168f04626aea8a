"""Cross two id features: one new id for every pair of distinct ids of a sample.

    row r: for a in distinct(A_r), for b in distinct(B_r): key = MurmurHash64A(16 bytes: a, b little endian)

Distinct ids stand in the order of their first occurrence and a duplicate keeps its first weight; pairs are a-major, their
weights multiply, and (a, b) and (b, a) differ. Crosses of many column pairs are one call: their rows one after another,
with the number of buckets per group of rows. Cost: a hash and a write per pair, plus finding the distinct ids
(ragged_distinct.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from recis_kernels.byte_hash import murmur_pair
from recis_kernels.columns import check_columns, column_of_value
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.jagged import check_offsets_form, lengths_to_offsets
from recis_kernels.philox import murmur64a
from recis_kernels.ragged_distinct import first_occurrences
from recis_kernels.threads import run_parts, split


@dataclass(frozen=True, slots=True)
class Crossed:
    """Crossed ids [M], the offsets [R + 1] of their rows, and their weights [M] or None."""

    values: Tensor
    offsets: Tensor
    weights: Tensor | None


def feature_cross(
    a: Tensor,
    a_offsets: Tensor,
    b: Tensor,
    b_offsets: Tensor,
    row_offsets: Sequence[int],
    num_buckets: Sequence[int | None],
    *,
    a_weights: Tensor | None = None,
    b_weights: Tensor | None = None,
    impl: Impl = "auto",
) -> Crossed:
    """Cross the ids of every row.

    Args:
        a, b: int64 ids of all column pairs.
        a_offsets, b_offsets: [R + 1] int64, the rows of a and of b.
        row_offsets: C + 1 ints; column pair c owns rows row_offsets[c] .. row_offsets[c + 1] - 1.
        num_buckets: per pair None (raw), 0 (AND 2**63 - 1) or n (unsigned mod n).
        a_weights, b_weights: fp32 like a and b, or None for ones. The result has weights if either is given.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    for name, ids, offsets, weights in (("a", a, a_offsets, a_weights), ("b", b, b_offsets, b_weights)):
        if ids.ndim != 1 or ids.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 ids [L]; got {tuple(ids.shape)} {ids.dtype}")
        check_offsets_form(offsets)
        if weights is not None and (weights.shape != ids.shape or weights.dtype != torch.float32):
            raise ValueError(
                f"{name}_weights must be fp32 {tuple(ids.shape)}; got {weights.dtype} {tuple(weights.shape)}"
            )
    if a_offsets.numel() != b_offsets.numel():
        raise ValueError(f"a has {a_offsets.numel() - 1} rows and b has {b_offsets.numel() - 1}; they must be equal")
    check_columns(a_offsets.numel() - 1, row_offsets, len(num_buckets))
    weighted = a_weights is not None or b_weights is not None
    if weighted:
        a_weights = torch.ones(a.shape, device=a.device) if a_weights is None else a_weights
        b_weights = torch.ones(b.shape, device=b.device) if b_weights is None else b_weights
    version = choose(impl, a, numba=_numba, reference=_reference)
    return version(a, a_offsets, b, b_offsets, row_offsets, num_buckets, a_weights, b_weights)


def _reference(a, a_offsets, b, b_offsets, row_offsets, num_buckets, a_weights, b_weights) -> Crossed:
    values, weights, lengths = [], [], []
    left, right = _rows(a, a_offsets, a_weights), _rows(b, b_offsets, b_weights)
    for column, (start, stop) in enumerate(pairwise(row_offsets)):
        for row in range(start, stop):
            lengths.append(len(left[row]) * len(right[row]))
            for x, x_weight in left[row].items():
                for y, y_weight in right[row].items():
                    text = x.to_bytes(8, "little", signed=True) + y.to_bytes(8, "little", signed=True)
                    bits, buckets = murmur64a(text), num_buckets[column]
                    if buckets is not None:
                        bits = bits % buckets if buckets else bits & (1 << 63) - 1
                    values.append(bits - (1 << 64) if bits >> 63 else bits)
                    weights.append(x_weight * y_weight)
    offsets = lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64)).to(a.device)
    out_weights = None if a_weights is None else torch.tensor(weights, dtype=torch.float32, device=a.device)
    return Crossed(torch.tensor(values, dtype=torch.int64, device=a.device), offsets, out_weights)


def _rows(ids: Tensor, offsets: Tensor, weights: Tensor | None) -> list[dict[int, float]]:
    numbers = ids.tolist()
    each = [1.0] * len(numbers) if weights is None else weights.tolist()
    rows = []
    for start, stop in pairwise(offsets.tolist()):
        first: dict[int, float] = {}
        for position in range(start, stop):
            first.setdefault(numbers[position], each[position])
        rows.append(first)
    return rows


def _numba(a, a_offsets, b, b_offsets, row_offsets, num_buckets, a_weights, b_weights) -> Crossed:
    num_rows = a_offsets.numel() - 1
    distinct_a, count_a = first_occurrences(a, a_offsets)
    distinct_b, count_b = first_occurrences(b, b_offsets)
    offsets = lengths_to_offsets(torch.from_numpy(count_a * count_b))
    values = torch.empty(int(offsets[-1]), dtype=torch.int64)
    weights = None if a_weights is None else torch.empty(values.shape[0], dtype=torch.float32)
    buckets = column_of_value(row_offsets, [-1 if n is None else n for n in num_buckets], a.device)
    none = np.empty(0, dtype=np.float32)
    arrays = (
        *(
            a.contiguous().numpy(),
            a_offsets.numpy(),
            distinct_a,
            count_a,
            none if a_weights is None else a_weights.numpy(),
        ),
        *(
            b.contiguous().numpy(),
            b_offsets.numpy(),
            distinct_b,
            count_b,
            none if b_weights is None else b_weights.numpy(),
        ),
        *(buckets.numpy(), offsets.numpy(), values.numpy(), none if weights is None else weights.numpy()),
    )
    run_parts(lambda start, stop: _cross(*arrays, start, stop), split(num_rows, min_items=512))
    return Crossed(values, offsets, weights)


@njit
def _cross(
    a,
    a_ends,
    a_first,
    a_count,
    a_weights,
    b,
    b_ends,
    b_first,
    b_count,
    b_weights,
    buckets,
    ends,
    out,
    weights,
    start,
    stop,
):
    for row in range(start, stop):
        at, modulus = ends[row], buckets[row]
        for i in range(a_ends[row], a_ends[row] + a_count[row]):
            for j in range(b_ends[row], b_ends[row] + b_count[row]):
                bits = murmur_pair(a[a_first[i]], b[b_first[j]])
                if modulus > 0:
                    bits = bits % np.uint64(modulus)
                elif modulus == 0:
                    bits = (bits << np.uint64(1)) >> np.uint64(1)
                out[at] = np.int64(bits)
                if weights.size:
                    weights[at] = a_weights[a_first[i]] * b_weights[b_first[j]]
                at += 1
