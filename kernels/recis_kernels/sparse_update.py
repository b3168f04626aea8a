"""Update the touched rows of a store: each is read once, updated, written once.

    for each distinct row u with a gradient:  g = scale * sum[u];  (w, state) = rule(w, state, g);  last_seen, count

The sum is the left fold of `row_grads`, taken inside the same pass, so neither [L, D] nor [U, D] gradients exist. Clipping
needs the norm of all sums first (`row_square_sums`) and then scales in this pass. Sums made apart (`reduce_lookups`) lead
to equal bits. Threads own ranges of distinct
rows. Rows are fetched some rows ahead, because a random row costs a wait on memory that would otherwise be most of the
time. Least traffic: 12 D + 8 bytes a row for row-wise Adagrad, 28 D for Adam, 16 for the metadata in the same lines.

On a GPU one pass of a Triton kernel does the same with the same bits (row_rules_triton.py names the one exception), and
`fused_update_flags` waits for nothing: which rows were left is a tensor on the device.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recis_kernels.address import load_int32, load_int64, store_int32
from recis_kernels.columns import to_device
from recis_kernels.contents import check_distinct, check_range
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.grad_lists import SOURCES_AHEAD, fetch_source, fold_row, list_grads
from recis_kernels.grad_lists_triton import cut_long_runs, list_grads_on_device
from recis_kernels.lanes import NUM_LANES, lane_scratch, scale_is_finite, square_sum
from recis_kernels.philox import rounding_stream
from recis_kernels.prefetch import prefetch
from recis_kernels.row_blocks import RowBlocks, layout_of_key
from recis_kernels.row_grads import (
    PendingLookup,
    RowGrad,
    join_views,
    merge_lookups,
    reduce_grads,
    reduce_lookups,
    split_views,
)
from recis_kernels.row_rounding import NOISE_BYTES, round_row, round_stochastic, widen_row
from recis_kernels.row_rules import (
    NUM_FOLDED,
    ROW_STEPS,
    UpdateRule,
    fold_scalars,
    has_coupled_decay,
    reference_update,
    rule_of,
    update_row,
)
from recis_kernels.sparse_update_triton import update
from recis_kernels.threads import run_parts

__all__ = [
    "PendingLookup",
    "RowGrad",
    "fused_update",
    "fused_update_flags",
    "merge_lookups",
    "reduce_grads",
    "reduce_lookups",
    "update_rows",
]

# Rows fetched at once, one such group ahead of the update. A fetch waits for its address translation, and an update is
# longer than what a core looks ahead: asking row by row would wait for one translation after the other.
GROUP = 8
ROWS_AHEAD = 12
MIN_WORK_PER_THREAD = 1024  # contributions, with a row counted as four


def fused_update(
    blocks: RowBlocks,
    lookups: Sequence[PendingLookup],
    rule: UpdateRule,
    scalars: Tensor,
    *,
    step: int,
    keys: Tensor | None = None,
    record_seen: bool = True,
    deterministic: bool = True,
    impl: Impl = "auto",
) -> tuple[PendingLookup, Tensor]:
    """Apply the gradients of all lookups to their rows, in place.

    Args:
        lookups: at least one; rows of -1 are skipped.
        scalars: [T, K] float64, columns rule.scalars, one line per logical table of the store; on any device.
        step: optimizer step, for stochastic rounding and last_seen.
        keys: key64 of each table, int64 [T]; needed for bfloat16 rows.
        record_seen: also set last_seen to `step` and add counts, for every row found, with or without a gradient.
        deterministic: sum in the order stated in row_grads, with the CPU's bits. False, on a GPU: a row with more than 1024
            contributions is summed in pieces of 256, which is many times faster for an id that is in every bag; equal
            from run to run, but other bits than the CPU's. The CPU always keeps the order.

    Returns:
        The merged lookup, and the indices [M] int64 into its rows, ascending, of those left as they were because their
        gradient is NaN or infinite (their metadata is recorded). On a GPU the indices cost a host sync;
        fused_update_flags does without.

    Raises:
        ValueError: shapes or dtypes do not fit, keys are missing, or the layout lacks a state of the rule.
    """
    lookup, bad = _update(blocks, lookups, rule, scalars, step, keys, record_seen, deterministic, impl)
    return lookup, bad.nonzero().squeeze(1) if bad.dtype == torch.bool else bad


def fused_update_flags(
    blocks: RowBlocks,
    lookups: Sequence[PendingLookup],
    rule: UpdateRule,
    scalars: Tensor,
    *,
    step: int,
    keys: Tensor | None = None,
    record_seen: bool = True,
    deterministic: bool = True,
    impl: Impl = "auto",
) -> tuple[PendingLookup, Tensor]:
    """As fused_update, with bool [U] on the rows' device in place of indices: True where a row was left as it was.

    No host sync on a GPU: sum the flags on the device and read the sum when it is asked for. Known to torch.compile.
    """
    if torch.compiler.is_compiling():
        lookup = merge_lookups(lookups)
        op = (blocks.blocks, blocks.layout_key, blocks.shift, lookup.rows, lookup.table_of_row, lookup.counts)
        numbers = (rule.name, rule.row_steps, scalars, step, keys, record_seen, deterministic, impl)
        return lookup, _update_op(*op, *split_views(lookup.views), _scale_of(lookup), *numbers)
    lookup, bad = _update(blocks, lookups, rule, scalars, step, keys, record_seen, deterministic, impl)
    return lookup, _flags(bad, lookup.rows.numel())


def _flags(bad: Tensor, num_rows: int) -> Tensor:
    return bad if bad.dtype == torch.bool else torch.zeros(num_rows, dtype=torch.bool).index_fill_(0, bad, True)


def _scale_of(lookup: PendingLookup) -> Tensor:
    """Return the scale, float32 [1], on the rows' device."""
    if isinstance(lookup.scale, Tensor):
        return lookup.scale.detach().reshape(1).to(lookup.rows.device, torch.float32)
    return torch.full((1,), lookup.scale, dtype=torch.float32, device=lookup.rows.device)


