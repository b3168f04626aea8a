"""The backward Triton kernels of jagged_attention and hstu_attention; attention_triton.py says what they compute.

One owns a tile of queries, writes their gradients and its share of the bias tables' gradients, and walks over the keys;
the other owns a tile of keys, writes the gradients of keys and values, and walks over the queries.
"""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportArgumentType=false
# a constexpr switch makes the names that only its own branches read, and pyright does not know that tl.min gives a number

from recis_kernels.attention_tiles import (
    add_product,
    key_steps,
    place_of_tile,
    position_bias,
    product_of_rows,
    store_distances,
    time_buckets,
    visible,
    weights_and_slopes,
)
from recis_kernels.dispatch import jit, tl


@jit
def _attention_query_grad_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    grad_ptr,
    log_sum_ptr,
    weighted_ptr,
    query_grad_ptr,
    position_partial_ptr,
    time_partial_ptr,
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
    first_tile,
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
    NUM_BUCKETS: tl.constexpr,
):
    own, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tile = own + first_tile
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
    grad_stride = num_heads * value_dim
    out_first = ((query_first + first) * num_heads + head) * value_dim
    grad_ptr += out_first
    out_at = lane[:, None] * grad_stride + value_columns[None, :]
    out_ok = row_ok[:, None] & (value_columns < value_dim)[None, :]
    grad = tl.load(grad_ptr + out_at, mask=out_ok, other=0.0)
    log_sum, weighted = 0.0, 0.0
    if SOFTMAX:
        out = tl.load(out_ptr + out_first + out_at, mask=out_ok, other=0.0)
        weighted = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        tl.store(weighted_ptr + query_rows * num_heads + head, weighted, mask=row_ok)
        weighted = weighted[:, None]
        log_sum = tl.load(log_sum_ptr + query_rows * num_heads + head, mask=row_ok, other=0.0)[:, None]
    if HAS_TIME:
        query_time = tl.load(query_times_ptr + query_rows, mask=row_ok, other=0)[:, None]
        buckets = tl.arange(0, NUM_BUCKETS)
        bucket_sums = tl.zeros([NUM_BUCKETS], dtype=tl.float32)
    if HAS_POSITION:
        reach = (position_width - 1) // 2
        position_row = position_partial_ptr + (own * num_heads + head) * position_width
        skewed = (lane[:, None] - lane[None, :] + BLOCK) % BLOCK  # puts a distance of the tile into one column
        is_high = lane[:, None] >= lane[None, :]
        carried = tl.zeros([BLOCK], dtype=tl.float32)
        farthest, nearest = 0.0, 0.0  # what pairs beyond the table's two ends give

    query_grad = tl.zeros([BLOCK, KEY_DIM], dtype=tl.float32)
    end = num_keys
    if CAUSAL:
        end = tl.minimum(num_keys, first + BLOCK + shift)
    num_steps, jump = key_steps(first, end, first_target, HAS_TARGETS, BLOCK)
    for step in range(num_steps):
        start = step * BLOCK
        if HAS_TARGETS:
            start = tl.where(step == jump, first, start)
            if HAS_POSITION:  # noqa: SIM102, the outer switch is constexpr
                if step == jump:  # the next tile does not continue the distances of the last one
                    behind, before = store_distances(carried, first + shift - step * BLOCK, position_row, reach, BLOCK)
                    farthest += behind
                    nearest += before
                    carried = tl.zeros([BLOCK], dtype=tl.float32)
        columns = start + lane
        column_ok = columns < num_keys
        key_rows = key_first + columns
        tile_ptr = key_ptr + ((key_first + start) * key_stride + head * key_dim)
        values_ptr = value_ptr + ((key_first + start) * value_stride + head * value_dim)
        key = tl.load(
            tile_ptr + (lane[:, None] * key_stride + key_columns[None, :]),
            mask=column_ok[:, None] & (key_columns < key_dim)[None, :],
            other=0.0,
        )
        if CHUNK == 0:
            value = tl.load(
                values_ptr + (lane[:, None] * value_stride + value_columns[None, :]),
                mask=column_ok[:, None] & (value_columns < value_dim)[None, :],
                other=0.0,
            )
            scores = add_product(query, tl.trans(key), nothing, WIDEN) * scale
            grad_weights = add_product(grad, tl.trans(value), nothing, WIDEN)
        else:
            scores = scale * product_of_rows(
                query_ptr, query_stride, row_ok, tile_ptr, key_stride, column_ok, key_dim, BLOCK, CHUNK
            )
            grad_weights = product_of_rows(
                grad_ptr, grad_stride, row_ok, values_ptr, value_stride, column_ok, value_dim, BLOCK, CHUNK
            )
        key_at = columns[None, :]
        pairs = visible(query_at, key_at, num_keys, first_target, CAUSAL, HAS_TARGETS)
        if HAS_POSITION:
            scores += position_bias(query_at, key_at, pairs, position_ptr, position_width)
        if HAS_TIME:
            key_time = tl.load(key_times_ptr + key_rows, mask=column_ok, other=0)[None, :]
            bucket = time_buckets(query_time, key_time, boundaries_ptr, num_boundaries, boundary_steps)
            scores += tl.load(time_ptr + bucket, mask=pairs, other=0.0)
        _, slopes = weights_and_slopes(scores, grad_weights, pairs, log_sum, weighted, num, SOFTMAX)
        query_grad = add_product(slopes.to(key.dtype), key, query_grad, WIDEN)
        if HAS_TIME:
            lowest = tl.min(tl.where(pairs, bucket, num_boundaries))
            highest = tl.max(tl.where(pairs, bucket, 0))
            for one in range(lowest, highest + 1):
                bucket_sum = tl.sum(tl.where(bucket == one, slopes, 0.0))
                bucket_sums += tl.where(buckets == one, bucket_sum, 0.0)
        if HAS_POSITION:
            by_distance = tl.gather(slopes, skewed, 1)
            done = carried + tl.sum(tl.where(is_high, by_distance, 0.0), 0)
            carried = tl.sum(tl.where(is_high, 0.0, by_distance), 0)
            behind, before = store_distances(done, first + shift - start, position_row, reach, BLOCK)
            farthest += behind
            nearest += before
    if HAS_POSITION:
        past = num_steps * BLOCK
        if HAS_TARGETS:
            past = tl.where(jump >= 0, first + BLOCK, past)
        behind, before = store_distances(carried, first + shift - past, position_row, reach, BLOCK)
        farthest += behind
        nearest += before
        both = tl.where(reach == 0, farthest + nearest, 0.0)  # a table of one entry: its ends are the same
        tl.store(position_row, tl.where(reach == 0, both, nearest))
        tl.store(position_row + 2 * reach, tl.where(reach == 0, both, farthest))
    if HAS_TIME:
        time_row = time_partial_ptr + (own * num_heads + head) * (num_boundaries + 1)
        tl.store(time_row + buckets, bucket_sums, mask=buckets <= num_boundaries)
    tl.store(
        query_grad_ptr
        + ((query_first + first) * num_heads + head) * key_dim
        + (lane[:, None] * (num_heads * key_dim) + key_columns[None, :]),
        (query_grad * scale).to(query_grad_ptr.dtype.element_ty),
        mask=row_ok[:, None] & (key_columns < key_dim)[None, :],
    )


