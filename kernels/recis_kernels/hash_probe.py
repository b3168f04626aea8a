"""Probe, fill and rebuild the slots of a hash index: its memory layout, and the numba loops over it.

A segment is a power-of-two count of 16-byte slots (key int64, row int64), in aligned groups of 16. An id's home slot is the
top bits of hash64(id); the bits above the last four name its home group.

    sequence of slots:  the home group, from the home slot on and round to just before it; then the next group the same way,
                        and after the last group the first
    insert:             the first EMPTY slot of that sequence
    find:               walk until the key (row -1: erased) or until EMPTY (absent)

A reader that loads whole groups (Triton) needs no start: hit = any equal, stop = any EMPTY. Erasing keeps the key and sets
row -1, so sequences stay unbroken; a rebuild drops such dead slots. The id that equals EMPTY has a side cell instead.
The loops reach slots by address; load <= 0.9 is the caller's promise, without it a walk would not end. Inner functions
take numbers, not arrays: numba counts references of an array it passes on, two atomic operations per call.
"""

import numpy as np

from recis_kernels.address import load_int64, store_int64
from recis_kernels.dispatch import njit
from recis_kernels.philox import hash64_one
from recis_kernels.prefetch import prefetch, prefetch_write

EMPTY = -(1 << 63)
GROUP_SLOTS = 16
SLOT_BYTES = 16
# Columns of the segment table, int64 [num_segments, COLUMNS]: one cache line per segment.
# LOST counts ids that a kernel found no slot for; 0 while the load is what it must be.
ADDRESS, SHIFT, SLOTS, LIVE, DEAD, SIDE, LOST, COLUMNS = 0, 1, 2, 3, 4, 5, 6, 8
_GROUP_BYTES = GROUP_SLOTS * SLOT_BYTES
_IN_GROUP = _GROUP_BYTES - 1
_AHEAD = 24  # keys between the prefetch of a slot and its use
_RING = 32  # power of two above _AHEAD
_BATCH = 64
_INSERTED, _REVIVED, _REPLACED, _FOREIGN = 0, 1, 2, 3


@njit
def _next_group(address, num_bytes, slot):
    """Return the same place in the group that follows, round the end of the segment."""
    following = slot + _GROUP_BYTES
    return following if following < address + num_bytes else following - num_bytes


@njit
def _locate(address, num_bytes, row_id, home):
    """Return the address of the slot that holds row_id, else of the EMPTY slot where its sequence ends."""
    slot = home
    while True:
        for _ in range(GROUP_SLOTS):
            key = load_int64(slot)
            if key == row_id or key == EMPTY:  # noqa: SIM109 (a tuple costs)
                return slot
            slot = (slot & ~_IN_GROUP) | ((slot + SLOT_BYTES) & _IN_GROUP)
        slot = _next_group(address, num_bytes, slot)


@njit
def _home(address, shift, row_id):
    return address + (np.int64(hash64_one(row_id) >> np.uint64(shift)) << 4)


@njit
def _row_of(address, num_bytes, side, row_id, home):
    """Return the row of one id, -1 where absent; the first slot nearly always decides."""
    slot, key = home, load_int64(home)
    if key != row_id and key != EMPTY:
        slot = _locate(address, num_bytes, row_id, home)
        key = load_int64(slot)
    if row_id == EMPTY:
        return side
    return load_int64(slot + 8) if key == row_id else np.int64(-1)


@njit
def find_loop(table, ids, segments, stride, rows, start, stop):
    """Write the row of ids[start:stop], -1 where absent; stride 0 = all ids are of segments[0]."""
    if stride == 0:
        _find_in_one(table, segments[0], ids, rows, start, stop)
        return
    homes = np.empty(_RING, np.int64)
    for i in range(start, min(stop, start + _AHEAD)):
        homes[i & (_RING - 1)] = _home(table[segments[i], ADDRESS], table[segments[i], SHIFT], ids[i])
        prefetch(homes[i & (_RING - 1)])
    for i in range(start, stop):
        ahead = i + _AHEAD
        if ahead < stop:
            segment = segments[ahead]
            home = _home(table[segment, ADDRESS], table[segment, SHIFT], ids[ahead])
            homes[ahead & (_RING - 1)] = home
            prefetch(home)
        segment = segments[i]
        address, num_bytes = table[segment, ADDRESS], table[segment, SLOTS] * SLOT_BYTES
        rows[i] = _row_of(address, num_bytes, table[segment, SIDE], ids[i], homes[i & (_RING - 1)])


@njit
def _find_in_one(table, segment, ids, rows, start, stop):
    """Do find_loop for one segment, whose address and shift stay in registers: a third faster."""
    address, shift, side = table[segment, ADDRESS], table[segment, SHIFT], table[segment, SIDE]
    num_bytes = table[segment, SLOTS] * SLOT_BYTES
    homes = np.empty(_RING, np.int64)
    for i in range(start, min(stop, start + _AHEAD)):
        homes[i & (_RING - 1)] = _home(address, shift, ids[i])
        prefetch(homes[i & (_RING - 1)])
    for i in range(start, stop):
        ahead = i + _AHEAD
        if ahead < stop:
            home = _home(address, shift, ids[ahead])
            homes[ahead & (_RING - 1)] = home
            prefetch(home)
        rows[i] = _row_of(address, num_bytes, side, ids[i], homes[i & (_RING - 1)])


