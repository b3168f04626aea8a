"""Attention over variable-length sequences on the CPU: matrix products over blocks of sequences of about one length.

Sequences are grouped by length (some longer than others by a third at most), each group's rows laid out as
[G, H, T, D] with the padding in front: positions count from the last key, so all of a group share distances and the
causal edge. Scores live in tiles of at most TILE numbers, or one row of a head; a backward pass makes them again.

The products are torch's. What is added to scores, and what flows back into the bias tables, are loops over one tile;
tables are summed in fp64, head by head in the order of the pairs, so their gradients do not depend on the threads.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recis_kernels.attention_inputs import AttentionInputs
from recis_kernels.dispatch import njit
from recis_kernels.threads import run_parts, split

TILE = 1 << 20  # scores at a time: 4 MiB; smaller tiles cost calls, larger ones the cache
GROUP_ROWS = 1 << 14  # padded rows of a group
_CAUSAL_ROWS = 64  # queries of a causal tile: more of them touch more keys that none of them sees
_GROWTH = 1.3  # of lengths within a group: fewer groups against less padding
MASKED = -1e30  # silu and its slope are 0 there; -inf would give NaN

# scores [G, H, Q, K] in, and N per sequence -> (weights, what their sum with the values is divided by, log of the row's sum)
Weigh = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
# scores, d loss / d weights, log of the row's sum, sum of weights * d weights, N -> (weights, d loss / d scores)
Pull = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor], tuple[Tensor, Tensor]]


class _Rows:
    """Where the rows of some sequences lie, and their cells in a block [G, T] padded in front."""

    def __init__(self, first: np.ndarray, count: np.ndarray) -> None:
        self.first, self.count, self.longest = first, count, int(count.max())
        step = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        front = np.arange(len(first)) * self.longest + self.longest - count
        self.source = torch.from_numpy(np.repeat(first, count) + step)
        self.cells = torch.from_numpy(np.repeat(front, count) + step)

    def load(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows [L, H, D] as [G, H, T, D]; zeros stand in front of the shorter sequences."""
        if len(self.first) == 1:
            return rows[self.first[0] : self.first[0] + self.longest].to(dtype).transpose(0, 1)[None]
        padded = rows.new_zeros((len(self.first), self.longest, *rows.shape[1:]), dtype=dtype)
        padded.view(-1, *rows.shape[1:]).index_copy_(0, self.cells, rows.index_select(0, self.source).to(dtype))
        return padded.transpose(1, 2).contiguous()

    def load_numbers(self, numbers: Tensor) -> np.ndarray:
        """Return numbers [L] as [G, T]."""
        return self.load(numbers[:, None, None], numbers.dtype)[:, 0, :, 0].numpy()

    def store(self, rows: Tensor, padded: Tensor) -> None:
        """Write [G, H, T, D] back to rows [L, H, D]."""
        if len(self.first) == 1:
            rows[self.first[0] : self.first[0] + self.longest] = padded[0].transpose(0, 1)
            return
        flat = padded.transpose(1, 2).reshape(-1, padded.shape[1], padded.shape[3])
        rows.index_copy_(0, self.source, flat.index_select(0, self.cells).to(rows.dtype))


@dataclass(frozen=True)
class _Group:
    """Sequences that are computed together."""

    queries: _Rows
    keys: _Rows
    num_targets: np.ndarray


class _Block:
    """The rows of a group [G, H, T, D] in the dtype of the sums, the padding in front."""

    def __init__(self, inputs: AttentionInputs, group: _Group) -> None:
        dtype = inputs.sum_dtype
        self.group = group
        self.queries = group.queries.load(inputs.query, dtype)
        self.keys = group.keys.load(inputs.key, dtype)
        self.values = group.keys.load(inputs.value, dtype)
        self.query_times, self.key_times = None, None
        if inputs.query_times is not None and inputs.key_times is not None:
            self.query_times = group.queries.load_numbers(inputs.query_times)
            self.key_times = group.keys.load_numbers(inputs.key_times)
        counts = group.keys.count if inputs.divisor == 0 else np.full_like(group.keys.count, inputs.divisor)
        self.divisor = torch.from_numpy(counts).to(dtype)[:, None, None, None]


class _Tile(NamedTuple):
    """Scores that exist at one time; `columns` start at the first key."""

    heads: slice
    rows: slice
    columns: slice