@torch.library.custom_op("recis::fused_update", mutates_args=("blocks",))
def _update_op(
    blocks: Sequence[Tensor],
    layout: str,
    shift: int,
    rows: Tensor,
    table_of_row: Tensor,
    counts: Tensor,
    inverses: Sequence[Tensor],
    offsets: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    strides: Sequence[int],
    per_position: Sequence[bool],
    micro_batches: Sequence[int],
    scale: Tensor,
    rule: str,
    row_steps: bool,
    scalars: Tensor,
    step: int,
    keys: Tensor | None,
    record_seen: bool,
    deterministic: bool,
    impl: str,
) -> Tensor:
    store = RowBlocks.over(layout_of_key(layout), shift, blocks, rows.device)
    views = join_views(inverses, offsets, factors, grads, strides, per_position, micro_batches)
    lookup = PendingLookup(rows, table_of_row, counts, views, scale)
    numbers = (rule_of(rule, row_steps), scalars, step, keys, record_seen, deterministic, impl)
    return _flags(_update(store, [lookup], *numbers)[1], rows.numel())  # type: ignore[arg-type]


@_update_op.register_fake
def _(blocks, layout, shift, rows, *rest):
    return rows.new_empty(rows.shape, dtype=torch.bool)


def _update(
    blocks: RowBlocks,
    lookups: Sequence[PendingLookup],
    rule: UpdateRule,
    scalars: Tensor,
    step: int,
    keys: Tensor | None,
    record_seen: bool,
    deterministic: bool,
    impl: Impl,
) -> tuple[PendingLookup, Tensor]:
    """Return the merged lookup and which rows were left: indices from the CPU versions, flags from Triton."""
    layout = blocks.layout
    needed = (*rule.states, ROW_STEPS) if rule.row_steps else rule.states
    if not set(needed) <= set(dict(layout.state)):
        raise ValueError(f"{rule.name} needs the states {needed}; the rows have {layout.state}")
    if layout.dtype == torch.bfloat16 and keys is None:
        raise ValueError("bfloat16 rows are rounded at random by table: pass keys [T] int64 (table_key)")
    if keys is not None and (keys.ndim != 1 or keys.dtype != torch.int64 or keys.numel() < scalars.shape[0]):
        raise ValueError(
            f"keys must be int64 [T], one for each of the {scalars.shape[0]} lines of scalars; "
            f"got {tuple(keys.shape)} {keys.dtype}"
        )
    lookup = merge_lookups(lookups)
    for name, dtype in (("rows", torch.int64), ("table_of_row", torch.int32), ("counts", torch.int32)):
        tensor = getattr(lookup, name)
        if tensor.shape != lookup.rows.shape or tensor.ndim != 1 or tensor.dtype != dtype:
            raise ValueError(f"{name} must be [U] {dtype}; got {tuple(tensor.shape)} {tensor.dtype}")
    check_range("rows", lookup.rows, -1, blocks.capacity - 1)
    check_range("table_of_row", lookup.table_of_row, 0, scalars.shape[0] - 1)
    check_distinct("rows", lookup.rows)  # a row in two places would be updated twice
    run = choose(impl, lookup.rows, triton=_triton, numba=_numba, reference=_reference)
    folded = fold_scalars(rule, scalars)
    if run is _triton:
        return lookup, _triton(blocks, lookup, rule, folded, step, keys, record_seen, deterministic)
    return lookup, run(blocks, lookup, rule, scalars if run is _reference else folded, step, keys, record_seen)


