"""Write the first value of rows: a pure function of (seed, table name, id, column), as `philox` draws words.

    u = (word >> 8) * 2**-24 in [0, 1);   s = ((word >> 8) - 2**23) * 2**-23 in [-1, 1): both exact in float32
    Uniform(a, b)           mid + s * half in float32, two roundings; mid = (a + b) / 2, half = (b - a) / 2 in float32
    Normal(mean, std)       mean + std * z in float64, rounded to float32 once; z by Box-Muller: words (0, 1) give columns
                            0 and 1 of a quad by cos and sin, words (2, 3) columns 2 and 3
    TruncatedNormal(std, bound)   a column draws again with stream 1, 2, ... while |std * z| > bound; the 8th is clamped

bfloat16 rows round the float32 value to nearest even. So CPU and GPU agree bit for bit for Constant and Uniform, and to one
float32 ulp for the normals. A row is written once, front to back: its bytes and about 1 ns per column (normals 15 ns).
Row -1 is skipped, so the padded output of a sync-free lookup can be passed as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from recis_kernels import row_init_triton
from recis_kernels.address import float32_at, store_float32, store_int32, store_int64, uint16_at, uint32_at
from recis_kernels.contents import check_distinct, check_range
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.philox import admission_stream, id_words, words
from recis_kernels.philox_vector import COLUMNS, store_words
from recis_kernels.row_blocks import RowBlocks, layout_of_key
from recis_kernels.threads import run_parts, split

MAX_ATTEMPTS = 8
_UNIT = 2.0**-24
_MIN_PER_THREAD = 512  # a row takes 50 ns and more


class InitKind(IntEnum):
    """What a table's rows start as."""

    CONSTANT = 0
    UNIFORM = 1
    NORMAL = 2
    TRUNCATED_NORMAL = 3


@dataclass(frozen=True, slots=True)
class InitSpec:
    """Parameters of an initializer.

    Args:
        kind: which formula.
        a: the constant | lower limit | mean | mean.
        b: unused | upper limit | standard deviation | standard deviation.
        bound: TRUNCATED_NORMAL keeps values within mean +- bound.
    """

    kind: InitKind
    a: float = 0.0
    b: float = 0.0
    bound: float = math.inf

    def __post_init__(self) -> None:
        if not (math.isfinite(self.a) and math.isfinite(self.b)):
            raise ValueError(f"initializer parameters must be finite; got {self.a} and {self.b}")
        if self.kind == InitKind.UNIFORM and self.a > self.b:
            raise ValueError(f"a uniform initializer needs low <= high; got {self.a} and {self.b}")
        if self.kind in (InitKind.NORMAL, InitKind.TRUNCATED_NORMAL) and self.b < 0:
            raise ValueError(f"a standard deviation is not negative; got {self.b}")
        if not self.bound > 0:
            raise ValueError(f"a truncation bound must be positive; got {self.bound}")

    def loop_args(self) -> tuple[int, float, float, float]:
        """Return (kind, a, b, bound) for the loops; a, b of UNIFORM become mid and half, each rounded to float32."""
        if self.kind == InitKind.UNIFORM:
            return (
                int(self.kind),
                float(np.float32((self.a + self.b) / 2)),
                float(np.float32((self.b - self.a) / 2)),
                0.0,
            )
        return int(self.kind), float(self.a), float(self.b), float(self.bound)


