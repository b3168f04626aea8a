"""Update the touched rows of a store on a GPU, in place through the table of block addresses. See sparse_update.py.

A program takes a tile of distinct rows, 512 elements for four warps: 8 rows at D = 64, one from D = 512 on. Weights and
state are asked for before the gradients are folded, so that the waits overlap. Rows belong to one program each: nothing is
atomic, and a run gives the same bits every time, those of the CPU (row_rules_triton.py names the one exception).
"""

from __future__ import annotations

import torch
from torch import Tensor

from recis_kernels.dispatch import jit, launch, tl
from recis_kernels.embedding_bag_triton import load_row
from recis_kernels.grad_lists_triton import DeviceGradLists, fold_lists, row_tile
from recis_kernels.philox import rounding_stream
from recis_kernels.row_blocks import RowBlocks
from recis_kernels.row_blocks_triton import row_address
from recis_kernels.row_rounding_triton import bf16_with_noise, column_noise
from recis_kernels.row_rules import NUM_FOLDED, ROW_STEPS, UpdateRule
from recis_kernels.row_rules_triton import adagrad, adam, ftrl, row_wise_adagrad, sgd, sgd_momentum


def update(
    blocks: RowBlocks,
    rows: Tensor,
    table_of_row: Tensor,
    counts: Tensor,
    lists: DeviceGradLists,
    rule: UpdateRule,
    folded: Tensor,
    scale: Tensor,
    *,
    step: int,
    keys: Tensor | None,
    record_seen: bool,
) -> Tensor:
    """Apply the listed gradients; returns bool [U]: rows left as they were because their gradient is not finite.

    Args:
        rows, table_of_row, counts: as in PendingLookup, contiguous.
        folded: what fold_scalars returns, on the device.
        scale: float32 [1].
        keys: int64 [T]; needed for bfloat16 rows.
    """
    layout, num_rows = blocks.layout, rows.numel()
    is_bad = torch.empty(num_rows, dtype=torch.uint8, device=rows.device)
    states = [layout.state_offset(name) for name in rule.states] + [0, 0]
    block_n, block_d, num_warps = row_tile(layout.dim)
    launch(
        _update_rows_kernel,
        (-(-num_rows // block_n),),
        *(blocks.device_pointers, rows, table_of_row, counts, rows if keys is None else keys),
        *(*lists.kernel_args(), folded, scale, is_bad),
        *(num_rows, layout.dim, blocks.shift, layout.row_bytes, states[0], states[1]),
        layout.state_offset(ROW_STEPS) if rule.row_steps else 0,
        *(layout.id_offset, layout.last_seen_offset, layout.count_offset, step, rounding_stream(step)),
        RULE="adam" if rule.name in ("adamw", "adamw_tf") else rule.name,
        ROW_STEPS=rule.row_steps,
        NUM_FOLDED=NUM_FOLDED,
        BF16=layout.dtype == torch.bfloat16,
        RECORD_SEEN=record_seen,
        HAS_FACTORS=lists.factors is not None,
        ALIGNED=lists.is_aligned,
        STATE_ALIGNED=all(offset % 16 == 0 for offset in states),
        N=block_n,
        BLOCK_D=block_d,
        num_warps=num_warps,
    )
    return is_bad.view(torch.bool)


@jit
def _state(address, offset, cols, STATE_ALIGNED: tl.constexpr):
    """Return pointers [N, BLOCK_D] to a state vector."""
    at = (address + offset).to(tl.pointer_type(tl.float32))
    if STATE_ALIGNED:
        at = tl.multiple_of(at, 16)
    return at[:, None] + cols[None, :]


@jit
def _record(address, present, counts_ptr, n, last_seen_at, count_at, step):
    """Set last_seen and add to count, which stays at its largest value."""
    tl.store((address + last_seen_at).to(tl.pointer_type(tl.int32)), step, mask=present)
    at = (address + count_at).to(tl.pointer_type(tl.int32))
    count = tl.load(at, mask=present, other=0).to(tl.int64) + tl.load(counts_ptr + n, mask=present, other=0)
    tl.store(at, tl.minimum(count, 2147483647).to(tl.int32), mask=present)


@jit
def _update_rows_kernel(
    pointers_ptr,
    rows_ptr,
    tables_ptr,
    counts_ptr,
    keys_ptr,
    first_ptr,
    last_ptr,
    sources_ptr,
    factors_ptr,
    folded_ptr,
    scale_ptr,
    is_bad_ptr,
    num_rows,
    dim,
    shift,
    row_bytes,
    first_at,
    second_at,
    steps_at,
    id_at,
    last_seen_at,
    count_at,
    step,
    stream,
    RULE: tl.constexpr,
    ROW_STEPS: tl.constexpr,
    NUM_FOLDED: tl.constexpr,
    BF16: tl.constexpr,
    RECORD_SEEN: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    STATE_ALIGNED: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    cols = tl.arange(0, BLOCK_D)
    exists = n < num_rows
    row = tl.load(rows_ptr + n, mask=exists, other=-1)
    present = row >= 0
    address = row_address(pointers_ptr, row, present, shift, row_bytes)
    if RECORD_SEEN:
        _record(address, present, counts_ptr, n, last_seen_at, count_at, step)
    first = tl.load(first_ptr + n, mask=present, other=0).to(tl.int64)
    last = tl.load(last_ptr + n, mask=present, other=0).to(tl.int64)
    go = last > first
    # asked for before the fold, so that the waits overlap
    w = load_row(address, go, cols, dim, BF16)
    first_state = _state(address, first_at, cols, STATE_ALIGNED)
    second_state = _state(address, second_at, cols, STATE_ALIGNED)
    shared_state = (address + first_at).to(tl.pointer_type(tl.float32))
    mask = go[:, None] & (cols < dim)[None, :]
    s, s2, h = w, w, first
    if RULE == "row_wise_adagrad":
        h = tl.load(shared_state, mask=go, other=1.0)
    elif RULE != "sgd":
        s = tl.load(first_state, mask=mask, other=1.0)
        if RULE == "adam" or RULE == "ftrl":
            s2 = tl.load(second_state, mask=mask, other=1.0)
    g = fold_lists(first, last, sources_ptr, factors_ptr, cols, dim, HAS_FACTORS, ALIGNED, N, BLOCK_D)
    g = g * tl.load(scale_ptr)
    is_finite = (g.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
    bad = go & (tl.min(is_finite.to(tl.int32), axis=1) == 0)
    tl.store(is_bad_ptr + n, bad.to(tl.uint8), mask=exists)
    go = go & (bad == 0)
    mask = go[:, None] & (cols < dim)[None, :]
    table = tl.load(tables_ptr + n, mask=go, other=0).to(tl.int64)
    k = folded_ptr + table * NUM_FOLDED
    if RULE == "sgd":
        w = sgd(w, g, k, go)
    elif RULE == "row_wise_adagrad":
        w, h = row_wise_adagrad(w, h, g, k, go, dim, N, BLOCK_D)
        tl.store(shared_state, h, mask=go)
    else:
        if RULE == "sgd_momentum":
            w, s = sgd_momentum(w, s, g, k, go)
        elif RULE == "adagrad":
            w, s = adagrad(w, s, g, k, go)
        elif RULE == "ftrl":
            w, s, s2 = ftrl(w, s, s2, g, k, go)
        else:
            t = first.to(tl.float32)
            if ROW_STEPS:
                steps = (address + steps_at).to(tl.pointer_type(tl.float32))
                t = tl.load(steps, mask=go, other=1.0) + 1.0
                tl.store(steps, t, mask=go)
            w, s, s2 = adam(w, s, s2, t, g, k, go, ROW_STEPS)
        tl.store(first_state, s, mask=mask)
        if RULE == "adam" or RULE == "ftrl":
            tl.store(second_state, s2, mask=mask)
    if BF16:
        row_id = tl.load((address + id_at).to(tl.pointer_type(tl.int64)), mask=go, other=0)
        key64 = tl.load(keys_ptr + table, mask=go, other=0)
        stored = bf16_with_noise(w, column_noise(key64, row_id, stream, 0, N, BLOCK_D))
        at = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), 16)
        tl.store(at[:, None] + cols[None, :], stored, mask=mask)
    else:
        at = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
        tl.store(at[:, None] + cols[None, :], w, mask=mask)