def update_rows(
    blocks: RowBlocks,
    rows: Tensor,
    grads: Tensor,
    rule: UpdateRule,
    scalars: Tensor,
    *,
    step: int,
    table_of_row: Tensor | None = None,
    keys: Tensor | None = None,
    scale: float | Tensor = 1.0,
    impl: Impl = "auto",
) -> Tensor:
    """Update distinct rows [U] (-1 skipped) with their summed gradients [U, D]; metadata stays. See fused_update.

    table_of_row: [U] int32 line of `scalars`; None: line 0 for all. Returns the indices of rows with non-finite gradient.
    """
    num_rows = rows.numel()
    tables = rows.new_zeros(num_rows, dtype=torch.int32) if table_of_row is None else table_of_row
    order = torch.arange(num_rows + 1, device=rows.device)
    view = RowGrad(inverse=order[:-1], offsets=order, stride=num_rows, per_position=True, grad=grads)
    lookup = PendingLookup(rows, tables, rows.new_zeros(num_rows, dtype=torch.int32), [view], scale)
    return fused_update(blocks, [lookup], rule, scalars, step=step, keys=keys, record_seen=False, impl=impl)[1]


def _reference(
    blocks: RowBlocks,
    lookup: PendingLookup,
    rule: UpdateRule,
    scalars: Tensor,
    step: int,
    keys: Tensor | None,
    record_seen: bool,
) -> Tensor:
    dim, num_rows = blocks.layout.dim, lookup.rows.numel()
    sums = reduce_grads(lookup.views, num_rows, dim, impl="reference") * lookup.scale
    reached = torch.zeros(num_rows, dtype=torch.bool)
    for view in lookup.views:
        if view.grad is not None:
            used = view.inverse[int(view.offsets[0]) : int(view.offsets[-1])].long()
            reached[used[used >= 0]] = True
    have = lookup.rows >= 0
    bad = (reached & have & ~sums.isfinite().all(1)).nonzero().squeeze(1)
    changed = reached & have & sums.isfinite().all(1)
    rows, old = lookup.rows[changed], blocks.read(lookup.rows[changed])
    state = {name: old[f"state.{name}"] for name, _ in blocks.layout.state}
    table = lookup.table_of_row[changed].long()
    weight, state = reference_update(rule, old["weight"], state, sums[changed], scalars[table])
    new = weight.float()
    if blocks.layout.dtype == torch.bfloat16:
        assert keys is not None
        new = round_stochastic(new, old["id"], keys[table], step)
    blocks.write(rows, {"weight": new, **{f"state.{name}": value.float() for name, value in state.items()}})
    if record_seen:
        seen = lookup.rows[have]
        counts = blocks.read(seen, ("count",))["count"].long() + lookup.counts[have].long()
        last_seen = torch.full((seen.numel(),), step, dtype=torch.int32)
        blocks.write(seen, {"count": counts.clamp(max=2**31 - 1).to(torch.int32), "last_seen": last_seen})
    return bad


