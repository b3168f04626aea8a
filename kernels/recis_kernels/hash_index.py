"""Map ids to row numbers: one open-addressing table per logical table, all reached by one launch.

    rows = find(index, ids [U], segments [U])        -1 = absent        segment = number of the logical table

Every int64 is a legal id, and a (segment, id) pair never meets another. Slots are laid out as `hash_probe` states; each
segment has its own slot tensor behind a table of addresses, so one can double while the others stay. A segment without
ids owns no memory. It doubles before an insert whose worst case would pass load 0.9, and in `maintain` (between steps)
above 0.75; erased ids keep their slot until they pass an eighth of the slots and `maintain` rebuilds the segment.
A find reads one cache line per id nearly always, so it is bound by latency: the loop prefetches 24 ids ahead.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from recis_kernels import hash_ops as ops
from recis_kernels import hash_probe as probe
from recis_kernels.contents import check_range
from recis_kernels.dispatch import Impl, choose
from recis_kernels.hash_ops import LAUNCH_LOAD
from recis_kernels.hash_segments import SegmentTable
from recis_kernels.host_memory import zeroed_bytes
from recis_kernels.unique_ids import order_by_segment_and_id, unique_ids

GROW_LOAD = 0.75
_SPARE_BYTES = (
    1 << 30
)  # on a GPU: slots that all segments of a call may own beyond their need, so that steps do not wait
_SPARE_CALLS = 4  # and for how many calls like the present one


class HashIndex:
    """Row numbers of the ids of many segments.

    On a GPU the slots and exact counts lie there, and the host decides about growth by upper bounds (`hash_segments`): an
    insert or `maintain` waits for the device only when a segment might be full.

    Attributes:
        device: where the slots lie.
        table: int64 [num_segments, 8], CPU: address, shift, slots, live, dead, the row of the id EMPTY, and how many ids
            found no slot, per segment. On a GPU reading it is one host sync, and writing to it changes nothing.
        kernel_table: the table that kernels use, on `device`.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._no_slots = self._new_slots(
            probe.GROUP_SLOTS
        )  # what a segment without ids reads; nothing is ever put there
        self._slots: list[Tensor] = []
        self._segments = SegmentTable(self.device, mirrored=self.device.type != "cpu")

    def __reduce__(self) -> tuple:
        raise TypeError(
            "a HashIndex holds addresses and cannot be copied or pickled; insert what export() gives into another"
        )

    @property
    def num_segments(self) -> int:
        return len(self._slots)

    @property
    def table(self) -> Tensor:
        return self._segments.pull()

    @property
    def kernel_table(self) -> Tensor:
        return self._segments.kernels

    def add_segment(self) -> int:
        """Add an empty segment and return its number."""
        segment = self._segments.add()
        self._slots.append(self._no_slots)
        self._reset(segment)
        return segment

    def find(self, ids: Tensor, segments: Tensor | int = 0) -> Tensor:
        """Return the row of each id, see `find`."""
        return find(self, ids, segments)

    def insert(self, ids: Tensor, segments: Tensor | int, rows: Tensor) -> None:
        """Give each id its row, see `insert`."""
        insert(self, ids, segments, rows)

    def erase(self, ids: Tensor, segments: Tensor | int = 0) -> Tensor:
        """Remove ids and return the rows they had, see `erase`."""
        return erase(self, ids, segments)

    def size(self, segment: int) -> int:
        """Return how many ids the segment holds; one host sync on a GPU, as all that reads counts."""
        live, side = self.table[self._own(segment), [probe.LIVE, probe.SIDE]].tolist()
        return live + (side >= 0)

    def sizes(self) -> Tensor:
        """Return how many ids each segment holds, int64 [num_segments], CPU."""
        table = self.table
        return table[:, probe.LIVE] + (table[:, probe.SIDE] >= 0)

    def num_bytes(self) -> int:
        """Return the memory of all slots."""
        return int(self._segments.host[:, probe.SLOTS].sum()) * probe.SLOT_BYTES

    def check(self) -> None:
        """Raise if a kernel found no slot for an id: one host sync on a GPU.

        Raises:
            RuntimeError: ids were lost; the message names the segments.
        """
        lost = self.table[:, probe.LOST]
        if bool(lost.any()):
            raise RuntimeError(
                f"the hash index had no slot for {int(lost.sum())} ids of segments {lost.nonzero().squeeze(1).tolist()}: "
                "their load passed 0.9, which only an insert inside torch.compile can do; call make_room before it"
            )

    def export(self, segment: int, *, ordered: bool = True, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
        """Return (ids, rows) of a segment, int64 [size] each; one host sync on a GPU.

        ordered: by ascending signed id; False: as they lie in memory, which takes a tenth of the time.
        """
        slots = self._slots[self._own(segment)]
        side = int(self.table[segment, probe.SIDE])
        ids, rows = choose(impl, slots, numba=ops.numba_export, torch=ops.torch_export, triton=ops.torch_export)(
            slots, side
        )
        if not ordered:
            return ids, rows
        order = torch.from_numpy(np.argsort(ids.numpy())) if ids.device.type == "cpu" else ids.argsort()
        return ids[order], rows[order]

    def reserve(self, segment: int, num_ids: int, *, impl: Impl = "auto") -> None:
        """Make room for num_ids ids in all, so that inserts up to there move nothing."""
        have = int(self._segments.host[self._own(segment), probe.SLOTS])
        slots = _slots_for(num_ids, have)
        if slots > have:
            self._segments.pull()
            self._rebuild(np.array([segment]), np.array([slots]), impl)

    def clear(self, segment: int) -> None:
        """Remove every id of a segment and give its memory back."""
        self._own(segment)
        self._segments.pull()
        self._slots[segment] = self._no_slots
        self._reset(segment)
        self._segments.push()

    def maintain(self, *, impl: Impl = "auto") -> None:
        """Between steps: double segments above load 0.75 and drop dead slots above an eighth; looks at counts alone.

        On a GPU it looks at the counts that have arrived by now, and waits for exact ones only when those call for work.
        """
        self._segments.bounds()  # takes in counts that have arrived
        if len(self._due()):
            self._segments.pull()
            due = self._due()
            slots, live = (self._segments.host.numpy()[:, column] for column in (probe.SLOTS, probe.LIVE))
            self._rebuild(due, np.array([_slots_for(int(live[k]), int(slots[k])) for k in due]), impl)

    def _due(self) -> np.ndarray:
        table = self._segments.host.numpy()
        slots, live, dead = (table[:, column] for column in (probe.SLOTS, probe.LIVE, probe.DEAD))
        return np.flatnonzero((live + dead > GROW_LOAD * slots) | (dead * 8 > slots))

    def make_room(self, segments: Tensor | int, num_ids: int, *, impl: Impl = "auto") -> None:
        """Rebuild the segments whose load could pass 0.9 if all num_ids ids were new.

        On a GPU one host sync when the upper bounds of the counts say that a segment might be full; a segment that grows
        then gets room for some calls more like this one.

        Args:
            segments: int32 or int64 [num_ids]; [1] or a number when all ids are of one segment.

        Raises:
            ValueError: a segment number this index does not have; of a tensor, inside `checks()`.
        """
        if isinstance(segments, Tensor):
            check_range("segments", segments, 0, self.num_segments - 1)
        else:
            self._own(segments)
        table, slots = self._segments, self._segments.host.numpy()[:, probe.SLOTS]
        if isinstance(segments, Tensor) and segments.numel() == 1 and not table.mirrored:
            segments = int(segments)
        touched = np.array([segments]) if isinstance(segments, int) else np.arange(self.num_segments)
        if table.mirrored and (table.bounds()[touched] + num_ids <= LAUNCH_LOAD * slots[touched]).all():
            table.note_inserts(touched, num_ids)
            return
        counts = np.array([num_ids])
        if isinstance(segments, Tensor):
            counts = np.zeros(self.num_segments, dtype=np.int64)
            per_id = segments.cpu()
            probe.count_loop(per_id.expand(num_ids).numpy(), counts)
            touched = np.flatnonzero(counts)
            counts = counts[touched]
        table.pull()
        spare = self._spare_ids(touched, num_ids)
        used, live = table.bounds()[touched], table.host.numpy()[touched, probe.LIVE]
        full = np.flatnonzero(used + counts + spare > LAUNCH_LOAD * slots[touched])
        if len(full):
            wanted = [_slots_for(int(live[k] + counts[k]) + spare, int(slots[touched[k]])) for k in full]
            self._rebuild(touched[full], np.array(wanted), impl)
        if table.mirrored:
            table.note_inserts(touched, counts)

    def checked(self, ids: Tensor, segments: Tensor | int) -> tuple[Tensor, Tensor]:
        """Return ids [U] and segments int32 [U], or [1] for a single number, contiguous."""
        if ids.ndim != 1 or ids.dtype != torch.int64:
            raise ValueError(f"ids must be int64 [U]; got {ids.dtype} {tuple(ids.shape)}")
        if ids.device.type != self.device.type:
            raise ValueError(f"ids must lie on {self.device} like the index; got {ids.device}: move them")
        if isinstance(segments, int):
            return ids.contiguous(), torch.full((1,), self._own(segments), dtype=torch.int32, device=ids.device)
        if segments.dtype not in (torch.int32, torch.int64) or segments.shape not in (ids.shape, (1,)):
            wanted = f"int32 or int64 [{ids.numel()}]"
            raise ValueError(f"segments must be a number or {wanted}; got {segments.dtype} {tuple(segments.shape)}")
        check_range("segments", segments, 0, self.num_segments - 1)
        return ids.contiguous(), segments.to(torch.int32).contiguous()

    def _own(self, segment: int) -> int:
        """Return the number; ValueError where this index has no such segment."""
        if not 0 <= segment < self.num_segments:
            raise ValueError(f"segment must lie in [0, {self.num_segments}); got {segment}; add_segment() makes one")
        return segment

    def _spare_ids(self, touched: np.ndarray, num_ids: int) -> int:
        """Return for how many ids more than needed a growing segment gets room: none on the CPU, whose counts are exact."""
        spare = _SPARE_CALLS * num_ids
        num_bytes = len(touched) * _slots_for(spare, 0) * probe.SLOT_BYTES
        return spare if self._segments.mirrored and num_bytes <= _SPARE_BYTES else 0

    def _new_slots(self, num_slots: int) -> Tensor:
        slots = zeroed_bytes(num_slots * probe.SLOT_BYTES, self.device).view(torch.int64).view(num_slots, 2)
        if slots.device.type == "cpu":
            probe.clear_loop(slots.numpy())
        else:
            slots[:, 0], slots[:, 1] = probe.EMPTY, -1
        return slots

    def _reset(self, segment: int) -> None:
        shift = 64 - (probe.GROUP_SLOTS.bit_length() - 1)
        row = [self._no_slots.data_ptr(), shift, 0, 0, 0, -1, 0, 0]
        self._segments.host[segment] = torch.tensor(row, dtype=torch.int64)

    def _rebuild(self, segments: np.ndarray, num_slots: np.ndarray, impl: Impl) -> None:
        """Give each segment num_slots fresh slots and move its live ids there; the host's counts must be exact."""
        table = self._segments.host.numpy()
        fresh = [self._new_slots(int(num)) for num in num_slots]
        old = table[segments][:, [probe.ADDRESS, probe.SLOTS]].copy()
        table[segments, probe.ADDRESS] = [slots.data_ptr() for slots in fresh]
        table[segments, probe.SHIFT] = [64 - (int(num).bit_length() - 1) for num in num_slots]
        table[segments, probe.SLOTS] = num_slots
        table[segments, probe.DEAD] = 0
        self._segments.push()
        run = choose(
            impl, self._no_slots, triton=ops.triton_rebuild, numba=ops.numba_rebuild, reference=ops.numba_rebuild
        )
        run(self.kernel_table, segments, old)
        for segment, slots in zip(segments.tolist(), fresh, strict=True):
            self._slots[segment] = slots  # the old tensor is freed here, after its ids have moved


def find(index: HashIndex, ids: Tensor, segments: Tensor | int = 0, *, impl: Impl = "auto") -> Tensor:
    """Return the row of each id, int64 [U], -1 where absent; changes nothing.

    Args:
        index: the index.
        ids: int64 [U]; any order, repeats allowed.
        segments: of each id, int32 or int64 [U], or one number for all. What it holds is trusted.

    Raises:
        ValueError: wrong shape or dtype, or a segment number this index does not have.
    """
    ids, segments = index.checked(ids, segments)
    run = ops.find_op if torch.compiler.is_compiling() else ops.find
    return run(index.kernel_table, index._slots, ids, segments, impl)


def insert(index: HashIndex, ids: Tensor, segments: Tensor | int, rows: Tensor, *, impl: Impl = "auto") -> None:
    """Give each id its row; an id that has one gets the new one, and of equal ids the last wins.

    Args:
        index: grows where needed, but not inside torch.compile: call make_room before.
        ids, segments: as in `find`; absent distinct ids are what this is fast for.
        rows: int64 [U], each >= 0.

    Raises:
        ValueError: wrong shape or dtype, or a segment number this index does not have.
        RuntimeError: inside torch.compile on the CPU, no room was made. (On a GPU see `HashIndex.check`.)
    """
    number = segments if isinstance(segments, int) else None
    ids, segments = index.checked(ids, segments)
    if rows.shape != ids.shape or rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64 {tuple(ids.shape)}; got {rows.dtype} {tuple(rows.shape)}")
    check_range("rows", rows, 0, None)  # a row below 0 says that the id is absent
    if ids.numel() == 0:
        return
    if torch.compiler.is_compiling():
        ops.insert_op(index.kernel_table, index._slots, ids, segments, rows, impl)
        return
    index.make_room(segments if number is None else number, ids.numel(), impl=impl)
    ops.insert(index.kernel_table, index._slots, ids, segments, rows.contiguous(), impl)
    index._segments.start_reading()


def erase(index: HashIndex, ids: Tensor, segments: Tensor | int = 0, *, impl: Impl = "auto") -> Tensor:
    """Remove ids and return the rows they had, int64 [U]; -1 where absent, and for all but the first of equal ids.

    Raises:
        ValueError: as `find`.
    """
    ids, segments = index.checked(ids, segments)
    run = ops.erase_op if torch.compiler.is_compiling() else ops.erase
    return run(index.kernel_table, index._slots, ids, segments, impl)


def find_or_insert(
    index: HashIndex,
    ids: Tensor,
    segments: Tensor | int,
    allocate: Callable[[Tensor, Tensor], Tensor],
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Return the row of each id, int64 [U], after giving a row to the ids that had none.

    Waits for a GPU, as `allocate` gets just the new ids; `row_allocator.find_or_insert_rows` does not wait.

    Args:
        index, ids, segments: as in `find`; repeats share one row.
        allocate: called at most once with the new distinct (ids [N] int64, segments [N] int32), in ascending
            (segment, signed id) order; returns their rows, int64 [N]. So row numbers depend on nothing else.
    """
    number = segments if isinstance(segments, int) else None
    ids, segments = index.checked(ids, segments)
    rows = find(index, ids, segments, impl=impl)
    absent = (rows < 0).nonzero().squeeze(1)
    if absent.numel():
        all_of_one = segments.numel() == 1
        unique = unique_ids(ids[absent], segments if all_of_one else segments[absent], impl=impl)
        order = order_by_segment_and_id(unique.ids, unique.segments, index.num_segments, impl=impl)
        new_ids, new_segments = unique.ids[order], unique.segments[order]
        new_rows = allocate(new_ids, new_segments)
        rows_of_unique = torch.empty_like(new_rows)
        rows_of_unique[order] = new_rows
        # in the order of `unique`, which is nearly that of the slots, so that the insert walks memory forwards
        where = segments if all_of_one else unique.segments
        insert(index, unique.ids, where if number is None else number, rows_of_unique, impl=impl)
        rows[absent] = rows_of_unique[unique.inverse]
    return rows


def _slots_for(num_ids: int, at_least: int) -> int:
    """Return the power of two of slots that holds num_ids at load 0.75."""
    slots = max(int(at_least), probe.GROUP_SLOTS)
    while num_ids > GROW_LOAD * slots:
        slots *= 2
    return slots
