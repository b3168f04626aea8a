"""In which order samples are read, as pure functions of the config: no state, no threads, no files.

Units (row groups, stripes, byte ranges) are sorted by (file, index), permuted per epoch when shuffling, and dealt
round-robin: lane l of N reads the units at places l, l + N, l + 2N, ... one after the other.

The **global sequence** of an epoch takes one row from each lane in turn; a lane without rows is passed over. An optimizer
step is the next `batch_size` rows of it, ordered by lane. So after T rows lane l has given

    c_l(T) = min(n_l, h) + [l is among the first T - sum_j min(n_j, h) lanes with n_l > h]      n_l = rows of lane l

with h = the number of full rounds: the largest h with sum_j min(n_j, h) <= T. One number, T, is the position of the whole
job. Rank r of W reads the lanes with lane mod W = r; nothing else depends on W, so neither does what a step holds.

Random numbers are the raw 64-bit words of Philox4x64-10 (numpy's bit generator, whose stream is stable across versions)
with key (seed, epoch) and counter (0, stream, block, 0): stream 0 permutes the units, stream l + 1 the blocks of lane l. A
permutation sorts n words, ties by place.
"""

import numpy as np

from recis.errors import ConfigError


def permutation(num: int, *, seed: int, epoch: int, stream: int, block: int = 0) -> np.ndarray:
    """Return a permutation of range(num) as int64, the same on every machine.

    Args:
        num: how many things are permuted.
        seed: from the config, below 2**64.
        epoch: from 0.
        stream: 0 for units, 1 + lane for rows.
        block: which refill of the lane's shuffle buffer.
    """
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, stream, block, 0], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(num)
    return np.argsort(np.asarray(words, dtype=np.uint64), kind="stable")


def deal_units(num_units: int, num_lanes: int, *, seed: int, epoch: int, shuffle: bool) -> list[list[int]]:
    """Return the units of each lane, in reading order."""
    order = permutation(num_units, seed=seed, epoch=epoch, stream=0) if shuffle else np.arange(num_units)
    return [order[lane::num_lanes].tolist() for lane in range(num_lanes)]


def rows_given(lane_rows: np.ndarray, total: int) -> np.ndarray:
    """Return how many rows each lane has given after `total` rows of the global sequence: c_l(total).

    Args:
        lane_rows: [N] int64, rows of each lane in this epoch.
        total: from 0 to lane_rows.sum().
    """
    if not 0 <= total <= int(lane_rows.sum()):
        raise ValueError(f"total must be in [0, {int(lane_rows.sum())}]; got {total}")
    low, high = 0, int(lane_rows.max(initial=0))  # the number of full rounds is in [low, high]
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.minimum(lane_rows, middle).sum()) <= total:
            low = middle
        else:
            high = middle - 1
    given = np.minimum(lane_rows, low)
    alive = np.flatnonzero(lane_rows > low)[: total - int(given.sum())]
    given[alive] += 1
    return given


def micro_batches_of_step(counts: np.ndarray, *, world_size: int, micro_batches: int, micro_batch_size: int) -> int:
    """Return how many micro-batches every rank delivers in a step that takes counts [N] rows from the lanes.

    It is `micro_batches` as long as no rank has more than its share. Where lanes have run out unevenly, or their number
    is no multiple of the ranks, the rank with the most rows decides: no micro-batch is ever larger than
    micro_batch_size, all ranks deliver the same number, and all of them know it without talking to each other.
    """
    most = max(int(counts[rank::world_size].sum()) for rank in range(world_size))
    return max(micro_batches, -(-most // micro_batch_size))


def check_split(*, batch_size: int, num_lanes: int, rank: int, world_size: int, micro_batches: int) -> int:
    """Return the largest micro-batch of a rank, batch_size / (ranks * micro-batches).

    Raises:
        ConfigError: that is not whole, the rank does not exist, or there are fewer lanes than ranks.
    """
    if world_size < 1 or not 0 <= rank < world_size or micro_batches < 1:
        raise ConfigError(
            f"rank must be in [0, world_size) and micro_batches at least 1; "
            f"got rank={rank}, world_size={world_size}, micro_batches={micro_batches}"
        )
    if num_lanes < world_size:
        raise ConfigError(
            f"{world_size} ranks need at least as many lanes; num_lanes={num_lanes}: raise it to a multiple"
        )
    parts = world_size * micro_batches
    if batch_size % parts:
        nearest = max(parts, round(batch_size / parts) * parts)
        raise ConfigError(
            f"batch_size={batch_size} must be a multiple of ranks times micro-batches, {world_size} x {micro_batches}; "
            f"use batch_size={nearest}"
        )
    return batch_size // parts
