"""Copies of rows that every rank keeps: all rows of data-parallel tables, and the hot ids of sliced ones.

    lookup       a copied pair (table, id) is read at home, nobody is asked
    gradients    sums and sightings of the copied rows --all-to-all--> their owners, who add them in ascending part, update once
    step's end   the owners' rows as they are now --all-gather--> the copies of all ranks

Each row still has one owner, and with it its optimizer state, counters, admission and eviction: a run with copies has the
bytes of one without. An all-reduce of the gradients is these two exchanges with the update on every rank in the place of
the owner's, so it moves the same bytes, and every rank would keep the optimizer's state.

A copy lies in a slot, K times its owner's rank + its place in the owner's (table, id) order; K is the most that one rank
owns. What travels is dense: K W slots per lookup and one row per slot and step, asked for or not. So copies are for ids that
most ranks ask for in most steps, and for tables with fewer rows than a step asks for.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recis.distributed.ranks import Ranks
from recis.distributed.room import Memory, Rooms
from recis.distributed.travelling import Travelling
from recis.embedding.lookups import StoreLookup
from recis.embedding.rows import RowStore
from recis_kernels.embedding_bag import row_gather
from recis_kernels.hash_index import HashIndex
from recis_kernels.row_blocks import RowBlocks
from recis_kernels.row_grads import RowGrad
from recis_kernels.unique_ids import order_by_segment_and_id

COUNTED_STEPS = 10  # whose lookups say which ids are hot
_PIECES = 3  # sums of the ranks before this one, of this one, of those behind it
_UNREACHED = -(1 << 31)  # bit of the sightings of a row that was looked up and got no gradient


@dataclass(slots=True, eq=False)
class Used:
    """What one training lookup of this rank read from copies, for the owners.

    Attributes:
        number: order of the lookup among all since the last update, see TableExchange.
        there: what this rank looked up as an owner, of the pairs that were asked for.
        slots: int64 [C], distinct.
        sightings: int32 [C].
        sums: gradients, float32 [C, D]; None: none came.
        reached: bool [C], which rows a gradient reached.
    """

    number: int
    there: StoreLookup
    slots: Tensor
    sightings: Tensor
    sums: Tensor | None = None
    reached: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Set:
    """The pairs with a copy: this rank's own by (table, id), and all of them by slot.

    Attributes:
        ids, tables: int64 [N], int32 [N], of all ranks by rank.
        index: pair -> slot.
        width: K.
        own_ids, own_tables: [M], those that this rank owns.
        own_rows: int64 [M], where they lie in the store.
    """

    ids: Tensor
    tables: Tensor
    index: HashIndex
    width: int
    own_ids: Tensor
    own_tables: Tensor
    own_rows: Tensor


class Copies:
    """The copies of one store's rows; every call but `find` and `gather` is made by all ranks in one order.

    Args:
        store: this rank's share of the rows, on the CPU.
        ranks: the job, of at least two.
        whole: numbers of the tables of which every row is copied.
        hot_ids: most pairs of the other tables that are copied.
        choose_every: steps between two choices of the hot ids; the first is after COUNTED_STEPS.
        sliced: numbers of the tables whose ids may be hot.
        rows_dtype, sums_dtype: what rows and gradients travel as.

    Attributes:
        generation: sets of copies there have been.
    """

    def __init__(
        self,
        store: RowStore,
        ranks: Ranks,
        *,
        whole: tuple[int, ...],
        hot_ids: int,
        choose_every: int,
        sliced: tuple[int, ...],
        rows_dtype: torch.dtype,
        sums_dtype: torch.dtype,
    ) -> None:
        self._store, self._ranks = store, ranks
        self._whole, self._hot_ids, self._choose_every = whole, hot_ids, choose_every
        self._rows_dtype, self._sums_dtype = rows_dtype, sums_dtype
        self._dim = store.layout.dim
        self._num_words = -(-self._dim * sums_dtype.itemsize // 4)
        self._name = store.describe()
        rank, world_size = ranks.rank, ranks.world_size
        # blocks of a message: those of the other ranks by rank, then this rank's own
        self._turns = np.array([world_size - 1 if one == rank else one - (one > rank) for one in range(world_size)])
        self._rows_evict = any(config.eviction for config in store.configs)
        self._is_sliced = np.isin(np.arange(store.num_tables), sliced)
        self._hot = _no_pairs()
        self._num_steps = self._num_counted = 0
        self._asks = torch.zeros(0, dtype=torch.int32)
        self._waiting: list[Used] = []
        self._messages, self._out_rows = Rooms(1), Memory(self._dim)
        self._travelling: Travelling | None = None
        self.generation, self._lost_at = 0, 0
        self._set = self._set_of([_no_pairs()] * world_size)
        self._rows = torch.empty(0, self._dim)
        self._blocks = RowBlocks.of_tensor(self._rows)

    @property
    def num_copies(self) -> int:
        """Pairs of which every rank has a copy."""
        return self._set.ids.numel()

    # ---- lookups

    def find(self, ids: Tensor, tables: Tensor) -> Tensor | None:
        """Return the slot of each pair, ids [U] of tables int32 [U], int64 [U], -1 = no copy; None: there are no copies."""
        return self._set.index.find(ids, tables) if self.num_copies else None

    def all_kept_since(self, generation: int) -> bool:
        """Whether every pair that had a copy in that generation has one now."""
        return generation >= self._lost_at

    def gather(self, slots: Tensor, out: Tensor) -> None:
        """Write the rows of slots [C] into out, float32 [C, D]."""
        self.wait()
        if slots.numel():
            row_gather(self._blocks, slots, out=out)

    def wait(self) -> None:
        """Wait for the rows of the last step's end."""
        if self._travelling is None:
            return
        arrived, self._travelling = self._travelling.wait(), None
        if arrived.dtype != torch.float32:
            self._rows.copy_(arrived.view_as(self._rows))

    # ---- what owners are told

    def remember(self, used: Used) -> None:
        """Keep what a training lookup read from copies until `send`, with or without its gradients."""
        self._waiting.append(used)

    def send(self) -> None:
        """Tell the owners sightings and gradients of the lookups since the last call, and look them up there."""
        waiting, self._waiting = self._waiting, []
        if not waiting or not self.num_copies:
            return
        ranks, width = self._ranks, self._set.width
        others, size = ranks.world_size - 1, len(waiting) * width * (self._num_words + 1)
        user = waiting[-1].there
        out = self._words((others + 1) * size, user).view(others + 1, len(waiting), -1)
        for place, used in enumerate(waiting):
            self._write(out[:, place].numpy(), used)
        sizes = [0 if rank == ranks.rank else size for rank in range(ranks.world_size)]
        given, room = out.view(-1)[: others * size], self._words(others * size, user)
        what = f"gradients of copied rows of {self._name}"
        arrived = ranks.start_all_to_all(given, sizes, sizes, what, out=room).wait().view(others, len(waiting), -1)
        for place, used in enumerate(waiting):
            by_rank = [*arrived[: ranks.rank, place], out[others, place], *arrived[ranks.rank :, place]]
            self._look_up(used, by_rank)
        self._store.extended()

    def _words(self, number: int, user: StoreLookup) -> Tensor:
        return self._messages.rows(number, user).view(torch.int32).flatten()

    def _write(self, blocks: np.ndarray, used: Used) -> None:
        """Write one lookup into blocks [W, K (words + 1)] int32: sums of all slots of a rank, then their sightings."""
        width = self._set.width
        blocks[:, width * self._num_words :] = 0
        slots = used.slots.numpy()
        turns, places = self._turns[slots // width], slots % width
        seen = used.sightings.numpy()
        if used.sums is None or used.reached is None:
            seen = seen | _UNREACHED
        else:
            seen = np.where(used.reached.numpy(), seen, seen | _UNREACHED)
            row_bytes, word_bytes = blocks.strides[0], blocks.itemsize
            by_slot = np.lib.stride_tricks.as_strided(
                blocks,
                (blocks.shape[0], width, self._num_words),
                (row_bytes, self._num_words * word_bytes, word_bytes),
            )
            by_slot[turns, places] = self._as_words(used.sums)
        blocks[turns, width * self._num_words + places] = seen

    def _as_words(self, sums: Tensor) -> np.ndarray:
        sums = sums.to(self._sums_dtype)
        missing = self._num_words * 4 // self._sums_dtype.itemsize - self._dim
        if missing:
            sums = torch.nn.functional.pad(sums, (0, missing))
        return sums.contiguous().view(torch.int32).numpy()

    def _look_up(self, used: Used, by_rank: list[Tensor]) -> None:
        """Add to what this rank looked up as an owner what all ranks read from their copies, and attach their sums."""
        own, split = self._set.own_ids.numel(), self._set.width * self._num_words
        words = torch.stack([block[split : split + own] for block in by_rank])  # [W, M]
        seen = words & ~_UNREACHED
        total = seen.sum(0)
        found = total.nonzero().squeeze(1)
        if not found.numel():
            return
        if self._is_counting:
            self._count(self._set.own_rows[found], (seen[:, found] > 0).sum(0))
        mine, there = self._set, used.there
        first = there.extend(mine.own_ids[found], mine.own_tables[found], total[found].int(), mine.own_rows[found])
        inverse = torch.full((own,), -1, dtype=torch.int32)
        inverse[found] = torch.arange(first, first + found.numel(), dtype=torch.int32)
        rank, reached = self._ranks.rank, words > 0
        assert there.grads is not None
        for piece, part in enumerate((slice(0, rank), slice(rank, rank + 1), slice(rank + 1, None))):
            if not bool(reached[part].any()):
                continue
            sums = [self._sums(block, own) for block in by_rank[part]]
            count = len(sums) * own
            view = RowGrad(
                inverse=torch.where(reached[part], inverse, -1).flatten(),
                offsets=torch.arange(count + 1),
                stride=count,
                per_position=True,
                micro_batch=_PIECES * used.number + piece,
                grad=sums[0] if len(sums) == 1 else torch.cat(sums),
            )
            there.grads.views.append(view)

    def _sums(self, block: Tensor, own: int) -> Tensor:
        """Return the sums [M, D] float32 of a block; they stay in its memory where they can."""
        sums = block[: own * self._num_words].view(self._sums_dtype).view(own, -1)[:, : self._dim]
        return sums.float().contiguous()

    # ---- the end of a step

    def end_step(self) -> None:
        """Choose anew what is copied, where that has changed, and let the owners' rows travel to the copies."""
        self._num_counted += self._is_counting
        self._num_steps += 1
        chosen = self._choose()
        if chosen is not None:
            self._hot = chosen
        if chosen is not None or self._has_changed():
            self._renew()
        if self.num_copies:
            self._refresh()

    def forget(self) -> None:
        """Copy nothing any more, until rows are chosen anew: rows were written or removed by hand."""
        self.wait()
        self._hot, self._num_steps, self._num_counted = _no_pairs(), 0, 0
        self._asks.zero_()
        if self.num_copies:
            self._take([_no_pairs()] * self._ranks.world_size)

    def count(self, rows: Tensor, inverse: Tensor) -> None:
        """Count which rows ranks asked for as owner: rows int64 [U], -1 = none; inverse [L]: asked pair -> row."""
        if self._is_counting:
            self._count(rows, torch.bincount(inverse.long(), minlength=rows.numel()))

    @property
    def _is_counting(self) -> bool:
        """Whether the step under way is one of the last before a choice."""
        if not self._hot_ids:
            return False
        first = self._num_steps < COUNTED_STEPS
        return first or -(self._num_steps + 1) % self._choose_every < COUNTED_STEPS

    def _count(self, rows: Tensor, num_ranks: Tensor) -> None:
        missing = self._store.owners.owner.numel() - self._asks.numel()
        if missing > 0:
            self._asks = torch.cat([self._asks, self._asks.new_zeros(missing)])
        has_row = rows.numpy() >= 0
        self._asks.numpy()[rows.numpy()[has_row]] += num_ranks.numpy()[has_row].astype(np.int32)  # rows are distinct

    def _choose(self) -> Tensor | None:
        """Return the hot pairs [M, 2] that this rank owns, when it is time to choose."""
        if not self._hot_ids:
            return None
        if self._num_steps != COUNTED_STEPS and self._num_steps % self._choose_every:
            return None
        store, world_size = self._store, self._ranks.world_size
        # fewer asks than half the ranks in each step, and a copy costs more than it saves
        rows = (2 * self._asks >= world_size * self._num_counted).nonzero().squeeze(1)
        tables = store.owners.owner[rows]
        known = (tables >= 0) & (tables < store.num_tables)
        rows, tables = rows[known], tables[known]
        rows, tables = (values[torch.from_numpy(self._is_sliced[tables.numpy()])] for values in (rows, tables))
        ids = store.blocks.read(rows, ("id",))["id"]
        found = torch.stack([self._asks[rows].long(), tables.long(), ids], 1)
        found = found[_hottest(found)[: self._hot_ids]]
        self._asks.zero_()
        self._num_counted = 0
        every = self._ranks.gather_rows(found, f"hot ids of {self._name}")
        owner = np.repeat(np.arange(world_size), [part.shape[0] for part in every])
        pairs = torch.cat(every)
        order = _hottest(pairs)[: self._hot_ids]
        return pairs[order][torch.from_numpy(owner[order.numpy()] == self._ranks.rank)][:, 1:]

    def _has_changed(self) -> bool:
        """Whether, on any rank, a copied row has gone, or a table of which all rows are copied has others now."""
        if not self._whole and not (self._rows_evict and self.num_copies):
            return False
        own, store = self._set, self._store
        moved = not torch.equal(store.index.find(own.own_ids, own.own_tables), own.own_rows)
        copied = torch.bincount(own.own_tables.long(), minlength=store.num_tables).numpy()
        whole = list(self._whole)
        here = moved or not np.array_equal(copied[whole], store.sizes[whole])
        return bool(self._ranks.largest(torch.tensor([int(here)]), f"changes of copied rows of {self._name}"))

    def _renew(self) -> None:
        """Let all ranks copy the hot pairs that are still there and all rows of the tables that are copied whole."""
        store = self._store
        tables, ids = self._hot[:, 0], self._hot[:, 1]
        self._hot = self._hot[store.index.find(ids.contiguous(), tables.int()) >= 0]
        own = [self._hot]
        for table in self._whole:
            ids, _ = store.index.export(table)
            own.append(torch.stack([torch.full_like(ids, table), ids], 1))
        pairs = torch.cat(own)
        order = order_by_segment_and_id(pairs[:, 1].contiguous(), pairs[:, 0].int(), store.num_tables)
        self._take(self._ranks.gather_rows(pairs[order], f"ids of copied rows of {self._name}"))

    def _take(self, by_rank: list[Tensor]) -> None:
        """Copy these pairs [N, 2] of each rank from now on."""
        self.wait()
        before, self._set = self._set, self._set_of(by_rank)
        self.generation += 1
        if bool((self._set.index.find(before.ids, before.tables) < 0).any()):
            self._lost_at = self.generation
        self._rows = torch.zeros(self._ranks.world_size * self._set.width, self._dim)
        self._blocks = RowBlocks.of_tensor(self._rows)

    def _set_of(self, by_rank: list[Tensor]) -> _Set:
        width = max(part.shape[0] for part in by_rank)
        slots = torch.cat([rank * width + torch.arange(part.shape[0]) for rank, part in enumerate(by_rank)])
        pairs = torch.cat(list(by_rank))
        ids, tables = pairs[:, 1].contiguous(), pairs[:, 0].int()
        index = HashIndex()
        for table in range(self._store.num_tables):
            index.add_segment()
            index.reserve(table, int((tables == table).sum()))
        index.insert(ids, tables, slots)
        own = by_rank[self._ranks.rank]
        own_ids, own_tables = own[:, 1].contiguous(), own[:, 0].int()
        rows = self._store.index.find(own_ids, own_tables)
        return _Set(ids, tables, index, width, own_ids, own_tables, rows)

    def _refresh(self) -> None:
        """Let the owners' rows travel to the copies; `gather` waits for them."""
        self.wait()
        world_size, width = self._ranks.world_size, self._set.width
        given = self._out_rows.rows(width)
        row_gather(self._store.blocks, self._set.own_rows, out=given[: self._set.own_rows.numel()])
        what, room = f"copies of rows of {self._name}", self._rows.view(world_size, width, self._dim)
        if self._rows_dtype == torch.float32:
            self._travelling = self._ranks.start_all_gather(given, what, out=room)
        else:
            self._travelling = self._ranks.start_all_gather(given.to(self._rows_dtype), what)


def _no_pairs() -> Tensor:
    """Return pairs (table, id) [0, 2]."""
    return torch.empty(0, 2, dtype=torch.int64)


def _hottest(found: Tensor) -> Tensor:
    """Return the order of found [N, 3] (asks, table, id) by falling asks, then by table and id."""
    asks, tables, ids = found.unbind(1)
    return torch.from_numpy(np.lexsort((ids.numpy(), tables.numpy(), -asks.numpy())))
