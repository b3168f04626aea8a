"""The forward Triton kernel of jagged_attention and hstu_attention; attention_triton.py says what it computes and runs it.

Every program owns one tile of queries of one sequence and one head, and walks over the tiles of its keys. Programs past
the last tile end at once: their number is an upper bound.
"""

# pyright: reportPossiblyUnboundVariable=false
# a constexpr switch makes the names that only its own branches read

from recis_kernels.attention_tiles import (
    add_product,
    key_steps,
    place_of_tile,
    position_bias,
    product_of_rows,
    time_buckets,
    visible,
)
from recis_kernels.dispatch import jit, tl


@jit
def _attention_forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    log_sum_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    tile_offsets_ptr,
    num_targets_ptr,
    position_ptr,
    time_ptr,
    boundaries_ptr,
    query_times_ptr,
    key_times_ptr,
    query_stride,
    key_stride,
    value_stride,
    num_sequences,
    search_steps,
    num_heads,
    key_dim,
    value_dim,
    position_width,
    num_boundaries,
    boundary_steps,
    divisor,
    scale,
    SOFTMAX: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_TIME: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDEN: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    tile, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if tile >= tl.load(tile_offsets_ptr + num_sequences):
        return
    query_first, key_first, num_queries, num_keys, first, first_target = place_of_tile(
        tile,
        tile_offsets_ptr,
        query_offsets_ptr,
        key_offsets_ptr,
        num_targets_ptr,
        num_sequences,
        search_steps,
        HAS_TARGETS,
        BLOCK,
    )
    shift = num_keys - num_queries  # the last query stands at the last key
    num = tl.where(divisor > 0.0, divisor, num_keys.to(tl.float32))
    position_ptr += head * position_width
    time_ptr += head * (num_boundaries + 1)

    lane = tl.arange(0, BLOCK)
    nothing = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    rows = first + lane
    row_ok = rows < num_queries
    query_at = (rows + shift)[:, None]
    key_columns, value_columns = tl.arange(0, KEY_DIM), tl.arange(0, VALUE_DIM)
    query_rows = query_first + rows
    query_ptr += (query_first + first) * query_stride + head * key_dim
    if CHUNK == 0:
        query = tl.load(
            query_ptr + (lane[:, None] * query_stride + key_columns[None, :]),
            mask=row_ok[:, None] & (key_columns < key_dim)[None, :],
            other=0.0,
        )
    if HAS_TIME:
        query_time = tl.load(query_times_ptr + query_rows, mask=row_ok, other=0)[:, None]
    total = tl.zeros([BLOCK, VALUE_DIM], dtype=tl.float32)
    top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    power = tl.zeros([BLOCK], dtype=tl.float32)
    end = num_keys
    if CAUSAL:
        end = tl.minimum(num_keys, first + BLOCK + shift)
    num_steps, jump = key_steps(first, end, first_target, HAS_TARGETS, BLOCK)
    for step in range(num_steps):
        start = step * BLOCK
        if HAS_TARGETS:
            start = tl.where(step == jump, first, start)
        columns = start + lane
        column_ok = columns < num_keys
        key_rows = key_first + columns
        tile_ptr = key_ptr + ((key_first + start) * key_stride + head * key_dim)
        if CHUNK == 0:
            key = tl.load(
                tile_ptr + (lane[:, None] * key_stride + key_columns[None, :]),
                mask=column_ok[:, None] & (key_columns < key_dim)[None, :],
                other=0.0,
            )
            scores = add_product(query, tl.trans(key), nothing, WIDEN) * scale
        else:
            scores = scale * product_of_rows(
                query_ptr, query_stride, row_ok, tile_ptr, key_stride, column_ok, key_dim, BLOCK, CHUNK
            )
        key_at = columns[None, :]
        pairs = visible(query_at, key_at, num_keys, first_target, CAUSAL, HAS_TARGETS)
        if HAS_POSITION:
            scores += position_bias(query_at, key_at, pairs, position_ptr, position_width)
        if HAS_TIME:
            key_time = tl.load(key_times_ptr + key_rows, mask=column_ok, other=0)[None, :]
            bucket = time_buckets(query_time, key_time, boundaries_ptr, num_boundaries, boundary_steps)
            scores += tl.load(time_ptr + bucket, mask=pairs, other=0.0)
        if SOFTMAX:
            scores = tl.where(pairs, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp(scores - safe_top[:, None])
            shrink = tl.exp(top - safe_top)
            power = power * shrink + tl.sum(weights, 1)
            total = total * shrink[:, None]
            top = new_top
        else:
            weights = tl.where(pairs, scores * tl.sigmoid(scores), 0.0)
        value = tl.load(
            value_ptr
            + ((key_first + start) * value_stride + head * value_dim)
            + (lane[:, None] * value_stride + value_columns[None, :]),
            mask=column_ok[:, None] & (value_columns < value_dim)[None, :],
            other=0.0,
        )
        total = add_product(weights.to(value.dtype), value, total, WIDEN)
    if SOFTMAX:
        power = tl.where(power == 0.0, 1.0, power)  # a query without a key: zeros, and a log of -inf from its top
        total = total / power[:, None]
        tl.store(log_sum_ptr + query_rows * num_heads + head, top + tl.log(power), mask=row_ok)
    else:
        total = total / num
    out_first = ((query_first + first) * num_heads + head) * value_dim
    tl.store(
        out_ptr + out_first + (lane[:, None] * (num_heads * value_dim) + value_columns[None, :]),
        total.to(out_ptr.dtype.element_ty),
        mask=row_ok[:, None] & (value_columns < value_dim)[None, :],
    )
