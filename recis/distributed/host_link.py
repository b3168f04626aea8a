"""Rows between ranks of one machine: through shared memory, with one small message per exchange.

    sender    copies what the others are to get into its outbox and says where (all-gather of a few numbers)
    receiver  copies its part out of every other rank's outbox

A loopback socket copies each byte four times and wakes two kernels threads for it; this copies twice. An outbox is anonymous
memory (memfd) that others open through /proc: nothing is left behind by a rank that is killed. There are two of them in turn:
when a rank fills one again, every other rank has entered the exchange after the one that used it, so it has been read.
Linux only; ranks that cannot open each other's memory (other machines, other users, containers) use sockets.
"""

import mmap
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FIRST_BYTES = 1 << 20
_TOKEN = b"recis"


class _Box:
    """Shared memory of one rank, grown by making a new one."""

    def __init__(self) -> None:
        self.descriptor, self.generation = -1, 0
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, num_bytes: int) -> None:
        if num_bytes <= self.bytes.numel() and self.descriptor >= 0:
            return
        size = max(_FIRST_BYTES, 1 << max(0, num_bytes - 1).bit_length())
        old, self.generation = self.descriptor, self.generation + 1
        self.descriptor = os.memfd_create("recis-exchange")
        os.ftruncate(self.descriptor, size)
        self.bytes = _mapped(self.descriptor, size)
        if old >= 0:
            os.close(old)  # who has it open keeps its memory until it maps the new one


class HostLink:
    """The outboxes of this rank and the mapped ones of the others. Made by `connect`.

    Args:
        ranks: the job; its all_gather carries the small messages.
        pids: process id of each rank.
    """

    def __init__(self, ranks: Any, pids: Sequence[int]) -> None:
        self._ranks, self._pids = ranks, list(pids)
        self._boxes = (_Box(), _Box())
        self._turn = 0
        self._opened: dict[tuple[int, int], tuple[int, Tensor]] = {}  # (rank, which box) -> (its generation, bytes)

    def all_to_all(self, given: Tensor, send: Sequence[int], receive: Sequence[int], what: str) -> Tensor:
        """Do Ranks.all_to_all."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        which, self._turn = self._turn, 1 - self._turn
        taken = given.new_empty((sum(receive), *given.shape[1:]))
        row_bytes = given[:1].nbytes if given.shape[0] else taken[:1].nbytes
        parts = [_bytes(part) for part in given.split(list(send))]
        box = self._boxes[which]
        box.reserve(sum(part.numel() for other, part in enumerate(parts) if other != rank))
        where, at = [box.descriptor, box.generation], 0
        for other, part in enumerate(parts):
            where.append(at)
            if other != rank:
                box.bytes[at : at + part.numel()] = part
                at += part.numel()
        places = self._ranks.all_gather(torch.tensor(where), what).tolist()
        flat, first = taken.reshape(-1).view(torch.uint8), 0
        for other in range(world_size):
            size = receive[other] * row_bytes
            if size:
                start = places[other][2 + rank]
                source = parts[rank] if other == rank else self._open(other, which, places[other])[start : start + size]
                flat[first : first + size] = source
            first += size
        return taken

    def _open(self, rank: int, which: int, place: Sequence[int]) -> Tensor:
        descriptor, generation = place[:2]  # the number of a descriptor may come again, that of a generation does not
        known = self._opened.get((rank, which))
        if known is None or known[0] != generation:
            file = os.open(f"/proc/{self._pids[rank]}/fd/{descriptor}", os.O_RDWR)
            try:
                known = (generation, _mapped(file, os.fstat(file).st_size))
            finally:
                os.close(file)
            self._opened[rank, which] = known
        return known[1]


def connect(ranks: Any) -> HostLink | None:
    """Return a link when every rank can open every other one's memory, else None; every rank calls it."""
    probe = _probe()
    told = ranks.gather_objects((os.getpid(), probe), "memory of the ranks")
    can = all(_reads(pid, descriptor) for pid, descriptor in told)
    every = ranks.gather_objects(can, "memory of the ranks")
    if probe >= 0:
        os.close(probe)
    return HostLink(ranks, [pid for pid, _ in told]) if all(every) else None


def _probe() -> int:
    """Return the descriptor of memory that says who we are; -1 where there is none of this kind."""
    if not hasattr(os, "memfd_create"):
        return -1
    descriptor = os.memfd_create("recis-probe")
    os.write(descriptor, _TOKEN + str(os.getpid()).encode())
    return descriptor


def _reads(pid: int, descriptor: int) -> bool:
    """Whether that process's probe can be read here: on another machine the number means another process or none."""
    if descriptor < 0:
        return False
    try:
        with open(f"/proc/{pid}/fd/{descriptor}", "rb") as file:  # noqa: PTH123  no path of a file system
            return file.read() == _TOKEN + str(pid).encode()
    except OSError:
        return False


def _bytes(values: Tensor) -> Tensor:
    """Return the bytes of contiguous values, a view; one value or none may have any stride, which torch would refuse."""
    flat = values.reshape(-1)
    return (flat if flat.stride(0) == 1 else flat.new_empty(flat.shape).copy_(flat)).view(torch.uint8)


def _mapped(descriptor: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
