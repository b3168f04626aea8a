"""Ranks as threads of one process: `on_ranks(4, work)` runs work(ranks) on each and returns what they gave.

For tests of what ranks compute. The collectives move data as gloo does, so a test may use any number of ranks without
starting a process; what happens when a process dies is tested with processes (fleet.py).
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recis.distributed.ranks import Ranks
from recis.distributed.travelling import Travelling


class _Meeting:
    """Where the threads of one job exchange: everyone lays something down, everyone sees all of it."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._laid: list[Any] = [None] * world_size
        self.calls: list[list[str]] = [[] for _ in range(world_size)]

    def exchange(self, rank: int, item: Any, what: str) -> list[Any]:
        self.calls[rank].append(what)
        self._laid[rank] = item
        self._barrier.wait()
        seen = list(self._laid)
        self._barrier.wait()
        return seen

    def give_up(self) -> None:
        self._barrier.abort()


class ThreadRanks(Ranks):
    """Ranks whose collectives meet in memory.

    Attributes:
        sent_bytes: what all_to_all sent to other ranks so far.
    """

    def __init__(self, rank: int, world_size: int, meeting: _Meeting) -> None:
        super().__init__(rank, world_size)
        self.meeting = meeting
        self.sent_bytes = 0

    def start_all_to_all(
        self, given: Tensor, send: Sequence[int], receive: Sequence[int], what: str, *, out: Tensor | None = None
    ) -> Travelling:
        assert given.shape[0] == sum(send)
        parts = given.split(list(send))
        self.sent_bytes += sum(part.nbytes for rank, part in enumerate(parts) if rank != self.rank)
        seen = self.meeting.exchange(self.rank, parts, what)
        taken = [seen[rank][self.rank].clone() for rank in range(self.world_size)]
        assert [part.shape[0] for part in taken] == list(receive)
        filled = torch.cat(taken)
        return Travelling(self, filled if out is None else out.copy_(filled), None, what)

    def start_all_gather(self, given: Tensor, what: str, *, out: Tensor | None = None) -> Travelling:
        filled = torch.stack(self.meeting.exchange(self.rank, given.clone(), what))
        return Travelling(self, filled if out is None else out.copy_(filled), None, what)

    def gather_objects(self, item: Any, what: str, *, group: Any = None) -> list[Any]:
        return self.meeting.exchange(self.rank, item, what)

    def broadcast(self, item: Any, what: str, *, group: Any = None) -> Any:
        return self.meeting.exchange(self.rank, item, what)[0]

    def copy_from_0(self, tensor: Tensor, what: str) -> None:
        tensor.copy_(self.meeting.exchange(self.rank, tensor.clone(), what)[0])


def on_ranks(world_size: int, work: Callable[[ThreadRanks], Any]) -> list[Any]:
    """Return work(ranks) of every rank; the first error of one is raised here, and none of the others waits for it."""
    meeting = _Meeting(world_size)
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, world_size, meeting))
        except threading.BrokenBarrierError as error:
            errors.append(error)
        except BaseException as error:
            errors.insert(0, error)
            meeting.give_up()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert all(calls == meeting.calls[0] for calls in meeting.calls), "ranks made other collectives"
    return results
