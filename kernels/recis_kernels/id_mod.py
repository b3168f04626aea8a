"""Reduce ids by an unsigned 64-bit modulo: negative ids count from 2**64, so -1 mod 1000 is 615.

All columns of a call are one concatenation (see columns.py) with a modulus each. Cost: one division per id.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recis_kernels.byte_hash_triton import to_bucket
from recis_kernels.calibration import current
from recis_kernels.columns import (
    block_table,
    check_columns,
    column_of_program,
    column_of_value,
    parameter_of_column,
    run_columns,
    values_of_program,
)
from recis_kernels.dispatch import Impl, choose, jit, launch, njit, tl


def id_mod(ids: Tensor, column_offsets: Sequence[int], moduli: Sequence[int], *, impl: Impl = "auto") -> Tensor:
    """Return ids mod moduli[c] for the ids of column c, int64 [L] in [0, moduli[c]).

    Raises:
        ValueError: ids is not int64 [L], columns and moduli do not fit together, or a modulus is outside [1, 2**63).
    """
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 [L]; got {tuple(ids.shape)} {ids.dtype}")
    check_columns(ids.shape[0], column_offsets, len(moduli))
    for modulus in moduli:
        if not 1 <= modulus < 1 << 63:
            raise ValueError(f"a modulus must be in [1, 2**63); got {modulus}")
    return (_op if torch.compiler.is_compiling() else _run)(ids, column_offsets, moduli, impl)


def _run(ids: Tensor, column_offsets: Sequence[int], moduli: Sequence[int], impl: str) -> Tensor:
    version = choose(impl, ids, triton=_triton, numba=_numba, torch=_torch, reference=_reference)  # type: ignore[arg-type]
    return version(ids, column_offsets, moduli)


_op = torch.library.custom_op("recis::id_mod", _run, mutates_args=())


@_op.register_fake
def _(ids, column_offsets, moduli, impl):
    return torch.empty_like(ids, memory_format=torch.contiguous_format)


def _reference(ids: Tensor, column_offsets: Sequence[int], moduli: Sequence[int]) -> Tensor:
    out = []
    for column, modulus in enumerate(moduli):
        part = ids[column_offsets[column] : column_offsets[column + 1]].tolist()
        out += [(value % 2**64) % modulus for value in part]
    return torch.tensor(out, dtype=torch.int64, device=ids.device)


def _torch(ids: Tensor, column_offsets: Sequence[int], moduli: Sequence[int]) -> Tensor:
    modulus = column_of_value(column_offsets, moduli, ids.device)
    wrap = column_of_value(column_offsets, [2**64 % modulus for modulus in moduli], ids.device)
    rest = ids % modulus  # in [0, modulus): torch's remainder has the sign of the divisor
    # a negative id is 2**64 more; rest + wrap may pass 2**63, so compare before adding
    wrapped = torch.where(rest >= modulus - wrap, rest - (modulus - wrap), rest + wrap)
    return torch.where(ids < 0, wrapped, rest)


def _numba(ids: Tensor, column_offsets: Sequence[int], moduli: Sequence[int]) -> Tensor:
    out = torch.empty(ids.shape[0], dtype=torch.int64)
    source, target = ids.contiguous().numpy(), out.numpy()
    run_columns(
        lambda column, start, stop: _mod(source, target, moduli[column], start, stop),
        ids.shape[0],
        column_offsets,
        min_items=16384,
    )
    return out


@njit
def _mod(source, target, modulus, start, stop):
    divisor = np.uint64(modulus)
    if modulus & (modulus - 1) == 0:
        for i in range(start, stop):
            target[i] = source[i] & (modulus - 1)
    else:
        for i in range(start, stop):
            target[i] = np.int64(np.uint64(source[i]) % divisor)


def _triton(ids: Tensor, column_offsets: Sequence[int], moduli: Sequence[int]) -> Tensor:
    out = torch.empty_like(ids, memory_format=torch.contiguous_format)
    block = current().block_items
    table, programs = block_table(column_offsets, (moduli,), block, ids.device)
    launch(_id_mod_kernel, (programs,), ids.contiguous(), table, out, len(moduli), BLOCK=block, num_warps=8)
    return out


@jit
def _id_mod_kernel(ids_ptr, table_ptr, out_ptr, num_columns, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    column = column_of_program(table_ptr, program, num_columns)
    place, mask = values_of_program(table_ptr, program, column, num_columns, BLOCK)
    ids = tl.load(ids_ptr + place, mask=mask, other=0)
    modulus = parameter_of_column(table_ptr, column, num_columns, 0)
    if modulus & (modulus - 1) == 0:  # a power of two: no division, which takes a GPU about 70 instructions
        rest = ids & (modulus - 1)
    else:
        rest = to_bucket(ids.to(tl.uint64), modulus)
    tl.store(out_ptr + place, rest, mask=mask)
