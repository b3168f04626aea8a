"""Where a reader stands, as JSON-able data, and whether another reader can go on from there.

The position of the whole job is (epoch, rows of its global sequence that were delivered); `lanes` says the same per lane:
[unit, row, buffer] = where the rows begin that have to be read again, and how many of them were delivered out of the lane's
shuffle buffer. Loading recomputes it and compares, so that a change of the order can never pass unnoticed. Every rank saves
the same state, and any number of ranks loads it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from recis.errors import CheckpointError, ConfigError
from recis.io.config import DataConfig
from recis.io.feed import deal, is_stream, rows_of_lanes
from recis.io.lanes import rows_given
from recis.io.memory import block_rows
from recis.io.source import Source

FORMAT = "recis-reader"
VERSION = 1
_ORDER_FIELDS = ("num_lanes", "shuffle_rows", "seed")


def order_of(config: DataConfig) -> dict[str, int]:
    """Return the settings that decide the order of samples; a position means nothing under others."""
    return {name: getattr(config, name) for name in _ORDER_FIELDS}


def check_state(state: Mapping[str, Any], config: DataConfig) -> None:
    """Raise unless the state is one of ours and was saved under the same order of samples.

    Raises:
        CheckpointError: not a reader's state, or of another version.
        ConfigError: another setting decides the order here.
    """
    if state.get("format") != FORMAT:
        raise CheckpointError(f"not the state of a reader: format is {state.get('format')!r}, expected {FORMAT!r}")
    if state.get("version") != VERSION:
        raise CheckpointError(f"reader state of version {state.get('version')!r}; this release reads version {VERSION}")
    for name, here in order_of(config).items():
        there = state["order"][name]
        if here != there:
            raise ConfigError(
                f"{name}={here} here, {there} when the position was saved: it decides the order of samples; "
                f"set it back to {there}, or start from the beginning"
            )


def check_micro_batch(state: Mapping[str, Any], split: Sequence[int]) -> int:
    """Return how many micro-batches of the current step were delivered.

    Raises:
        ConfigError: some were, and steps are split in another way here.
    """
    delivered = int(state["micro_batch"])
    if delivered and list(state["split"]) != list(split):
        raise ConfigError(
            "the position was saved inside a step, by (batch_size, ranks, micro-batches) = "
            f"{tuple(state['split'])}; here it is {tuple(split)}: keep that, or save between steps"
        )
    return delivered


def lane_places(source: Source, config: DataConfig, epoch: int, rows: int) -> list[list[int]]:
    """Return [unit, row, buffer] of each lane after `rows` rows of an epoch; [-1, 0, 0] of one that has nothing left.

    Raises:
        CheckpointError: an epoch has fewer rows.
    """
    dealt = deal(source, config, epoch)
    if is_stream(source):
        given = [rows]
    else:
        lane_rows = rows_of_lanes(source, dealt)
        if rows > int(lane_rows.sum()):
            raise CheckpointError(f"the saved position is {rows} rows into an epoch of {int(lane_rows.sum())}")
        given = rows_given(lane_rows, rows).tolist()
    block = block_rows(config) if config.shuffle_rows else 1
    return [_place(source, units, delivered, block) for units, delivered in zip(dealt, given, strict=True)]


def _place(source: Source, units: Sequence[int], delivered: int, block: int) -> list[int]:
    total = sum(source.units[unit].rows or 0 for unit in units)
    is_endless = any(source.units[unit].rows is None for unit in units)
    if not units or (delivered >= total and not is_endless):
        return [-1, 0, 0]
    row = delivered // block * block
    buffered = delivered - row
    for unit in units:
        rows = source.units[unit].rows
        if rows is None or row < rows:
            return [unit, row, buffered]
        row -= rows
    raise AssertionError("a lane that has rows left has a unit they are in")
