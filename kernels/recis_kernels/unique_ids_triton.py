"""Distinct pairs on a GPU without a sort: tickets in a scratch hash table, then a stable numbering by partition.

    ticket   each position probes for its pair: CAS of the position into an empty word, else atomic_min on the word whose
             position holds an equal pair; so every word ends as the first position of its pair
    rank     first positions count those of their partition before them in their block, and the block's total
    number   totals summed over (partition, block) give the number of each pair: by partition, then by first position
    inverse  every position reads the number of its first one and counts itself

The result is that of the CPU loops, element by element, whoever won a CAS. About 90 bytes move per id, 8 of them at random
in a table at load 0.5 or less; the positions of one id meet in one word, so a position that is not smaller leaves it alone.
"""

# pyright: reportOperatorIssue=false
# (triton types its reductions as a tensor or a tuple)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recis_kernels.dispatch import jit, launch, tl, triton
from recis_kernels.philox_triton import hash64

_BLOCK = 128
_RANK_BLOCK = 64  # compared all with all: 16 pairs a thread
_FREE = 0x7FFFFFFF  # larger than any position
_IDLE_WORDS = 32  # where lanes without work aim their CAS
FREE: Any = _FREE if triton is None else tl.constexpr(_FREE)


def padded(ids: Tensor, segments: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ids, segments, inverse and counts, [L] each with zeros after the distinct pairs, and their number [1].

    Args:
        ids: int64 [L], L at least 1.  segments: int32 [L] or [1].  bits: of the pair hash that number a partition.
    """
    num_ids, device = ids.numel(), ids.device
    num_blocks, stride = -(-num_ids // _RANK_BLOCK), 0 if segments.numel() == 1 else 1
    num_words = 1 << (2 * num_ids - 1).bit_length()
    words = torch.full((num_words + _IDLE_WORDS,), _FREE, dtype=torch.int32, device=device)
    word_of = torch.empty(num_ids, dtype=torch.int64, device=device)
    grid, pairs = (-(-num_ids // _BLOCK),), (ids, segments, num_ids, stride)
    launch(_unique_ticket_kernel, grid, *pairs, words, word_of, num_words, BLOCK=_BLOCK)
    totals = torch.zeros(num_blocks << bits, dtype=torch.int32, device=device)
    ranks = torch.empty(num_ids, dtype=torch.int32, device=device)
    where = (words, word_of, totals, num_blocks, bits)
    launch(_unique_rank_kernel, (num_blocks,), *pairs, *where, ranks, BLOCK=_RANK_BLOCK, num_warps=8)
    ends = totals.cumsum(0, dtype=torch.int32)
    out_ids = torch.zeros(num_ids, dtype=torch.int64, device=device)
    out_segments, counts, inverse = (torch.zeros(num_ids, dtype=torch.int32, device=device) for _ in range(3))
    out = (out_ids, out_segments)
    launch(_unique_number_kernel, (num_blocks,), *pairs, *where, ends, ranks, *out, BLOCK=_RANK_BLOCK, num_warps=2)
    launch(_unique_inverse_kernel, grid, words, word_of, ranks, inverse, counts, num_ids, BLOCK=_BLOCK)
    return out_ids, out_segments, inverse, counts, ends[-1:].to(torch.int64)


@jit
def _pairs(ids_ptr, segments_ptr, num_ids, stride, BLOCK: tl.constexpr):
    """Return this program's positions [BLOCK], their mask, ids, segments and pair hashes."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = position < num_ids
    ids = tl.load(ids_ptr + position, mask=mask, other=0)
    segment = tl.load(segments_ptr + position * stride, mask=mask, other=0)
    mixed = hash64(ids) ^ (segment.to(tl.int64).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15)
    return position, mask, ids, segment, mixed


@jit
def _first_ones(position, mask, mixed, words_ptr, word_of_ptr, num_blocks, bits):
    """Return who is the first position of its pair, its partition, and where (partition, block) has its total."""
    first = tl.load(words_ptr + tl.load(word_of_ptr + position, mask=mask, other=0), mask=mask, other=-1)
    # after a shift by 1: one by 64 - 0 is undefined
    partition = ((mixed >> 1) >> (63 - bits).to(tl.uint64)).to(tl.int64)
    return mask & (first == position), partition, partition * num_blocks + tl.program_id(0)


@jit
def _unique_ticket_kernel(
    ids_ptr, segments_ptr, num_ids, stride, words_ptr, word_of_ptr, num_words, BLOCK: tl.constexpr
):
    """Find or take the word of each position's pair and leave there the smallest position."""
    position, mask, ids, segment, mixed = _pairs(ids_ptr, segments_ptr, num_ids, stride, BLOCK)
    ticket = position.to(tl.int32)
    free = tl.full([BLOCK], FREE, tl.int32)
    idle = num_words + (tl.arange(0, BLOCK) & 31)
    last = (num_words - 1).to(tl.int64)
    word = (mixed >> 20).to(tl.int64) & last
    searching = mask
    steps = num_words
    while (steps > 0) & (tl.max(searching.to(tl.int32)) > 0):
        there = tl.load(words_ptr + word, mask=searching, other=0, volatile=True)
        is_trying = searching & (there == FREE)
        at = tl.where(is_trying, word, idle)
        before = tl.atomic_cas(words_ptr + at, free, tl.where(is_trying, ticket, free), sem="relaxed")
        there = tl.where(is_trying, before, there)
        has_won = is_trying & (before == FREE)
        # a word only ever changes between positions of one pair, so any of them tells which pair that is
        taken = searching & (has_won == 0)
        is_same = taken & (tl.load(ids_ptr + there, mask=taken, other=0) == ids)
        is_same = is_same & (tl.load(segments_ptr + there.to(tl.int64) * stride, mask=is_same, other=0) == segment)
        tl.atomic_min(words_ptr + word, ticket, mask=is_same & (ticket < there), sem="relaxed")
        searching = taken & (is_same == 0)
        word = tl.where(searching, (word + 1) & last, word)
        steps -= 1
    tl.store(word_of_ptr + position, word, mask=mask)


@jit
def _unique_rank_kernel(
    ids_ptr, segments_ptr, num_ids, stride, words_ptr, word_of_ptr, totals_ptr, num_blocks, bits, ranks_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write how many first positions of the same partition come before each in its block; totals of those there are."""
    position, mask, _, _, mixed = _pairs(ids_ptr, segments_ptr, num_ids, stride, BLOCK)
    is_first, partition, total_at = _first_ones(position, mask, mixed, words_ptr, word_of_ptr, num_blocks, bits)
    name = tl.where(is_first, partition, -1).to(tl.int32)  # the rank of others is not used
    lane = tl.arange(0, BLOCK)
    is_same = name[:, None] == name[None, :]
    rank = tl.sum((is_same & (lane[None, :] < lane[:, None])).to(tl.int32), axis=1)
    total = tl.sum(is_same.to(tl.int32), axis=1)
    tl.store(ranks_ptr + position, rank, mask=mask)
    tl.store(totals_ptr + total_at, total, mask=is_first & (rank == 0))


@jit
def _unique_number_kernel(
    ids_ptr, segments_ptr, num_ids, stride, words_ptr, word_of_ptr, totals_ptr, num_blocks, bits, ends_ptr, ranks_ptr,
    out_ids_ptr, out_segments_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn the rank of each first position into the number of its pair, and write the pair there."""
    position, mask, ids, segment, mixed = _pairs(ids_ptr, segments_ptr, num_ids, stride, BLOCK)
    is_first, _, total_at = _first_ones(position, mask, mixed, words_ptr, word_of_ptr, num_blocks, bits)
    start = tl.load(ends_ptr + total_at, mask=is_first, other=0) - tl.load(
        totals_ptr + total_at, mask=is_first, other=0
    )
    number = start + tl.load(ranks_ptr + position, mask=is_first, other=0)
    tl.store(ranks_ptr + position, number, mask=is_first)
    tl.store(out_ids_ptr + number, ids, mask=is_first)
    tl.store(out_segments_ptr + number, segment, mask=is_first)


@jit
def _unique_inverse_kernel(words_ptr, word_of_ptr, numbers_ptr, inverse_ptr, counts_ptr, num_ids, BLOCK: tl.constexpr):
    """Write the number of each position's pair and count the position there."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = position < num_ids
    first = tl.load(words_ptr + tl.load(word_of_ptr + position, mask=mask, other=0), mask=mask, other=0)
    number = tl.load(numbers_ptr + first, mask=mask, other=0)
    tl.store(inverse_ptr + position, number, mask=mask)
    tl.atomic_add(counts_ptr + number, number * 0 + 1, mask=mask, sem="relaxed")
