"""Save the state of training at the end of a step, while training goes on or not.

    saver = Saver(run, keep=3);  saver.save(boundary);  ...;  saver.wait()

`save` takes a view of the tables (rows that change afterwards are copied first, by the tables themselves) and copies of
everything small, then writes on a thread: files into `.tmp-…`, each hashed on the way and fsynced, the manifest last, one
rename. One save is in flight; the next waits for it. A save that fails removes its folder, leaves all others as they were
and raises at the next call.
"""

import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from recis.checkpoint import tree
from recis.checkpoint.folder import commit, make_tmp, rotate
from recis.checkpoint.manifest import (
    MANIFEST_NAME,
    Base,
    FileEntry,
    Manifest,
    TableEntry,
    manifest_sha256,
    rank_slices,
    read_manifest,
    step_folder,
)
from recis.checkpoint.parts import PARTS_IN_FLIGHT, file_name, rows_per_part, write_parts
from recis.checkpoint.tensors import dtype_name, write_bytes, write_tensors
from recis.embedding import TableSet, TableSnapshot
from recis.errors import CheckpointError, RecisError

CONFIG_NAME = "config.json"
READ_ROWS = 8192  # rows read at once from a view of a table: so few that torch wakes no OpenMP workers
GENTLE_READ_ROWS = 4096  # the same while training goes on
_LOWEST_PRIORITY = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """Everything of a run at the end of a step. Tensors are read while `save` runs and not after it.

    Attributes:
        step: optimizer updates so far.
        seed: of the run.
        clock_s: seconds since 1970.
        table_sets: the tables, of different names.
        dense: parameters and buffers outside the tables, by name.
        trees: states of tensors and plain values by name ("optim", "rng", "metrics"), see recis.checkpoint.tree.
        reader, schedules, trainer: plain values.
        metrics: newest metric values, for people who look into the manifest.
        config: text of config.json.
    """

    step: int
    seed: int = 0
    clock_s: int = 0
    table_sets: Sequence[TableSet] = ()
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    trees: Mapping[str, Any] = field(default_factory=dict)
    reader: Any = None
    schedules: Any = None
    trainer: Any = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    config: str = "{}\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """A boundary that training can no longer change."""

    boundary: Boundary
    tables: Mapping[str, TableSnapshot]
    dense: Mapping[str, Tensor]
    trees: Mapping[str, tuple[str, dict[str, Tensor]]]
    plain: Mapping[str, Any]
    base: Base | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFiles:
    """What one rank reports after writing: its files, and what it knows of each table."""

    files: Mapping[str, FileEntry]
    tables: Mapping[str, TableEntry]


class Peers(Protocol):
    """The processes that save together: recis.distributed.ranks.Ranks, by the group that is theirs for saving."""

    rank: int
    world_size: int
    saving: Any

    def gather_objects(self, item: Any, what: str, *, group: Any = None) -> list[Any]: ...

    def broadcast(self, item: Any, what: str, *, group: Any = None) -> Any: ...


class Saver:
    """Writes the checkpoints of one run.

    Of several processes each writes the rows it owns, all at once; the last to finish is waited for in one exchange, then
    rank 0 writes the manifest. A rank that fails is named by all, and nothing of that save is kept.

    Args:
        run: folder of the run.
        peers: the other ranks of the job; each of them saves the same steps. None: this process is alone.
        keep: newest checkpoints to keep.
        snapshot_memory_mib: memory for rows copied during a save; beyond it training waits.
        background: write on a thread; else `save` returns when the checkpoint is whole.
    """

    def __init__(
        self,
        run: Path,
        *,
        peers: Peers | None = None,
        keep: int = 3,
        snapshot_memory_mib: int = 1024,
        background: bool = True,
    ) -> None:
        self.run = run
        self.peers = peers
        self.keep = keep
        self.snapshot_memory_mib = snapshot_memory_mib
        self.background = background
        self._thread = _pool(1, gentle=background)
        self._in_flight: Future[Path] | None = None

    def save(self, boundary: Boundary, *, protect: Sequence[int] = (), base: Path | None = None) -> Path | None:
        """Save a boundary as `step_<step>`.

        Args:
            boundary: the state; free to change once this returns.
            protect: steps whose checkpoints rotation must leave (the best one).
            base: write a delta on this checkpoint; it must be the one saved or loaded last.

        Returns:
            The checkpoint when it is whole already; None when a thread writes it.

        Raises:
            CheckpointError: this save or the one before could not be written.
        """
        self.wait()
        captured = capture(boundary, base=base, memory_mib=self.snapshot_memory_mib)
        self._in_flight = self._thread.submit(self._write, captured, tuple(protect))
        return None if self.background else self.wait()

    def wait(self) -> Path | None:
        """Wait for the save in flight and return its folder; None when there is none. Raises as save."""
        if self._in_flight is None:
            return None
        try:
            return self._in_flight.result()
        finally:
            self._in_flight = None

    def poll(self) -> Path | None:
        """Return the folder of a save that has just become whole, without waiting. Raises as save."""
        return self.wait() if self._in_flight is not None and self._in_flight.done() else None

    def close(self) -> None:
        """Wait for the save in flight and end the thread. Raises as save."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, captured: Captured, protect: Sequence[int]) -> Path:
        if self.peers is not None:
            return self._write_together(self.peers, captured, protect)
        final = write_checkpoint(captured, self.run, gentle=self.background)
        self.rotate(protect)
        return final

    def _write_together(self, peers: Peers, captured: Captured, protect: Sequence[int]) -> Path:
        step = captured.boundary.step
        with ExitStack() as stack:
            for snapshot in captured.tables.values():
                stack.callback(snapshot.close)
            outcome = _tried(lambda: make_tmp(self.run, step_folder(step)), peers.rank == 0)
            tmp, fault = peers.broadcast(outcome, f"folder of the checkpoint of step {step}", group=peers.saving)
            if fault is not None:
                raise CheckpointError(f"rank 0: {fault}")

            def write() -> RankFiles:
                if not tmp.is_dir():
                    raise CheckpointError(
                        f"{tmp}: rank 0 made this folder and it is not here: the run's folder must be one that all ranks "
                        "share (NFS, a mounted bucket)"
                    )
                return write_rank(captured, tmp, rank=peers.rank, world_size=peers.world_size, gentle=self.background)

            written = peers.gather_objects(_tried(write), f"files of the checkpoint of step {step}", group=peers.saving)
            outcome = _tried(lambda: self._commit(captured, tmp, written, protect), peers.rank == 0)
        final, fault = peers.broadcast(outcome, f"checkpoint of step {step}", group=peers.saving)
        if fault is not None:
            raise CheckpointError(fault)
        return final

    def _commit(
        self, captured: Captured, tmp: Path, written: Sequence[tuple[RankFiles, str | None]], protect: Sequence[int]
    ) -> Path:
        """Make the checkpoint whole from the files of all ranks; rank 0 does."""
        try:
            faults = [f"rank {rank}: {fault}" for rank, (_, fault) in enumerate(written) if fault is not None]
            if faults:
                raise CheckpointError("; ".join(faults))
            final = commit_checkpoint(captured, tmp, self.run, [report for report, _ in written])
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        self.rotate(protect)
        return final

    def rotate(self, protect: Sequence[int]) -> None:
        """Delete old checkpoints but those of the steps `protect`: after each save, and when a killed run goes on."""
        rotate(self.run, self.keep, [self.run / step_folder(step) for step in protect])


