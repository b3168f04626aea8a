"""Attention over variable-length sequences in tiles: the Triton kernels behind jagged_attention and hstu_attention.

    scores s = scale * q k^T + bias;   weight w = softmax(s), or silu(s) / N;   out = w v
    softmax:  ds = w * (dw - sum over keys of w * dw), w again from the saved log of the row's sum
    silu:     ds = dw / N * sigmoid(s) * (1 + s * (1 - sigmoid(s)))

One program owns one tile of queries (or of keys, for their gradients) of one sequence and one head, and walks over the
tiles of the other side; a [tile, tile] block of scores is all that exists of them. Programs are numbered without reading
lengths on the host: ceil(L / tile) + B bounds the number of tiles, and each program finds its sequence by binary search.

Gradients of the bias tables need no atomics. Walking along the keys, the distances of one tile overlap those of the next
by half, so each program writes each distance once into its own row of a partial table; time buckets are summed bucket by
bucket over the range that a tile holds, few where times ascend. The rows are then summed in a fixed order.
"""

import torch
from torch import Tensor

from recis_kernels.attention_grad_kernels import _attention_key_grad_kernel, _attention_query_grad_kernel
from recis_kernels.attention_inputs import AttentionInputs
from recis_kernels.attention_kernels import _attention_forward_kernel
from recis_kernels.dispatch import launch, triton
from recis_kernels.jagged import lengths_to_offsets

_MIN_DIM = 16  # tl.dot takes no narrower tile
_MAX_STRIDE = 1 << 24  # within a tile addresses are int32: 64 rows of this stride are below 2**31
_PARTIAL_BYTES = 1 << 27  # partial bias tables at a time; more tiles than fit are launched in turns


def forward(inputs: AttentionInputs, softmax: bool) -> tuple[Tensor, Tensor]:
    """Return (out [L, H, Dv], log of the sum of exp(scores) [L, H] fp32, which is empty without softmax)."""
    _check_dtype(inputs)
    query, value = inputs.query, inputs.value
    num_queries, num_heads, _ = query.shape
    out = query.new_empty(num_queries, num_heads, value.shape[2])
    log_sum = query.new_empty((num_queries, num_heads) if softmax else (0,), dtype=torch.float32)
    block, options = _options(inputs, softmax)
    tile_offsets, num_tiles = _tiles(inputs.query_offsets, num_queries, block)
    rows, strides = _rows(inputs)
    launch(
        _attention_forward_kernel,
        (num_tiles, num_heads),
        *rows,
        out,
        log_sum,
        *_tables(inputs, tile_offsets),
        *strides,
        *_sizes(inputs),
        **_registers(inputs),
        **options,
    )
    return out, log_sum


