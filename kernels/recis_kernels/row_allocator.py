"""Give rows to new ids without waiting for the device: the counters of free and fresh rows live there.

    k-th new id gets   free[num_free - 1 - k]  while there are freed rows (last in, first out),
                       then the fresh rows num_fresh, num_fresh + 1, ... below capacity,  then -1 (overflow)

    rows, is_new = find_or_insert_rows(index, ids [U], segments [U], allocator)

New ids are numbered by ascending (segment, signed id), so rows are a function of the calls alone. An id that finds no row
stays absent from the index, gets -1 and is counted: `overflow()` tells how many, `check()` raises. A look-up moves what
find and insert move; numbering costs two stable sorts of U on a GPU, which deterministic=False replaces by a prefix sum.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from recis_kernels import hash_ops, row_allocator_triton
from recis_kernels.contents import check_range, is_asked
from recis_kernels.dispatch import Impl, choose
from recis_kernels.hash_index import HashIndex
from recis_kernels.unique_ids import order_by_segment_and_id, unique_ids

# Entries of the state, int64 [4].
NUM_FRESH, NUM_FREE, CAPACITY, OVERFLOW = 0, 1, 2, 3


class RowAllocator:
    """Row numbers 0 .. capacity - 1, dealt out and taken back.

    Attributes:
        device: where the counters lie.
        capacity: rows there may be; `grow` raises it as the row store grows.
        state: int64 [4] on `device`: rows used at least once, freed rows, capacity, ids refused so far.
        free: int64 [capacity + 1] on `device`, a stack of freed rows; the last entry takes what must not be kept.
    """

    def __init__(self, capacity: int, *, device: torch.device | str = "cpu") -> None:
        if capacity < 0:
            raise ValueError(f"capacity must be at least 0; got {capacity}")
        self.device = torch.device(device)
        self.capacity = capacity
        self.state = torch.tensor([0, 0, capacity, 0], dtype=torch.int64).to(self.device)
        self.free = torch.zeros(capacity + 1, dtype=torch.int64, device=self.device)

    def grow(self, capacity: int) -> None:
        """Raise the capacity; rows in use stay. No host sync.

        Raises:
            ValueError: capacity is below the present one.
        """
        if capacity < self.capacity:
            raise ValueError(f"a row allocator does not shrink: capacity is {self.capacity}, asked for {capacity}")
        self.free = torch.cat((self.free, self.free.new_zeros(capacity - self.capacity)))
        self.state[CAPACITY] = capacity
        self.capacity = capacity

    def release(self, rows: Tensor) -> None:
        """Make rows [N] int64 free again: distinct and in use (trusted); -1 is ignored. No host sync.

        Raises:
            ValueError: wrong shape or dtype; inside `checks()` also a row that cannot be in use, or one given twice.
        """
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise ValueError(f"rows must be int64 [N]; got {rows.dtype} {tuple(rows.shape)}")
        given = rows >= 0
        if is_asked():
            self._check_released(rows[given])
        at = torch.where(given, self.state[NUM_FREE] + given.cumsum(0) - 1, self.capacity)
        self.free.index_put_((at,), rows)
        self.state[NUM_FREE] += given.sum()

    def num_used(self) -> int:
        """Return how many rows are in use; one host sync on a GPU."""
        num_fresh, num_free = self.state[:2].tolist()
        return num_fresh - num_free

    def overflow(self) -> int:
        """Return how many new ids got no row so far; one host sync on a GPU, so ask a step late."""
        return int(self.state[OVERFLOW])

    def check(self) -> None:
        """Raise if a new id got no row; one host sync on a GPU.

        Raises:
            RuntimeError: the capacity was reached.
        """
        refused = self.overflow()
        if refused:
            raise RuntimeError(
                f"{refused} new ids got no row: all {self.capacity} rows are in use; grow the row store and the "
                "allocator, or evict rows, before the next look-up"
            )

    def _check_released(self, rows: Tensor) -> None:
        num_fresh, num_free = self.state[:2].tolist()
        every = torch.cat((self.free[:num_free], rows))
        if rows.numel() and (int(rows.max()) >= num_fresh or every.unique().numel() < every.numel()):
            raise ValueError(
                f"rows to release must be in use and distinct, below {num_fresh}; got {rows.tolist()[:8]}: "
                "a row was released twice or never given"
            )


def find_or_insert_rows(
    index: HashIndex,
    ids: Tensor,
    segments: Tensor | int,
    allocator: RowAllocator,
    *,
    num_ids: Tensor | None = None,
    deterministic: bool = True,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return (rows int64 [U], is_new bool [U]) after giving rows to ids that had none; no host sync in the usual step.

    The GPU is waited for only where `HashIndex.make_room` says so. Inside torch.compile call make_room before.

    Args:
        index, ids, segments: as in `hash_index.find`. Repeats share a row, and the first one is new.
        allocator: on the same device.
        num_ids: int64 [1]; ids from that count on are padding and get -1, as `unique_ids_padded` leaves them.
        deterministic: number new ids by (segment, signed id); False: by position, on a GPU (the CPU always sorts).

    Returns:
        rows: -1 for padding and for new ids past the capacity (`allocator.overflow`).
        is_new: ids that got their row in this call, for `init_rows(blocks, torch.where(is_new, rows, -1), ids, ...)`.

    Raises:
        ValueError: wrong shape, dtype or device, or a segment number this index does not have.
    """
    number = segments if isinstance(segments, int) else None
    ids, segments = index.checked(ids, segments)
    if allocator.device.type != ids.device.type:
        raise ValueError(f"the allocator must lie on {ids.device} like the ids; it lies on {allocator.device}")
    if num_ids is not None and (num_ids.dtype != torch.int64 or num_ids.shape != (1,)):
        raise ValueError(f"num_ids must be int64 [1]; got {num_ids.dtype} {tuple(num_ids.shape)}")
    check_range("num_ids", num_ids, 0, ids.numel())
    if torch.compiler.is_compiling():
        return _op(
            index.kernel_table, index._slots, allocator.state, allocator.free, ids, segments, num_ids, deterministic,
            impl,
        )  # fmt: skip
    if ids.numel() == 0:
        return ids.clone(), torch.zeros(0, dtype=torch.bool, device=ids.device)
    index.make_room(segments if number is None else number, ids.numel(), impl=impl)
    found = _run(
        index.kernel_table, index._slots, allocator.state, allocator.free, ids, segments, num_ids, deterministic, impl
    )
    index._segments.start_reading()
    return found