def save(run: Path, boundary: Boundary, *, base: Path | None = None) -> Path:
    """Save one boundary now and return the checkpoint's folder; nothing is rotated. Raises as Saver.save."""
    return write_checkpoint(capture(boundary, base=base), run)


def capture(boundary: Boundary, *, base: Path | None = None, memory_mib: int = 1024) -> Captured:
    """Freeze a boundary: views of the tables, copies of the rest. The tables start a new delta here.

    The views must be written (or closed): until then training copies the rows that it changes.

    Raises:
        CheckpointError: a state that cannot be saved; a table name in two table sets; a base that is not one.
    """
    on = None if base is None else Base(step=read_manifest(base).step, manifest_sha256=manifest_sha256(base))
    trees = {}
    for name, state in boundary.trees.items():
        packed, tensors = tree.pack(state)
        trees[name] = (tree.to_text(packed), {key: _copied(tensor) for key, tensor in tensors.items()})
    plain = {}
    for name in ("reader", "schedules", "trainer", "metrics"):
        packed, tensors = tree.pack(getattr(boundary, name))
        if tensors:
            raise CheckpointError(f"{name} state holds tensors ({', '.join(tensors)}); it must be plain values")
        plain[name] = packed
    dense = {name: _copied(tensor) for name, tensor in boundary.dense.items()}
    names = [name for table_set in boundary.table_sets for name in table_set.tables]
    for name in names:
        if names.count(name) > 1:
            raise CheckpointError(f"two table sets have a table {name!r}; rename one, or build both on one TableSet")
    tables: dict[str, TableSnapshot] = {}
    for table_set in boundary.table_sets:
        tables.update(table_set.snapshot(memory_mib=memory_mib, since_step=None if on is None else on.step))
        for table in table_set:
            table.mark_base()
    return Captured(boundary=boundary, tables=tables, dense=dense, trees=trees, plain=plain, base=on)


