"""Cross two id features: one new id for every pair of distinct ids of a sample.

    row r: for a in distinct(A_r), for b in distinct(B_r): key = MurmurHash64A(16 bytes: a, b little endian)

Distinct ids stand in the order of their first occurrence and a duplicate keeps its first weight; pairs are a-major, their
weights multiply, and (a, b) and (b, a) differ. Crosses of many column pairs are one call: their rows one after another,
with the number of buckets per group of rows. Cost: a hash and a write per pair, plus finding the distinct ids
(ragged_distinct.py); on a GPU seven launches of our own, whatever the number of columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from recis_kernels.byte_hash import murmur_pair
from recis_kernels.byte_hash_triton import largest
from recis_kernels.byte_hash_triton import murmur_pair as device_murmur_pair
from recis_kernels.columns import check_columns, column_of_value, to_device
from recis_kernels.contents import check_offsets
from recis_kernels.dispatch import Impl, choose, jit, launch, njit, tl
from recis_kernels.jagged import check_offsets_form, lengths_to_offsets
from recis_kernels.jagged_triton import bag_of_place
from recis_kernels.philox import murmur64a
from recis_kernels.ragged_distinct import distinct_mask, first_occurrences
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
    """Cross the ids of every row. One host sync on a GPU: the number of pairs.

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
        check_offsets(offsets, ids.shape[0], name=f"{name}_offsets")
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
    codes = [-1 if buckets is None else buckets for buckets in num_buckets]
    run = _op if torch.compiler.is_compiling() else _run
    values, offsets, weights = run(a, a_offsets, b, b_offsets, row_offsets, codes, a_weights, b_weights, impl)
    return Crossed(values, offsets, weights if weighted else None)