def _run(
    table: Tensor, slots: Sequence[Tensor], state: Tensor, free: Tensor, ids: Tensor, segments: Tensor,
    num_ids: Tensor | None, deterministic: bool, impl: Impl,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    args = (table, slots, state, free, ids, segments, num_ids)
    run = choose(impl, ids, triton=row_allocator_triton.find_or_insert_rows, numba=_numba, reference=_reference)
    return run(*args, deterministic)


@torch.library.custom_op("recis::find_or_insert_rows", mutates_args=("table", "slots", "state"))
def _op(
    table: Tensor, slots: Sequence[Tensor], state: Tensor, free: Tensor, ids: Tensor, segments: Tensor,
    num_ids: Tensor | None, deterministic: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    bound = hash_ops.Rebound(table, slots)
    if table.device.type == "cpu":
        hash_ops.require_room(bound.table, segments, ids.numel())
    args = (state, free, ids, segments, num_ids, deterministic, impl)
    found = _run(bound.table, bound.slots, *args)  # type: ignore[arg-type]
    bound.write_back()
    return found


@_op.register_fake
def _(table, slots, state, free, ids, segments, num_ids, deterministic, impl):
    return torch.empty_like(ids), torch.empty_like(ids, dtype=torch.bool)


# ---- CPU


def _take(state: Tensor, free: Tensor, num_rows: int) -> Tensor:
    """Return the rows of num_rows new ids, int64, -1 for those past the capacity."""
    num_fresh, num_free, capacity, _ = state.tolist()
    reused = min(num_rows, num_free)
    fresh = min(num_rows - reused, capacity - num_fresh)
    state += torch.tensor([fresh, -reused, 0, num_rows - reused - fresh])
    rows = torch.full((num_rows,), -1, dtype=torch.int64)
    rows[:reused] = free[num_free - reused : num_free].flip(0)
    rows[reused : reused + fresh] = torch.arange(num_fresh, num_fresh + fresh)
    return rows


def _numba(
    table: Tensor, slots: Sequence[Tensor], state: Tensor, free: Tensor, ids: Tensor, segments: Tensor,
    num_ids: Tensor | None, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    del deterministic  # always
    all_of_one = segments.numel() == 1
    rows = torch.full_like(ids, -1)
    used = ids.numel() if num_ids is None else int(num_ids)
    rows[:used] = hash_ops.find(table, slots, ids[:used], segments if all_of_one else segments[:used], "numba")
    is_new = torch.zeros_like(ids, dtype=torch.bool)
    absent = (rows[:used] < 0).nonzero().squeeze(1)
    if absent.numel() == 0:
        return rows, is_new
    unique = unique_ids(ids[absent], segments if all_of_one else segments[absent])
    order = order_by_segment_and_id(unique.ids, unique.segments, len(table))
    rows_of_unique = torch.empty_like(unique.ids)
    rows_of_unique[order] = _take(state, free, order.numel())
    placed = (rows_of_unique >= 0).nonzero().squeeze(1)
    if placed.numel():
        where = segments if all_of_one else unique.segments[placed]
        hash_ops.insert(table, slots, unique.ids[placed], where, rows_of_unique[placed], "numba")
    rows[absent] = rows_of_unique[unique.inverse]
    first = torch.full_like(unique.ids, ids.numel()).scatter_reduce(0, unique.inverse.long(), absent, "amin")
    is_new[first[placed]] = True
    return rows, is_new


def _reference(
    table: Tensor, slots: Sequence[Tensor], state: Tensor, free: Tensor, ids: Tensor, segments: Tensor,
    num_ids: Tensor | None, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    del deterministic  # always
    used = ids.numel() if num_ids is None else int(num_ids)
    pairs = list(zip(segments.expand(ids.shape).tolist(), ids.tolist(), strict=True))[:used]
    found: dict[tuple[int, int], int] = {}

    def call(version, pair, *rows):
        args = (torch.tensor([pair[1]]), torch.tensor([pair[0]], dtype=torch.int32), *rows)
        return version(table, slots, *args, "reference")

    for pair in pairs:
        found[pair] = int(call(hash_ops.find, pair))
    new = sorted(pair for pair, row in found.items() if row < 0)
    for pair in new:
        num_fresh, num_free, capacity, _ = state.tolist()
        if num_free:
            found[pair] = int(free[num_free - 1])
            state[NUM_FREE] -= 1
        elif num_fresh < capacity:
            found[pair] = num_fresh
            state[NUM_FRESH] += 1
        else:
            state[OVERFLOW] += 1
            continue
        call(hash_ops.insert, pair, torch.tensor([found[pair]]))
    rows, is_new = torch.full_like(ids, -1), torch.zeros_like(ids, dtype=torch.bool)
    fresh = {pair for pair in new if found[pair] >= 0}
    for position, pair in enumerate(pairs):
        rows[position] = found[pair]
        is_new[position] = pair in fresh
        fresh.discard(pair)
    return rows, is_new
