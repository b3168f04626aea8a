"""Join the processes that torchrun started into one job, make sure that they run the same thing, and leave it cleanly.

    with joined() as job:                    None where this process is alone
        job.rank_0_first(build);  ranks = job.connect(identity, timeout_s=600)

torchrun tells each process RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. The ranks first meet in a key-value store: who is
missing there, has another world size, version or recipe is named before any collective could hang on it. Whatever ends a
rank ends the job: its reason goes into the store, rank 0 prints one line, and every process exits with the same code.
"""

import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from recis.distributed.ranks import LOOK_EVERY_S, RankError, Ranks
from recis.errors import ConfigError

JOIN_TIMEOUT_S = 300.0
_FIRST_TIMEOUT_S = 24 * 3600.0  # what rank 0 does first may generate or download data
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_GRACE_S = 4.0  # in which the others read notes and rank 0 prints; when a rank ends, torchrun stops the others
_STOPPED = "stopped by SIGTERM"


class Job:
    """The processes of one torchrun, met in a store. Made by `joined`."""

    def __init__(self, rank: int, world_size: int, store: Any, timeout_s: float) -> None:
        self.rank, self.world_size, self.store = rank, world_size, store
        self.join_timeout_s = timeout_s
        self.ranks: Ranks | None = None
        self._stage = 0

    def rank_0_first(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0, then on all others: rank 0 may write files that the others then find.

        Raises:
            RankError: rank 0 failed, on the others.
        """
        self._stage += 1
        key = f"first/{self._stage}"
        if self.rank == 0:
            try:
                made = work()
            except BaseException as error:
                self._set(key, " ".join(str(error).split()) or type(error).__name__)
                raise
            self._set(key, "")
            return made
        self._wait(key, _FIRST_TIMEOUT_S, "rank 0 prepares the run")
        fault = self.store.get(key).decode()
        if fault:
            raise RankError(f"rank 0: {fault}")
        return work()

    def tell(self, key: str, text: str) -> None:
        """Leave a text for the other ranks."""
        self._set(f"told/{key}", text)

    def hear(self, key: str) -> str:
        """Return what another rank told, waiting for it."""
        self._wait(f"told/{key}", self.join_timeout_s, f"{key} is known")
        return self.store.get(f"told/{key}").decode()

    def check_same(self, identity: Mapping[str, Any], differences: Callable[[Any, Any], list[str]]) -> None:
        """Wait for all ranks and compare what they are about to run.

        Args:
            identity: JSON-able: versions, the config of the run.
            differences: returns a line "name: one -> other" for each difference between two of them.

        Raises:
            ConfigError: a rank differs from rank 0; the text names rank, field and both values.
            RankError: a rank does not come within the time to join.
        """
        self._set(f"identity/{self.rank}", json.dumps(identity))
        first: Any = None
        for rank in range(self.world_size):
            self._wait(f"identity/{rank}", self.join_timeout_s, f"rank {rank} reads its recipe")
            found = json.loads(self.store.get(f"identity/{rank}"))
            first = found if rank == 0 else first
            lines = differences(first, found)
            if lines:
                raise ConfigError(
                    f"rank {rank} would not run what rank 0 runs: {'; '.join(lines[:3])}: start all ranks with the same "
                    "command, code and packages"
                )

    def connect(self, timeout_s: float) -> Ranks:
        """Open the process groups of the job and return its ranks.

        Raises:
            RankError: that fails, because a rank is gone or cannot be reached.
        """
        if self.world_size == 1:
            return Ranks(timeout_s=timeout_s)
        limit = timedelta(seconds=timeout_s)
        try:
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=limit,
            )
            group = dist.group.WORLD
            saving = dist.new_group(backend="gloo", timeout=limit)
        except (RuntimeError, ValueError) as error:
            raise RankError(f"the ranks cannot reach each other: {' '.join(str(error).split())[:300]}") from error
        self.ranks = Ranks(
            self.rank, self.world_size, store=self.store, group=group, saving=saving, timeout_s=timeout_s
        )
        return self.ranks

    def meet(self) -> None:
        """Wait until every rank has joined, and refuse other world sizes.

        Raises:
            RankError: some do not come; the text names them.
            ConfigError: a rank was started with another world size.
        """
        self._set(f"hello/{self.rank}", str(self.world_size))
        until = time.monotonic() + self.join_timeout_s
        missing = []
        for rank in range(self.world_size):
            while not self._has(f"hello/{rank}") and time.monotonic() < until:
                time.sleep(LOOK_EVERY_S)
            if not self._has(f"hello/{rank}"):
                missing.append(rank)
                continue
            size = int(self.store.get(f"hello/{rank}"))
            if size != self.world_size:
                raise ConfigError(
                    f"rank {rank} was started with WORLD_SIZE={size}, this one with {self.world_size}: start all of "
                    "them with one torchrun command, or with equal --nnodes and --nproc-per-node on every node"
                )
        if missing:
            raise RankError(
                f"WORLD_SIZE={self.world_size}, but ranks {missing} have not come within {self.join_timeout_s:g} s: start "
                "as many processes as torchrun was told, or look why those ended"
            )

    def close(self) -> None:
        """Leave after success: all ranks together, nothing of the groups stays behind."""
        if self.ranks is not None:
            self.ranks.meet("the end of the job")
            self.ranks = None
            gc.collect()  # what holds on to a group (DDP does, in cycles) must be gone before it
            dist.destroy_process_group()
        # the store may live in rank 0: it goes last
        self._set(f"bye/{self.rank}", "")
        if self.rank == 0:
            for rank in range(1, self.world_size):
                self._wait(f"bye/{rank}", self.join_timeout_s, f"rank {rank} leaves the job")

    def _set(self, key: str, value: str) -> None:
        try:
            self.store.set(key, value)
        except RuntimeError as error:
            raise RankError(f"the job's store on rank 0 cannot be reached: {' '.join(str(error).split())}") from error

    def _wait(self, key: str, timeout_s: float, what: str) -> None:
        until = time.monotonic() + timeout_s
        while not self._has(key):
            fault = self._fault()
            if fault is not None:
                raise RankError(fault)
            if time.monotonic() >= until:
                raise RankError(f"waited {timeout_s:g} s until {what}; that rank hangs or was killed")
            time.sleep(LOOK_EVERY_S)

    def _has(self, key: str) -> bool:
        try:
            return self.store.check([key])
        except RuntimeError as error:
            raise RankError(f"the job's store on rank 0 cannot be reached: {' '.join(str(error).split())}") from error

    def _fault(self) -> str | None:
        """Return what a rank that has failed says of it; None where none has."""
        for rank in range(self.world_size):
            if rank != self.rank and self.store.check([f"note/{rank}"]):
                note = json.loads(self.store.get(f"note/{rank}"))
                if note["kind"] == "error":
                    return f"rank {rank} failed: {note['text']}"
        return None


@contextmanager
def joined(*, timeout_s: float = JOIN_TIMEOUT_S) -> Iterator[Job | None]:
    """Join this process's job; None where torchrun did not start it. At the end all ranks leave together.

    Any exception ends the process here, after rank 0 has printed why: the others must not wait for it.

    Args:
        timeout_s: how long the ranks wait for each other to come.
    """
    if "WORLD_SIZE" not in os.environ:
        yield None
        return
    rank, world_size, address, port = _from_environment()
    job: Job | None = None
    try:
        job = Job(rank, world_size, _store(rank, address, port, timeout_s), timeout_s)
        before = signal.signal(signal.SIGTERM, _stop)  # torchrun sends it to all ranks when one has failed
        job.meet()
        yield job
        job.close()
        signal.signal(signal.SIGTERM, before)
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what follows takes a moment and ends the process anyhow
        _give_up(job, rank, error)


def in_job() -> bool:
    """Whether torchrun started this process."""
    return "WORLD_SIZE" in os.environ


def _from_environment() -> tuple[int, int, str, int]:
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is set but not {', '.join(missing)}: start with torchrun, which sets all of them"
        )
    values = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        text = os.environ[name]
        if not text.isdigit():
            raise ConfigError(f"{name} must be a whole number; got {text!r}: start with torchrun, which sets it")
        values[name] = int(text)
    if not values["RANK"] < values["WORLD_SIZE"]:
        raise ConfigError(f"RANK={values['RANK']} must be below WORLD_SIZE={values['WORLD_SIZE']}")
    return values["RANK"], values["WORLD_SIZE"], os.environ["MASTER_ADDR"], values["MASTER_PORT"]


def _store(rank: int, address: str, port: int, timeout_s: float) -> Any:
    """Return the job's store, of this attempt alone: torchrun's own, or one that rank 0 serves."""
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(
            address, port, None, hosts, timedelta(seconds=timeout_s), wait_for_workers=False, multi_tenant=True
        )
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {rank} cannot reach the job's master at {address}:{port} within {timeout_s:g} s: check MASTER_ADDR and "
            "MASTER_PORT (torchrun --master-addr, --rdzv-endpoint) and that the port is open between the nodes"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return dist.PrefixStore(f"recis/{run}/{attempt}", store)


def _stop(number: int, frame: Any) -> None:
    raise RankError(f"{_STOPPED}: another rank failed, or the job was cancelled")


def _give_up(job: Job | None, rank: int, error: BaseException) -> None:
    """End this process, after its reason has been told and, on rank 0, printed. Never returns.

    Where another rank has failed the process groups are not destroyed: that may wait for ever. The system closes them.
    """
    code = 2 if isinstance(error, ConfigError) else 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    ranks = None if job is None else (job.ranks or Ranks(rank, job.world_size, store=job.store))
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, RankError):
        text = text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}"
        if ranks is not None:
            ranks.leave_note("error", text)
    elif ranks is not None and text.startswith(_STOPPED):
        ranks.leave_note("stopped", "stopped by torchrun")
        text = ranks.explain("lost", "stopped by torchrun") or text
    if rank == 0 or job is None or _rank_0_is_silent(text):
        print(f"recis: {text}", file=sys.stderr, flush=True)
    if job is not None:
        if not isinstance(error, RankError):
            threading.Thread(target=_hang_up, args=(ranks,), daemon=True).start()
        time.sleep(_GRACE_S)  # the others must hear of it before this process, and with rank 0 the store, is gone
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 1)


def _hang_up(ranks: Ranks | None) -> None:
    """Close the connections of the process groups: whoever waits for this rank in a collective then looks for its note."""
    if ranks is not None and dist.is_initialized():
        ranks.group = ranks.saving = None  # a connection closes when nothing refers to its group any more
        dist.destroy_process_group()
        gc.collect()


def _rank_0_is_silent(text: str) -> bool:
    return "rank 0 gives no sign" in text or "ranks [0" in text


def versions() -> dict[str, str]:
    """Return the versions that must be equal on all ranks."""
    from importlib.metadata import version

    return {
        "recis": version("recis"),
        "torch": str(torch.__version__),
        "Python": ".".join(map(str, sys.version_info[:2])),
    }