def forward(inputs: AttentionInputs, weigh: Weigh, masked: float) -> tuple[Tensor, Tensor]:
    """Return (out, log of each row's sum [L, H]); the second stays -inf where `weigh` gives none."""
    query, value = inputs.query, inputs.value
    num_heads = query.shape[1]
    out = query.new_zeros(query.shape[0], num_heads, value.shape[2])
    log_sum = torch.full((query.shape[0], num_heads), -torch.inf, dtype=inputs.sum_dtype)
    with torch.autocast("cpu", enabled=False):  # what is summed in float32 stays so inside autocast too
        for group in _groups(inputs):
            block = _Block(inputs, group)
            outs = block.values.new_zeros(*block.queries.shape[:3], value.shape[2])
            logs = outs.new_full((*outs.shape[:3], 1), -torch.inf)
            for tile in _tiles(inputs, group):
                heads, rows, columns = tile
                weights, total, log = weigh(_scores(inputs, block, tile, masked)[0], block.divisor)
                outs[:, heads, rows] = (weights @ block.values[:, heads, columns]).div_(total)
                if log is not None:
                    logs[:, heads, rows] = log
            group.queries.store(out, outs)
            group.queries.store(log_sum[..., None], logs)
    return out, log_sum


def backward(
    inputs: AttentionInputs, pull: Pull, masked: float, out: Tensor | None, log_sum: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and of the position and time tables (empty where there is none)."""
    query_grad, key_grad, value_grad = (
        torch.zeros_like(rows, memory_format=torch.contiguous_format)
        for rows in (inputs.query, inputs.key, inputs.value)
    )
    position_grad, time_grad = (
        torch.zeros(0 if table is None else table.shape, dtype=torch.float64)
        for table in (inputs.position_table, inputs.time_table)
    )
    wide = inputs.sum_dtype
    with torch.autocast("cpu", enabled=False):  # what is summed in float32 stays so inside autocast too
        for group in _groups(inputs):
            block = _Block(inputs, group)
            grad_outs = group.queries.load(grad, wide)
            weighted, logs = None, None
            if out is not None and log_sum is not None:
                weighted = (group.queries.load(out, wide) * grad_outs).sum(3, keepdim=True)
                logs = group.queries.load(log_sum[..., None], wide)
            query_grads, key_grads, value_grads = (
                torch.zeros_like(part) for part in (block.queries, block.keys, block.values)
            )
            for tile in _tiles(inputs, group):
                heads, rows, columns = tile
                scores, buckets = _scores(inputs, block, tile, masked)
                grad_out = grad_outs[:, heads, rows]
                grad_weights = grad_out @ block.values[:, heads, columns].mT
                log, mean = (None if part is None else part[:, heads, rows] for part in (logs, weighted))
                weights, slopes = pull(scores, grad_weights, log, mean, block.divisor)
                value_grads[:, heads, columns] += weights.mT @ grad_out
                query_grads[:, heads, rows] = (slopes @ block.keys[:, heads, columns]).mul_(inputs.scale)
                key_grads[:, heads, columns] += (slopes.mT @ block.queries[:, heads, rows]).mul_(inputs.scale)
                if inputs.position_table is not None:
                    _fold_distances(slopes, _ahead(group, tile), position_grad[heads])
                if buckets is not None:
                    _fold_buckets(slopes, buckets, time_grad[heads])
            group.queries.store(query_grad, query_grads)
            group.keys.store(key_grad, key_grads)
            group.keys.store(value_grad, value_grads)
    return query_grad, key_grad, value_grad, position_grad.to(wide), time_grad.to(wide)


# ---- which sequences together, which scores at a time


def _groups(inputs: AttentionInputs) -> Iterator[_Group]:
    """Cut the sequences that have pairs into groups of about equal numbers of queries and of keys."""
    query_ends, key_ends = inputs.query_offsets.numpy(), inputs.key_offsets.numpy()
    query_count, key_count = np.diff(query_ends), np.diff(key_ends)
    targets = np.zeros_like(key_count) if inputs.num_targets is None else inputs.num_targets.numpy()
    alive = np.flatnonzero((query_count > 0) & (key_count > 0))
    if alive.size == 0:
        return
    query_class, key_class = (
        np.floor(np.log1p(count[alive] / 8) / np.log(_GROWTH)).astype(np.int64) for count in (query_count, key_count)
    )
    order = np.lexsort((query_class, key_class))
    alive, both = alive[order], np.stack([query_class[order], key_class[order]])
    bounds = [0, *(np.flatnonzero((both[:, 1:] != both[:, :-1]).any(0)) + 1), alive.size]
    num_heads = inputs.query.shape[1]
    for start, stop in pairwise(bounds):
        members = alive[start:stop]
        rows, columns = int(query_count[members].max()), int(key_count[members].max())
        least = min(rows, _CAUSAL_ROWS) if inputs.causal else rows
        together = max(1, min(TILE // (num_heads * least * columns), GROUP_ROWS // max(rows, columns)))
        for first in range(0, members.size, together):
            part = members[first : first + together]
            queries, keys = _Rows(query_ends[part], query_count[part]), _Rows(key_ends[part], key_count[part])
            yield _Group(queries, keys, targets[part])


def _tiles(inputs: AttentionInputs, group: _Group) -> Iterator[_Tile]:
    """Cut the scores of a group into tiles, without those that no query sees."""
    num_heads, num_queries, num_keys = inputs.query.shape[1], group.queries.longest, group.keys.longest
    together = len(group.num_targets)
    fewest = min(num_queries, _CAUSAL_ROWS)
    num_together = max(1, min(num_heads, TILE // (together * fewest * num_keys)))
    num_rows = max(1, min(num_queries, TILE // (together * num_together * num_keys)))
    if inputs.causal and num_queries > 1.5 * _CAUSAL_ROWS:
        num_rows = min(num_rows, _CAUSAL_ROWS)
    for first_head in range(0, num_heads, num_together):
        heads = slice(first_head, min(first_head + num_together, num_heads))
        for first in range(0, num_queries, num_rows):
            rows = slice(first, min(first + num_rows, num_queries))
            last_seen = num_keys - num_queries + rows.stop if inputs.causal else num_keys
            if last_seen > 0:
                yield _Tile(heads, rows, slice(0, min(last_seen, num_keys)))


def _ahead(group: _Group, tile: _Tile) -> int:
    """Return the position of the tile's first query, counted from the first of the padded keys."""
    return group.keys.longest - group.queries.longest + tile.rows.start


def _scores(inputs: AttentionInputs, block: _Block, tile: _Tile, masked: float) -> tuple[Tensor, np.ndarray | None]:
    """Return the scores [G, H, Q, K] of a tile with their biases, `masked` where a pair may not meet; and time buckets."""
    group, (heads, rows, columns) = block.group, tile
    scores = (block.queries[:, heads, rows] @ block.keys[:, heads, columns].mT).mul_(inputs.scale)
    array, ahead = scores.numpy(), _ahead(group, tile)
    together, num_heads, num_rows, num_columns = array.shape
    distances = np.zeros((num_heads, 0), array.dtype)
    if inputs.position_table is not None:
        reach = inputs.position_table.shape[1] // 2
        at = torch.arange(ahead + num_rows - 1, ahead - num_columns, -1).clamp(-reach, reach) + reach
        distances = inputs.position_table[heads].detach().index_select(1, at).numpy()
    buckets, table = np.zeros((together, 0, 0), np.int32), np.zeros((num_heads, 0), array.dtype)
    if inputs.time_table is not None:
        buckets = _buckets(inputs, block, tile)
        table = inputs.time_table[heads].detach().contiguous().numpy()
    first_query = group.queries.longest - group.queries.count - rows.start
    first_key, first_target = group.keys.longest - group.keys.count, group.keys.longest - group.num_targets
    limits = np.stack([first_query, first_key, first_target], 1)

    def loop(start: int, stop: int) -> None:
        _finish(array, distances, table, buckets, limits, ahead, inputs.causal, masked, start, stop)

    run_parts(loop, split(together * num_heads, min_items=max(1, 65536 // (num_rows * num_columns))))
    return scores, None if inputs.time_table is None else buckets


def _buckets(inputs: AttentionInputs, block: _Block, tile: _Tile) -> np.ndarray:
    """Return the time bucket of each pair of a tile, int32 [G, Q, K]."""
    assert inputs.boundaries is not None
    assert block.query_times is not None
    assert block.key_times is not None
    queried = np.ascontiguousarray(block.query_times[:, tile.rows])  # one memory layout: one compiled loop
    keyed = np.ascontiguousarray(block.key_times[:, tile.columns])
    found = np.empty((len(queried), queried.shape[1], keyed.shape[1]), np.int32)
    bounds = inputs.boundaries.contiguous().numpy()

    def loop(start: int, stop: int) -> None:
        _find_buckets(queried, keyed, bounds, found, start, stop)

    run_parts(loop, split(found.shape[0] * found.shape[1], min_items=max(1, 16384 // found.shape[2])))
    return found


# ---- gradients of the tables


def _fold_distances(slopes: Tensor, ahead: int, total: Tensor) -> None:
    """Add slopes [G, H, Q, K] to the entries of their distances in total [H, 2 M - 1]."""
    array = slopes.numpy()
    num_heads, num_rows, num_columns = array.shape[1:]
    sums = np.zeros((num_heads, num_rows + num_columns - 1))
    run_parts(lambda start, stop: _sum_diagonals(array, sums, start, stop), split(num_heads, min_items=1))
    reach = total.shape[1] // 2
    at = np.clip(ahead + np.arange(num_rows - 1, -num_columns, -1), -reach, reach) + reach
    for head in range(num_heads):
        total[head] += torch.from_numpy(np.bincount(at, sums[head], minlength=2 * reach + 1))


def _fold_buckets(slopes: Tensor, buckets: np.ndarray, total: Tensor) -> None:
    """Add slopes [G, H, Q, K] to the entries of their buckets [G, Q, K] in total [H, T]."""
    array, sums = slopes.numpy(), total.numpy()
    run_parts(lambda start, stop: _sum_buckets(array, buckets, sums, start, stop), split(array.shape[1], min_items=1))


@njit
def _finish(scores, distances, table, buckets, limits, ahead, causal, masked, start, stop):
    """Add the biases to the scores of (sequence, head) pairs start .. stop - 1, and mask what may not meet."""
    num_heads, num_rows, num_columns = scores.shape[1:]
    for pair in range(start, stop):
        g, h = pair // num_heads, pair % num_heads
        first_query, first_key, first_target = limits[g]
        for i in range(num_rows):
            row = scores[g, h, i]
            high = max(min(num_columns, ahead + i + 1), 0) if causal else num_columns
            low = min(first_key, high) if i >= first_query else high  # a query of the padding sees nothing
            if distances.shape[1] > 0:
                bias = distances[h, num_rows - 1 - i : num_rows - 1 - i + num_columns]
                for j in range(low, high):
                    row[j] += bias[j]
            if table.shape[1] > 0:
                own = buckets[g, i]
                for j in range(low, high):
                    row[j] += table[h, own[j]]
            for j in range(low):
                row[j] = masked
            for j in range(high, num_columns):
                row[j] = masked
            if ahead + i >= first_target:  # a target: it sees no other target
                for j in range(max(first_target, low), high):
                    if j != ahead + i:
                        row[j] = masked


@njit
def _find_buckets(query_times, key_times, boundaries, buckets, start, stop):
    """Number of boundaries <= each difference, for rows start .. stop - 1; each search starts where the last one ended."""
    num_rows, num_columns = buckets.shape[1:]
    for pair in range(start, stop):
        g, i = pair // num_rows, pair % num_rows
        bucket = 0
        for j in range(num_columns):
            difference = query_times[g, i] - key_times[g, j]
            while bucket < boundaries.size and boundaries[bucket] <= difference:
                bucket += 1
            while bucket > 0 and boundaries[bucket - 1] > difference:
                bucket -= 1
            buckets[g, i, j] = bucket


@njit
def _sum_diagonals(slopes, sums, start, stop):
    num_rows, num_columns = slopes.shape[2:]
    for h in range(start, stop):
        for g in range(slopes.shape[0]):
            for i in range(num_rows):
                row, total = slopes[g, h, i], sums[h, num_rows - 1 - i : num_rows - 1 - i + num_columns]
                for j in range(num_columns):
                    total[j] += row[j]


@njit
def _sum_buckets(slopes, buckets, sums, start, stop):
    num_rows, num_columns = slopes.shape[2:]
    for h in range(start, stop):
        for g in range(slopes.shape[0]):
            for i in range(num_rows):
                row, own = slopes[g, h, i], buckets[g, i]
                for j in range(num_columns):
                    sums[h, own[j]] += row[j]
