"""Boundary state of tables while training goes on: rows are copied just before they change, if they were not read yet.

    TableSet.snapshot()         freezes: lists of (ids, rows) are copied, rows are only marked
    RowStore.before_write       training calls it ahead of each write; marked rows among them are copied first
    TableSnapshot.read, chunks  a writer thread reads each row once: the copy if there is one, else the row itself

So a save costs training a copy of the rows it changes during the save and no more, and what is saved is exactly the
boundary. Copies live in blocks of their own, at most `memory_mib` per store; when that is used up training waits until the
writer has read some of them, and says so. Copying rows rather than whole blocks keeps this small: a step that touches one
row in each block would otherwise copy the table.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recis.embedding.row_owners import RowOwners
from recis.embedding.step_clock import from_low_seconds
from recis_kernels.dispatch import njit
from recis_kernels.row_blocks import RowBlocks
from recis_kernels.row_copies import copy_rows, read_either

if TYPE_CHECKING:
    from recis.embedding.rows import RowStore

_NOT_NEEDED, _MARKED = -2, -1  # any other state of a row: where its copy is
_SAY_EVERY_S = 10.0
_log = logging.getLogger(__name__)


class StoreSnapshot:
    """Copy-on-write protection of the rows of one store.

    Args:
        store: at a boundary: no lookup of a step under way.
        memory_mib: most memory for copies.
    """

    def __init__(self, store: "RowStore", *, memory_mib: int) -> None:
        self._store = store
        self._capacity = max(1, (memory_mib << 20) // store.layout.row_bytes)
        self._copies = RowBlocks(store.layout, device=store.device)
        self._places = RowOwners()
        # numpy, because torch's indexing wakes OpenMP's workers from 3000 entries on, who then spin beside training
        self._state = np.full(store.owners.num_fresh, _NOT_NEEDED, dtype=np.int64)
        self._changed = threading.Condition()
        self._num_open = 0
        self.waited_s = 0.0

    def open(self, rows: Tensor) -> None:
        """Mark rows [N] of one more table; `close` takes the mark back."""
        self._state[rows.cpu().numpy()] = _MARKED
        self._num_open += 1

    def keep(self, rows: Tensor) -> None:
        """Copy those of rows [N] (-1 is ignored) that are marked; waits while there is no room, and for rows on a GPU."""
        with self._changed:
            while True:
                rows = torch.from_numpy(_marked(self._state, rows.cpu().numpy()))
                part = rows[: self._capacity - self._places.num_used]
                if part.numel():
                    places = self._places.take(torch.zeros(part.numel(), dtype=torch.int32))
                    self._copies.grow(self._places.num_fresh)
                    device = self._store.device
                    copy_rows(self._store.blocks, part.to(device), self._copies, places.to(device))
                    self._state[part.numpy()] = places.numpy()
                if part.numel() == rows.numel():
                    return
                rows = rows[part.numel() :]
                self._wait(rows.numel())

    def _wait(self, num_rows: int) -> None:
        started = time.monotonic()
        if self.waited_s == 0:
            limit = self._capacity * self._store.layout.row_bytes / 2**20
            _log.warning(
                "training waits for the checkpoint writer: %d rows are about to change and the %.0f MiB for copies are "
                "used up; raise snapshot_memory_mib, or save less often",
                num_rows,
                limit,
            )
        elif self.waited_s > _SAY_EVERY_S:
            _log.warning("training has waited %.0f s for the checkpoint writer", self.waited_s)
        self._changed.wait(timeout=_SAY_EVERY_S)
        self.waited_s += time.monotonic() - started

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the boundary state of rows [N] as RowBlocks.read does, and stop protecting them.

        Raises:
            ValueError: a row was read before, or is not part of the snapshot.
        """
        with self._changed:
            numbers = rows.cpu()
            states = self._state[numbers.numpy()]
            if (states == _NOT_NEEDED).any():
                raise ValueError(
                    "a snapshot gives each of its rows once; some of these were read before, or never in it"
                )
            places = torch.from_numpy(states).to(rows.device)
            fields = read_either(self._store.blocks, rows, self._copies, places)
            self._release(numbers, torch.from_numpy(states[states >= 0]))
        return fields

    def _release(self, rows: Tensor, places: Tensor) -> None:
        self._state[rows.numpy()] = _NOT_NEEDED
        self._places.release(places)
        self._changed.notify_all()

    def close(self, rows: Tensor) -> None:
        """Stop protecting rows [N] of one table, read or not."""
        with self._changed:
            rows = rows.cpu()
            states = self._state[rows.numpy()]
            self._release(rows, torch.from_numpy(states[states >= 0]))
            self._num_open -= 1
            if self._num_open == 0:
                self._store.snapshot = None