def backward(
    inputs: AttentionInputs, softmax: bool, out: Tensor, log_sum: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and of the position and time tables (empty where there is none)."""
    _check_dtype(inputs)
    query, key, value = inputs.query, inputs.key, inputs.value
    num_heads = query.shape[1]
    grad = grad.contiguous()
    query_grad, key_grad, value_grad = (
        torch.empty_like(part, memory_format=torch.contiguous_format) for part in (query, key, value)
    )
    weighted = torch.empty_like(log_sum)
    block, options = _options(inputs, softmax)
    rows, strides = _rows(inputs)
    sizes = _sizes(inputs)

    tile_offsets, num_tiles = _tiles(inputs.query_offsets, query.shape[0], block)
    tables = _tables(inputs, tile_offsets)
    position_grad, time_grad = (
        part.new_zeros(0) if table is None else torch.zeros_like(table)
        for part, table in ((log_sum, inputs.position_table), (log_sum, inputs.time_table))
    )
    num_buckets = time_grad.shape[-1]
    turn = max(1, num_tiles)
    if position_grad.numel() + time_grad.numel():
        turn = max(1, _PARTIAL_BYTES // (4 * (position_grad.numel() + time_grad.numel())))
    for first_tile in range(0, num_tiles, turn):
        count = min(turn, num_tiles - first_tile)
        position_partial = position_grad.new_zeros(count, *position_grad.shape)  # not all distances occur in all tiles
        time_partial = time_grad.new_zeros(count, *time_grad.shape)
        launch(
            _attention_query_grad_kernel,
            (count, num_heads),
            *rows,
            out,
            grad,
            log_sum,
            weighted,
            query_grad,
            position_partial,
            time_partial,
            *tables,
            *strides,
            first_tile,
            *sizes,
            NUM_BUCKETS=_power_of_two(num_buckets, 1),
            **_registers(inputs, query.dtype == torch.float32),
            **options,
        )
        position_grad += position_partial.sum(0)
        time_grad += time_partial.sum(0)

    tile_offsets, num_tiles = _tiles(inputs.key_offsets, key.shape[0], block)
    launch(
        _attention_key_grad_kernel,
        (num_tiles, num_heads),
        *rows,
        grad,
        log_sum,
        weighted,
        key_grad,
        value_grad,
        *_tables(inputs, tile_offsets),
        *strides,
        *sizes,
        **options,
    )
    return query_grad, key_grad, value_grad, position_grad, time_grad


def _check_dtype(inputs: AttentionInputs) -> None:
    if inputs.query.dtype == torch.float64:
        raise ValueError("float64 attention runs on the CPU only: move the rows there, or make them float32")


def _options(inputs: AttentionInputs, softmax: bool) -> tuple[int, dict[str, int | bool]]:
    """Return the tile's length and the constants of the kernels: the largest tile whose registers fit (compiled, sm_90)."""
    key_dim, value_dim = (_power_of_two(rows.shape[2], _MIN_DIM) for rows in (inputs.key, inputs.value))
    widest = max(key_dim, value_dim)
    if inputs.query.dtype == torch.bfloat16:  # tensor cores: whole rows of numbers
        has_tables = inputs.position_table is not None or inputs.time_table is not None
        block, chunk = (64 if widest <= 64 and not has_tables else 32), 0
        num_warps = 4 if widest <= 64 else 8
    else:  # full fp32 products hold their operands in registers: some numbers of each row at a time
        block, chunk, num_warps = (32 if widest <= 128 else 16), 16, 8
    return block, {
        "SOFTMAX": softmax,
        "CAUSAL": inputs.causal,
        "HAS_TARGETS": inputs.num_targets is not None,
        "HAS_POSITION": inputs.position_table is not None,
        "HAS_TIME": inputs.time_table is not None,
        "BLOCK": block,
        "CHUNK": chunk,
        "WIDEN": not isinstance(_attention_forward_kernel, getattr(triton, "JITFunction", ())),  # interpreted
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "num_warps": num_warps,
        "num_stages": 2 if chunk == 0 else 1,
    }


def _registers(inputs: AttentionInputs, is_wanted: bool = True) -> dict[str, int]:
    """Return a limit of registers per thread where ptxas, left to itself, spills some to fit a second block on an SM."""
    has_tables = inputs.position_table is not None or inputs.time_table is not None
    return {"maxnreg": 192} if has_tables and is_wanted else {}


def _tiles(offsets: Tensor, num_rows: int, block: int) -> tuple[Tensor, int]:
    """Return the first tile of each sequence [B + 1], on the device, and an upper bound of their number."""
    tile_offsets = lengths_to_offsets((offsets.diff() + (block - 1)) // block)
    return tile_offsets, -(-num_rows // block) + offsets.numel() - 1 if num_rows else 0


def _rows(inputs: AttentionInputs) -> tuple[list[Tensor], list[int]]:
    """Return query, key and value with the numbers of a row together, and the strides of their rows."""
    parts = [rows if _is_packed(rows) else rows.contiguous() for rows in (inputs.query, inputs.key, inputs.value)]
    return parts, [rows.stride(0) for rows in parts]


def _is_packed(rows: Tensor) -> bool:
    return rows.stride(2) == 1 and rows.stride(1) == rows.shape[2] and 0 <= rows.stride(0) <= _MAX_STRIDE


def _tables(inputs: AttentionInputs, tile_offsets: Tensor) -> list[Tensor]:
    """Return the kernels' pointers from query_offsets to key_times; where there is no table, offsets stand unread."""
    optional = (
        inputs.num_targets,
        inputs.position_table,
        inputs.time_table,
        inputs.boundaries,
        inputs.query_times,
        inputs.key_times,
    )
    query_offsets, key_offsets = inputs.query_offsets.contiguous(), inputs.key_offsets.contiguous()
    present = [query_offsets if table is None else table.contiguous() for table in optional]
    return [query_offsets, key_offsets, tile_offsets, *present]


def _sizes(inputs: AttentionInputs) -> list[int | float]:
    num_sequences = inputs.query_offsets.numel() - 1
    num_boundaries = 0 if inputs.boundaries is None else inputs.boundaries.numel()
    return [
        num_sequences,
        max(0, num_sequences - 1).bit_length(),
        inputs.query.shape[1],
        inputs.query.shape[2],
        inputs.value.shape[2],
        1 if inputs.position_table is None else inputs.position_table.shape[1],
        num_boundaries,
        num_boundaries.bit_length(),
        float(inputs.divisor),
        inputs.scale,
    ]


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << max(0, number - 1).bit_length())
