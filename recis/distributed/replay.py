"""Replay steps of a trace over W ranks that do not exist: who asks whom for how much, and which rows grow where.

    per lookup:  ids of rank r  --unique_ids-->  pairs (table, id)  --Owners-->  owner       the functions that ranks run
    sent words of r to s = n + ceil(n / 2)       n ids of 8 bytes, then n sightings of 4     (exchange.py, `_pack`)

Samples r B .. (r + 1) B - 1 of a step are rank r's. The same bits as a run are not promised (a reader deals by lane), the
volumes of a run over these samples are. Memory: the ids of one step, 4 W^2 bytes, and about 40 bytes per distinct pair of
the whole trace.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from recis.distributed.owners import Owners
from recis.distributed.shape import ModelShape, index_bytes, owners_bytes, sightings_bytes
from recis.distributed.trace import TraceStep
from recis.embedding.row_owners import grown
from recis.errors import ConfigError
from recis_kernels.dispatch import njit
from recis_kernels.hash_index import HashIndex
from recis_kernels.unique_ids import unique_ids

MAX_RANKS = 4096
WORD_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Volumes:
    """One lookup of one step, int64 [W] each: the r-th entry is rank r's.

    Attributes:
        positions: ids it looks up.
        asked: distinct pairs it sends to owners, itself included.
        own: those of them that it owns.
        received: pairs that all ranks ask it for, itself included.
        distinct: distinct pairs among them, which one update writes.
        words_out, words_in: words of 8 bytes to and from other ranks in the exchange of ids.
        inserted: rows that the lookup makes at this owner.
        local: distinct pairs that it serves from its copies of hot ids.
    """

    positions: np.ndarray
    asked: np.ndarray
    own: np.ndarray
    received: np.ndarray
    distinct: np.ndarray
    words_out: np.ndarray
    words_in: np.ndarray
    inserted: np.ndarray
    local: np.ndarray

    def total(self, name: str) -> int:
        """Return the sum over the ranks."""
        return int(getattr(self, name).sum())


VOLUMES = tuple(field.name for field in fields(Volumes))


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """One step.

    Attributes:
        plain: volumes of each lookup.
        hot: the same with copies of the hot ids; None before these are chosen.
        asked_per_table: int64 [T], distinct ids of each table that ranks ask for, summed over them.
    """

    plain: tuple[Volumes, ...]
    hot: tuple[Volumes, ...] | None
    asked_per_table: np.ndarray


class Replay:
    """W ranks that look up the ids of a trace.

    Args:
        shape: tables and lookups.
        world_size: W, 1 to 4096.
        hot_ids: pairs of which every rank keeps a copy: those that most ranks ask for in the first step. They are chosen
            after it, so a replay of one step has none.

    Attributes:
        rows: int64 [T, W], rows of each table at each owner now.
        waiting: int64 [T, W], ids that were seen and not admitted.
        num_steps: replayed so far.
        hot_per_table: int64 [T], hot pairs of each table.

    Raises:
        ConfigError: W or hot_ids out of range.
    """

    def __init__(self, shape: ModelShape, world_size: int, *, hot_ids: int = 0) -> None:
        check_world(world_size)
        if hot_ids < 0:
            raise ConfigError(f"--hot-ids must be at least 0; got {hot_ids}")
        self.shape, self.world_size, self.hot_ids = shape, world_size, hot_ids
        num_tables = len(shape.tables)
        self.rows = np.zeros((num_tables, world_size), np.int64)
        self.waiting = np.zeros((num_tables, world_size), np.int64)
        self.hot_per_table = np.zeros(num_tables, np.int64)
        self.num_steps = 0
        self._owners = Owners(world_size, num_tables)
        self._admit_after = torch.tensor([table.admit_after for table in shape.tables])
        self._index = HashIndex()  # (table, id) -> number in order of first sight
        for _ in shape.tables:
            self._index.add_segment()
        self._num_pairs = 0
        self._has_row = torch.zeros(1024, dtype=torch.bool)
        self._seen = torch.zeros(1024, dtype=torch.int64)  # sightings in earlier steps
        self._asking = torch.zeros(1024, dtype=torch.int64)  # ranks that ask in the first step
        self._is_hot: Tensor | None = None
        self._asked = np.zeros(num_tables, np.int64)

    def step(self, ids: TraceStep) -> ReplayedStep:
        """Look up the ids of one step, num_samples div W samples per rank."""
        self.num_steps += 1
        plain, hot, sightings = [], [], []
        self._asked = np.zeros(len(self.shape.tables), np.int64)
        for features in self.shape.lookups:
            without, copies = self._look_up(ids, features, sightings)
            plain.append(without)
            hot.append(copies)
        for numbers, counts in sightings:  # admission looks at earlier steps alone
            self._seen.index_add_(0, numbers, counts)
        chosen = tuple(volumes for volumes in hot if volumes is not None)
        result = ReplayedStep(tuple(plain), chosen if self._is_hot is not None else None, self._asked)
        if self.hot_ids and self._is_hot is None:
            self._choose_hot()
        return result

    def _look_up(
        self, ids: TraceStep, features: tuple[str, ...], sightings: list[tuple[Tensor, Tensor]]
    ) -> tuple[Volumes, Volumes | None]:
        num_tables, ranks = len(self.shape.tables), self.world_size
        values, bounds, segments = self._ranges(ids, features)
        asked = unique_ids(values, segments, bounds)  # per rank and table, as each rank would
        rank, table = (asked.segments // num_tables).long(), asked.segments % num_tables
        self._asked += torch.bincount(table, minlength=num_tables).numpy()
        owner = self._owners.of(asked.ids).long()
        every = unique_ids(asked.ids, table)  # what owners see of all ranks together
        numbers = self._numbers_of(every.ids, every.segments)
        owner_of = self._owners.of(every.ids).long()
        counts = torch.zeros(numbers.numel(), dtype=torch.int64).index_add_(
            0, every.inverse.long(), asked.counts.long()
        )
        inserted = self._admit(numbers, every.segments.long(), owner_of)
        sightings.append((numbers, counts))
        if self.num_steps == 1 and self.hot_ids:
            self._asking.index_add_(0, numbers, every.counts.long())
        positions = _per_range(bounds, ranks)
        travels = torch.ones(asked.ids.numel(), dtype=torch.bool)
        plain = self._volumes(rank, owner, travels, owner_of, positions, inserted)
        if self._is_hot is None:
            return plain, None
        is_hot = self._is_hot[numbers]
        travels = ~is_hot[every.inverse.long()]
        return plain, self._volumes(rank, owner, travels, owner_of[~is_hot], positions, inserted)

    def _ranges(self, ids: TraceStep, features: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ids of a lookup, the bounds [F W + 1] of each (feature, rank) among them, and rank T + table [F W]."""
        ranks, num_tables = self.world_size, len(self.shape.tables)
        each = ids.num_samples // ranks
        values, bounds, first = [], [torch.zeros(1, dtype=torch.int64)], 0
        for name in features:
            cuts = ids.offsets[name][: each * ranks + 1 : each]
            values.append(ids.values[name][: int(cuts[-1])])
            bounds.append(cuts[1:] + first)
            first += int(cuts[-1])
        tables = torch.tensor([self.shape.features[name] for name in features], dtype=torch.int32)
        segments = tables[:, None] + num_tables * torch.arange(ranks, dtype=torch.int32)
        return torch.cat(values), torch.cat(bounds), segments.flatten()

    def _numbers_of(self, ids: Tensor, tables: Tensor) -> Tensor:
        """Return the number of each distinct pair; new ones get the next numbers."""
        numbers = self._index.find(ids, tables)
        new = (numbers < 0).nonzero().squeeze(1)
        if new.numel():
            fresh = torch.arange(self._num_pairs, self._num_pairs + new.numel())
            self._index.insert(ids[new], tables[new], fresh)
            numbers[new] = fresh
            self._num_pairs += new.numel()
            for name in ("_has_row", "_seen", "_asking"):
                setattr(self, name, grown(getattr(self, name), self._num_pairs, 0))
            if self._is_hot is not None:
                self._is_hot = grown(self._is_hot, self._num_pairs, 0)
            owner = self._owners.of(ids[new]).long()
            self.waiting += self._by_table(tables[new].long(), owner)
        return numbers

    def _admit(self, numbers: Tensor, tables: Tensor, owner: Tensor) -> np.ndarray:
        """Give rows to the pairs that earn one now; return how many at each owner."""
        earns = ~self._has_row[numbers] & (self._seen[numbers] + 1 >= self._admit_after[tables])
        self._has_row[numbers[earns]] = True
        made = self._by_table(tables[earns], owner[earns])
        self.rows += made
        self.waiting -= made
        return made.sum(0)

    def _by_table(self, tables: Tensor, owner: Tensor) -> np.ndarray:
        size = len(self.shape.tables) * self.world_size
        return torch.bincount(tables * self.world_size + owner, minlength=size).view(-1, self.world_size).numpy()

    def _volumes(
        self,
        rank: Tensor,
        owner: Tensor,
        travels: Tensor,
        owner_of: Tensor,
        positions: np.ndarray,
        inserted: np.ndarray,
    ) -> Volumes:
        """Sum pairs [U] by who asks and who owns; owner_of: of the distinct pairs that travel."""
        ranks = self.world_size
        sums = np.zeros((5, ranks), np.int64)
        _sum_pairs(rank.numpy(), owner.numpy(), travels.numpy(), sums)
        asked, own, received, words_out, words_in = sums
        local = torch.bincount(rank[~travels], minlength=ranks).numpy()
        distinct = torch.bincount(owner_of, minlength=ranks).numpy()
        return Volumes(
            positions=positions,
            asked=asked,
            own=own,
            received=received,
            distinct=distinct,
            words_out=words_out,
            words_in=words_in,
            inserted=inserted,
            local=local,
        )

    def _choose_hot(self) -> None:
        """Take the pairs that most ranks asked for; of equals the first seen."""
        asking = self._asking[: self._num_pairs]
        order = torch.argsort(asking, descending=True, stable=True)[: self.hot_ids]
        self._is_hot = torch.zeros_like(self._has_row)
        self._is_hot[order] = True
        for table in range(len(self.shape.tables)):
            _, numbers = self._index.export(table, ordered=False)
            self.hot_per_table[table] = int(self._is_hot[numbers].sum())

    # ---- memory

    def table_bytes(self) -> np.ndarray:
        """Return bytes of rows, index, lists of owners and sightings of all tables at each rank, int64 [W]."""
        return sum(self.parts_of_bytes().values(), np.zeros(self.world_size, np.int64))

    def parts_of_bytes(self) -> dict[str, np.ndarray]:
        """Return what `table_bytes` sums, by part, int64 [W] each."""
        tables, ranks = self.shape.tables, range(self.world_size)
        rows = self.capped_rows()
        row_bytes = np.array([table.row_bytes for table in tables])
        index = np.array([[index_bytes(int(rows[t, r])) for r in ranks] for t in range(len(tables))]).sum(0)
        stores = np.array([table.store for table in tables])
        of_store = [rows[stores == store].sum(0) for store in sorted(set(stores.tolist()))]
        owners = np.array([[owners_bytes(int(one)) for one in each] for each in of_store]).sum(0)
        sightings = np.zeros(self.world_size, np.int64)
        for number, table in enumerate(tables):
            if table.sketch_bytes:
                sightings += table.sketch_bytes
            elif table.admit_after > 1:
                sightings += np.array([sightings_bytes(int(count)) for count in self.waiting[number]])
        return {"rows": row_bytes @ rows, "index": index, "owners": owners, "sightings": sightings}

    def capped_rows(self) -> np.ndarray:
        """Return `rows` under the tables' capacities, which are dealt evenly here."""
        rows = self.rows.copy()
        for number, table in enumerate(self.shape.tables):
            if table.capacity is not None:
                np.minimum(rows[number], -(-table.capacity // self.world_size), out=rows[number])
        return rows


def check_world(world_size: int) -> None:
    """Raise ConfigError for a number of ranks outside 1..4096."""
    if not 1 <= world_size <= MAX_RANKS:
        raise ConfigError(f"--world must be 1..{MAX_RANKS} ranks; got {world_size}")


def _per_range(bounds: Tensor, ranks: int) -> np.ndarray:
    """Return positions of each rank, from the bounds of (feature, rank)."""
    return bounds.diff().view(-1, ranks).sum(0).numpy()


@njit
def _sum_pairs(rank, owner, travels, sums):
    """Add up pairs in sums [5, W]: asked, own, received, words out, words in."""
    num_ranks = sums.shape[1]
    pairs = np.zeros((num_ranks, num_ranks), np.int32)
    for u in range(rank.size):
        if travels[u]:
            pairs[rank[u], owner[u]] += 1
    for source in range(num_ranks):
        for target in range(num_ranks):
            number = np.int64(pairs[source, target])
            sums[0, source] += number
            sums[2, target] += number
            if source == target:
                sums[1, source] = number
            else:
                words = number + (number + 1) // 2
                sums[3, source] += words
                sums[4, target] += words