@njit
def _marked(state, rows):
    """Return those of rows that are marked, in their order; rows without a state (-1, or newer than it) are not."""
    out = np.empty(rows.size, np.int64)
    found = 0
    for row in rows:
        if 0 <= row < state.size and state[row] == _MARKED:
            out[found] = row
            found += 1
    return out[:found]


class TableSnapshot:
    """One table as it was at the boundary; made by TableSet.snapshot.

    One thread reads it while training goes on in another. Call `close` in a finally (or use it as a context manager): an
    open snapshot that nobody reads makes training wait for ever once the memory for copies is used up.

    Attributes:
        name: of the table.
        state, signature, admission: HashTable.state(), .signature() and .admission_state() of the boundary.
        tombstones: ids removed since the base, ascending; empty without a base.
        slices: those of the table's ids that lie here; None where its rows are not shared with other processes.
        state_widths: width of each optimizer state vector.
    """

    def __init__(
        self,
        *,
        name: str,
        ids: Tensor,
        rows: Tensor,
        protection: StoreSnapshot,
        store: "RowStore",
        state: Mapping[str, Any],
        signature: Mapping[str, Any],
        admission: Mapping[str, Tensor],
        tombstones: Tensor,
        slices: tuple[int, int] | None = None,
    ) -> None:
        self.name = name
        self.slices = slices
        self._ids = ids
        self._is_ordered = False
        self.state = dict(state)
        self.signature = dict(signature)
        self.admission = dict(admission)
        self.tombstones = tombstones
        self.state_widths = dict(store.layout.state)
        self._rows = rows  # with _ids in no order until somebody reads: ordering many ids would stall training
        self._store = store
        self._protection: StoreSnapshot | None = protection
        protection.open(rows)

    @property
    def num_rows(self) -> int:
        """n."""
        return self._ids.numel()

    @property
    def ids(self) -> Tensor:
        """[n] int64, ascending, of the rows to save; the first use puts them in order."""
        if not self._is_ordered:
            order = torch.from_numpy(np.argsort(self._ids.cpu().numpy())).to(self._ids.device)
            self._ids, self._rows = self._ids[order], self._rows[order]
            self._is_ordered = True
        return self._ids

    def __enter__(self) -> "TableSnapshot":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return rows start..stop - 1 of `ids`, fields as HashTable.export; each row may be read once.

        Raises:
            ValueError: the snapshot is closed, or a row was read before.
        """
        if self._protection is None:
            raise ValueError(f"the snapshot of table {self.name!r} is closed; take another")
        ids = self.ids[start:stop]
        return exported_fields(ids, self._protection.read(self._rows[start:stop]))

    def chunks(self, rows_per_chunk: int = 8192) -> Iterator[dict[str, Tensor]]:
        """Yield all rows in ascending id, rows_per_chunk at a time; training waits at most for one chunk to be copied."""
        for start in range(0, self.num_rows, rows_per_chunk):
            yield self.read(start, min(start + rows_per_chunk, self.num_rows))

    def close(self) -> None:
        """Stop protecting the rows of this table; a second call does nothing."""
        protection, self._protection = self._protection, None
        if protection is not None:
            protection.close(self._rows)


def exported_fields(ids: Tensor, fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return fields of RowBlocks.read under the names a checkpoint uses; the clock as seconds since 1970, int64."""
    out = {"ids": ids, **{name: values for name, values in fields.items() if name != "id"}}
    if "last_seen_s" in out:
        out["last_seen_s"] = from_low_seconds(out["last_seen_s"])
    return out
