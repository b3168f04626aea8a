"""What attention over variable-length sequences is given, checked: rows, offsets and the two biases.

    score of query i and key j of one sequence and head h:
        scale * q_i . k_j  +  position_bias[h, clip(at_i - j, -(M - 1), M - 1) + M - 1]  +  time.table[h, bucket(d)]
    at_i = i + K - Q for Q queries and K keys: the last query stands at the last key; in self attention at_i = i
    d = time of query i - time of key j;   bucket(d) = how many boundaries are <= d

The position table has 2 M - 1 entries per head, from the farthest key ahead to the farthest behind; pairs farther apart
than that take the end entry. Tables over coarser buckets are made of this one: table[:, bucket_of_distance].
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from recis_kernels.contents import is_asked, require_offsets

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
MAX_DIM = 256


@dataclass(frozen=True, kw_only=True)
class TimeBias:
    """A learned bias per bucket of the time difference between a query and a key."""

    table: Tensor
    """[H, T] floating point; differentiable."""
    boundaries: Tensor
    """[T - 1] int64, ascending, in the unit of the times; bucket t holds boundaries[t - 1] <= d < boundaries[t]."""
    query_times: Tensor
    """[L] int64, one per query row."""
    key_times: Tensor | None = None
    """[L] int64, one per key row; None takes query_times."""


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """All that the versions of an attention op read. Tables are fp32, or fp64 with fp64 rows."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    position_table: Tensor | None
    time_table: Tensor | None
    boundaries: Tensor | None
    query_times: Tensor | None
    key_times: Tensor | None
    num_targets: Tensor | None
    """[B] int64: the last items of each sequence that do not see each other."""
    causal: bool
    scale: float
    divisor: int
    """Of pointwise weights; 0 takes each sequence's own number of keys."""

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


