"""The processes of one job, and what they tell each other: every collective has a name, a time limit and one error.

    ranks.all_to_all(...)   ranks.all_gather(...)   ranks.gather_objects(...)   ranks.broadcast(...)

Alone (W = 1) nothing is sent. A collective that fails raises RankError with rank, step and collective; whoever fails for a
reason of its own leaves a note in the job's store first, so that the others can say whose fault it was.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recis.distributed.timeline import Timeline
from recis.distributed.travelling import Travelling
from recis.errors import RecisError

_NOTE_WAIT_S = 3.0  # how long the others' notes are waited for: all of them meet a dead peer at about the same time
_SHORT = 400
LOOK_EVERY_S = 0.02  # a wait of the store itself prints a stack trace when it is over


class RankError(RecisError):
    """Another rank failed, was lost, or did not answer in time; the text says which and where."""


class Ranks:
    """This process among W.

    Args:
        rank, world_size: who this is.
        store: the job's key-value store; None alone.
        group: of the step's collectives; None alone.
        saving: a group of its own for the thread that writes checkpoints; None alone.
        timeout_s: how long a collective waits.

    Attributes:
        step: the step under way, for messages.
        timeline: what this rank does when.
        link_delay_s: what every collective of the step takes at least, to try a slow link on one machine.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        *,
        store: Any = None,
        group: Any = None,
        saving: Any = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.store, self.group, self.saving = store, group, saving
        self.timeout_s = timeout_s
        self._met = 0
        self.step = 0
        self.timeline = Timeline(rank)
        self.link_delay_s = 0.0

    def __repr__(self) -> str:
        return f"Ranks(rank {self.rank} of {self.world_size})"

    # ---- collectives of the step

    def all_to_all(self, given: Tensor, send: Sequence[int], receive: Sequence[int], what: str) -> Tensor:
        """Return the parts [sum(receive), ...] that all ranks have for this one, in order of rank.

        Args:
            given: [sum(send), ...], contiguous, first the rows for rank 0.
            send, receive: rows for and from each rank.
            what: name of the exchange, for messages.
        """
        return self.start_all_to_all(given, send, receive, what).wait()

    def start_all_to_all(
        self, given: Tensor, send: Sequence[int], receive: Sequence[int], what: str, *, out: Tensor | None = None
    ) -> Travelling:
        """Start all_to_all; every rank must start its collectives in one order, and may wait for them in any.

        Args:
            given, send, receive, what: as for all_to_all; `given` may not change until it has been waited for.
            out: [sum(receive), ...], contiguous: where the parts go; None = new memory.
        """
        if self.world_size == 1:
            return Travelling(self, given, None, what)
        taken = given.new_empty((sum(receive), *given.shape[1:])) if out is None else out
        with self.named(what):
            work = dist.all_to_all_single(taken, given, list(receive), list(send), group=self.group, async_op=True)
        return Travelling(self, taken, work, what, given)

    def all_gather(self, given: Tensor, what: str) -> Tensor:
        """Return [W, ...]: the tensors of all ranks, which have one shape."""
        return self.start_all_gather(given, what).wait()

    def start_all_gather(self, given: Tensor, what: str, *, out: Tensor | None = None) -> Travelling:
        """Start all_gather; see start_all_to_all. `out`: [W, ...], contiguous, where to; None = new memory."""
        if self.world_size == 1:
            return Travelling(self, given.unsqueeze(0), None, what)
        taken = given.new_empty((self.world_size, *given.shape)) if out is None else out
        given = given.contiguous()
        with self.named(what):
            work = dist.all_gather(list(taken.unbind(0)), given, group=self.group, async_op=True)
        return Travelling(self, taken, work, what, given)

    def gather_rows(self, given: Tensor, what: str) -> list[Tensor]:
        """Return the tensors [N_r, ...] of all ranks in order; N may differ, the rest of the shape may not."""
        if self.world_size == 1:
            return [given]
        sizes = self.all_gather(torch.tensor([given.shape[0]]), what).flatten().tolist()
        padded = given.new_zeros((max(sizes), *given.shape[1:]))
        padded[: given.shape[0]] = given
        return [part[:size] for part, size in zip(self.all_gather(padded, what), sizes, strict=True)]

    def largest(self, given: Tensor, what: str) -> Tensor:
        """Return the largest over the ranks, entry by entry."""
        return self.all_gather(given, what).amax(0)

    def total(self, given: Tensor, what: str) -> Tensor:
        """Return the sum over the ranks, entry by entry; in ascending rank, which matters to floats."""
        gathered = self.all_gather(given, what)
        out = gathered[0].clone()
        for part in gathered[1:]:
            out += part
        return out

    def gather_objects(self, item: Any, what: str, *, group: Any = None) -> list[Any]:
        """Return the picklable items of all ranks, in order of rank, on every rank."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        with self.named(what):
            dist.all_gather_object(items, item, group=self.group if group is None else group)
        return items

    def broadcast(self, item: Any, what: str, *, group: Any = None) -> Any:
        """Return rank 0's item, picklable."""
        if self.world_size == 1:
            return item
        box = [item]
        with self.named(what):
            dist.broadcast_object_list(box, src=0, group=self.group if group is None else group)
        return box[0]

    def copy_from_0(self, tensor: Tensor, what: str) -> None:
        """Overwrite a contiguous tensor with rank 0's, which has the same shape."""
        if self.world_size > 1:
            with self.named(what):
                dist.broadcast(tensor, src=0, group=self.group)

    def meet(self, what: str) -> None:
        """Wait until every rank is here, for as long as it takes: for work that one rank does alone, such as a report.

        Raises:
            RankError: a rank has failed meanwhile.
        """
        if self.world_size == 1:
            return
        self._met += 1
        try:
            self.store.set(f"met/{self._met}/{self.rank}", "")
            missing = list(range(self.world_size))
            while missing:
                missing = [rank for rank in missing if not self.store.check([f"met/{self._met}/{rank}"])]
                if any(self.store.check([f"note/{rank}"]) for rank in missing):
                    raise RankError(self.explain("lost", what) or f"{what}: one of the ranks {missing} has failed")
                time.sleep(LOOK_EVERY_S if missing else 0)
        except RuntimeError as error:
            raise RankError(f"{what}: the job's store on rank 0 cannot be reached: {_short(error)}") from error

    def on_rank_0(self, work: Callable[[], Any], what: str) -> Any:
        """Let rank 0 do something, and return on every rank what came of it.

        Raises:
            whatever `work` raises, on rank 0; on the others RankError with its text.
        """
        outcome: tuple[Any, str | None] = (None, None)
        try:
            if self.rank == 0:
                outcome = (work(), None)
        except Exception as error:
            self.broadcast((None, _short(error)), what)
            raise
        value, fault = self.broadcast(outcome, what)
        if fault is not None:
            raise RankError(f"rank 0: {fault}")
        return value

    # ---- faults

    @contextmanager
    def named(self, what: str) -> Iterator[None]:
        """Turn a failure inside into a RankError that says where, and whose fault it is."""
        begun = time.monotonic()
        try:
            yield
        except (RuntimeError, ValueError) as error:
            waited_s = time.monotonic() - begun
            kind = "timeout" if "imed out" in str(error) or waited_s >= self.timeout_s else "lost"
            self.leave_note(kind, what)
            raise RankError(self._explained(kind, what, error)) from error

    def leave_note(self, kind: str, text: str) -> None:
        """Tell the others why this rank stops: kind "error" for a reason of its own, else what it waited for."""
        if self.store is None:
            return
        note = {"kind": kind, "text": " ".join(text.split())[:_SHORT], "step": self.step}
        try:
            if not self.store.check([f"note/{self.rank}"]):
                self.store.set(f"note/{self.rank}", json.dumps(note))
        except RuntimeError:  # the store went with rank 0's machine: then nobody reads notes either
            return

    def notes(self) -> dict[int, dict[str, Any]]:
        """Return the notes of the other ranks, after waiting a little for those that are still to come."""
        found: dict[int, dict[str, Any]] = {}
        if self.store is None:
            return found
        until = time.monotonic() + _NOTE_WAIT_S
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        while len(found) < len(others):
            try:
                for rank in others:
                    if rank not in found and self.store.check([f"note/{rank}"]):
                        found[rank] = json.loads(self.store.get(f"note/{rank}"))
            except RuntimeError:  # the store went with its rank
                break
            if time.monotonic() > until:
                break
            time.sleep(LOOK_EVERY_S)
        return found

    def _explained(self, kind: str, what: str, error: BaseException) -> str:
        return self.explain(kind, what) or f"step {self.step}, {what}: {_short(error)}"

    def explain(self, kind: str, what: str) -> str | None:
        """Say whose fault it is that this rank cannot go on, by the notes of the others; None where none tells.

        Args:
            kind: "timeout" or "lost", as this rank has met it.
            what: where it was.
        """
        notes = self.notes()
        for rank, note in notes.items():
            if note["kind"] == "error":
                return f"rank {rank} failed in step {note['step']}: {note['text']}"
        where = f"step {self.step}, {what}"
        timed_out = "timeout" in (kind, *(note["kind"] for note in notes.values()))
        silent = [rank for rank in range(self.world_size) if rank != self.rank and rank not in notes]
        if silent:
            who = f"rank {silent[0]} gives" if len(silent) == 1 else f"ranks {silent} give"
            state = f"hung, nothing came within timeout_s={self.timeout_s:g}" if timed_out else "killed or lost"
            return f"{where}: {who} no sign of life: {state}; start again with --resume"
        places = {f"step {note['step']}, {note['text']}" for note in notes.values()}
        if timed_out and places - {where}:
            return (
                f"{where}: nothing came within timeout_s={self.timeout_s:g}; other ranks are at {'; '.join(sorted(places))}: "
                "they do not run the same steps"
            )
        return None


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:_SHORT]