def write_checkpoint(captured: Captured, run: Path, *, gentle: bool = False) -> Path:
    """Write a captured boundary as one process and return its folder; on failure nothing of it is left.

    Gentle: let training go first, at the price of a longer save.

    Raises:
        CheckpointError: a file cannot be written.
    """
    with ExitStack() as stack:
        for snapshot in captured.tables.values():
            stack.callback(snapshot.close)
        tmp = make_tmp(run, step_folder(captured.boundary.step))
        try:
            report = write_rank(captured, tmp, rank=0, world_size=1, gentle=gentle)
            return commit_checkpoint(captured, tmp, run, [report])
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise


def write_rank(captured: Captured, tmp: Path, *, rank: int, world_size: int, gentle: bool = False) -> RankFiles:
    """Write the files of one rank into `tmp`; dense tensors and config.json are rank 0's."""
    of = f"{rank:05d}-of-{world_size:05d}"
    files: dict[str, FileEntry] = {}
    tables: dict[str, TableEntry] = {}
    with _pool(2, gentle=gentle) as pool:
        for name, snapshot in captured.tables.items():
            tables[name] = entry = _table_entry(snapshot, is_delta=captured.base is not None)
            parts = _parts(snapshot, rows_per_part(entry.row_bytes), gentle=gentle)
            own = snapshot.slices
            files.update(write_parts(tmp, name, parts, rank=rank, world_size=world_size, slices=own, pool=pool))
            files.update(_write_rest(tmp, name, snapshot, rank, world_size, is_delta=captured.base is not None))
    for name, (text, tensors) in captured.trees.items():
        file = f"{name}-{of}.safetensors"
        files[file] = write_tensors(tmp / file, tensors, metadata={"tree": text})
    if rank == 0:
        file = f"dense-{of}.safetensors"
        files[file] = write_tensors(tmp / file, captured.dense)
        files[CONFIG_NAME] = write_bytes(tmp / CONFIG_NAME, captured.boundary.config.encode())
    return RankFiles(files=files, tables=tables)


def commit_checkpoint(captured: Captured, tmp: Path, run: Path, reports: Sequence[RankFiles]) -> Path:
    """Write the manifest over the files of all ranks, rename the folder, and return it: what rank 0 does last."""
    boundary = captured.boundary
    manifest = Manifest(
        step=boundary.step,
        world_size=len(reports),
        kind="full" if captured.base is None else "delta",
        base=captured.base,
        seed=boundary.seed,
        clock_s=boundary.clock_s,
        files={name: entry for report in reports for name, entry in report.files.items()},
        tables=merge_tables([report.tables for report in reports]),
        dense={name: _shape(tensor) for name, tensor in captured.dense.items()},
        lib={"torch": str(torch.__version__)},
        **captured.plain,
    )
    write_bytes(tmp / MANIFEST_NAME, manifest.to_bytes())
    final = run / step_folder(boundary.step)
    commit(tmp, final)
    return final