def check_rows(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ValueError unless the three are [L, H, D] rows that fit each other."""
    for name, rows in (("query", query), ("key", key), ("value", value)):
        if rows.ndim != 3 or rows.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be [L, H, D] float32, bfloat16 or float64; got {tuple(rows.shape)} {rows.dtype}"
            )
        if not 1 <= rows.shape[2] <= MAX_DIM or rows.shape[1] < 1:
            raise ValueError(f"{name} must have 1 head or more of 1 to {MAX_DIM} numbers; got {tuple(rows.shape)}")
        if rows.dtype != query.dtype or rows.device != query.device:
            raise ValueError(f"{name} is {rows.dtype} on {rows.device}, query {query.dtype} on {query.device}: use one")
    if key.shape[1:] != query.shape[1:]:
        raise ValueError(f"key must be [L, {query.shape[1]}, {query.shape[2]}] as query is; got {tuple(key.shape)}")
    if value.shape[:2] != key.shape[:2]:
        raise ValueError(f"value must be [{key.shape[0]}, {key.shape[1]}, D] as key is; got {tuple(value.shape)}")


def check_offsets(offsets: Tensor, name: str, like: Tensor) -> None:
    """Raise ValueError unless offsets is [B + 1] int64 on the device of `like`."""
    if offsets.ndim != 1 or offsets.numel() == 0 or offsets.dtype != torch.int64:
        raise ValueError(f"{name} must be [B + 1] int64; got {tuple(offsets.shape)} {offsets.dtype}")
    _check_device(offsets, name, like)


def check_position_table(table: Tensor | None, query: Tensor) -> Tensor | None:
    """Return the position table in the dtype of the sums; raise ValueError unless it is [H, 2 M - 1]."""
    if table is None:
        return None
    num_heads = query.shape[1]
    if table.ndim != 2 or table.shape[0] != num_heads or table.shape[1] % 2 == 0 or not table.is_floating_point():
        raise ValueError(
            f"position_bias must be floating point [{num_heads}, 2 * max_distance - 1], an odd width; "
            f"got {tuple(table.shape)} {table.dtype}"
        )
    _check_device(table, "position_bias", query)
    return table.to(_wide(query))


def check_time(
    time: TimeBias | None, query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor] | tuple[None, None, None, None]:
    """Return (table in the dtype of the sums, boundaries, query_times, key_times); raise ValueError where one is wrong."""
    if time is None:
        return None, None, None, None
    num_heads = query.shape[1]
    table = time.table
    if table.ndim != 2 or table.shape[0] != num_heads or table.shape[1] < 1 or not table.is_floating_point():
        raise ValueError(f"time.table must be floating point [{num_heads}, T]; got {tuple(table.shape)} {table.dtype}")
    if tuple(time.boundaries.shape) != (table.shape[1] - 1,) or time.boundaries.dtype != torch.int64:
        raise ValueError(
            f"time.boundaries must be [{table.shape[1] - 1}] int64, one fewer than the table's buckets; "
            f"got {tuple(time.boundaries.shape)} {time.boundaries.dtype}"
        )
    key_times = time.query_times if time.key_times is None else time.key_times
    for name, times, rows in (("query_times", time.query_times, query), ("key_times", key_times, key)):
        if tuple(times.shape) != (rows.shape[0],) or times.dtype != torch.int64:
            raise ValueError(f"time.{name} must be [{rows.shape[0]}] int64; got {tuple(times.shape)} {times.dtype}")
    for name, part in (("table", table), ("boundaries", time.boundaries), ("query_times", time.query_times)):
        _check_device(part, f"time.{name}", query)
    _check_device(key_times, "time.key_times", query)
    return table.to(_wide(query)), time.boundaries, time.query_times, key_times


def check_targets(num_targets: Tensor | None, offsets: Tensor) -> None:
    """Raise ValueError unless num_targets is [B] int64."""
    if num_targets is None:
        return
    if tuple(num_targets.shape) != (offsets.numel() - 1,) or num_targets.dtype != torch.int64:
        raise ValueError(
            f"num_targets must be [{offsets.numel() - 1}] int64; got {tuple(num_targets.shape)} {num_targets.dtype}"
        )
    _check_device(num_targets, "num_targets", offsets)


def check_contents(inputs: AttentionInputs) -> None:
    """Raise ValueError unless offsets, boundaries and target counts hold what they must; reads them on the host."""
    require_offsets(inputs.query_offsets, inputs.query.shape[0], whole=True)
    require_offsets(inputs.key_offsets, inputs.key.shape[0], whole=True, name="key_offsets")
    if inputs.boundaries is not None and bool((inputs.boundaries.diff() < 0).any()):
        raise ValueError("time.boundaries must ascend; sort them")
    if inputs.num_targets is not None:
        spare = inputs.key_offsets.diff() - inputs.num_targets
        if bool((inputs.num_targets < 0).any()) or bool((spare < 0).any()):
            raise ValueError("num_targets must lie between 0 and the length of its sequence; cut it to the length")


def check_contents_if_asked(inputs: AttentionInputs) -> None:
    """On the CPU the contents are at hand and always checked; elsewhere only inside recis_kernels.checks()."""
    if (inputs.query.device.type == "cpu" and not torch.compiler.is_compiling()) or is_asked():
        check_contents(inputs)


def grads_like(
    query: Tensor, key: Tensor, value: Tensor, position_table: Tensor | None, time_table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return unwritten gradients of all five: contiguous, empty where there is no table."""
    query_grad, key_grad, value_grad = (
        torch.empty_like(rows, memory_format=torch.contiguous_format) for rows in (query, key, value)
    )
    position_grad, time_grad = (
        query.new_empty((0,) if table is None else table.shape, dtype=_wide(query))
        for table in (position_table, time_table)
    )
    return query_grad, key_grad, value_grad, position_grad, time_grad


# ---- reference: float64, one sequence at a time, torch's own gradients


def reference_scores(inputs: AttentionInputs) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return per sequence (scores [H, Q, K] float64, which pairs may meet [Q, K], values [H, K, Dv] float64)."""
    found = []
    spans = zip(pairwise(inputs.query_offsets.tolist()), pairwise(inputs.key_offsets.tolist()), strict=True)
    for sequence, ((query_lo, query_hi), (key_lo, key_hi)) in enumerate(spans):
        query = inputs.query[query_lo:query_hi].double().transpose(0, 1)
        key = inputs.key[key_lo:key_hi].double().transpose(0, 1)
        num_keys = key_hi - key_lo
        at = (torch.arange(query_hi - query_lo, device=query.device) + num_keys - (query_hi - query_lo))[:, None]
        column = torch.arange(num_keys, device=query.device)
        scores = inputs.scale * query @ key.transpose(1, 2)
        if inputs.position_table is not None:
            reach = inputs.position_table.shape[1] // 2
            scores = scores + inputs.position_table.double()[:, (at - column).clamp(-reach, reach) + reach]
        if inputs.time_table is not None:
            assert inputs.boundaries is not None
            assert inputs.query_times is not None
            assert inputs.key_times is not None
            difference = inputs.query_times[query_lo:query_hi, None] - inputs.key_times[key_lo:key_hi]
            bucket = (inputs.boundaries <= difference[..., None]).sum(-1)
            scores = scores + inputs.time_table.double()[:, bucket]
        pairs = (column <= at) if inputs.causal else torch.ones_like(column <= at)
        if inputs.num_targets is not None:
            history = num_keys - inputs.num_targets[sequence]
            pairs = pairs & ((at == column) | (at < history) | (column < history))
        found.append((scores, pairs, inputs.value[key_lo:key_hi].double().transpose(0, 1)))
    return found


def _wide(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _check_device(tensor: Tensor, name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, query on {like.device}: move them together")