def init_rows(
    blocks: RowBlocks,
    rows: Tensor,
    ids: Tensor,
    keys: Tensor,
    spec: InitSpec,
    *,
    tables: Tensor | None = None,
    state_values: Sequence[float] = (),
    step: int = 0,
    clock_s: int = 0,
    impl: Impl = "auto",
) -> None:
    """Make rows [N] the fresh rows of ids [N]: initial weight and state, id, last_seen = step, count = 0.

    Args:
        blocks: the store; every row must lie below its capacity (trusted, as rows and tables are).
        rows: int64 [N], distinct; -1 = write nothing for this id.
        ids: int64 [N].
        keys: int64 [T], `table_key` of each table; best on the device of the rows, else copied there at each call.
        spec: the initializer, one per store.
        tables: int32 or int64 [N], index of each id's table in keys; None = all of keys[0].
        state_values: initial value of each state vector, in layout order; () = zeros.
        step: optimizer step, stored as int32.
        clock_s: clock reading in seconds, stored as int32 in layouts with a clock.

    Raises:
        ValueError: wrong shape or dtype, or state_values of another length than the layout's states.
    """
    ids, tables = _checked(ids, keys, tables)
    if rows.shape != ids.shape or rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64 {tuple(ids.shape)}; got {rows.dtype} {tuple(rows.shape)}")
    check_range("rows", rows, -1, blocks.capacity - 1)
    check_distinct("rows", rows)
    names = [name for name, _ in blocks.layout.state]
    if len(state_values) not in (0, len(names)):
        raise ValueError(f"state_values needs one value for each of {names}; got {tuple(state_values)}")
    values = list(state_values) or [0.0] * len(names)
    if torch.compiler.is_compiling():
        numbers = [spec.a, spec.b, spec.bound]
        _init_rows_op(
            blocks.blocks, rows, ids, keys, tables, blocks.layout_key, blocks.shift, int(spec.kind), numbers, values,
            step, clock_s, impl,
        )  # fmt: skip
    else:
        _init_rows(blocks, rows, ids, keys, tables, spec, values, step, clock_s, impl)