def _beside(table: Tensor, rows: Tensor) -> Tensor:
    return table if table.device == rows.device else to_device(table, rows.device)


def _triton(
    blocks: RowBlocks,
    lookup: PendingLookup,
    rule: UpdateRule,
    folded: Tensor,
    step: int,
    keys: Tensor | None,
    record_seen: bool,
    deterministic: bool,
) -> Tensor:
    rows, tables, counts = (t.contiguous() for t in (lookup.rows, lookup.table_of_row, lookup.counts))
    lists = list_grads_on_device(lookup.views, rows.numel(), blocks.layout.dim, rows.device)
    if not deterministic:
        lists = cut_long_runs(lists, blocks.layout.dim)
    numbers = _beside(folded, rows), _scale_of(lookup)
    own_keys = None if keys is None else _beside(keys.contiguous(), rows)
    given = (blocks, rows, tables, counts, lists, rule, *numbers)
    return update(*given, step=step, keys=own_keys, record_seen=record_seen)


def _numba(
    blocks: RowBlocks,
    lookup: PendingLookup,
    rule: UpdateRule,
    folded: Tensor,
    step: int,
    keys: Tensor | None,
    record_seen: bool,
) -> Tensor:
    num_rows = lookup.rows.numel()
    lists = list_grads(lookup.views, num_rows, blocks.layout.dim)
    place = _place(blocks, rule)
    rows, tables, counts = (t.contiguous().numpy() for t in (lookup.rows, lookup.table_of_row, lookup.counts))
    table_keys = np.zeros(1, np.int64) if keys is None else keys.contiguous().numpy()
    bad = np.empty(num_rows, dtype=np.int64)  # mapped lazily: costs nothing while no row is bad
    pointers, scale = blocks.pointers.numpy(), np.float32(float(lookup.scale))
    seen_step = step if record_seen else -1
    # a rule with coupled decay changes the gradient, and loops over sixteen floats read past a row of another width
    is_direct = not lists.factors.size and scale == 1 and blocks.layout.dim % NUM_LANES == 0
    is_direct = is_direct and not has_coupled_decay(rule, folded)

    def loop(start: int, stop: int) -> int:
        return _update_loop(
            (rule.code, seen_step, rounding_stream(step), is_direct, start, stop),
            place,
            (pointers, rows, counts, table_keys, bad, *_scratch(blocks.layout.dim)),
            tables,
            (lists.starts, *lists.addresses),
            folded.data_ptr(),
            scale,
        )

    parts = lists.parts(MIN_WORK_PER_THREAD)
    found = run_parts(loop, parts)
    indices = [bad[start : start + int(count)] for (start, _), count in zip(parts, found, strict=True)]  # type: ignore[call-overload]
    return torch.from_numpy(np.concatenate(indices))


def _scratch(dim: int) -> tuple[np.ndarray, ...]:
    """Return memory for one loop: a widened row and GROUP gradients; their addresses; their square sums; noise."""
    noise = np.empty(NOISE_BYTES, np.uint8)
    return lane_scratch(dim, 1 + GROUP), np.empty(GROUP, np.int64), np.empty(GROUP, np.float32), noise