@njit
def _owner(address, shift, slot, parts):
    """Return which of `parts` even runs of groups the slot lies in."""
    if parts == 1:
        return 0
    return (((slot - address) >> 8) * parts) >> (60 - shift)


@njit
def _place(address, num_bytes, shift, row_id, row, home, part, parts):
    """Put (row_id, row) into its slot unless that lies in another part's groups; return what happened."""
    slot = home
    while True:
        for _ in range(GROUP_SLOTS):
            key = load_int64(slot)
            if key == EMPTY:
                store_int64(slot + 8, row)
                store_int64(slot, row_id)
                return _INSERTED
            if key == row_id:
                was = load_int64(slot + 8)
                store_int64(slot + 8, row)
                return _REVIVED if was < 0 else _REPLACED
            slot = (slot & ~_IN_GROUP) | ((slot + SLOT_BYTES) & _IN_GROUP)
        slot = _next_group(address, num_bytes, slot)
        if _owner(address, shift, slot, parts) != part:
            return _FOREIGN


@njit
def insert_loop(table, ids, segments, stride, rows, part, parts, changes, left):
    """Insert those ids whose home group belongs to `part` of `parts`; threads with different parts never share a slot.

    Args:
        changes: int64 [num_segments, 2], grows by (live, dead) of this part.
        left: int64 [N], takes the positions whose sequence ran into another part's groups.

    Returns:
        How many positions `left` took.
    """
    homes = np.empty(_BATCH, np.int64)
    mine = np.empty(_BATCH, np.int64)
    num_left = 0
    for start in range(0, ids.shape[0], _BATCH):
        num_mine = 0
        for i in range(start, min(start + _BATCH, ids.shape[0])):
            segment = segments[i * stride]
            address, shift = table[segment, ADDRESS], table[segment, SHIFT]
            home = _home(address, shift, ids[i])
            homes[num_mine] = home
            mine[num_mine] = i
            num_mine += _owner(address, shift, home, parts) == part
        for k in range(num_mine):
            prefetch_write(homes[k])
        for k in range(num_mine):
            i = mine[k]
            segment = segments[i * stride]
            if ids[i] == EMPTY:
                table[segment, SIDE] = rows[i]
                continue
            address, num_bytes = table[segment, ADDRESS], table[segment, SLOTS] * SLOT_BYTES
            result = _place(address, num_bytes, table[segment, SHIFT], ids[i], rows[i], homes[k], part, parts)
            if result == _FOREIGN:
                left[num_left] = i
                num_left += 1
            elif result == _INSERTED:
                changes[segment, 0] += 1
            elif result == _REVIVED:
                changes[segment, 0] += 1
                changes[segment, 1] -= 1
    return num_left


@njit
def erase_loop(table, ids, segments, stride, rows):
    """Set the row of each id to -1 and write what it was, -1 where absent; updates the counts."""
    homes = np.empty(_BATCH, np.int64)
    for i in range(ids.shape[0]):
        if i % _BATCH == 0:
            for k in range(i, min(i + _BATCH, ids.shape[0])):
                segment = segments[k * stride]
                homes[k - i] = _home(table[segment, ADDRESS], table[segment, SHIFT], ids[k])
                prefetch_write(homes[k - i])
        segment = segments[i * stride]
        if ids[i] == EMPTY:
            rows[i] = table[segment, SIDE]
            table[segment, SIDE] = -1
            continue
        address, num_bytes = table[segment, ADDRESS], table[segment, SLOTS] * SLOT_BYTES
        slot = _locate(address, num_bytes, ids[i], homes[i % _BATCH])
        rows[i] = -1
        if load_int64(slot) == ids[i] and load_int64(slot + 8) >= 0:
            rows[i] = load_int64(slot + 8)
            store_int64(slot + 8, -1)
            table[segment, LIVE] -= 1
            table[segment, DEAD] += 1


@njit
def clear_loop(slots):
    """Make every slot of int64 [slots, 2] empty."""
    for slot in range(slots.shape[0]):
        slots[slot, 0] = EMPTY
        slots[slot, 1] = -1


@njit
def rebuild_loop(table, segments, old):
    """Move the live slots of old[k] = (address, slots) into the new, empty slots of segments[k].

    A group's ids land in one or two neighbouring groups of the larger segment: both sides stream.
    """
    for k in range(segments.shape[0]):
        segment = segments[k]
        address, shift = table[segment, ADDRESS], table[segment, SHIFT]
        num_bytes = table[segment, SLOTS] * SLOT_BYTES
        for n in range(old[k, 1]):
            slot = old[k, 0] + n * SLOT_BYTES
            key, row = load_int64(slot), load_int64(slot + 8)
            if key != EMPTY and row >= 0:
                _place(address, num_bytes, shift, key, row, _home(address, shift, key), 0, 1)
        table[segment, DEAD] = 0


@njit
def export_loop(slots, side, ids, rows):
    """Write every (id, row) of one segment in slot order and return how many there are."""
    found = 0
    for slot in range(slots.shape[0]):
        if slots[slot, 0] != EMPTY and slots[slot, 1] >= 0:
            ids[found] = slots[slot, 0]
            rows[found] = slots[slot, 1]
            found += 1
    if side >= 0:
        ids[found] = EMPTY
        rows[found] = side
        found += 1
    return found


@njit
def count_loop(segments, counts):
    """Add the number of ids of each segment to counts [num_segments]."""
    for i in range(segments.shape[0]):
        counts[segments[i]] += 1