def _run(
    a: Tensor,
    a_offsets: Tensor,
    b: Tensor,
    b_offsets: Tensor,
    row_offsets: Sequence[int],
    codes: Sequence[int],
    a_weights: Tensor | None,
    b_weights: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, offsets and weights (empty where there are none); a code is -1 for None, else the buckets."""
    version = choose(impl, a, triton=_triton, numba=_numba, reference=_reference)  # type: ignore[arg-type]
    return version(a, a_offsets, b, b_offsets, row_offsets, codes, a_weights, b_weights)


_op = torch.library.custom_op("recis::feature_cross", _run, mutates_args=())


@_op.register_fake
def _(a, a_offsets, b, b_offsets, row_offsets, codes, a_weights, b_weights, impl):
    num_pairs = torch.library.get_ctx().new_dynamic_size()
    weights = a.new_empty(0 if a_weights is None else num_pairs, dtype=torch.float32)
    return a.new_empty(num_pairs), a_offsets.new_empty(a_offsets.shape, dtype=torch.int64), weights


def _reference(a, a_offsets, b, b_offsets, row_offsets, codes, a_weights, b_weights) -> tuple[Tensor, Tensor, Tensor]:
    values, weights, lengths = [], [], []
    left, right = _rows(a, a_offsets, a_weights), _rows(b, b_offsets, b_weights)
    for column, (start, stop) in enumerate(pairwise(row_offsets)):
        for row in range(start, stop):
            lengths.append(len(left[row]) * len(right[row]))
            for x, x_weight in left[row].items():
                for y, y_weight in right[row].items():
                    text = x.to_bytes(8, "little", signed=True) + y.to_bytes(8, "little", signed=True)
                    bits, buckets = murmur64a(text), codes[column]
                    if buckets >= 0:
                        bits = bits % buckets if buckets else bits & (1 << 63) - 1
                    values.append(bits - (1 << 64) if bits >> 63 else bits)
                    weights.append(x_weight * y_weight)
    offsets = lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64)).to(a.device)
    out_weights = torch.tensor(weights if a_weights is not None else [], dtype=torch.float32, device=a.device)
    return torch.tensor(values, dtype=torch.int64, device=a.device), offsets, out_weights


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


def _numba(a, a_offsets, b, b_offsets, row_offsets, codes, a_weights, b_weights) -> tuple[Tensor, Tensor, Tensor]:
    distinct_a, count_a = first_occurrences(a, a_offsets)
    distinct_b, count_b = first_occurrences(b, b_offsets)
    offsets = lengths_to_offsets(torch.from_numpy(count_a * count_b))
    values = torch.empty(int(offsets[-1]), dtype=torch.int64)
    weights = torch.empty(0 if a_weights is None else values.shape[0], dtype=torch.float32)
    buckets = column_of_value(row_offsets, codes, a.device)
    none = np.empty(0, dtype=np.float32)

    def side(ids, ends, positions, counts, each):
        return ids.contiguous().numpy(), ends.numpy(), positions, counts, none if each is None else each.numpy()

    arrays = (
        *side(a, a_offsets, distinct_a, count_a, a_weights),
        *side(b, b_offsets, distinct_b, count_b, b_weights),
        *(buckets.numpy(), offsets.numpy(), values.numpy(), weights.numpy()),
    )
    run_parts(lambda start, stop: _cross(*arrays, start, stop), split(count_a.size, min_items=512))
    return values, offsets, weights


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


# ---- Triton: a lane takes one pair, so a row with many pairs spreads over many programs

_PER_PROGRAM = 512


def _triton(a, a_offsets, b, b_offsets, row_offsets, codes, a_weights, b_weights) -> tuple[Tensor, Tensor, Tensor]:
    device, num_rows, num_columns = a.device, a_offsets.numel() - 1, len(codes)
    first_a, ends_a = _distinct_places(a, a_offsets)
    first_b, ends_b = _distinct_places(b, b_offsets)
    offsets = lengths_to_offsets(ends_a.diff() * ends_b.diff())
    num_pairs = int(offsets[-1])
    values = torch.empty(num_pairs, dtype=torch.int64, device=device)
    weights = torch.empty(0 if a_weights is None else num_pairs, dtype=torch.float32, device=device)
    if num_pairs == 0:
        return values, offsets, weights
    rules = to_device(torch.tensor([list(row_offsets), [*codes, 0]], dtype=torch.int64), device)
    sides = a.contiguous(), first_a, ends_a, b.contiguous(), first_b, ends_b
    each = [values if one is None else one.contiguous() for one in (a_weights, b_weights)]
    launch(
        _feature_cross_kernel,
        (-(-num_pairs // _PER_PROGRAM),),
        *(*sides, *each, offsets, rules, values, weights if weights.numel() else values),
        *(num_rows, num_columns, num_pairs),
        WEIGHTED=a_weights is not None,
        BLOCK=_PER_PROGRAM,
        num_warps=4,
    )
    return values, offsets, weights


def _distinct_places(ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions of the first occurrences, at the front of int64 [L], and how many lie before each row [R + 1]."""
    num_values = ids.shape[0]
    kept = distinct_mask(ids, offsets, (0, offsets.numel() - 1), (0,))
    before = lengths_to_offsets(kept.to(torch.int64))
    positions = torch.empty(num_values, dtype=torch.int64, device=ids.device)
    if num_values:
        grid = (-(-num_values // _PER_PROGRAM),)
        launch(_feature_cross_pack_kernel, grid, kept, before, positions, num_values, BLOCK=_PER_PROGRAM)
    return positions, before.index_select(0, offsets)


@jit
def _feature_cross_pack_kernel(kept_ptr, before_ptr, positions_ptr, num_values, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < num_values
    kept = tl.load(kept_ptr + place, mask=mask, other=0) != 0
    target = tl.load(before_ptr + place, mask=mask, other=0)
    tl.store(positions_ptr + target, place, mask=mask & kept)


@jit
def _feature_cross_kernel(
    a_ptr,
    a_first_ptr,
    a_ends_ptr,
    b_ptr,
    b_first_ptr,
    b_ends_ptr,
    a_weights_ptr,
    b_weights_ptr,
    offsets_ptr,
    rules_ptr,
    out_ptr,
    weights_ptr,
    num_rows,
    num_columns,
    num_pairs,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < num_pairs
    row = bag_of_place(offsets_ptr, place, num_rows)
    pair = place - tl.load(offsets_ptr + row)
    b_start = tl.load(b_ends_ptr + row)
    b_count = tl.maximum(tl.load(b_ends_ptr + row + 1) - b_start, 1)
    i = tl.load(a_first_ptr + tl.load(a_ends_ptr + row) + pair // b_count, mask=mask, other=0)
    j = tl.load(b_first_ptr + b_start + pair % b_count, mask=mask, other=0)
    bits = device_murmur_pair(tl.load(a_ptr + i, mask=mask, other=0), tl.load(b_ptr + j, mask=mask, other=0))
    buckets = tl.load(rules_ptr + num_columns + 1 + bag_of_place(rules_ptr, row, num_columns))
    if largest(buckets) > 0:
        bits = tl.where(buckets > 0, bits % tl.maximum(buckets, 1).to(tl.uint64), bits)
    bits = tl.where(buckets == 0, bits & 0x7FFFFFFFFFFFFFFF, bits)
    tl.store(out_ptr + place, bits.to(tl.int64), mask=mask)
    if WEIGHTED:
        a_weight = tl.load(a_weights_ptr + i, mask=mask, other=0)
        tl.store(weights_ptr + place, a_weight * tl.load(b_weights_ptr + j, mask=mask, other=0), mask=mask)