def _place(blocks: RowBlocks, rule: UpdateRule) -> tuple[int, ...]:
    """Return where things lie: shift, row_bytes, dim, is bf16, offsets of two states, of the row's steps, id, metadata."""
    layout = blocks.layout
    states = [layout.state_offset(name) for name in rule.states]
    states += [0] * (2 - len(states))
    return (
        blocks.shift,
        layout.row_bytes,
        layout.dim,
        int(layout.dtype == torch.bfloat16),
        *states,
        layout.state_offset(ROW_STEPS) if rule.row_steps else -1,
        layout.id_offset,
        layout.last_seen_offset,
        layout.count_offset,
    )


@njit
def _fetch_row(pointers, row, shift, row_bytes):
    if row >= 0:
        address = pointers[row >> shift] + (row & ((1 << shift) - 1)) * row_bytes
        for line in range(0, row_bytes, 64):
            prefetch(address + line)


@njit
def _update_loop(job, place, memory, tables, lists, scalars, scale):
    """Update rows start .. stop - 1; returns how many gradients are not finite, whose rows `bad` takes from `start` on.

    Rows go in groups of GROUP: first all their gradients and square sums, then all their updates, so that the processor
    works at several long chains of additions, roots and divisions at once.
    """
    code, seen_step, stream, is_direct, start, stop = job
    shift, row_bytes, dim, is_bf16, first_at, second_at, steps_at, id_at, seen_at, count_at = place
    pointers, rows, counts, keys, bad, scratch, ready, squares, noise = memory
    starts, sources, factors = lists
    mask = (1 << shift) - 1
    num_bad = 0
    padded = scratch.shape[1]
    wide_at = scratch.ctypes.data
    for u in range(start, min(start + ROWS_AHEAD, stop)):
        _fetch_row(pointers, rows[u], shift, row_bytes)
    for first in range(start, stop, GROUP):
        last = min(first + GROUP, stop)
        for u in range(first, last):
            if u + ROWS_AHEAD < stop:
                _fetch_row(pointers, rows[u + ROWS_AHEAD], shift, row_bytes)
            row = rows[u]
            ready[u - first] = 0
            if row < 0:
                continue
            if seen_step >= 0:
                address = pointers[row >> shift] + (row & mask) * row_bytes
                store_int32(address + seen_at, np.int32(seen_step))
                count = np.int64(load_int32(address + count_at)) + counts[u]
                store_int32(address + count_at, np.int32(min(count, 2147483647)))
            low, high = starts[u], starts[u + 1]
            if low == high:
                continue
            own_at = wide_at + 4 * padded * (1 + u - first)
            g_at = own_at
            if is_direct and high - low == 1:  # the one contribution is the sum: read it where it lies
                g_at = load_int64(sources + 8 * low)
                fetch_source(low + SOURCES_AHEAD, sources, dim)
            else:
                fold_row(low, high, sources, factors, g_at, dim)
                if scale != np.float32(1.0):
                    scale_is_finite(g_at, padded, scale)
            square = square_sum(g_at, padded)
            if not square < np.inf:  # something is not finite, or a square is too large for a float
                if g_at != own_at:
                    fold_row(low, high, sources, factors, own_at, dim)
                if not scale_is_finite(own_at, padded, np.float32(1.0)):
                    bad[start + num_bad] = u
                    num_bad += 1
                    continue
            ready[u - first] = g_at
            squares[u - first] = square
        for u in range(first, last):
            g_at = ready[u - first]
            if g_at == 0:
                continue
            row = rows[u]
            address = pointers[row >> shift] + (row & mask) * row_bytes
            k = scalars + 8 * NUM_FOLDED * tables[u]
            steps = address + steps_at if steps_at >= 0 else 0
            weight = address
            if is_bf16 != 0:
                weight = wide_at
                widen_row(address, wide_at, dim)
            update_row(code, dim, weight, address + first_at, address + second_at, steps, g_at, squares[u - first], k)
            if is_bf16 != 0:
                row_id = load_int64(address + id_at)
                round_row(wide_at, address, dim, keys[tables[u]], row_id, stream, noise.ctypes.data)
    return num_bad
