"""How a run is spread over processes."""

import math
from dataclasses import dataclass
from typing import Literal

from recis.errors import ConfigError

RowsDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where the rows of tables lie among the ranks; values are the same wherever they lie.

    A table that is named nowhere is sliced: each rank owns the ids of its slices.
    """

    table_wise: tuple[str, ...] = ()
    """Tables that one rank owns whole; they are dealt to the ranks in turn."""
    data_parallel: tuple[str, ...] = ()
    """Small tables of which every rank has a copy of all rows; gradients meet at a row's owner, new rows go to all."""
    hot_ids: int = 0
    """Ids, of all sliced tables with rows of one shape together, of which every rank has a copy: those most ranks ask for."""
    hot_every_steps: int = 1000
    """Steps between two choices of the hot ids; the first choice is after 10 steps, or as many as here if those are fewer."""

    def __post_init__(self) -> None:
        twice = sorted(set(self.table_wise) & set(self.data_parallel))
        if twice:
            raise ConfigError(f"Places: table {twice[0]!r} is both table_wise and data_parallel; name it once")
        if self.hot_ids < 0 or self.hot_every_steps < 1:
            raise ConfigError(
                "Places: hot_ids must be at least 0, hot_every_steps at least 1; got "
                f"{self.hot_ids}, {self.hot_every_steps}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """One run over the W processes that torchrun starts; a process alone is W = 1.

    A step's samples are cut into `parts` by lane, each computed for itself, and all sums over parts are added in ascending
    part. In deterministic mode a run therefore gives equal bytes at every W that divides `parts`.
    """

    parts: int | None = None
    """Parts of a step; a multiple of W. None: W of them, and a process alone trains as if this config were not there."""
    timeout_s: float = 600.0
    """Seconds that a rank waits for the others in one exchange before it gives up and says for whom it waited."""
    rows_dtype: RowsDtype = "float32"
    """Type in which rows and their gradients travel; sums and updates stay float32. bfloat16 rows always travel as such."""

    places: Places = Places()
    """Where the rows of tables lie: sliced unless it says otherwise."""
    shard_dense: bool = False
    """Deal the dense part to the ranks by torch's fully_shard (FSDP2): each keeps 1/W of its weights, gradients and
    optimizer state. Needs deterministic=False where there is more than one process."""
    unit_parameters: int = 1_000_000
    """Parameters of the smallest submodule that is then gathered by itself, just for the time in which it runs."""
    overlap: bool = True
    """Read the next step's samples and send their ids to the owners while this step computes; values are the same."""
    link_delay_ms: float = 0.0
    """What every exchange of a step takes at least: tries a slow link on one machine. 0 for real runs."""
    timeline_steps: int = 0
    """Steps, from the first of this process on, whose times each rank writes to `timeline-<rank>.json` in the run's folder."""

    def __post_init__(self) -> None:
        if not 0 <= self.link_delay_ms < math.inf or self.timeline_steps < 0:
            raise ConfigError(
                "Parallel: link_delay_ms must be at least 0 and finite, timeline_steps at least 0; got "
                f"{self.link_delay_ms}, {self.timeline_steps}"
            )
        if self.unit_parameters < 1:
            raise ConfigError(f"Parallel: unit_parameters must be at least 1; got {self.unit_parameters}")
        if self.parts is not None and self.parts < 1:
            raise ConfigError(f"Parallel: parts must be at least 1 or None; got {self.parts}")
        if not self.timeout_s > 0:
            raise ConfigError(f"Parallel: timeout_s must be above 0; got {self.timeout_s}")
        if self.rows_dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"Parallel: rows_dtype must be float32, bfloat16 or float16; got {self.rows_dtype!r}")

    def deals_dense(self, world_size: int, *, deterministic: bool) -> bool:
        """Return whether W processes deal the dense part among them.

        Raises:
            ConfigError: they would, and the run is to be deterministic.
        """
        if self.shard_dense and world_size > 1 and deterministic:
            raise ConfigError(
                "parallel.shard_dense: gradients are added in an order of the backend's, so equal bytes cannot be promised "
                "as deterministic=True does; set deterministic=false, or parallel.shard_dense=false"
            )
        return self.shard_dense and world_size > 1

    def parts_over(self, world_size: int) -> int:
        """Return the parts of a step over W processes.

        Raises:
            ConfigError: W does not divide them.
        """
        parts = world_size if self.parts is None else self.parts
        if parts % world_size:
            raise ConfigError(
                f"parallel.parts={parts} must be a multiple of the {world_size} processes; use a --nproc-per-node that "
                f"divides it, or parallel.parts={-(-parts // world_size) * world_size}"
            )
        return parts
