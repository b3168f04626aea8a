"""The stages of one lookup of rows that ranks share: asked, answered, taken and waiting for its gradients.

Asked -> Answer -> Sent        made and carried on by recis.distributed.exchange.TableExchange
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recis.distributed.copies import Used
from recis.distributed.owners import Dealt
from recis.distributed.room import Received
from recis.distributed.travelling import Travelling
from recis.embedding.lookups import StoreLookup

if TYPE_CHECKING:
    from recis.distributed.exchange import TableExchange


@dataclass(slots=True, eq=False)
class Asked:
    """The ids of one lookup on their way to the owners.

    Attributes:
        exchange: where.
        dealt: the distinct (table, id) pairs of this rank by owner.
        inverse: int32 [L], position -> pair.
        numbers: pairs from each rank of each table, [W, T], under way; with copies a column more, their generation.
        generation: of the copies when it was asked.
        words: the ids and sightings that other ranks have for this one, once `start_ids` was called.
        per_table: the same, from then on.
    """

    exchange: "TableExchange"
    dealt: Dealt
    inverse: Tensor
    numbers: Travelling
    generation: int = 0
    words: Travelling | None = None
    per_table: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def send(self) -> list[int]:
        """Pairs for each rank."""
        return self.dealt.counts.sum(1).tolist()

    @property
    def receive(self) -> list[int]:
        """Pairs from each rank."""
        return self.per_table.sum(1).tolist()

    def start_ids(self) -> None:
        """Wait for the numbers and let the ids travel; a second call does nothing."""
        if self.words is None:
            self.words = self.exchange.start_ids(self)

    def look_up(self, *, train: bool, source: object) -> StoreLookup:
        """Do the rest of the lookup at once."""
        return self.exchange.take(self.exchange.answer(self, train=train, source=source))

    def drop(self) -> None:
        """Wait for what travels and forget it; every rank must do so."""
        self.start_ids()
        assert self.words is not None
        self.words.wait()


@dataclass(slots=True, eq=False)
class Answer:
    """The rows of one lookup on their way back.

    Attributes:
        asked: what was asked.
        there: what this rank looked up for all ranks as an owner.
        received: where the rows go.
        rows: [U, D], of which those of other ranks still travel.
        others: what travels.
        train, source: as given to `answer`.
    """

    asked: Asked
    there: StoreLookup
    received: Received
    rows: Tensor
    others: Travelling
    train: bool
    source: object

    def take(self) -> StoreLookup:
        """Wait for the rows and return them as a lookup of this rank; in training its gradients will be sent."""
        return self.asked.exchange.take(self)


@dataclass(slots=True, eq=False)
class Sent:
    """One training lookup of this rank that waits for its gradients, and what it became at the owners.

    Attributes:
        here: as pooling sees it; pairs of other ranks by rank, then this rank's own, then copied ones.
        there: what this rank looked up for all ranks as an owner; pairs by rank.
        send, receive: pairs for and from each rank.
        number: order of the lookup among all since the last update: by collection, then by time.
        slots: int64 [C], of the copied pairs.
    """

    here: StoreLookup
    there: StoreLookup
    send: list[int]
    receive: list[int]
    number: int
    slots: Tensor

    def from_copies(self) -> Used:
        """Return what it read from copies, without gradients."""
        first = self.here.counts.numel() - self.slots.numel()
        return Used(self.number, self.there, self.slots, self.here.counts[first:])
