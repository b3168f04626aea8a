"""Rows of one store that W ranks share: each id's row lies with its owner, everyone looks up everything.

    ask        distinct pairs --deal--> owners; their numbers start to travel
    start_ids  the numbers are there: ids and sightings start to travel
    answer     the owner's own lookup (admission, initial values); rows start to travel
    take       the rows are there: this rank pools them as if they were its own
    gradients  this rank sums its positions per pair, in (sample, feature, position) --> all-to-all of sums --> the owner
               adds those of one row in ascending part and updates once

Pairs of which this rank has a copy (see `copies`) are not asked for: `take` puts them behind those that came.
`lookup` does the first four at once. Up to `start_ids` no table is read or changed, so a batch may be asked for while the
step before it still runs; `answer` finds the rows as that step's update has left them, and values are the same.

All ranks make the same lookups in the same order. Rank r's j-th micro-batch of a step is part r + j W, so "lookup by lookup,
and inside of one in ascending rank" is ascending part: a sum that does not depend on W. What a rank owns itself never
travels. Memory beside the rows of the table, until the step ends: the unique rows of a lookup and the sums of their
gradients, each once, and both once more as far as they belong to other ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from recis.distributed.agreement import lowest_of_all, sum_of_squares
from recis.distributed.config import Places
from recis.distributed.copies import Copies
from recis.distributed.owners import Owners
from recis.distributed.ranks import RankError, Ranks
from recis.distributed.room import Memory, Received, Rooms, round_rows
from recis.distributed.stages import Answer, Asked, Sent
from recis.distributed.travelling import Travelling
from recis.embedding.lookups import StoreLookup
from recis.embedding.rows import RowStore
from recis_kernels.embedding_bag import row_gather
from recis_kernels.ids_partition import NUM_SLICES, slice_bounds
from recis_kernels.row_blocks import RowBlocks
from recis_kernels.row_grads import PendingLookup, RowGrad, reduce_lookups
from recis_kernels.unique_ids import unique_ids

# What stands in a sum's first entry where no gradient reached the row: a NaN that arithmetic does not make. It saves a
# second message; float16 and bfloat16 have one of their own.
_UNREACHED = {torch.float32: 0x7FC5_EC15, torch.bfloat16: 0x7FD5, torch.float16: 0x7ED5}
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_SOURCES = 1 << 20  # more lookups of one collection between two updates than there can be
_PIECES = 3  # sums of the ranks before this one, of this one, of those behind it


@dataclass(slots=True)
class _Pending:
    sent: list[Sent] = field(default_factory=list)
    sources: list[object] = field(default_factory=list)
    lookups: list[int] = field(default_factory=list)
    answers: int = 0
    """Training lookups since the last update that were answered, taken or not."""


class TableExchange:
    """The exchange of one RowStore, attached as `store.exchange`.

    Args:
        store: this rank's share of the rows, on the CPU.
        ranks: the job.
        rows_dtype: what rows and gradients travel as.
        places: where the tables lie; names of tables of other stores in it mean nothing here.
    """

    def __init__(
        self,
        store: RowStore,
        ranks: Ranks,
        *,
        rows_dtype: torch.dtype = torch.float32,
        places: Places | None = None,
    ) -> None:
        self._store, self._ranks = store, ranks
        places = Places() if places is None else places
        whole = self._whole_tables(places)
        self._owners = Owners(ranks.world_size, store.num_tables, own=ranks.rank, whole=whole)
        self._tables = torch.arange(store.num_tables, dtype=torch.int32).repeat(ranks.world_size)
        self._sums_dtype = rows_dtype
        self._rows_dtype = torch.bfloat16 if store.layout.dtype == torch.bfloat16 else rows_dtype
        self._dim = store.layout.dim
        self._name = store.describe()
        self._pending = _Pending()
        self._received: list[Received] = []
        self._idle: list[Received] = []
        self._outbox = Memory(self._dim)
        self._sums = Rooms(self._dim)
        self._copies = self._make_copies(places)

    def _whole_tables(self, places: Places) -> dict[int, int]:
        """Return the owner of each table of this store that one rank owns: they are dealt to the ranks in turn."""
        turns = {name: turn % self._ranks.world_size for turn, name in enumerate(places.table_wise)}
        return {k: turns[config.name] for k, config in enumerate(self._store.configs) if config.name in turns}

    def _make_copies(self, places: Places) -> Copies | None:
        names = [config.name for config in self._store.configs]
        whole = tuple(k for k, name in enumerate(names) if name in places.data_parallel)
        if self._ranks.world_size == 1 or not (whole or places.hot_ids):
            return None
        return Copies(
            self._store,
            self._ranks,
            whole=whole,
            hot_ids=places.hot_ids,
            choose_every=places.hot_every_steps,
            sliced=tuple(k for k in range(len(names)) if k not in whole and k not in self._owners.whole),
            rows_dtype=self._rows_dtype,
            sums_dtype=self._sums_dtype,
        )

    @property
    def num_copies(self) -> int:
        """Pairs (table, id) of which every rank has a copy now."""
        return 0 if self._copies is None else self._copies.num_copies

    def slices_of(self, table: int) -> tuple[int, int]:
        """Return the slices [first, stop) of a table's ids that this rank owns."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        if table in self._owners.whole:
            return (0, NUM_SLICES) if self._owners.whole[table] == rank else (0, 0)
        first, stop = slice_bounds(world_size)[rank : rank + 2].tolist()
        return first, stop

    @property
    def world_size(self) -> int:
        """How many ranks share the rows."""
        return self._ranks.world_size

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
        return self.ask(ranges).look_up(train=train, source=source)

    def ask(self, ranges: tuple[Tensor, Tensor, Tensor]) -> Asked:
        """Begin to look up ids [L] of ranges, see RowStore.lookup; every rank must do it, with no ids if it has none."""
        ids, offsets, tables = ranges
        unique = unique_ids(ids, tables, offsets)
        return self._ask(unique.ids, unique.segments, unique.counts, unique.inverse)

    def _ask(self, ids: Tensor, tables: Tensor, sightings: Tensor, inverse: Tensor) -> Asked:
        """Begin to look up distinct pairs [U]; inverse int32 [L]: position -> pair."""
        copies = self._copies
        slots = None if copies is None else copies.find(ids, tables)
        dealt = self._owners.deal(ids, tables, sightings, slots=slots)
        ones, counts = [1] * self._ranks.world_size, dealt.counts
        if copies is not None:
            counts = torch.cat([counts, counts.new_full((counts.shape[0], 1), copies.generation)], 1)
        numbers = self._ranks.start_all_to_all(counts, ones, ones, f"numbers of ids for {self._name}")
        generation = 0 if copies is None else copies.generation
        return Asked(self, dealt, dealt.places_of(inverse), numbers, generation)

    def start_ids(self, asked: Asked) -> Travelling:
        """Send each owner its ids and their sightings: one message per rank, two sightings in the place of an id."""
        asked.per_table = asked.numbers.wait()
        if self._copies is not None:
            generations, asked.per_table = asked.per_table[:, -1], asked.per_table[:, :-1]
            self._check_generations(generations.tolist(), asked.generation)
        send, receive = self._without_own(asked.send), self._without_own(asked.receive)
        words = [number + (number + 1) // 2 for number in send]
        back = [number + (number + 1) // 2 for number in receive]
        buffer = np.zeros(sum(words), np.int64)
        _pack(buffer, asked.dealt.ids.numpy(), asked.dealt.sightings.numpy(), send, words)
        return self._ranks.start_all_to_all(torch.from_numpy(buffer), words, back, f"ids for {self._name}")

    def answer(self, asked: Asked, *, train: bool, source: object) -> Answer:
        """Look up, among the rows that lie here, what all ranks asked for, and let the rows travel."""
        asked = self._with_copies_of_now(asked)
        asked.start_ids()
        bounds = torch.zeros(self._tables.numel() + 1, dtype=torch.int64)
        torch.cumsum(asked.per_table.reshape(-1), 0, out=bounds[1:])
        ids, sightings = self._asked_of_this(asked)
        there = self._store.look_up_own((ids, bounds, self._tables), train=train, source=source, counts=sightings)
        if train and self._copies is not None:
            self._copies.count(there.row_numbers, there.inverse)
        send, receive = asked.send, asked.receive
        before, own = sum(receive[: self._ranks.rank]), receive[self._ranks.rank]
        num_others = sum(receive) - own
        outbox = self._outbox.rows(num_others)
        self._gather(there, slice(0, before), outbox[:before])
        self._gather(there, slice(before + own, None), outbox[before:])
        received = self._room(train=train)
        dealt, copied_from = asked.dealt, sum(send)
        rows = received.memory.rows(dealt.ids.numel())
        own_rows = rows[copied_from - own : copied_from]
        others = self._travel(outbox, rows[: copied_from - own], receive, send, self._rows_dtype, "rows")
        self._gather(there, slice(before, before + own), own_rows)
        round_rows(own_rows, self._rows_dtype)
        if self._copies is not None:
            self._copies.gather(dealt.slots, rows[copied_from:])
        return Answer(asked, there, received, rows, others, train, source)

    def take(self, answer: Answer) -> StoreLookup:
        """Return an answer's rows as a lookup of this rank, and remember a training lookup for its gradients."""
        asked, train, source = answer.asked, answer.train, answer.source
        arrived, rows = answer.others.wait(), answer.rows
        if arrived.dtype != torch.float32:
            rows[: arrived.shape[0]] = arrived
        answer.received.blocks = RowBlocks.of_tensor(rows)
        numbers = torch.arange(rows.shape[0])
        dealt, store = asked.dealt, answer.received
        here = StoreLookup(
            store,  # type: ignore[arg-type]
            dealt.ids,
            dealt.tables,
            dealt.sightings,
            asked.inverse,
            numbers,
            numbers,
            source=source,
        )
        if not train:
            self._idle.append(store)
            return here
        here.grads = PendingLookup(here.row_numbers, here.tables, here.counts)
        number = self._number(source, store)
        self._pending.sent.append(Sent(here, answer.there, asked.send, asked.receive, number, dealt.slots))
        return here

    def _with_copies_of_now(self, asked: Asked) -> Asked:
        """Return a lookup that was asked for when other rows were copied, as it would be asked for now."""
        copies = self._copies
        if copies is None or asked.generation == copies.generation:
            return asked
        dealt = asked.dealt
        if not copies.all_kept_since(asked.generation):  # what is not copied any more must be asked for
            asked.drop()
            return self._ask(dealt.ids, dealt.tables, dealt.sightings, asked.inverse)
        first = dealt.ids.numel() - dealt.slots.numel()
        slots = copies.find(dealt.ids[first:], dealt.tables[first:])
        if slots is not None:
            asked.dealt = replace(dealt, slots=slots)
        return asked

    def _check_generations(self, theirs: list[int], own: int) -> None:
        if theirs != [own] * len(theirs):
            other = next(rank for rank, one in enumerate(theirs) if one != own)
            raise RankError(
                f"{self._name}: rank {other} has other copies of its rows than this one: rows were written or removed by "
                "hand (insert, import_rows, remove, clear, evict_older_than) on some ranks only; do it on all of them"
            )

    def num_waiting(self, source: object) -> int:
        """Return how many lookups of `source` have a gradient that no update has used."""
        return sum(sent.here.has_gradient and sent.here.source is source for sent in self._pending.sent)

    def _asked_of_this(self, asked: Asked) -> tuple[Tensor, Tensor]:
        """Return the ids and sightings that all ranks have for this one, by rank: its own come from here."""
        assert asked.words is not None
        given, receive, rank = asked.words.wait().numpy(), asked.receive, self._ranks.rank
        ids, sightings = np.empty(sum(receive), np.int64), np.empty(sum(receive), np.int32)
        own = sum(asked.send) - receive[rank]
        at = first = 0
        for source, number in enumerate(receive):
            last = first + number
            if source == rank:
                ids[first:last] = asked.dealt.ids.numpy()[own : own + number]
                sightings[first:last] = asked.dealt.sightings.numpy()[own : own + number]
            else:
                size = number + (number + 1) // 2
                ids[first:last] = given[at : at + number]
                sightings[first:last] = given[at + number : at + size].view(np.int32)[:number]
                at += size
            first = last
        return torch.from_numpy(ids), torch.from_numpy(sightings)

    def _without_own(self, sizes: list[int]) -> list[int]:
        return [0 if rank == self._ranks.rank else size for rank, size in enumerate(sizes)]

    def _gather(self, there: StoreLookup, part: slice, out: Tensor) -> None:
        if out.shape[0]:
            row_gather(self._store.blocks, there.read_rows, there.inverse[part], out=out)

    def _travel(
        self, rows: Tensor, room: Tensor, send: Sequence[int], receive: Sequence[int], dtype: torch.dtype, what: str
    ) -> Travelling:
        """Send rows of other ranks, float32, as `dtype`; what arrives is `room` itself, or of that type."""
        send, receive, what = self._without_own(list(send)), self._without_own(list(receive)), f"{what} of {self._name}"
        if dtype == torch.float32:
            return self._ranks.start_all_to_all(rows, send, receive, what, out=room)
        return self._ranks.start_all_to_all(rows.to(dtype), send, receive, what)

    def _room(self, *, train: bool) -> Received:
        """Return where the rows of the next lookup go; outside of training only until they are taken and pooled."""
        if not train:
            return self._idle.pop() if self._idle else Received(self._dim)
        used = self._pending.answers
        self._pending.answers += 1
        if used == len(self._received):
            self._received.append(Received(self._dim))
        return self._received[used]

    def _number(self, source: object, received: Received) -> int:
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
            copied_from = sum(sent.send)
            num_others = copied_from - sent.send[self._ranks.rank]
            room = self._sums.rows(copied_from + sent.slots.numel(), sent.there)
            summed = reduce_lookups([sent.here.grads], self._dim, out=room).views[0]
            sums, is_unreached = summed.grad, summed.inverse < 0
            assert sums is not None
            num_back = sum(sent.receive) - sent.receive[self._ranks.rank]
            inbox = self._sums.rows(num_back, sent.there)
            outbox = self._marked(sums[:num_others], is_unreached[:num_others])
            travelling = self._travel(outbox, inbox, sent.send, sent.receive, self._sums_dtype, "gradients")
            if self._copies is not None:
                used = sent.from_copies()
                self._copies.remember(replace(used, sums=sums[copied_from:], reached=~is_unreached[copied_from:]))
            own = slice(num_others, copied_from)
            round_rows(sums[own], self._sums_dtype)
            self._give_to_owner(sent, travelling.wait(), inbox, sums[own], ~is_unreached[own])
            sent.here.applied = True
        if self._copies is not None:
            self._copies.send()

    def _marked(self, sums: Tensor, is_unreached: Tensor) -> Tensor:
        sums = sums.to(self._sums_dtype)
        if bool(is_unreached.any()):
            sums.view(_BITS[sums.dtype])[is_unreached, 0] = _UNREACHED[sums.dtype]
        return sums

    def _give_to_owner(self, sent: Sent, arrived: Tensor, inbox: Tensor, own: Tensor, own_reached: Tensor) -> None:
        """Attach sums to the lookup this rank made for all: one contribution per rank and row, in ascending rank."""
        reached = arrived.view(_BITS[arrived.dtype])[:, 0] != _UNREACHED[arrived.dtype]
        if arrived.dtype != torch.float32:
            inbox[:] = arrived
        before = sum(sent.receive[: self._ranks.rank])
        first = 0
        pieces = (
            (inbox[:before], reached[:before]),
            (own, own_reached),
            (inbox[before:], reached[before:]),
        )
        assert sent.there.grads is not None
        for piece, (sums, is_reached) in enumerate(pieces):
            count = sums.shape[0]
            inverse = sent.there.inverse[first : first + count]
            first += count
            if not bool(is_reached.any()):
                continue
            if not bool(is_reached.all()):
                inverse = torch.where(is_reached, inverse, -1)
            view = RowGrad(
                inverse=inverse,
                offsets=torch.arange(count + 1),
                stride=count,
                per_position=True,
                micro_batch=_PIECES * sent.number + piece,
                grad=sums,
            )
            sent.there.grads.views.append(view)

    def drop_gradients(self) -> None:
        """Forget the gradients of lookups that were not sent yet, on every rank."""
        for sent in self._pending.sent:
            sent.here.applied = True
            if self._copies is not None:  # what was looked up was seen all the same
                self._copies.remember(sent.from_copies())
        self._pending = _Pending()

    def has_unsent(self) -> bool:
        """Whether a lookup since the last update got a gradient that was not sent."""
        return any(sent.here.has_gradient for sent in self._pending.sent)

    # ---- copies

    def settle(self) -> None:
        """Tell the owners what the lookups of a step that ends without an update read from copies; every rank must."""
        if self._copies is not None:
            self.drop_gradients()
            self._copies.send()

    def end_step(self) -> None:
        """Let the copies become what the owners' rows are after eviction; every rank must."""
        if self._copies is not None:
            self._copies.end_step()

    def forget_copies(self) -> None:
        """Copy nothing any more: rows were written or removed by hand; every rank must."""
        if self._copies is not None:
            self._copies.forget()

    def finish(self) -> None:
        """Wait for what still travels to the copies, before the group of ranks ends."""
        if self._copies is not None:
            self._copies.wait()


def _pack(
    buffer: np.ndarray, ids: np.ndarray, sightings: np.ndarray, send: Sequence[int], words: Sequence[int]
) -> None:
    """Write each rank's ids and sightings into its part of the buffer."""
    at = first = 0
    for number, size in zip(send, words, strict=True):
        buffer[at : at + number] = ids[first : first + number]
        buffer[at + number : at + size].view(np.int32)[:number] = sightings[first : first + number]
        at, first = at + size, first + number
