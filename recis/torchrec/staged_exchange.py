"""The exchange of one row store cut into stages, so that a pipeline can start a batch's ids before the step it belongs to.

    ask      distinct pairs, dealt to owners; their numbers start to travel
    send     the numbers are there: the ids start to travel
    receive  the ids are there
    answer   the owner's own lookup, in the step that the batch belongs to; its rows start to travel
    take     the rows are there: what this rank pools

Up to `receive` no table is read or changed, so a batch may be asked for while the step before it still runs; `answer` finds
the rows as that step's update has left them. Values are those of a lookup done in one go.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from recis.distributed.exchange import Sent, TableExchange, _pack, _unpack
from recis.distributed.owners import Dealt
from recis.distributed.ranks import Ranks
from recis.embedding.lookups import StoreLookup
from recis_kernels.embedding_bag import row_gather
from recis_kernels.row_grads import PendingLookup
from recis_kernels.unique_ids import Unique, unique_ids


class Travelling:
    """A tensor that a collective is still filling.

    Args:
        ranks: the job; its name for the collective is in the error of a rank that is lost meanwhile.
        taken: what is being filled.
        work: the collective; None: it is there.
        what: name of the collective.
        given: what is sent; kept until it has been.
    """

    def __init__(self, ranks: Ranks, taken: Tensor, work: Any, what: str, given: Tensor | None = None) -> None:
        self._ranks, self._taken, self._work, self._what, self._given = ranks, taken, work, what, given

    def wait(self) -> Tensor:
        """Return the filled tensor.

        Raises:
            RankError: another rank failed, was lost or did not answer in time.
        """
        if self._work is not None:
            with self._ranks._named(self._what):
                self._work.wait()
            self._work = self._given = None
        return self._taken


def start_all_gather(ranks: Ranks, given: Tensor, what: str) -> Travelling:
    """Start Ranks.all_gather."""
    if ranks.world_size == 1:
        return Travelling(ranks, given.unsqueeze(0), None, what)
    taken = given.new_empty((ranks.world_size, *given.shape))
    given = given.contiguous()
    with ranks._named(what):
        work = dist.all_gather(list(taken.unbind(0)), given, group=ranks.group, async_op=True)
    return Travelling(ranks, taken, work, what, given)


def start_all_to_all(ranks: Ranks, given: Tensor, send: Sequence[int], receive: Sequence[int], what: str) -> Travelling:
    """Start Ranks.all_to_all."""
    if ranks.world_size == 1:
        return Travelling(ranks, given, None, what)
    taken = given.new_empty((sum(receive), *given.shape[1:]))
    with ranks._named(what):
        work = dist.all_to_all_single(taken, given, list(receive), list(send), group=ranks.group, async_op=True)
    return Travelling(ranks, taken, work, what, given)


@dataclass(slots=True, eq=False)
class Asked:
    """The ids of one lookup on their way to the owners.

    Attributes:
        exchange: where.
        unique, dealt: the distinct (table, id) pairs of this rank, and who owns them.
        counts: pairs from each rank of each table, then the ids and sightings that all ranks have for this one.
    """

    exchange: "StagedExchange"
    unique: Unique
    dealt: Dealt
    numbers: Travelling
    per_table: Tensor = field(default_factory=lambda: torch.empty(0))
    words: Travelling | None = None

    @property
    def send(self) -> list[int]:
        """Pairs for each rank."""
        return self.dealt.counts.sum(1).tolist()

    @property
    def receive(self) -> list[int]:
        """Pairs from each rank, known once their numbers have come."""
        return self.per_table.sum(1).tolist()

    def start_ids(self) -> None:
        """Wait for the numbers of ids and let the ids travel; a second call does nothing."""
        if self.words is None:
            self.words = self.exchange.start_ids(self)


@dataclass(slots=True, eq=False)
class Answer:
    """The rows of one lookup on their way back.

    Attributes:
        asked: what was asked.
        there: what this rank looked up for all ranks as an owner.
        rows: [sum(send), D] as they travel.
        train, source: as given to `answer`.
    """

    asked: Asked
    there: StoreLookup
    rows: Travelling
    train: bool
    source: object

    def take(self) -> StoreLookup:
        """Wait for the rows and return them as a lookup of this rank; in training its gradients will be sent."""
        return self.asked.exchange.take(self)


class StagedExchange(TableExchange):
    """A TableExchange whose lookups can be done in stages; in one go it does what its base does."""

    def ask(self, ranges: tuple[Tensor, Tensor, Tensor]) -> Asked:
        """Begin to look up ids [L] of ranges, see RowStore.lookup; every rank must do it, with no ids if it has none."""
        ids, offsets, tables = ranges
        unique = unique_ids(ids, tables, offsets)
        dealt = self._owners.deal(unique.ids, unique.segments)
        numbers = start_all_gather(self._ranks, dealt.counts, f"numbers of ids for {self._name}")
        return Asked(self, unique, dealt, numbers)

    def start_ids(self, asked: Asked) -> Travelling:
        """Send each owner its ids and their sightings: one message per rank, two sightings in the place of an id."""
        asked.per_table = asked.numbers.wait()[:, self._ranks.rank].contiguous()
        order, send, receive = asked.dealt.order, asked.send, asked.receive
        words = [number + (number + 1) // 2 for number in send]
        back = [number + (number + 1) // 2 for number in receive]
        buffer = np.zeros(sum(words), np.int64)
        counts = asked.unique.counts[order]
        _pack(buffer, asked.unique.ids[order].numpy(), counts.numpy(), np.array(send), np.array(words))
        return start_all_to_all(self._ranks, torch.from_numpy(buffer), words, back, f"ids for {self._name}")

    def answer(self, asked: Asked, *, train: bool, source: object) -> Answer:
        """Look up, among the rows that lie here, what all ranks asked for, and let the rows travel."""
        asked.start_ids()
        assert asked.words is not None
        given, receive = asked.words.wait().numpy(), asked.receive
        back = [number + (number + 1) // 2 for number in receive]
        own_ids, own_counts = np.empty(sum(receive), np.int64), np.empty(sum(receive), np.int32)
        _unpack(given, own_ids, own_counts, np.array(receive), np.array(back))
        bounds = torch.zeros(self._tables.numel() + 1, dtype=torch.int64)
        torch.cumsum(asked.per_table.reshape(-1), 0, out=bounds[1:])
        ranges = (torch.from_numpy(own_ids), bounds, self._tables)
        there = self._store.look_up_own(ranges, train=train, source=source, counts=torch.from_numpy(own_counts))
        rows = row_gather(self._store.blocks, there.read_rows, there.inverse).to(self._rows_dtype)
        travelling = start_all_to_all(self._ranks, rows, receive, asked.send, f"rows of {self._name}")
        return Answer(asked, there, travelling, train, source)

    def take(self, answer: Answer) -> StoreLookup:
        """Return an answer's rows as a lookup of this rank, and remember a training lookup for its gradients."""
        asked, train, source = answer.asked, answer.train, answer.source
        unique, order = asked.unique, asked.dealt.order
        rows = answer.rows.wait().float()
        here = self._as_found(rows, asked.dealt.place[unique.inverse.long()], train=train, source=source)
        here.ids, here.tables, here.counts = unique.ids[order], unique.segments[order], unique.counts[order]
        if train:
            here.grads = PendingLookup(here.row_numbers, here.tables, here.counts)
            number = self._number(source, here.store)
            self._pending.sent.append(Sent(here, answer.there, asked.send, asked.receive, number))
        return here

    def lookup(self, ranges: tuple[Tensor, Tensor, Tensor], *, train: bool, source: object) -> StoreLookup:
        """Do all stages at once."""
        return self.take(self.answer(self.ask(ranges), train=train, source=source))

    def num_waiting(self, source: object) -> int:
        """Return how many lookups of `source` have a gradient that no update has used."""
        return sum(sent.here.has_gradient and sent.here.source is source for sent in self._pending.sent)
