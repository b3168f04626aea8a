"""How much of the memory limit each part of a reader gets.

    lanes      an open unit each (pages, or a stripe), and two chunks of decoded rows
    shuffle    two blocks per lane, one being delivered and one ready; three more per thread while one is joined and permuted
    prefetch   the steps that are ready, and one more in the making

Sizes are estimates from the files' own figures and a probe of the first rows. Decoders and allocators hold memory beside
them: measured, some 20 MiB and up to two thirds more, so that much of the limit is not planned with. The interpreter and
torch come on top of the limit. What cannot fit is an error before the first batch that states the need, the limit and
settings that fit; what fits tightly only makes chunks and prefetch smaller.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from recis.errors import ConfigError
from recis.io.config import DataConfig
from recis.io.files import MIB
from recis.io.source import Source

MAX_CHUNK_ROWS = 65536
MIN_CHUNK_ROWS = 64
OVERHEAD_BYTES = 24 * MIB  # not planned with, and of the rest only this share:
USABLE_SHARE = 0.55
LEAST_SHARE = 0.4  # of a limit so small that nothing would be left


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a reader keeps to."""

    chunk_rows: int
    """Rows decoded at once per lane."""
    prefetch_steps: int
    """Steps prepared ahead."""


def plan_memory(
    config: DataConfig, source: Source, lanes: Sequence[Sequence[int]], *, step_rows: int, row_bytes: float
) -> MemoryPlan:
    """Share the memory limit out.

    Args:
        config: for the limit, the shuffle buffer, prefetch and threads.
        source: for the size of its units.
        lanes: the units of each lane that this rank reads.
        step_rows: most rows of a step on this rank.
        row_bytes: about how large a decoded row is.

    Raises:
        ConfigError: the least that is needed is above the limit.
    """
    limit = usable_bytes(config.memory_limit_mib)
    busy = [units for units in lanes if units]
    largest = sorted((unit.open_bytes for unit in source.units), reverse=True)
    opened = sum(largest[: len(busy)])  # of any order of the units, so that no later epoch needs more than the first
    block = block_rows(config) if config.shuffle_rows else 0
    shuffle = row_bytes * block * (2 * len(busy) + 3 * min(config.threads, len(busy)))
    step = 2.0 * row_bytes * step_rows  # its slices and the tensors made of them
    chunk_row = row_bytes * ((3 if block else 2) * len(busy) + config.threads)  # one row more in every chunk
    least = opened + shuffle + 2 * step + MIN_CHUNK_ROWS * chunk_row
    if least > limit:
        raise ConfigError(_too_much(config, opened, shuffle, step, least, len(busy)))
    prefetch = max(1, min(config.prefetch_batches, int((limit - opened - shuffle) / 2 / step) - 1)) if step else 1
    for_chunks = (limit - opened - shuffle - (prefetch + 1) * step) / 2
    most = max(MIN_CHUNK_ROWS, int(for_chunks / chunk_row)) if chunk_row else MIN_CHUNK_ROWS
    wanted = max(
        MIN_CHUNK_ROWS, block, 8 * step_rows // max(1, len(busy))
    )  # a few steps per chunk keep all lanes smooth
    return MemoryPlan(chunk_rows=min(MAX_CHUNK_ROWS, most, max(wanted, 4096)), prefetch_steps=prefetch)


def usable_bytes(memory_limit_mib: int) -> float:
    """Return how much of a memory limit is planned with."""
    limit = memory_limit_mib * MIB
    return max(LEAST_SHARE * limit, USABLE_SHARE * (limit - OVERHEAD_BYTES))


def block_rows(config: DataConfig) -> int:
    """Return the rows in the shuffle buffer of one lane."""
    return max(1, -(-config.shuffle_rows // config.num_lanes))


def _too_much(config: DataConfig, opened: float, shuffle: float, step: float, least: float, num_busy: int) -> str:
    parts = (
        f"{num_busy} open units {opened / MIB:.1f}, shuffle buffers {shuffle / MIB:.1f}, two steps {2 * step / MIB:.1f}"
    )
    needed = int(min(least / LEAST_SHARE, least / USABLE_SHARE + OVERHEAD_BYTES) / MIB) + 1
    ways = [f"memory_limit_mib={needed}"]
    if opened >= max(shuffle, 2 * step) and num_busy > 1:
        room = max(0.0, usable_bytes(config.memory_limit_mib) - shuffle - 2 * step)
        ways.append(f"num_lanes={max(1, int(num_busy * room / opened * 0.9))} or less")
    elif shuffle >= 2 * step:
        ways.append("a smaller shuffle_rows")
    else:
        ways.append("a smaller batch_size")
    return f"reading needs about {needed} MiB ({parts}), memory_limit_mib={config.memory_limit_mib}; set {' or '.join(ways)}"
