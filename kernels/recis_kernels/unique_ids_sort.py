"""Distinct pairs by sorting, on any device and without waiting for it: the other way to the result of `unique_ids`.

Two stable sorts bring equal pairs together, first positions first; a third orders the pairs by (partition, first position).
About 400 bytes move per id, none of them at random: it pays where a few ids hold most positions, or tickets collide.
"""

import torch
from torch import Tensor

from recis_kernels.philox import hash64, to_signed

SEGMENT_MIX = 0x9E3779B97F4A7C15  # odd: ids common to many segments must not share a partition


def padded(ids: Tensor, segments: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ids, segments, inverse and counts, [L] each with zeros after the distinct pairs, and their number [1].

    Args:
        ids: int64 [L], L at least 1.  segments: int32 [L] or [1].  bits: of the pair hash that number a partition.
    """
    num_ids = ids.numel()
    segment = segments.expand(num_ids)
    order = ids.argsort(stable=True)
    if segments.numel() > 1:
        order = order[segment[order].argsort(stable=True)]
    sorted_ids, sorted_segments = ids[order], segment[order]
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[1:] = (sorted_ids[1:] != sorted_ids[:-1]) | (sorted_segments[1:] != sorted_segments[:-1])
    group = is_first.cumsum(0) - 1
    num_unique = group[-1:] + 1
    mixed = hash64(sorted_ids) ^ (sorted_segments.long() * to_signed(SEGMENT_MIX))
    partition = ((mixed >> 1) & ((1 << 63) - 1)) >> (63 - bits)
    last = torch.iinfo(torch.int64).max
    by_number = torch.where(is_first, (partition << 31) + order, last).argsort()
    places = torch.arange(num_ids, device=ids.device)
    number_of_group = torch.zeros(num_ids + 1, dtype=torch.int64, device=ids.device)  # the last one takes the others
    number_of_group[torch.where(is_first[by_number], group[by_number], num_ids)] = places
    number = number_of_group[group].to(torch.int32)
    inverse = torch.empty_like(number)
    inverse[order] = number
    counts = torch.zeros_like(number).scatter_add_(0, number.long(), torch.ones_like(number))
    is_pair = places < num_unique
    out_ids = torch.where(is_pair, sorted_ids[by_number], 0)
    out_segments = torch.where(is_pair, sorted_segments[by_number], 0)
    return out_ids, out_segments, inverse, counts, num_unique
