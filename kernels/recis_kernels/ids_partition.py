"""Deal ids to the ranks that own them.

    slice(id) = hash64(id) & 0xffff   (rule "hash")      |  unsigned id mod 65536   (rule "mod", kept for comparison)
    rank r owns a run of 65536 div W slices; the first 65536 mod W ranks own one more

The low bits of the hash choose the owner and the top bits the hash index's slot, so sharding does not cluster slots.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recis_kernels import ids_partition_triton
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.philox import hash64, hash64_one
from recis_kernels.threads import run_parts, split
from recis_kernels.unique_ids import unique_ids
from recis_kernels.unique_ids_order import argsort_ids

NUM_SLICES = 1 << 16
Rule = Literal["hash", "mod"]
_SIGN = np.int64(-(1 << 63))


@dataclass(frozen=True, slots=True)
class Partition:
    """Distinct ids by owner.

    Attributes:
        ids: int64 [U], by ascending (slice, unsigned id): rank 0's first.
        counts: int64 [W], ids of each rank.
        inverse: int32 [L], position -> place in ids.
    """

    ids: Tensor
    counts: Tensor
    inverse: Tensor


def slice_bounds(num_ranks: int) -> Tensor:
    """Return int64 [W + 1]: rank r owns the slices bounds[r]:bounds[r + 1].

    Raises:
        ValueError: num_ranks outside 1..65536.
    """
    if not 1 <= num_ranks <= NUM_SLICES:
        raise ValueError(f"num_ranks must be 1..{NUM_SLICES}; got {num_ranks}")
    each, more = divmod(NUM_SLICES, num_ranks)
    rank = torch.arange(num_ranks + 1)
    return rank * each + rank.clamp(max=more)


def slice_of_id(ids: Tensor, rule: Rule = "hash") -> Tensor:
    """Return the slice of each id (int64, any shape), int64 in [0, 65536).

    Raises:
        ValueError: ids are not int64, or the rule is unknown.
    """
    if rule not in ("hash", "mod"):
        raise ValueError(f'rule must be "hash" or "mod"; got {rule!r}')
    if ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64; got {ids.dtype}")
    return (hash64(ids) if rule == "hash" else ids) & (NUM_SLICES - 1)


def ids_partition(ids: Tensor, num_ranks: int, rule: Rule = "hash", *, impl: Impl = "auto") -> Partition:
    """Return the distinct ids of ids [L] int64 ordered by owner, with counts per rank and the inverse.

    One host sync on a GPU, for the number of distinct ids; `counts` stays on the device.

    Raises:
        ValueError: wrong shape or dtype, an unknown rule, or num_ranks outside 1..65536.
    """
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 [L]; got {ids.dtype} {tuple(ids.shape)}")
    if rule not in ("hash", "mod"):
        raise ValueError(f'rule must be "hash" or "mod"; got {rule!r}')
    bounds = slice_bounds(num_ranks)
    run = _op if torch.compiler.is_compiling() else _run
    return Partition(*run(ids.contiguous(), bounds, rule, impl))


def _run(ids: Tensor, bounds: Tensor, rule: str, impl: Impl) -> tuple[Tensor, Tensor, Tensor]:
    found = choose(impl, ids, triton=_triton, numba=_numba, reference=_reference)(ids, bounds, rule)
    return found.ids, found.counts, found.inverse


@torch.library.custom_op("recis::ids_partition", mutates_args=())
def _op(ids: Tensor, bounds: Tensor, rule: str, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    return _run(ids, bounds, rule, impl)  # type: ignore[arg-type]


@_op.register_fake
def _(ids, bounds, rule, impl):
    distinct = ids.new_empty(torch.library.get_ctx().new_dynamic_size())
    return distinct, ids.new_empty(bounds.shape[0] - 1), torch.empty_like(ids, dtype=torch.int32)


def _triton(ids: Tensor, bounds: Tensor, rule: Rule) -> Partition:
    unique = unique_ids(ids, impl="triton")
    order, slices = ids_partition_triton.order_by_slice(unique.ids, rule == "hash")
    starts = torch.searchsorted(slices, bounds.to(ids.device, torch.int32))
    return Partition(unique.ids[order], starts.diff(), ids_partition_triton.through(unique.inverse, order))


def _reference(ids: Tensor, bounds: Tensor, rule: Rule) -> Partition:
    distinct = torch.tensor(sorted(set(ids.tolist())), dtype=torch.int64)
    slices = slice_of_id(distinct, rule).tolist()
    ordered = sorted(zip(slices, [row_id % (1 << 64) for row_id in distinct.tolist()], strict=True))
    place = {row_id: k for k, (_, row_id) in enumerate(ordered)}
    signed = [row_id - (1 << 64) if row_id >> 63 else row_id for _, row_id in ordered]
    starts = np.searchsorted([owner_slice for owner_slice, _ in ordered], bounds.numpy())
    return Partition(
        torch.tensor(signed, dtype=torch.int64),
        torch.from_numpy(np.diff(starts)),
        torch.tensor([place[row_id % (1 << 64)] for row_id in ids.tolist()], dtype=torch.int32),
    )


def _numba(ids: Tensor, bounds: Tensor, rule: Rule) -> Partition:
    unique = unique_ids(ids)
    distinct = unique.ids.numpy()
    by_id = argsort_ids(distinct ^ _SIGN)  # the flipped sign bit makes signed order unsigned
    starts = np.zeros(NUM_SLICES + 1, np.int64)
    ordered, place = np.empty_like(distinct), np.empty(len(distinct), np.int32)
    _order_by_slice(distinct, by_id, rule == "hash", starts, ordered, place)
    inverse = torch.empty_like(unique.inverse)
    args = (unique.inverse.numpy(), place, inverse.numpy())
    run_parts(lambda start, stop: _through(*args, start, stop), split(ids.numel()))
    counts = torch.from_numpy(starts[bounds.numpy()]).diff()
    return Partition(torch.from_numpy(ordered), counts, inverse)


@njit
def _slice_of(row_id, by_hash):
    bits = hash64_one(row_id) if by_hash else np.uint64(row_id)
    return np.int64(bits & np.uint64(0xFFFF))


@njit
def _order_by_slice(distinct, by_id, by_hash, starts, ordered, place):
    """Sort stably by slice what by_id has sorted by id; starts[s] = first place of slice s."""
    num_slices = starts.shape[0] - 1
    for u in range(distinct.shape[0]):
        starts[_slice_of(distinct[u], by_hash) + 1] += 1
    for s in range(num_slices):
        starts[s + 1] += starts[s]
    cursor = starts.copy()
    for k in range(by_id.shape[0]):
        u = by_id[k]
        s = _slice_of(distinct[u], by_hash)
        ordered[cursor[s]] = distinct[u]
        place[u] = cursor[s]
        cursor[s] += 1


@njit
def _through(inverse, place, out, start, stop):
    for i in range(start, stop):
        out[i] = place[inverse[i]]
