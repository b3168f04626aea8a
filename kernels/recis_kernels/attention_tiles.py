"""Parts of the attention kernels: where a tile lies, which pairs may meet, what is added to their scores.

A tile is a block of queries or keys of one sequence. Positions count in keys: key j stands at j, and query i of a sequence
with Q queries and K keys at i + K - Q, so that the last query stands at the last key (for self attention this is i).
"""

from recis_kernels.dispatch import jit, tl


@jit
def place_of_tile(
    tile,
    tile_offsets_ptr,
    query_offsets_ptr,
    key_offsets_ptr,
    num_targets_ptr,
    num_sequences,
    search_steps,
    HAS_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return (first query row, first key row, queries, keys, first position of the tile, first target) of a tile.

    The sequence is the last one whose first tile is not after `tile`: so an empty sequence is never found.
    """
    sequence = tile * 0
    for step in range(search_steps):
        ahead = sequence + ((tile * 0 + 1) << (search_steps - 1 - step))
        inside = ahead < num_sequences
        start = tl.load(tile_offsets_ptr + ahead, mask=inside, other=0)
        sequence = tl.where(inside & (start <= tile), ahead, sequence)
    query_first, key_first = tl.load(query_offsets_ptr + sequence), tl.load(key_offsets_ptr + sequence)
    num_queries = (tl.load(query_offsets_ptr + sequence + 1) - query_first).to(tl.int32)
    num_keys = (tl.load(key_offsets_ptr + sequence + 1) - key_first).to(tl.int32)
    first = ((tile - tl.load(tile_offsets_ptr + sequence)) * BLOCK).to(tl.int32)
    first_target = num_keys
    if HAS_TARGETS:
        first_target = num_keys - tl.load(num_targets_ptr + sequence).to(tl.int32)
    return query_first, key_first, num_queries, num_keys, first, first_target


@jit
def visible(query_at, key_at, num_keys, first_target, CAUSAL: tl.constexpr, HAS_TARGETS: tl.constexpr):
    """Return which pairs of positions may meet; the last query stands at the last key, so one end bounds both."""
    pairs = (query_at < num_keys) & (key_at < num_keys)
    if CAUSAL:
        pairs = pairs & (key_at <= query_at)
    if HAS_TARGETS:
        pairs = pairs & ((query_at == key_at) | (query_at < first_target) | (key_at < first_target))
    return pairs


@jit
def key_steps(first, end, first_target, HAS_TARGETS: tl.constexpr, BLOCK: tl.constexpr):
    """Return (how many key tiles a query tile meets, the step that jumps to the tile itself, or -1).

    A tile of targets alone meets the history and then itself; the targets between would all be masked.
    """
    num_steps, jump = tl.cdiv(tl.maximum(end, 0), BLOCK), -1
    if HAS_TARGETS:
        history = tl.cdiv(tl.maximum(first_target, 0), BLOCK)
        alone = first >= tl.maximum(first_target, 0)
        num_steps = tl.where(alone, history + 1, num_steps)
        jump = tl.where(alone & (first > history * BLOCK), history, -1)
    return num_steps, jump


@jit
def time_buckets(query_time, key_time, boundaries_ptr, num_boundaries, boundary_steps):
    """Return how many boundaries are <= the time difference of each pair."""
    difference = query_time - key_time
    bucket = (difference * 0).to(tl.int32)
    for step in range(boundary_steps):
        ahead = bucket + ((step * 0 + 1) << (boundary_steps - 1 - step))
        inside = ahead <= num_boundaries
        boundary = tl.load(boundaries_ptr + ahead - 1, mask=inside, other=0)
        bucket = tl.where(inside & (boundary <= difference), ahead, bucket)
    return bucket


@jit
def position_bias(query_at, key_at, pairs, table_ptr, width):
    """Return the entry of each pair's distance; pairs farther apart than the table reaches take its ends."""
    reach = (width - 1) // 2
    distance = tl.minimum(tl.maximum(query_at - key_at, -reach), reach)
    return tl.load(table_ptr + (distance + reach), mask=pairs, other=0.0)


@jit
def store_distances(sums, first_distance, row_ptr, reach, BLOCK: tl.constexpr):
    """Write the sums of BLOCK distances to their entries; return what the table's two ends get, (behind, ahead)."""
    distance = first_distance + tl.arange(0, BLOCK)
    tl.store(row_ptr + reach + distance, sums, mask=(distance > -reach) & (distance < reach))
    behind = tl.sum(tl.where(distance >= reach, sums, 0.0))
    ahead = tl.sum(tl.where((distance <= -reach) & (distance < reach), sums, 0.0))
    return behind, ahead


@jit
def weights_and_slopes(scores, grad_weights, pairs, log_sum, weighted, num, SOFTMAX: tl.constexpr):
    """Return (weights, d loss / d scores) from d loss / d weights; zeros where a pair may not meet."""
    if SOFTMAX:
        weights = tl.where(pairs, tl.exp(scores - log_sum), 0.0)
        slopes = weights * (grad_weights - weighted)
    else:
        gate = tl.sigmoid(scores)
        weights = tl.where(pairs, scores * gate, 0.0) / num
        slopes = tl.where(pairs, grad_weights * gate * (1.0 + scores * (1.0 - gate)), 0.0) / num
    return weights, slopes


@jit
def add_product(left, right, total, WIDEN: tl.constexpr):
    """Return total + left @ right in fp32; the interpreter cannot multiply bf16, so there the operands are widened."""
    if WIDEN:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(left, right, total, input_precision="ieee")


@jit
def product_of_rows(
    left_ptr, left_stride, left_ok, right_ptr, right_stride, right_ok, dim, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """Return [BLOCK, BLOCK] dot products of the rows at two addresses, read CHUNK numbers at a time.

    Products in full fp32 keep both operands in registers; whole rows of them would not fit.
    """
    lane, total = tl.arange(0, BLOCK), tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in range(0, dim, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        inside = (columns < dim)[None, :]
        left = tl.load(
            left_ptr + (lane[:, None] * left_stride + columns[None, :]), mask=left_ok[:, None] & inside, other=0.0
        )
        right = tl.load(
            right_ptr + (lane[:, None] * right_stride + columns[None, :]), mask=right_ok[:, None] & inside, other=0.0
        )
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    return total
