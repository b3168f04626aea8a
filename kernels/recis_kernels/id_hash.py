"""Hash byte strings and int64 ids to 64 bits: FarmHash Fingerprint64 ("farm") and MurmurHash64A with seed 0 ("murmur").

    num_buckets None: the raw 64 bits as int64;  0: hash AND 2**63 - 1;  n > 0: hash mod n, unsigned

An int64 id is hashed as its 8 bytes, little endian. All columns of a call are one concatenation (see columns.py) with a
kind and a number of buckets per column. Cost: every byte is read once; a short string takes about 10 ns.
Sources: Pike, FarmHash 1.1 (Fingerprint64 is farmhashna::Hash64); Appleby, MurmurHash64A.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recis_kernels import byte_hash_triton as device
from recis_kernels.byte_hash import farm_id, farm_one, murmur_id, murmur_one
from recis_kernels.calibration import current
from recis_kernels.columns import (
    block_table,
    check_columns,
    column_of_program,
    parameter_of_column,
    run_columns,
    values_of_program,
)
from recis_kernels.contents import check_offsets
from recis_kernels.dispatch import Impl, choose, jit, launch, njit, tl
from recis_kernels.jagged import check_offsets_form

HashKind = Literal["farm", "murmur"]
KINDS: tuple[HashKind, ...] = ("farm", "murmur")


def hash_strings(
    data: Tensor,
    offsets: Tensor,
    column_offsets: Sequence[int],
    kinds: Sequence[HashKind],
    num_buckets: Sequence[int | None],
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Return the hashes, int64 [L], of L byte strings data[offsets[i]:offsets[i + 1]].

    Args:
        data: uint8 [bytes] of all columns.
        offsets: [L + 1] int64 or int32, from 0.
        column_offsets: C + 1 ints; column c holds strings column_offsets[c] .. column_offsets[c + 1] - 1.
        kinds: per column "farm" or "murmur".
        num_buckets: per column None, 0 or n, as above.

    Raises:
        ValueError: data is not uint8 [bytes], or columns, kinds and num_buckets do not fit together.
    """
    if data.ndim != 1 or data.dtype != torch.uint8:
        raise ValueError(f"data must be uint8 [bytes]; got {tuple(data.shape)} {data.dtype}")
    check_offsets_form(offsets)
    check_offsets(offsets, data.shape[0])
    _check(offsets.numel() - 1, column_offsets, kinds, num_buckets)
    run = _strings_op if torch.compiler.is_compiling() else _strings
    return run(data, offsets, column_offsets, [KINDS.index(kind) for kind in kinds], _bucket_codes(num_buckets), impl)