def initial_values(
    ids: Tensor, dim: int, keys: Tensor, spec: InitSpec, *, tables: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """Return the float32 weights [N, dim] that fresh rows of ids [N] get; keys and tables as in `init_rows`."""
    ids, tables = _checked(ids, keys, tables)
    return _initial_values_op(ids, dim, keys.contiguous(), tables, int(spec.kind), [spec.a, spec.b, spec.bound], impl)


def admission_draws(
    ids: Tensor, keys: Tensor, step: int, *, tables: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """Return one uniform number of [0, 1) per id for admission by probability in a step, float32 [N]; exact."""
    ids, tables = _checked(ids, keys, tables)
    return _draws_op(ids, keys.contiguous(), tables, admission_stream(step), impl)


def _init_rows(
    blocks: RowBlocks, rows: Tensor, ids: Tensor, keys: Tensor, tables: Tensor, spec: InitSpec,
    state_values: Sequence[float], step: int, clock_s: int, impl: Impl,
) -> None:  # fmt: skip
    run = choose(impl, rows, triton=row_init_triton.init_rows, numba=_numba_init, reference=_reference_init)
    run(blocks, rows.contiguous(), ids, keys.contiguous(), tables, spec, state_values, step, clock_s)


@torch.library.custom_op("recis::init_rows", mutates_args=("blocks",))
def _init_rows_op(
    blocks: Sequence[Tensor], rows: Tensor, ids: Tensor, keys: Tensor, tables: Tensor, layout_key: str, shift: int,
    kind: int, numbers: Sequence[float], state_values: Sequence[float], step: int, clock_s: int, impl: str,
) -> None:  # fmt: skip
    store = RowBlocks.over(layout_of_key(layout_key), shift, blocks, rows.device)
    spec = InitSpec(InitKind(kind), *numbers)
    _init_rows(store, rows, ids, keys, tables, spec, state_values, step, clock_s, impl)  # type: ignore[arg-type]


@torch.library.custom_op("recis::initial_values", mutates_args=())
def _initial_values_op(
    ids: Tensor, dim: int, keys: Tensor, tables: Tensor, kind: int, numbers: Sequence[float], impl: str
) -> Tensor:
    versions = {
        "triton": row_init_triton.initial_values,
        "numba": _numba_values,
        "torch": _torch_values,
        "reference": _torch_values,
    }
    return choose(impl, ids, **versions)(ids, dim, keys, tables, InitSpec(InitKind(kind), *numbers))  # type: ignore[arg-type]


@torch.library.custom_op("recis::admission_draws", mutates_args=())
def _draws_op(ids: Tensor, keys: Tensor, tables: Tensor, stream: int, impl: str) -> Tensor:
    versions = {"triton": row_init_triton.draws, "numba": _numba_draws, "torch": _torch_draws}
    return choose(impl, ids, reference=_torch_draws, **versions)(ids, keys, tables, stream)  # type: ignore[arg-type]


@_draws_op.register_fake
def _(ids, keys, tables, stream, impl):
    return ids.new_empty(ids.shape, dtype=torch.float32)


@_initial_values_op.register_fake
def _(ids, dim, keys, tables, kind, numbers, impl):
    return ids.new_empty(ids.shape[0], dim, dtype=torch.float32)


def _checked(ids: Tensor, keys: Tensor, tables: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return contiguous ids [N] and tables int32 [N], or [1] when all ids are of keys[0]."""
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 [N]; got {ids.dtype} {tuple(ids.shape)}")
    if keys.ndim != 1 or keys.dtype != torch.int64 or keys.numel() == 0:
        raise ValueError(f"keys must be int64 [T], one per table; got {keys.dtype} {tuple(keys.shape)}")
    if tables is None:
        return ids.contiguous(), torch.zeros(1, dtype=torch.int32, device=ids.device)
    if tables.shape != ids.shape or tables.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tables must be int32 or int64 {tuple(ids.shape)}; got {tables.dtype} {tuple(tables.shape)}")
    check_range("tables", tables, 0, keys.numel() - 1)
    return ids.contiguous(), tables.to(torch.int32).contiguous()


def _key_of_id(ids: Tensor, keys: Tensor, tables: Tensor) -> Tensor:
    return keys[tables.long()].expand(ids.shape)


# ---- over whole tensors: the obvious form, float64 where the formula says so; also what a GPU runs


def _torch_values(ids: Tensor, dim: int, keys: Tensor, tables: Tensor, spec: InitSpec) -> Tensor:
    kind, a, b, bound = spec.loop_args()
    of_id = _key_of_id(ids, keys, tables)
    if kind == InitKind.CONSTANT:
        return torch.full((ids.numel(), dim), a, dtype=torch.float32, device=ids.device)
    if kind == InitKind.UNIFORM:
        signed = ((words(ids, dim, of_id, 0) >> 8) - (1 << 23)).to(torch.float32) * 2.0**-23
        return signed * torch.tensor(b, dtype=torch.float32) + torch.tensor(a, dtype=torch.float32)
    deviation = b * _normals(ids, dim, of_id, 0)
    if kind == InitKind.TRUNCATED_NORMAL:
        for attempt in range(1, MAX_ATTEMPTS):
            again = b * _normals(ids, dim, of_id, attempt)
            deviation = torch.where(deviation.abs() > bound, again, deviation)
        deviation = deviation.clamp(-bound, bound)
    return (a + deviation).to(torch.float32)


def _normals(ids: Tensor, dim: int, keys: Tensor, stream: int) -> Tensor:
    """Return z, float64 [N, dim], by Box-Muller."""
    width = (dim + 3) // 4 * 4
    high = (words(ids, width, keys, stream) >> 8).to(torch.float64).view(ids.numel(), width // 2, 2)
    radius = torch.sqrt(-2.0 * torch.log((high[..., 0] + 1.0) * _UNIT))
    angle = 2.0 * math.pi * (high[..., 1] * _UNIT)
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).view(ids.numel(), width)[:, :dim]


def _torch_draws(ids: Tensor, keys: Tensor, tables: Tensor, stream: int) -> Tensor:
    return (words(ids, 1, _key_of_id(ids, keys, tables), stream)[:, 0] >> 8).to(torch.float32) * _UNIT


def _reference_init(
    blocks: RowBlocks, rows: Tensor, ids: Tensor, keys: Tensor, tables: Tensor, spec: InitSpec,
    state_values: Sequence[float], step: int, clock_s: int,
) -> None:  # fmt: skip
    layout, taken = blocks.layout, rows >= 0
    of_id = tables.expand(ids.shape)[taken]
    rows, ids = rows[taken], ids[taken]
    fields = {"weight": _torch_values(ids, layout.dim, keys, of_id, spec).to(layout.dtype)}
    for (name, width), value in zip(layout.state, state_values, strict=True):
        fields[f"state.{name}"] = torch.full((rows.numel(), width), value, dtype=torch.float32, device=rows.device)
    fields["id"] = ids
    fields["last_seen"] = torch.full_like(rows, step, dtype=torch.int32)
    fields["count"] = torch.zeros_like(rows, dtype=torch.int32)
    if layout.clock:
        fields["last_seen_s"] = torch.full_like(rows, clock_s, dtype=torch.int32)
    blocks.write(rows, fields)


# ---- numba


def _numba_values(ids: Tensor, dim: int, keys: Tensor, tables: Tensor, spec: InitSpec) -> Tensor:
    out = torch.empty(ids.numel(), dim, dtype=torch.float32)
    args = (out.numpy(), ids.numpy(), keys.numpy(), tables.numpy(), 0 if tables.numel() == 1 else 1, *spec.loop_args())
    cuts = split(ids.numel(), min_items=_MIN_PER_THREAD)
    run_parts(lambda start, stop: _values_loop(*args, _scratch(dim), start, stop), cuts)
    return out


def _numba_draws(ids: Tensor, keys: Tensor, tables: Tensor, stream: int) -> Tensor:
    out = torch.empty(ids.shape, dtype=torch.float32)
    args = (out.numpy(), ids.numpy(), keys.numpy(), tables.numpy(), 0 if tables.numel() == 1 else 1, stream)
    run_parts(lambda start, stop: _draws_loop(*args, start, stop), split(ids.numel()))
    return out


def _numba_init(
    blocks: RowBlocks, rows: Tensor, ids: Tensor, keys: Tensor, tables: Tensor, spec: InitSpec,
    state_values: Sequence[float], step: int, clock_s: int,
) -> None:  # fmt: skip
    layout = blocks.layout
    widths = torch.tensor([width for _, width in layout.state], dtype=torch.int64)
    state = torch.repeat_interleave(torch.tensor(state_values, dtype=torch.float32), widths)
    args = (
        blocks.pointers.numpy(), blocks.shift, layout.row_bytes, layout.dim, layout.dtype == torch.bfloat16,
        layout.state_start, layout.id_offset, layout.clock_offset,
        rows.numpy(), ids.numpy(), keys.numpy(), tables.numpy(), 0 if tables.numel() == 1 else 1,
        *spec.loop_args(), state.numpy(), step, clock_s,
    )  # fmt: skip
    cuts = split(rows.numel(), min_items=_MIN_PER_THREAD)
    run_parts(lambda start, stop: _init_loop(*args, _scratch(layout.dim), start, stop), cuts)


def _scratch(dim: int) -> np.ndarray:
    """Return [2, padded dim] words for one loop: a row's values, and its random words.

    Loops that work by address are given their memory: numba frees an array of its own once only its address is in use.
    """
    return np.empty((2, -(-dim // COLUMNS) * COLUMNS), np.uint32)


@njit
def _init_loop(
    pointers, shift, row_bytes, dim, is_bf16, state_start, id_offset, clock_offset,
    rows, ids, keys, tables, stride, kind, a, b, bound, state, step, clock_s, scratch, start, stop,
):  # fmt: skip
    mask = (1 << shift) - 1
    values_at = np.int64(scratch.ctypes.data)
    drawn_at = values_at + 4 * scratch.shape[1]
    for n in range(start, stop):
        if rows[n] < 0:
            continue
        base = pointers[rows[n] >> shift] + (rows[n] & mask) * row_bytes
        key = keys[tables[n * stride]]
        if is_bf16:
            _fill(values_at, drawn_at, dim, key, ids[n], kind, a, b, bound)
            _round_to_bf16(values_at, base, dim)
        else:
            _fill(base, drawn_at, dim, key, ids[n], kind, a, b, bound)
        for k in range(state.shape[0]):
            store_float32(base + state_start + 4 * k, state[k])
        store_int64(base + id_offset, ids[n])
        store_int32(base + id_offset + 8, np.int32(step))
        store_int32(base + id_offset + 12, np.int32(0))
        if clock_offset >= 0:
            store_int32(base + clock_offset, np.int32(clock_s))


@njit
def _values_loop(out, ids, keys, tables, stride, kind, a, b, bound, scratch, start, stop):
    dim, drawn_at, out_at = out.shape[1], np.int64(scratch.ctypes.data), np.int64(out.ctypes.data)
    for n in range(start, stop):
        _fill(out_at + 4 * n * dim, drawn_at, dim, keys[tables[n * stride]], ids[n], kind, a, b, bound)


@njit
def _draws_loop(out, ids, keys, tables, stride, stream, start, stop):
    for n in range(start, stop):
        word, _, _, _ = id_words(keys[tables[n * stride]], ids[n], 0, stream)
        out[n] = np.float32(word >> np.uint64(8)) * np.float32(2.0**-24)


@njit
def _fill(values_at, drawn_at, dim, key, row_id, kind, a, b, bound):
    """Write the dim initial float32 of one row; a, b are mid and half of a uniform; drawn takes the row's words.

    Addresses, not arrays: numba counts references of an array it passes on, two atomic operations per row.
    """
    values, drawn = float32_at(values_at, dim), uint32_at(drawn_at, dim + 1)
    if kind == 0:
        for column in range(dim):
            values[column] = np.float32(a)
        return
    for first in range(0, dim, COLUMNS):
        store_words(key, row_id, first // 4, 0, drawn_at + 4 * first)
    if kind == 1:
        mid, half = np.float32(a), np.float32(b)
        for column in range(dim):
            centred = np.int32(np.int32(drawn[column] >> np.uint32(8)) - np.int32(8388608))
            values[column] = mid + np.float32(centred) * np.float32(2.0**-23) * half
        return
    for even in range(0, dim, 2):
        deviations = _normal_pair(drawn[even], drawn[even + 1], b)
        for column in range(even, min(even + 2, dim)):
            deviation = deviations[column - even]
            if kind == 3:
                deviation = _truncate(deviation, key, row_id, column, b, bound)
            values[column] = np.float32(a + deviation)


@njit
def _normal_pair(word_a, word_b, std):
    """Return std * z of two neighbouring columns by Box-Muller, float64; words are uint32."""
    radius = np.sqrt(-2.0 * np.log((np.float64(word_a >> np.uint32(8)) + 1.0) * _UNIT))
    angle = 2.0 * math.pi * (np.float64(word_b >> np.uint32(8)) * _UNIT)
    return std * (radius * np.cos(angle)), std * (radius * np.sin(angle))


@njit
def _truncate(deviation, key, row_id, column, std, bound):
    attempt = 1
    while abs(deviation) > bound and attempt < MAX_ATTEMPTS:
        w0, w1, w2, w3 = id_words(key, row_id, column // 4, attempt)
        if column % 4 < 2:
            w2, w3 = w0, w1
        deviation = _normal_pair(np.uint32(w2), np.uint32(w3), std)[column % 2]
        attempt += 1
    return min(max(deviation, -bound), bound)


@njit
def _round_to_bf16(values_at, out_at, dim):
    """Write dim finite float32 values as bfloat16 bits, to nearest even."""
    bits, out = uint32_at(values_at, dim), uint16_at(out_at, dim)
    for column in range(dim):
        last = (bits[column] >> np.uint32(16)) & np.uint32(1)
        out[column] = np.uint16((bits[column] + np.uint32(0x7FFF) + last) >> np.uint32(16))
