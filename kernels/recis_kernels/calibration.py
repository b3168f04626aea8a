"""Choices between two ways of doing the same work, taken from numbers of the machine at hand.

    with use(table):  choices = current()      the table of the block, else this machine's, else BUILT_IN

`recis roofline --calibrate` measures them and writes one small JSON file per machine into the user's cache folder; it is
read once per process, at the first use. A machine without a file gets BUILT_IN: what the kernels were developed with.
No choice changes which numbers are right, but `numba_from_items` can change their last bits, so runs that must repeat bit
for bit work under `use(BUILT_IN)`, and a run keeps its table in its checkpoints. Ops read choices in the forward pass, on
the caller's thread: autograd's own threads do not see the block around the call.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

FORMAT, VERSION = "recis-calibration", 1
DuplicateRule = Literal["ticket", "sort"]
_CPU_INFO = Path("/proc/cpuinfo")
_GPU_INFO = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """One table of choices. A field's text says its unit and who reads it; a wrong value raises ValueError.

    Attributes:
        machine: what it was measured on; "built-in" for the table that was not.
        measured_at: ISO time of the measurement; "" for the built-in table.
        thread_hand_over_us: microseconds to give a share of a loop to another thread. Least shares per thread are stated
            for 30 us and grow in proportion (`threads.split`).
        numba_from_items: on the CPU, from how many elements on the numba loop of an op runs, where it has a torch version
            besides (`dispatch.choose`).
        bucketed_sort_from_ids: from how many ids on a sort deals them into ranges first (`unique_ids.argsort_ids`).
        reduce_duplicates_by: on a GPU, how distinct ids are found: "ticket" (positions meet in a scratch hash table) or
            "sort"; both give the same result (`unique_ids`).
        gather_tile_items: on a GPU, elements that a program of a gather or a pooled sum holds: rows next to one another
            in flight, times the row's width; 128 to 4096, a power of two.
        find_keys_per_program: on a GPU, keys that one program of a find probes: 16 to 256, a power of two.
        block_items: on a GPU, values per program of feature ops: 128 to 8192, a power of two.
    """

    machine: str = "built-in"
    measured_at: str = ""
    thread_hand_over_us: float = 30.0
    numba_from_items: int = 0
    bucketed_sort_from_ids: int = 1 << 16
    reduce_duplicates_by: DuplicateRule = "ticket"
    gather_tile_items: int = 512
    find_keys_per_program: int = 32
    block_items: int = 1024

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if field.type is float else (int,) if field.type is int else (str,)
            if isinstance(value, bool) or not isinstance(value, kinds):
                wanted = "a number" if float in kinds else "a whole number" if int in kinds else "text"
                raise ValueError(f"calibration: {field.name} must be {wanted}; got {value!r}")
        if not 0.1 <= self.thread_hand_over_us <= 1e5:
            raise ValueError(
                f"calibration: thread_hand_over_us must lie in 0.1..100000 us; got {self.thread_hand_over_us}"
            )
        for name in ("numba_from_items", "bucketed_sort_from_ids"):
            if getattr(self, name) < 0:
                raise ValueError(f"calibration: {name} must be at least 0; got {getattr(self, name)}")
        if self.reduce_duplicates_by not in get_args(DuplicateRule):
            raise ValueError(
                f"calibration: reduce_duplicates_by must be one of {get_args(DuplicateRule)}; "
                f"got {self.reduce_duplicates_by!r}"
            )
        for name, low, high in (
            ("gather_tile_items", 128, 4096),
            ("find_keys_per_program", 16, 256),
            ("block_items", 128, 8192),
        ):
            value = getattr(self, name)
            if not low <= value <= high or value & (value - 1):
                raise ValueError(f"calibration: {name} must be a power of two in {low}..{high}; got {value}")


BUILT_IN = Calibration()
"""The table of the development machine (2 cores), and of no GPU in particular; deterministic runs use it everywhere."""

_used: ContextVar[Calibration | None] = ContextVar("recis_kernels_calibration", default=None)


def current() -> Calibration:
    """Return the table that holds here: that of the innermost `use`, else the machine's, else BUILT_IN.

    Raises:
        ValueError: this machine's file exists and is damaged.
    """
    table = _used.get()
    return of_this_machine() if table is None else table


@contextmanager
def use(table: Calibration) -> Iterator[None]:
    """Let `table` hold inside the block, for the calling thread and context."""
    token = _used.set(table)
    try:
        yield
    finally:
        _used.reset(token)


@cache
def of_this_machine() -> Calibration:
    """Return what was measured on this machine, BUILT_IN where nothing was; the file is read once per process."""
    path = default_path()
    return load(path) if path.is_file() else BUILT_IN


def load(path: Path) -> Calibration:
    """Return the table of a file.

    Raises:
        ValueError: it cannot be read, is no calibration of this version, or has a wrong value.
    """
    try:
        return from_json(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; write it anew with `recis roofline --calibrate`, or delete it") from error


def save(table: Calibration, path: Path) -> None:
    """Write a table to a file, whole or not at all, and forget what this process had read before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    part.write_text(json.dumps(to_json(table), indent=1) + "\n")
    part.replace(path)
    of_this_machine.cache_clear()


def to_json(table: Calibration) -> dict[str, Any]:
    """Return a table as plain JSON data."""
    return {"format": FORMAT, "version": VERSION, **asdict(table)}


def from_json(data: Any) -> Calibration:
    """Invert to_json; a field that an older release did not write has its built-in value.

    Raises:
        ValueError: not a calibration, of a newer version, an unknown field, or a wrong value.
    """
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        raise ValueError(f"calibration: format must be {FORMAT!r}; got {found!r}")
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= VERSION:
        raise ValueError(f"calibration: version must be 1..{VERSION}; got {version!r}")
    values = {key: value for key, value in data.items() if key not in ("format", "version")}
    unknown = sorted(set(values) - {field.name for field in fields(Calibration)})
    if unknown:
        raise ValueError(
            f"calibration: unknown field {unknown[0]!r}; known are {[f.name for f in fields(Calibration)]}"
        )
    return Calibration(**values)


def cache_folder() -> Path:
    """Return where measurements of this machine are kept: $XDG_CACHE_HOME/recis, or ~/.cache/recis."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "recis"


def default_path() -> Path:
    """Return the file of this machine's table: one per CPU model, number of usable cores and GPU model."""
    return cache_folder() / f"calibration-{machine_slug(machine_name())}.json"


def machine_slug(name: str) -> str:
    """Return a machine's name as a piece of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def machine_name() -> str:
    """Return CPU model, usable cores and GPU model; wakes no GPU, since whoever asks may only use the CPU."""
    parts = [f"{_field_of(_CPU_INFO, 'model name') or 'unknown CPU'}, {len(os.sched_getaffinity(0))} cores"]
    folders = sorted(_GPU_INFO.iterdir()) if _GPU_INFO.is_dir() else []
    models = [_field_of(folder / "information", "Model") or "unknown GPU" for folder in folders]
    return ", ".join(parts + models[:1])


def _field_of(path: Path, name: str) -> str | None:
    """Return the first value of `name : value` in a file of /proc; None where there is none."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name), None)