def hash_ids(
    ids: Tensor,
    column_offsets: Sequence[int],
    kinds: Sequence[HashKind],
    num_buckets: Sequence[int | None],
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Return the hashes, int64 [L], of int64 ids [L], each taken as 8 little-endian bytes. Arguments as hash_strings.

    Raises:
        ValueError: ids is not int64 [L], or columns, kinds and num_buckets do not fit together.
    """
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 [L]; got {tuple(ids.shape)} {ids.dtype}")
    _check(ids.shape[0], column_offsets, kinds, num_buckets)
    run = _ids_op if torch.compiler.is_compiling() else _ids
    return run(ids, column_offsets, [KINDS.index(kind) for kind in kinds], _bucket_codes(num_buckets), impl)


def _check(num_values: int, column_offsets: Sequence[int], kinds: Sequence[str], num_buckets: Sequence) -> None:
    check_columns(num_values, column_offsets, len(kinds))
    check_columns(num_values, column_offsets, len(num_buckets))
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"hash kind must be one of {KINDS}; got {kind!r}")
    for buckets in num_buckets:
        if buckets is not None and not 0 <= buckets < 1 << 63:
            raise ValueError(f"num_buckets must be None or in [0, 2**63); got {buckets}")


def _bucket_codes(num_buckets: Sequence[int | None]) -> list[int]:
    return [-1 if buckets is None else buckets for buckets in num_buckets]


# ---- nodes of torch.compile: kinds are places in KINDS, and a bucket count of -1 stands for None


def _strings(
    data: Tensor, offsets: Tensor, column_offsets: Sequence[int], kinds: Sequence[int], codes: Sequence[int], impl: str
) -> Tensor:
    version = choose(impl, data, triton=_strings_triton, numba=_strings_numba, reference=_strings_reference)  # type: ignore[arg-type]
    return version(data, offsets, column_offsets, kinds, codes)


def _ids(ids: Tensor, column_offsets: Sequence[int], kinds: Sequence[int], codes: Sequence[int], impl: str) -> Tensor:
    version = choose(impl, ids, triton=_ids_triton, numba=_ids_numba, reference=_ids_reference)  # type: ignore[arg-type]
    return version(ids, column_offsets, kinds, codes)


_strings_op = torch.library.custom_op("recis::hash_strings", _strings, mutates_args=())
_ids_op = torch.library.custom_op("recis::hash_ids", _ids, mutates_args=())


@_strings_op.register_fake
def _(data, offsets, column_offsets, kinds, codes, impl):
    return data.new_empty(offsets.shape[0] - 1, dtype=torch.int64)


@_ids_op.register_fake
def _(ids, column_offsets, kinds, codes, impl):
    return torch.empty_like(ids, memory_format=torch.contiguous_format)


# ---- reference: Python ints, written from the published descriptions apart from byte_hash.py

_MASK = (1 << 64) - 1
_K0, _K1, _K2 = 0xC3A5C85C97CB3127, 0xB492B66FBE98F273, 0x9AE16A3B2F90404F
_M = 0xC6A4A7935BD1E995


def _strings_reference(data, offsets, column_offsets, kinds, codes) -> Tensor:
    joined, ends = data.cpu().numpy().tobytes(), offsets.tolist()
    texts = [joined[start:stop] for start, stop in pairwise(ends)]
    return _hash_reference(texts, column_offsets, kinds, codes).to(data.device)


def _ids_reference(ids, column_offsets, kinds, codes) -> Tensor:
    texts = [value.to_bytes(8, "little", signed=True) for value in ids.tolist()]
    return _hash_reference(texts, column_offsets, kinds, codes).to(ids.device)


def _hash_reference(texts: list[bytes], column_offsets, kinds, codes) -> Tensor:
    hashes = []
    for column, (kind, buckets) in enumerate(zip(kinds, codes, strict=True)):
        hash_one = {"farm": _farm_reference, "murmur": _murmur_reference}[KINDS[kind]]
        for text in texts[column_offsets[column] : column_offsets[column + 1]]:
            bits = hash_one(text)
            if buckets >= 0:
                bits = bits % buckets if buckets else bits & (1 << 63) - 1
            hashes.append(bits - (1 << 64) if bits >> 63 else bits)
    return torch.tensor(hashes, dtype=torch.int64)


def _word(text: bytes, at: int, size: int = 8) -> int:
    return int.from_bytes(text[at : at + size], "little")


def _rotate(bits: int, by: int) -> int:
    bits &= _MASK
    return (bits >> by | bits << 64 - by) & _MASK


def _shift_mix(bits: int) -> int:
    bits &= _MASK
    return bits ^ bits >> 47


def _mix(u: int, v: int, mul: int) -> int:
    u, v = u & _MASK, v & _MASK
    a = _shift_mix((u ^ v) * mul)
    return _shift_mix((v ^ a) * mul) * mul & _MASK


def _farm_reference(text: bytes) -> int:
    size = len(text)
    mul = _K2 + 2 * size
    if size == 0:
        return _K2
    if size < 4:
        low = text[0] + (text[size // 2] << 8)
        high = size + (text[-1] << 2)
        return _shift_mix(low * _K2 ^ high * _K0) * _K2 & _MASK
    if size < 8:
        return _mix(size + (_word(text, 0, 4) << 3), _word(text, size - 4, 4), mul)
    if size <= 16:
        a, b = _word(text, 0) + _K2, _word(text, size - 8)
        return _mix(_rotate(b, 37) * mul + a, (_rotate(a, 25) + b) * mul, mul)
    if size > 64:
        return _farm_long_reference(text)
    a = _word(text, 0) * (_K1 if size <= 32 else _K2)
    b, c, d = _word(text, 8), _word(text, size - 8) * mul, _word(text, size - 16) * _K2
    y = _rotate(a + b, 43) + _rotate(c, 30) + d
    z = _mix(y, a + _rotate(b + _K2, 18) + c, mul)
    if size <= 32:
        return z
    e, f = _word(text, 16) * mul, _word(text, 24)
    g, h = (y + _word(text, size - 32)) * mul, (z + _word(text, size - 24)) * mul
    return _mix(_rotate(e + f, 43) + _rotate(g, 30) + h, e + _rotate(f + a, 18) + g, mul)


def _farm_long_reference(text: bytes) -> int:
    size = len(text)
    x, y = 81, (81 * _K1 + 113) & _MASK
    z = _shift_mix(y * _K2 + 113) * _K2
    v = w = (0, 0)
    x = x * _K2 + _word(text, 0)

    def weak(at: int, a: int, b: int) -> tuple[int, int]:
        first, second, third, fourth = (_word(text, at + 8 * i) for i in range(4))
        a += first
        b = _rotate(b + a + fourth, 21)
        total = a + second + third
        return (total + fourth) & _MASK, (b + _rotate(total, 44) + a) & _MASK

    last = (size - 1) // 64 * 64
    for block in [*range(0, last, 64), None]:
        at, mul, nine = (size - 64, _K1 + ((z & 255) << 1), 9) if block is None else (block, _K1, 1)
        if block is None:
            w = (w[0] + (size - 1) % 64, w[1])
            v = (v[0] + w[0], v[1])
            w = (w[0] + v[0], w[1])
        x = _rotate(x + y + v[0] + _word(text, at + 8), 37) * mul & _MASK
        y = _rotate(y + v[1] + _word(text, at + 48), 42) * mul
        x ^= w[1] * nine & _MASK
        y += v[0] * nine + _word(text, at + 40)
        z = _rotate(z + w[0], 33) * mul
        v = weak(at, v[1] * mul, x + w[0])
        w = weak(at + 32, z + w[1], y + _word(text, at + 16))
        x, z = z, x
        if block is None:
            first = _mix(v[0], w[0], mul) + _shift_mix(y) * _K0 + z
            return _mix(first, _mix(v[1], w[1], mul) + x, mul)
    raise AssertionError("the loop ends in its last, partial block")


def _murmur_reference(text: bytes) -> int:
    mixed = len(text) * _M & _MASK
    whole = len(text) & ~7
    for at in range(0, whole, 8):
        mixed = (mixed ^ _shift_mix(_word(text, at) * _M) * _M & _MASK) * _M & _MASK
    if len(text) > whole:
        mixed = (mixed ^ _word(text, whole)) * _M & _MASK
    return _shift_mix(_shift_mix(mixed) * _M)


# ---- numba: one loop per kind; a column is one call, so the kind costs nothing per value


def _strings_numba(data, offsets, column_offsets, kinds, codes) -> Tensor:
    out = torch.empty(offsets.numel() - 1, dtype=torch.int64)
    data = data.contiguous()  # kept by this name while the loops read it by address
    base, ends, array = data.data_ptr(), offsets.numpy(), out.numpy()
    run = _farm_strings, _murmur_strings
    loops = [partial(run[kind], base, ends, array, code) for kind, code in zip(kinds, codes, strict=True)]
    run_columns(lambda column, *part: loops[column](*part), out.numel(), column_offsets, min_items=2048)
    return out


def _ids_numba(ids, column_offsets, kinds, codes) -> Tensor:
    out = torch.empty_like(ids, memory_format=torch.contiguous_format)
    source, array = ids.contiguous().numpy(), out.numpy()
    run = _farm_ids, _murmur_ids
    loops = [partial(run[kind], source, array, code) for kind, code in zip(kinds, codes, strict=True)]
    run_columns(lambda column, *part: loops[column](*part), out.numel(), column_offsets, min_items=8192)
    return out


_LOW63 = np.uint64((1 << 63) - 1)


@njit
def _to_bucket(bits, buckets):
    if buckets > 0:
        bits = bits % np.uint64(buckets)
    elif buckets == 0:
        bits &= _LOW63
    return np.int64(bits)


@njit
def _farm_strings(base, ends, out, buckets, start, stop):
    for i in range(start, stop):
        first = np.int64(ends[i])
        out[i] = _to_bucket(farm_one(base + first, np.int64(ends[i + 1]) - first), buckets)


@njit
def _murmur_strings(base, ends, out, buckets, start, stop):
    for i in range(start, stop):
        first = np.int64(ends[i])
        out[i] = _to_bucket(murmur_one(base + first, np.int64(ends[i + 1]) - first), buckets)


@njit
def _farm_ids(ids, out, buckets, start, stop):
    for i in range(start, stop):
        out[i] = _to_bucket(farm_id(ids[i]), buckets)


@njit
def _murmur_ids(ids, out, buckets, start, stop):
    for i in range(start, stop):
        out[i] = _to_bucket(murmur_id(ids[i]), buckets)


# ---- Triton: a program takes strings or ids of one column, so its kind and buckets are the same for every lane

_STRINGS_PER_PROGRAM = 128


def _strings_triton(data, offsets, column_offsets, kinds, codes) -> Tensor:
    out = data.new_empty(offsets.numel() - 1, dtype=torch.int64)
    block = _STRINGS_PER_PROGRAM
    table, programs = block_table(column_offsets, (kinds, codes), block, data.device)
    arguments = data.contiguous(), offsets.contiguous(), table, out, len(kinds)
    launch(_hash_strings_kernel, (programs,), *arguments, BLOCK=block, num_warps=4)
    return out


def _ids_triton(ids, column_offsets, kinds, codes) -> Tensor:
    out = torch.empty_like(ids, memory_format=torch.contiguous_format)
    block = current().block_items
    table, programs = block_table(column_offsets, (kinds, codes), block, ids.device)
    launch(_hash_ids_kernel, (programs,), ids.contiguous(), table, out, len(kinds), BLOCK=block, num_warps=8)
    return out


@jit
def _hash_strings_kernel(data_ptr, offsets_ptr, table_ptr, out_ptr, num_columns, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    column = column_of_program(table_ptr, program, num_columns)
    place, mask = values_of_program(table_ptr, program, column, num_columns, BLOCK)
    first = tl.load(offsets_ptr + place, mask=mask, other=0).to(tl.int64)
    size = tl.load(offsets_ptr + place + 1, mask=mask, other=0).to(tl.int64) - first
    if parameter_of_column(table_ptr, column, num_columns, 0) == 0:
        bits = device.farm_bytes(data_ptr, first, size, mask)
    else:
        bits = device.murmur_bytes(data_ptr, first, size, mask)
    buckets = parameter_of_column(table_ptr, column, num_columns, 1)
    tl.store(out_ptr + place, device.to_bucket(bits, buckets), mask=mask)


@jit
def _hash_ids_kernel(ids_ptr, table_ptr, out_ptr, num_columns, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    column = column_of_program(table_ptr, program, num_columns)
    place, mask = values_of_program(table_ptr, program, column, num_columns, BLOCK)
    ids = tl.load(ids_ptr + place, mask=mask, other=0)
    if parameter_of_column(table_ptr, column, num_columns, 0) == 0:
        bits = device.farm_id(ids)
    else:
        bits = device.murmur_id(ids)
    buckets = parameter_of_column(table_ptr, column, num_columns, 1)
    tl.store(out_ptr + place, device.to_bucket(bits, buckets), mask=mask)
