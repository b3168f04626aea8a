"""Attention over variable-length sequences on the CPU: matrix products over blocks of sequences of about one length.

Sequences are grouped by length (a fifth longer at most, so little is padded), each group's rows laid out as
[G, H, T, D] with the padding in front: positions count from the last key, so all of a group share distances and the
causal edge. Scores live in tiles of at most TILE numbers, or one row of a head; a backward pass makes them again.

The products are torch's. What is added to scores, and what flows back into the bias tables, are loops over one tile;
tables are summed in fp64, head by head in the order of the pairs, so their gradients do not depend on the threads.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from recis_kernels.attention_inputs import AttentionInputs
from recis_kernels.dispatch import njit
from recis_kernels.threads import run_parts, split

TILE = 1 << 19  # scores at a time: 2 MiB, twice that with their gradients, stays in cache
GROUP_ROWS = 1 << 14
_CAUSAL_ROWS = 64  # queries of a causal tile: more of them touch more keys that none of them sees
_GROWTH = 1.2
MASKED = -1e30  # silu and its slope are 0 there; -inf would give NaN

# scores [.., Q, K] in, and N per sequence -> (weights, what their sum with the values is divided by, log of the row's sum)
Weigh = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
# scores, d loss / d weights, log of the row's sum, sum of weights * d weights, N -> (weights, d loss / d scores)
Pull = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Group:
    """Sequences that are computed together."""

    query_first: np.ndarray
    query_count: np.ndarray
    key_first: np.ndarray
    key_count: np.ndarray
    first_target: np.ndarray  # position of each sequence's first target, from the front of the padded keys

    @property
    def num_queries(self) -> int:
        return int(self.query_count.max())

    @property
    def num_keys(self) -> int:
        return int(self.key_count.max())


def forward(inputs: AttentionInputs, weigh: Weigh, masked: float) -> tuple[Tensor, Tensor]:
    """Return (out, log of each row's sum [L, H]); the second is unwritten where `weigh` gives none."""
    query, value = inputs.query, inputs.value
    num_heads = query.shape[1]
    out = query.new_zeros(query.shape[0], num_heads, value.shape[2])
    log_sum = torch.full((query.shape[0], num_heads), -torch.inf, dtype=inputs.sum_dtype)
    for group in _groups(inputs):
        queries, keys, values = _load_all(inputs, group)
        outs = values.new_zeros(*queries.shape[:3], values.shape[3])
        logs = values.new_full((*queries.shape[:3], 1), -torch.inf)
        divisor = _divisor(inputs, group)
        for heads, rows, columns in _tiles(inputs, group):
            scores = _scores(inputs, group, queries, keys, heads, rows, columns, masked)[0]
            weights, total, log = weigh(scores, divisor)
            outs[:, heads, rows] = (weights @ values[:, heads, columns]).div_(total)
            if log is not None:
                logs[:, heads, rows] = log
        _store(out, outs, group.query_first, group.query_count)
        _store(log_sum[..., None], logs, group.query_first, group.query_count)
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
    for group in _groups(inputs):
        queries, keys, values = _load_all(inputs, group)
        grad_outs = _load(grad, group.query_first, group.query_count, inputs.sum_dtype)
        weighted, logs = None, None
        if out is not None and log_sum is not None:
            outs = _load(out, group.query_first, group.query_count, inputs.sum_dtype)
            weighted = (outs * grad_outs).sum(3, keepdim=True)
            logs = _load(log_sum[..., None], group.query_first, group.query_count, inputs.sum_dtype)
        query_grads, key_grads, value_grads = (torch.zeros_like(part) for part in (queries, keys, values))
        divisor = _divisor(inputs, group)
        for heads, rows, columns in _tiles(inputs, group):
            scores, buckets = _scores(inputs, group, queries, keys, heads, rows, columns, masked)
            grad_out = grad_outs[:, heads, rows]
            grad_weights = grad_out @ values[:, heads, columns].mT
            log, mean = (None if part is None else part[:, heads, rows] for part in (logs, weighted))
            weights, slopes = pull(scores, grad_weights, log, mean, divisor)
            value_grads[:, heads, columns] += weights.mT @ grad_out
            query_grads[:, heads, rows] = (slopes @ keys[:, heads, columns]).mul_(inputs.scale)
            key_grads[:, heads, columns] += (slopes.mT @ queries[:, heads, rows]).mul_(inputs.scale)
            if inputs.position_table is not None:
                ahead = (group.num_keys - group.num_queries) + rows.start
                _fold_distances(slopes, ahead, position_grad[heads])
            if buckets is not None:
                _fold_buckets(slopes, buckets, time_grad[heads])
        _store(query_grad, query_grads, group.query_first, group.query_count)
        _store(key_grad, key_grads, group.key_first, group.key_count)
        _store(value_grad, value_grads, group.key_first, group.key_count)
    wide = inputs.sum_dtype
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
            target = int(key_count[part].max()) - targets[part]
            yield _Group(query_ends[part], query_count[part], key_ends[part], key_count[part], target)


def _tiles(inputs: AttentionInputs, group: _Group) -> Iterator[tuple[slice, slice, slice]]:
    """Return the heads, queries and keys (from the first on) of each tile of scores."""
    num_heads, num_queries, num_keys = inputs.query.shape[1], group.num_queries, group.num_keys
    together = len(group.query_first)
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
                yield heads, rows, slice(0, min(last_seen, num_keys))


def _scores(
    inputs: AttentionInputs,
    group: _Group,
    queries: Tensor,
    keys: Tensor,
    heads: slice,
    rows: slice,
    columns: slice,
    masked: float,
) -> tuple[Tensor, np.ndarray | None]:
    """Return the scores [G, H, Q, K] of a tile with their biases, `masked` where a pair may not meet; and time buckets."""
    scores = (queries[:, heads, rows] @ keys[:, heads, columns].mT).mul_(inputs.scale)
    array = scores.numpy()
    together, num_heads, num_rows, num_columns = array.shape
    ahead = (group.num_keys - group.num_queries) + rows.start  # of the first query over the first key
    distances = np.zeros((num_heads, 0), array.dtype)
    if inputs.position_table is not None:
        reach = inputs.position_table.shape[1] // 2
        at = torch.arange(ahead + num_rows - 1, ahead - num_columns, -1).clamp(-reach, reach) + reach
        distances = inputs.position_table[heads].detach().index_select(1, at).numpy()
    buckets, table = None, np.zeros((num_heads, 0), array.dtype)
    if inputs.time_table is not None:
        buckets = _buckets(inputs, group, rows, columns)
        table = inputs.time_table[heads].detach().contiguous().numpy()
    empty = np.zeros((together, 0, 0), np.int32) if buckets is None else buckets
    first_query = group.num_queries - group.query_count - rows.start
    first_key = group.num_keys - group.key_count
    limits = np.stack([first_query, first_key, group.first_target], 1)

    def loop(start: int, stop: int) -> None:
        _finish(array, distances, table, empty, limits, ahead, inputs.causal, masked, start, stop)

    run_parts(loop, split(together * num_heads, min_items=max(1, 65536 // (num_rows * num_columns))))
    return scores, buckets


def _buckets(inputs: AttentionInputs, group: _Group, rows: slice, columns: slice) -> np.ndarray:
    assert inputs.boundaries is not None
    assert inputs.query_times is not None
    assert inputs.key_times is not None
    query_times = _load(inputs.query_times[:, None, None], group.query_first, group.query_count, torch.int64)
    key_times = _load(inputs.key_times[:, None, None], group.key_first, group.key_count, torch.int64)
    queried = query_times[:, 0, rows, 0].contiguous().numpy()
    keyed = key_times[:, 0, columns, 0].contiguous().numpy()
    found = np.empty((len(group.query_first), queried.shape[1], keyed.shape[1]), np.int32)
    bounds = inputs.boundaries.contiguous().numpy()
    num_rows = found.shape[0] * found.shape[1]

    def loop(start: int, stop: int) -> None:
        _find_buckets(queried, keyed, bounds, found, start, stop)

    run_parts(loop, split(num_rows, min_items=max(1, 16384 // found.shape[2])))
    return found


def _divisor(inputs: AttentionInputs, group: _Group) -> Tensor:
    counts = group.key_count if inputs.divisor == 0 else np.full_like(group.key_count, inputs.divisor)
    return torch.from_numpy(counts).to(inputs.sum_dtype)[:, None, None, None]


# ---- rows of a group, padded in front


def _load_all(inputs: AttentionInputs, group: _Group) -> tuple[Tensor, Tensor, Tensor]:
    dtype = inputs.sum_dtype
    return (
        _load(inputs.query, group.query_first, group.query_count, dtype),
        _load(inputs.key, group.key_first, group.key_count, dtype),
        _load(inputs.value, group.key_first, group.key_count, dtype),
    )


def _load(rows: Tensor, first: np.ndarray, count: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return rows [L, H, D] of some sequences as [G, H, T, D]; zeros stand in front of the shorter ones."""
    if len(first) == 1:
        return rows[first[0] : first[0] + count[0]].to(dtype).transpose(0, 1)[None]
    padded = rows.new_zeros((len(first), int(count.max()), *rows.shape[1:]), dtype=dtype)
    source, target = _cells(first, count)
    padded.view(-1, *rows.shape[1:]).index_copy_(0, target, rows.index_select(0, source).to(dtype))
    return padded.transpose(1, 2).contiguous()


def _store(rows: Tensor, padded: Tensor, first: np.ndarray, count: np.ndarray) -> None:
    """Write [G, H, T, D] back to the rows [L, H, D] of its sequences."""
    if len(first) == 1:
        rows[first[0] : first[0] + count[0]] = padded[0].transpose(0, 1)
        return
    source, target = _cells(first, count)
    flat = padded.transpose(1, 2).reshape(-1, padded.shape[1], padded.shape[3])
    rows.index_copy_(0, source, flat.index_select(0, target).to(rows.dtype))


def _cells(first: np.ndarray, count: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the row of each item of some sequences, and its cell in their padded block."""
    longest = int(count.max())
    step = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    front = np.arange(len(first)) * longest + longest - count
    return torch.from_numpy(np.repeat(first, count) + step), torch.from_numpy(np.repeat(front, count) + step)


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