def merge_tables(reports: Sequence[Mapping[str, TableEntry]]) -> dict[str, TableEntry]:
    """Return one entry per table from those of all ranks: rows and tombstones summed, states side by side."""
    merged = {}
    for name, entry in reports[0].items():
        entries = [report[name] for report in reports]
        merged[name] = replace(
            entry,
            rows=sum(item.rows for item in entries),
            tombstones=sum(item.tombstones for item in entries),
            states=[state for item in entries for state in item.states],
        )
    return merged


def _table_entry(snapshot: TableSnapshot, *, is_delta: bool) -> TableEntry:
    signature = snapshot.signature
    return TableEntry(
        dim=signature["dim"],
        dtype=dtype_name(getattr(torch, signature["dtype"])),
        rows=snapshot.num_rows,
        optimizer=signature["optimizer"],
        initializer=signature["initializer"],
        t=int(snapshot.state["t"]),
        tombstones=snapshot.tombstones.numel() if is_delta else 0,
        state_widths=snapshot.state_widths,
        states=[snapshot.state],
    )


def _write_rest(
    tmp: Path, name: str, snapshot: TableSnapshot, rank: int, world_size: int, *, is_delta: bool
) -> dict[str, FileEntry]:
    """Write what a table has beside rows: what admission counted and, in a delta, the tombstones."""
    files: dict[str, FileEntry] = {}
    slices = rank_slices(rank, world_size) if snapshot.slices is None else snapshot.slices
    # the log of changes ends at every checkpoint: what it says stands in the tombstones and rows of a delta
    admission = {key: value for key, value in snapshot.admission.items() if not key.startswith("log.")}
    if admission:
        file = file_name("admission", name, rank, world_size)
        files[file] = write_tensors(tmp / file, admission, slices=slices)
    if is_delta:
        file = file_name("tombstones", name, rank, world_size)
        files[file] = write_tensors(tmp / file, {"ids": snapshot.tombstones}, slices=slices)
    return files


def _parts(snapshot: TableSnapshot, part_rows: int, *, gentle: bool) -> Iterator[dict[str, Tensor]]:
    """Yield the rows of a table, part by part, in memory that is used again for the third part after.

    Rows are read a few at a time and copied on while they are in cache. Gentle: fewer still, because training may have to
    wait for a read to end.
    """
    step = GENTLE_READ_ROWS if gentle else READ_ROWS
    ring: list[dict[str, Tensor]] = [{} for _ in range(PARTS_IN_FLIGHT + 1)]
    for number, start in enumerate(range(0, snapshot.num_rows, part_rows)):
        stop = min(start + part_rows, snapshot.num_rows)
        buffers = ring[number % len(ring)]
        for first in range(start, stop, step):
            for key, values in snapshot.read(first, min(first + step, stop)).items():
                if key not in buffers:
                    buffers[key] = values.new_empty((min(part_rows, snapshot.num_rows), *values.shape[1:]))
                _copy_into(buffers[key][first - start : first - start + values.shape[0]], values)
        yield {key: values[: stop - start] for key, values in buffers.items()}


def _copy_into(target: Tensor, values: Tensor) -> None:
    """Copy contiguous values by one thread: torch's own copy would wake OpenMP's workers, who then spin for a while."""
    np.copyto(target.reshape(-1).view(torch.uint8).numpy(), values.reshape(-1).view(torch.uint8).numpy())


def _pool(threads: int, *, gentle: bool) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "recis-save", _yield_to_training if gentle else None)


def _tried(work: Callable[[], Any], wanted: bool = True) -> tuple[Any, str | None]:
    """Return (what work gives, None), or (None, why it failed): an outcome that can be told to other ranks."""
    try:
        return (work() if wanted else None), None
    except (OSError, RecisError) as error:
        return None, " ".join(str(error).split())


def _yield_to_training() -> None:
    """Let this thread run when nobody else wants the core; Linux sets priorities per thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _shape(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
