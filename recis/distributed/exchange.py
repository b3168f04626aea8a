"""Rows of one store that W ranks share: each id's row lies with its owner, everyone looks up everything.

    lookup     distinct pairs --deal--> owners: all-to-all of ids and sightings --> the owner's own lookup (admission,
               initial values) --> all-to-all of rows --> this rank pools them as if they were its own
    gradients  this rank sums its positions per pair, in (sample, feature, position) --> all-to-all of sums --> the owner
               adds those of one row in ascending part and updates once

All ranks make the same lookups in the same order. Rank r's j-th micro-batch of a step is part r + j W, so "lookup by lookup,
and inside of one in ascending rank" is ascending part: a sum that does not depend on W. Memory beside the rows of the
table: the unique rows of a lookup once as they came and once in the pooling's layout, until the step ends.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis.distributed.agreement import lowest_of_all, sum_of_squares
from recis.distributed.owners import Owners
from recis.distributed.ranks import Ranks
from recis.embedding.lookups import StoreLookup
from recis.embedding.rows import RowStore
from recis_kernels.embedding_bag import row_gather
from recis_kernels.row_blocks import RowBlocks, RowLayout
from recis_kernels.row_grads import PendingLookup, RowGrad, reduce_lookups
from recis_kernels.unique_ids import unique_ids

# What stands in a sum's first entry where no gradient reached the row: a NaN that arithmetic does not make. It saves a
# second message; float16 and bfloat16 have one of their own.
_UNREACHED = {torch.float32: 0x7FC5_EC15, torch.bfloat16: 0x7FD5, torch.float16: 0x7ED5}
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_SOURCES = 1 << 20  # more lookups of one collection between two updates than there can be


class Received:
    """Rows that a lookup brought from their owners: what pooling and backward see in place of the store."""

    def __init__(self, layout: RowLayout) -> None:
        self.blocks = RowBlocks(layout)
        self.number = 0

    def micro_batch(self, source: object) -> int:
        """Return the number of this lookup among those of its collection since the last update."""
        return self.number


@dataclass(slots=True, eq=False)
class Sent:
    """One training lookup of this rank that waits for its gradients, and what it became at the owners.

    Attributes:
        here: as pooling sees it; its rows are in the order they were sent in.
        there: what this rank looked up for all ranks as an owner.
        send, receive: pairs for and from each rank.
        number: order of the lookup among all since the last update: by collection, then by time.
    """

    here: StoreLookup
    there: StoreLookup
    send: list[int]
    receive: list[int]
    number: int


@dataclass(slots=True)
class _Pending:
    sent: list[Sent] = field(default_factory=list)
    sources: list[object] = field(default_factory=list)
    lookups: list[int] = field(default_factory=list)


class TableExchange:
    """The exchange of one RowStore, attached as `store.exchange`.

    Args:
        store: this rank's share of the rows, on the CPU.
        ranks: the job.
        rows_dtype: what rows and gradients travel as.
    """

    def __init__(self, store: RowStore, ranks: Ranks, *, rows_dtype: torch.dtype = torch.float32) -> None:
        self._store, self._ranks = store, ranks
        self._owners = Owners(ranks.world_size, store.num_tables)
        self._tables = torch.arange(store.num_tables, dtype=torch.int32).repeat(ranks.world_size)
        self._sums_dtype = rows_dtype
        self._rows_dtype = torch.bfloat16 if store.layout.dtype == torch.bfloat16 else rows_dtype
        self._layout = RowLayout(dim=store.layout.dim)
        self._name = store.describe()
        self._pending = _Pending()
        self._received: list[Received] = []
        self._read_only = Received(self._layout)

    # ---- what owners decide together

    def sum_of_squares(self, squares: Tensor) -> Tensor:
        """Return the sum over all owners of squares [N] of their rows, float64, the same bits for any W."""
        return sum_of_squares(self._ranks, squares, f"gradient norm of {self._name}")

    def total(self, sizes: np.ndarray) -> np.ndarray:
        """Return whole numbers summed over the owners, entry by entry."""
        return self._ranks.total(torch.from_numpy(sizes), f"sizes of {self._name}").numpy()

    def among_lowest(self, scores: Tensor, last_seen: Tensor, ids: Tensor, num_rows: int) -> Tensor:
        """Return which candidates [N] are among the num_rows lowest of all owners, bool [N]; see lowest_of_all."""
        return lowest_of_all(self._ranks, scores, last_seen, ids, num_rows, f"eviction from {self._name}")

    # ---- lookups

    def lookup(self, ranges: tuple[Tensor, Tensor, Tensor], *, train: bool, source: object) -> StoreLookup:
        """Look up ids [L] of ranges, as RowStore.lookup does; every rank must call it, with no ids if it has none."""
        ids, offsets, tables = ranges
        unique = unique_ids(ids, tables, offsets)
        dealt = self._owners.deal(unique.ids, unique.segments)
        sent_ids, sent_counts = unique.ids[dealt.order], unique.counts[dealt.order]
        per_table = self._exchange_counts(dealt.counts)
        send, receive = dealt.counts.sum(1).tolist(), per_table.sum(1).tolist()
        own_ids, own_counts = self._exchange_ids(sent_ids, sent_counts, send, receive)
        bounds = torch.zeros(self._tables.numel() + 1, dtype=torch.int64)
        torch.cumsum(per_table.reshape(-1), 0, out=bounds[1:])
        there = self._store.look_up_own((own_ids, bounds, self._tables), train=train, source=source, counts=own_counts)
        rows = row_gather(self._store.blocks, there.read_rows, there.inverse)
        rows = self._travel(rows, receive, send, self._rows_dtype, "rows")
        here = self._as_found(rows, dealt.place[unique.inverse.long()], train=train, source=source)
        here.ids, here.tables, here.counts = sent_ids, unique.segments[dealt.order], sent_counts
        if train:
            here.grads = PendingLookup(here.row_numbers, here.tables, here.counts)
            self._pending.sent.append(Sent(here, there, send, receive, self._number(source, here.store)))
        return here

    def _exchange_counts(self, counts: Tensor) -> Tensor:
        """Return pairs from each rank of each table, int64 [W, T]."""
        every = self._ranks.all_gather(counts, f"numbers of ids for {self._name}")
        return every[:, self._ranks.rank].contiguous()

    def _exchange_ids(self, ids: Tensor, counts: Tensor, send: list[int], receive: list[int]) -> tuple[Tensor, Tensor]:
        """Return the ids and sightings that all ranks have for this one.

        One message per rank: its ids, then its counts, two of them in the place of an id.
        """
        if self._ranks.world_size == 1:
            return ids, counts
        words = [number + (number + 1) // 2 for number in send]
        buffer = np.zeros(sum(words), np.int64)
        _pack(buffer, ids.numpy(), counts.numpy(), np.array(send), np.array(words))
        back = [number + (number + 1) // 2 for number in receive]
        given = self._ranks.all_to_all(torch.from_numpy(buffer), words, back, f"ids for {self._name}").numpy()
        own_ids, own_counts = np.empty(sum(receive), np.int64), np.empty(sum(receive), np.int32)
        _unpack(given, own_ids, own_counts, np.array(receive), np.array(back))
        return torch.from_numpy(own_ids), torch.from_numpy(own_counts)

    def _travel(self, rows: Tensor, send: list[int], receive: list[int], dtype: torch.dtype, what: str) -> Tensor:
        """Return rows [sum(receive), D] float32 for rows [sum(send), D] float32, sent as `dtype`."""
        if self._ranks.world_size == 1 and dtype == torch.float32:
            return rows
        taken = self._ranks.all_to_all(rows.to(dtype), send, receive, f"{what} of {self._name}")
        return taken.float()

    def _as_found(self, rows: Tensor, inverse: Tensor, *, train: bool, source: object) -> StoreLookup:
        """Return the received rows [U, D] as a lookup of positions inverse [L]."""
        received = self._read_only
        if train:
            used = len(self._pending.sent)
            if used == len(self._received):
                self._received.append(Received(self._layout))
            received = self._received[used]
        numbers = torch.arange(rows.shape[0])
        received.blocks.grow(rows.shape[0])
        if rows.shape[0]:
            received.blocks.write(numbers, {"weight": rows})
        none = numbers.new_empty(0)
        store: Any = received
        return StoreLookup(store, none, none.int(), none.int(), inverse, numbers, numbers, source=source)

    def _number(self, source: object, received: Any) -> int:
        """Number a training lookup: by collection in order of first use, then by time, the same on every rank."""
        known = self._pending.sources
        place = next((k for k, one in enumerate(known) if one is source), len(known))
        if place == len(known):
            known.append(source)
            self._pending.lookups.append(0)
        received.number = self._pending.lookups[place]
        self._pending.lookups[place] += 1
        return place * _SOURCES + received.number

    # ---- gradients

    def bring_gradients(self) -> None:
        """Send the gradients of all lookups since the last call to the owners; every rank must call it after backward."""
        pending, self._pending = self._pending, _Pending()
        for sent in pending.sent:
            assert sent.here.grads is not None
            summed = reduce_lookups([sent.here.grads], self._layout.dim).views[0]
            assert summed.grad is not None
            sums = self._marked(summed.grad, summed.inverse < 0)
            if self._ranks.world_size > 1:
                sums = self._ranks.all_to_all(sums, sent.send, sent.receive, f"gradients of {self._name}")
            self._give_to_owner(sent, sums)
            sent.here.applied = True

    def _marked(self, sums: Tensor, is_unreached: Tensor) -> Tensor:
        sums = sums.to(self._sums_dtype)
        if bool(is_unreached.any()):
            sums.view(_BITS[sums.dtype])[is_unreached, 0] = _UNREACHED[sums.dtype]
        return sums

    def _give_to_owner(self, sent: Sent, sums: Tensor) -> None:
        """Attach sums [R, D] to the lookup this rank made for the others: one contribution per rank and row."""
        reached = sums.view(_BITS[sums.dtype])[:, 0] != _UNREACHED[sums.dtype]
        if not bool(reached.any()):
            return
        inverse = sent.there.inverse
        if not bool(reached.all()):
            inverse = torch.where(reached, inverse, -1)
        order = torch.arange(sums.shape[0] + 1)
        view = RowGrad(
            inverse=inverse,
            offsets=order,
            stride=sums.shape[0],
            per_position=True,
            micro_batch=sent.number,
            grad=sums.float(),
        )
        assert sent.there.grads is not None
        sent.there.grads.views.append(view)

    def drop_gradients(self) -> None:
        """Forget the gradients of lookups that were not sent yet, on every rank."""
        for sent in self._pending.sent:
            sent.here.applied = True
        self._pending = _Pending()

    def has_unsent(self) -> bool:
        """Whether a lookup since the last update got a gradient that was not sent."""
        return any(sent.here.has_gradient for sent in self._pending.sent)


def _pack(buffer: np.ndarray, ids: np.ndarray, counts: np.ndarray, send: np.ndarray, words: np.ndarray) -> None:
    """Write each rank's ids and counts into its part of the buffer."""
    at = first = 0
    for number, size in zip(send.tolist(), words.tolist(), strict=True):
        buffer[at : at + number] = ids[first : first + number]
        buffer[at + number : at + size].view(np.int32)[:number] = counts[first : first + number]
        at, first = at + size, first + number


def _unpack(given: np.ndarray, ids: np.ndarray, counts: np.ndarray, receive: np.ndarray, words: np.ndarray) -> None:
    at = first = 0
    for number, size in zip(receive.tolist(), words.tolist(), strict=True):
        ids[first : first + number] = given[at : at + number]
        counts[first : first + number] = given[at + number : at + size].view(np.int32)[:number]
        at, first = at + size, first + number