@jit
def _attention_key_grad_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_ptr,
    log_sum_ptr,
    weighted_ptr,
    key_grad_ptr,
    value_grad_ptr,
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
    columns = first + lane  # keys: the rows of the blocks below
    column_ok = columns < num_keys
    key_at = columns[:, None]
    key_columns, value_columns = tl.arange(0, KEY_DIM), tl.arange(0, VALUE_DIM)
    key_rows = key_first + columns
    key_ok = column_ok[:, None] & (key_columns < key_dim)[None, :]
    value_ok = column_ok[:, None] & (value_columns < value_dim)[None, :]
    key_ptr += (key_first + first) * key_stride + head * key_dim
    value_ptr += (key_first + first) * value_stride + head * value_dim
    if CHUNK == 0:
        key = tl.load(key_ptr + (lane[:, None] * key_stride + key_columns[None, :]), mask=key_ok, other=0.0)
        value = tl.load(value_ptr + (lane[:, None] * value_stride + value_columns[None, :]), mask=value_ok, other=0.0)
    if HAS_TIME:
        key_time = tl.load(key_times_ptr + key_rows, mask=column_ok, other=0)[:, None]
    grad_stride = num_heads * value_dim
    key_grad = tl.zeros([BLOCK, KEY_DIM], dtype=tl.float32)
    value_grad = tl.zeros([BLOCK, VALUE_DIM], dtype=tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(first - shift, 0) // BLOCK * BLOCK  # earlier queries stand before all of these keys
    end = num_queries
    if CAUSAL and HAS_TARGETS:
        end = tl.where(first >= first_target, tl.minimum(end, first + BLOCK), end)  # no other target sees these
    for start in range(begin, end, BLOCK):
        rows = start + lane
        row_ok = rows < num_queries
        query_rows = query_first + rows
        tile_ptr = query_ptr + ((query_first + start) * query_stride + head * key_dim)
        grads_ptr = grad_ptr + ((query_first + start) * num_heads + head) * value_dim
        query = tl.load(
            tile_ptr + (lane[:, None] * query_stride + key_columns[None, :]),
            mask=row_ok[:, None] & (key_columns < key_dim)[None, :],
            other=0.0,
        )
        grad = tl.load(
            grads_ptr + (lane[:, None] * grad_stride + value_columns[None, :]),
            mask=row_ok[:, None] & (value_columns < value_dim)[None, :],
            other=0.0,
        )
        if CHUNK == 0:
            scores = add_product(key, tl.trans(query), nothing, WIDEN) * scale
            grad_weights = add_product(value, tl.trans(grad), nothing, WIDEN)
        else:
            scores = scale * product_of_rows(
                key_ptr, key_stride, column_ok, tile_ptr, query_stride, row_ok, key_dim, BLOCK, CHUNK
            )
            grad_weights = product_of_rows(
                value_ptr, value_stride, column_ok, grads_ptr, grad_stride, row_ok, value_dim, BLOCK, CHUNK
            )
        query_at = (rows + shift)[None, :]
        pairs = visible(query_at, key_at, num_keys, first_target, CAUSAL, HAS_TARGETS)
        if HAS_POSITION:
            scores += position_bias(query_at, key_at, pairs, position_ptr, position_width)
        if HAS_TIME:
            query_time = tl.load(query_times_ptr + query_rows, mask=row_ok, other=0)[None, :]
            bucket = time_buckets(query_time, key_time, boundaries_ptr, num_boundaries, boundary_steps)
            scores += tl.load(time_ptr + bucket, mask=pairs, other=0.0)
        log_sum, weighted = 0.0, 0.0
        if SOFTMAX:
            log_sum = tl.load(log_sum_ptr + query_rows * num_heads + head, mask=row_ok, other=0.0)[None, :]
            weighted = tl.load(weighted_ptr + query_rows * num_heads + head, mask=row_ok, other=0.0)[None, :]
        weights, slopes = weights_and_slopes(scores, grad_weights, pairs, log_sum, weighted, num, SOFTMAX)
        value_grad = add_product(weights.to(grad.dtype), grad, value_grad, WIDEN)
        key_grad = add_product(slopes.to(query.dtype), query, key_grad, WIDEN)
    tl.store(
        key_grad_ptr
        + ((key_first + first) * num_heads + head) * key_dim
        + (lane[:, None] * (num_heads * key_dim) + key_columns[None, :]),
        (key_grad * scale).to(key_grad_ptr.dtype.element_ty),
        mask=key_ok,
    )
    tl.store(
        value_grad_ptr
        + ((key_first + first) * num_heads + head) * value_dim
        + (lane[:, None] * (num_heads * value_dim) + value_columns[None, :]),
        value_grad.to(value_grad_ptr.dtype.element_ty),
        mask=value_ok,
    )
