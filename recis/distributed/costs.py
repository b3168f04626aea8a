"""What parts of a step cost on a machine, as one small file that `recis plan` and `recis simulate` both read.

    seconds of an op = fixed_s + items x item_s + passes x bytes / copy bandwidth
    all-to-all       = latency_s x (W - 1) + bytes / (gb_per_s 1e9)          bytes: the larger of sent and received
    all-gather       = gather_latency_s x (W - 1) + bytes received / (gb_per_s 1e9)

The copy bandwidth is that of `recis roofline`; ops and the link are measured by `recis.distributed.measure`. The file says on
which machine and when, so an estimate can be told from one of another machine.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recis.errors import ConfigError
from recis_kernels import calibration

FORMAT, VERSION = "recis-costs", 2

# op -> what an item is, and which bytes move
OPS: Mapping[str, tuple[str, str]] = {
    "dedup": ("position", "none"),
    "lookup": ("pair received", "float32 row of each"),
    "insert": ("new row", "row with state"),
    "pool": ("position", "float32 row of each, forward and backward"),
    "sums": ("position", "float32 gradient row of each"),
    "update": ("pair received", "float32 gradient row of each, and each distinct row with state"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCost:
    """Cost of one op; passes: how often its bytes move, in copies of them at the machine's copy bandwidth."""

    fixed_s: float = 0.0
    item_s: float = 0.0
    passes: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCost:
    """Cost of messages between ranks that compute, and what it was measured between.

    Attributes:
        latency_s, gather_latency_s: of a small message to or from another rank, behind some computing.
        gb_per_s: of a large one.
        between: whom.
        crowding: how many times as long ranks compute side by side, until the slowest is done, than one of them alone.
    """

    latency_s: float
    gather_latency_s: float
    gb_per_s: float
    between: str
    crowding: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Measured costs of one machine.

    Attributes:
        machine, measured_at, threads, load_average: where, when (UTC), with how many threads, how busy.
        copy_gb_per_s: bytes read and written per second of a large copy, from the roofline of `roofline_at`.
        ops: name -> OpCost, every name of OPS.
        link: between ranks.
    """

    machine: str
    measured_at: str
    threads: int
    load_average: tuple[float, float]
    copy_gb_per_s: float
    roofline_at: str
    ops: Mapping[str, OpCost]
    link: LinkCost

    def seconds(self, op: str, items: np.ndarray | float, num_bytes: np.ndarray | float = 0) -> np.ndarray:
        """Return the seconds of an op; where there are no items it is not run."""
        cost = self.ops[op]
        items = np.asarray(items, np.float64)
        moved = cost.passes * np.asarray(num_bytes, np.float64) / (self.copy_gb_per_s * 1e9)
        return np.where(items > 0, cost.fixed_s + items * cost.item_s + moved, 0.0)

    def all_to_all(self, num_bytes: np.ndarray | float, world_size: int) -> np.ndarray:
        """Return the seconds of an all-to-all of which a rank sends or receives that many bytes."""
        others = world_size - 1
        if not others:
            return np.zeros_like(np.asarray(num_bytes, np.float64))
        return self.link.latency_s * others + np.asarray(num_bytes, np.float64) / (self.link.gb_per_s * 1e9)

    def all_gather(self, num_bytes: float, world_size: int) -> float:
        """Return the seconds of an all-gather of num_bytes from each rank."""
        others = world_size - 1
        return others * (self.link.gather_latency_s + num_bytes / (self.link.gb_per_s * 1e9))

    def with_link(self, *, gb_per_s: float | None, latency_us: float | None) -> "Costs":
        """Return these costs with another network between the ranks; None keeps what was measured.

        Raises:
            ConfigError: a number that is not above 0.
        """
        link = self.link
        for name, value in (("--link-gb-per-s", gb_per_s), ("--link-latency-us", latency_us)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be above 0; got {value}")
        if gb_per_s is not None:
            link = replace(link, gb_per_s=gb_per_s, between="ranks as given")
        if latency_us is not None:
            latency_s = latency_us * 1e-6
            link = replace(link, latency_s=latency_s, gather_latency_s=latency_s, between="ranks as given")
        return replace(self, link=link)

    def describe(self) -> str:
        """Return one line that says whose costs these are."""
        here = "this machine" if self.machine == calibration.machine_name() else self.machine
        return (
            f"costs: {here}, {self.threads} thread{'s' if self.threads > 1 else ''}, {self.measured_at}, load "
            f"{self.load_average[0]} to {self.load_average[1]}; copy {self.copy_gb_per_s:.1f} GB/s; link "
            f"{self.link.gb_per_s:.2f} GB/s, {self.link.latency_s * 1e6:.0f} us per message, between {self.link.between}; "
            f"side by side {self.link.crowding:.2f} times as long"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}


def default_path() -> Path:
    """Return where this machine's costs are kept: the user's cache folder."""
    slug = calibration.machine_slug(calibration.machine_name())
    return calibration.cache_folder() / f"costs-{slug}.json"


def store(costs: Costs, path: Path) -> None:
    """Write a costs file, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    part = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(costs.to_json(), indent=1) + "\n")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"costs file {path}: cannot be written ({error.strerror}); name another --costs") from error


def load(path: Path) -> Costs:
    """Return what `store` wrote.

    Raises:
        ConfigError: no such file, or it is damaged or of another release; the text says how to measure anew.
    """
    way_out = f"measure with: recis simulate --measure --costs {path}"
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"costs file {path}: cannot be read ({error}); {way_out}") from error
    try:
        if (value.pop("format"), value.pop("version")) != (FORMAT, VERSION):
            raise ConfigError(f"costs file {path}: is of another release; {way_out}")
        ops = {name: OpCost(**value["ops"][name]) for name in OPS}
        costs = Costs(
            **{
                **value,
                "load_average": tuple(value["load_average"]),
                "ops": ops,
                "link": LinkCost(**value["link"]),
            }
        )
        numbers = [n for op in ops.values() for n in (op.fixed_s, op.item_s, op.passes)]
        numbers += [costs.link.latency_s, costs.link.gather_latency_s]
        if (
            not all(math.isfinite(n) and n >= 0 for n in numbers)
            or not min(costs.copy_gb_per_s, costs.link.gb_per_s, costs.link.crowding) > 0
        ):
            raise ValueError("a cost is negative or not finite")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"costs file {path}: lacks or garbles {error}; {way_out}") from error
    return costs
