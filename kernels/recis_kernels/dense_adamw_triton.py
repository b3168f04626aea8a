"""Adam for dense parameters on a GPU: one launch for all tensors of a dtype. See dense_adamw.py.

    table, int64 [7, N + 1]: first program | elements | address of parameter, gradient, mean, square | line of scalars

A program takes 1024 elements of one tensor and finds the tensor by halving the first row, so nothing but the table depends on
the tensors. The equation is the row rules' own (row_rules_triton.adam): the bits of the numba loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from recis_kernels.columns import column_of_program, to_device
from recis_kernels.dispatch import jit, launch, tl
from recis_kernels.row_rules import NUM_FOLDED
from recis_kernels.row_rules_triton import adam

_BLOCK = 1024


def adamw_on_device(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    folded: Tensor,
    scale: Tensor,
) -> None:
    """Update all tensors in place; all contiguous. folded [1 or N, 9] float64 and scale [1] float32 lie on their device."""
    kinds = sorted({(param.dtype, grad.dtype) for param, grad in zip(params, grads, strict=True)}, key=str)
    for kind in kinds:
        picked = [i for i, param in enumerate(params) if (param.dtype, grads[i].dtype) == kind and param.numel()]
        sizes = [params[i].numel() for i in picked]
        programs = list(accumulate((-(-size // _BLOCK) for size in sizes), initial=0))
        parts = [[tensors[i].data_ptr() for i in picked] for tensors in (params, grads, means, squares)]
        lines = [i * NUM_FOLDED if folded.shape[0] > 1 else 0 for i in picked]
        rows = [programs, *([*part, 0] for part in (sizes, *parts, lines))]
        launch(
            _dense_adamw_kernel,
            (programs[-1],),
            *(to_device(torch.tensor(rows, dtype=torch.int64), scale.device), folded, scale, len(picked)),
            PARAM_BF16=kind[0] == torch.bfloat16,
            GRAD_BF16=kind[1] == torch.bfloat16,
            ALIGNED=all(address % 16 == 0 for part in parts for address in part),
            BLOCK=_BLOCK,
            num_warps=4,
        )


@jit
def _place(address, start, BF16: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer to element `start` of the tensor at an address."""
    if BF16:
        at = address.to(tl.pointer_type(tl.bfloat16)) + start
    else:
        at = address.to(tl.pointer_type(tl.float32)) + start
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at


@jit
def _nearest_bf16(values):
    """Return float32 values as bf16 bits in int16, rounded to nearest even; NaN stays NaN."""
    bits = values.to(tl.int32, bitcast=True)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(is_nan, (bits >> 16) | 0x40, rounded).to(tl.int16)


@jit
def _dense_adamw_kernel(
    table_ptr,
    folded_ptr,
    scale_ptr,
    num_tensors,
    PARAM_BF16: tl.constexpr,
    GRAD_BF16: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = column_of_program(table_ptr, program, num_tensors)
    entry = table_ptr + tensor
    row = num_tensors + 1
    start = (program.to(tl.int64) - tl.load(entry)) * BLOCK
    cols = tl.arange(0, BLOCK)[None, :]
    mask = start + cols < tl.load(entry + row)
    param = tl.load(entry + 2 * row)
    w_at = _place(param, start, PARAM_BF16, ALIGNED)
    g_at = _place(tl.load(entry + 3 * row), start, GRAD_BF16, ALIGNED)
    m_at = _place(tl.load(entry + 4 * row), start, False, ALIGNED)
    v_at = _place(tl.load(entry + 5 * row), start, False, ALIGNED)
    w = tl.load(w_at + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_at + cols, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_at + cols, mask=mask, other=0.0)
    v = tl.load(v_at + cols, mask=mask, other=1.0)
    g = g * tl.load(scale_ptr)
    one = tl.arange(0, 1)
    w, m, v = adam(w, m, v, one, g, folded_ptr + tl.load(entry + 6 * row) + one, one == 0, False)
    tl.store(m_at + cols, m, mask=mask)
    tl.store(v_at + cols, v, mask=mask)
    if PARAM_BF16:
        bits_at = param.to(tl.pointer_type(tl.int16)) + start
        if ALIGNED:
            bits_at = tl.multiple_of(bits_at, 16)
        tl.store(bits_at + cols, _nearest_bf16(w), mask=mask)
    else:
        tl.store(w_at + cols, w, mask=mask)
