"""Adam for dense parameters, all tensors of a model in one pass: PyTorch's AdamW, TensorFlow's, and plain Adam.

    g = scale * grad, m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2, t = steps so far, this one included
    ADAMW      w *= 1 - lr wd;  w -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)          torch.optim.AdamW
    ADAMW_TF   w *= 1 - wd;     w -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)          TensorFlow Addons
    ADAM       g += wd w, then as ADAMW without wd                                               torch.optim.Adam

The rules and their numbers are those of row_rules.py, so dense parameters and embedding rows follow the same equations.
Arithmetic is fp32, state is fp32; bfloat16 parameters are rounded to nearest even once. Traffic: 28 bytes an element for
fp32, 24 with bfloat16 parameters and fp32 gradients, 22 with both bfloat16. The Triton version (one launch for all tensors
of a dtype) and the numba loop give equal bits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recis_kernels.address import float32_at, load_float64, uint16_at, uint32_at
from recis_kernels.columns import to_device
from recis_kernels.dense_adamw_triton import adamw_on_device
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.row_rounding import widen_row
from recis_kernels.row_rules import (
    ADAM,
    ADAMW,
    ADAMW_TF,
    NUM_FOLDED,
    UpdateRule,
    fold_scalars,
    reference_update,
    rule_of,
)
from recis_kernels.threads import run_parts, split

_CHUNK = 4096  # elements at a time: widened copies stay in the first-level cache
_MIN_CHUNKS_PER_THREAD = 8
_DTYPES = (torch.float32, torch.bfloat16)


def dense_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    rule: UpdateRule,
    scalars: Tensor,
    *,
    scale: float | Tensor = 1.0,
    impl: Impl = "auto",
) -> None:
    """Update parameters, means (m) and squares (v) in place.

    Args:
        params: float32 or bfloat16, contiguous, any shapes, on one device.
        grads: float32 or bfloat16, one per parameter, of its shape.
        means, squares: float32, contiguous, one per parameter, of its shape; zeros before the first step.
        rule: ADAMW, ADAMW_TF or ADAM of row_rules.
        scalars: [1, 6] float64 for all tensors, or [N, 6], a line each: lr, beta1, beta2, eps, weight_decay, t.
        scale: what gradients are multiplied with (clipping, one over a loss scale); a tensor of one element stays on its
            device. No host sync on a GPU.

    Raises:
        ValueError: lists of unequal length, a tensor of another shape, dtype, device or layout, or another rule.
    """
    _check(params, grads, means, squares, rule, scalars)
    if not params:
        return
    device = params[0].device
    if isinstance(scale, Tensor):
        scale = scale.detach().reshape(1).to(device, torch.float32)
    else:
        scale = torch.full((1,), scale, dtype=torch.float32, device=device)
    if torch.compiler.is_compiling():
        _adamw_op(list(params), list(grads), list(means), list(squares), rule.name, scalars, scale, impl)
        return
    _run(params, grads, means, squares, rule, scalars, scale, impl)
    torch.autograd.graph.increment_version([*params, *means, *squares])  # addresses are unknown to autograd


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    rule: UpdateRule,
    scalars: Tensor,
) -> None:
    if rule not in (ADAM, ADAMW, ADAMW_TF):
        raise ValueError(f"dense_adamw takes the rules ADAM, ADAMW and ADAMW_TF of row_rules; got {rule}")
    lengths = [len(tensors) for tensors in (params, grads, means, squares)]
    if len(set(lengths)) != 1:
        raise ValueError(f"params, grads, means and squares must be equally many; got {lengths}")
    if scalars.shape[0] not in (1, len(params)) and params:
        raise ValueError(f"scalars must have 1 or {len(params)} lines; got {tuple(scalars.shape)}")
    for i, param in enumerate(params):
        for name, tensor, dtypes in (
            ("params", param, _DTYPES),
            ("grads", grads[i], _DTYPES),
            ("means", means[i], _DTYPES[:1]),
            ("squares", squares[i], _DTYPES[:1]),
        ):
            if tensor.shape != param.shape or tensor.dtype not in dtypes or tensor.device != params[0].device:
                raise ValueError(
                    f"{name}[{i}] must be {tuple(param.shape)} {' or '.join(map(str, dtypes))} on {params[0].device}; "
                    f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                )
            if name != "grads" and not tensor.is_contiguous():
                raise ValueError(
                    f"{name}[{i}] must be contiguous; got strides {tensor.stride()}: it is written in place"
                )


def _run(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    rule: UpdateRule,
    scalars: Tensor,
    scale: Tensor,
    impl: Impl,
) -> None:
    run = choose(impl, params[0], triton=adamw_on_device, numba=_numba, reference=_reference)
    own_grads = [grad.detach().contiguous() for grad in grads]
    if run is _reference:
        _reference(params, own_grads, means, squares, rule, scalars, scale)
        return
    folded = fold_scalars(rule, scalars)
    folded = folded if folded.device == scale.device else to_device(folded, scale.device)
    run(params, own_grads, means, squares, folded, scale)


@torch.library.custom_op("recis::dense_adamw", mutates_args=("params", "means", "squares"))
def _adamw_op(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    rule: str,
    scalars: Tensor,
    scale: Tensor,
    impl: str,
) -> None:
    _run(params, grads, means, squares, rule_of(rule), scalars, scale, impl)  # type: ignore[arg-type]


@_adamw_op.register_fake
def _(params, grads, means, squares, rule, scalars, scale, impl):
    return None


def _reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    rule: UpdateRule,
    scalars: Tensor,
    scale: Tensor,
) -> None:
    lines = scalars.expand(len(params), -1)
    for line, param, grad, mean, square in zip(lines, params, grads, means, squares, strict=True):
        state = {"m": mean.reshape(1, -1), "v": square.reshape(1, -1)}
        g = grad.double().reshape(1, -1) * scale.double()
        weight, new = reference_update(rule, param.detach().reshape(1, -1), state, g, line[None])
        param.detach().copy_(weight.view(param.shape))
        mean.copy_(new["m"].view(mean.shape))
        square.copy_(new["v"].view(square.shape))


def _numba(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    folded: Tensor,
    scale: Tensor,
) -> None:
    table = np.array(
        [
            (
                *(param.data_ptr(), grad.data_ptr(), mean.data_ptr(), square.data_ptr(), param.numel()),
                *(int(param.dtype == torch.bfloat16), int(grad.dtype == torch.bfloat16)),
                i * NUM_FOLDED * 8 if folded.shape[0] > 1 else 0,
            )
            for i, (param, grad, mean, square) in enumerate(zip(params, grads, means, squares, strict=True))
        ],
        dtype=np.int64,
    )
    first_chunk = np.concatenate(([0], np.cumsum(-(-table[:, 4] // _CHUNK))))
    factor = np.float32(float(scale))

    def loop(start: int, stop: int) -> None:
        scratch = np.empty((2, _CHUNK), np.float32)
        _adamw_loop(table, first_chunk, folded.data_ptr(), factor, scratch, start, stop)

    run_parts(loop, split(int(first_chunk[-1]), min_items=_MIN_CHUNKS_PER_THREAD))


@njit
def _adamw_loop(table, first_chunk, folded, scale, scratch, start, stop):
    wide_w, wide_g = scratch[0].ctypes.data, scratch[1].ctypes.data
    i = np.searchsorted(first_chunk, start, side="right") - 1
    for chunk in range(start, stop):
        while first_chunk[i + 1] <= chunk:
            i += 1
        param, grad, mean, square, numel, param_bf16, grad_bf16, line = table[i]
        done = (chunk - first_chunk[i]) * _CHUNK
        count = min(_CHUNK, numel - done)
        w_at = param + (2 if param_bf16 != 0 else 4) * done
        g_at = grad + (2 if grad_bf16 != 0 else 4) * done
        stored = w_at
        if param_bf16 != 0:
            widen_row(stored, wide_w, count)
            w_at = wide_w
        if grad_bf16 != 0:
            widen_row(g_at, wide_g, count)
            g_at = wide_g
        _adam_chunk(count, w_at, mean + 4 * done, square + 4 * done, g_at, scale, folded + line)
        if param_bf16 != 0:
            _round_nearest(wide_w, stored, count)


@njit
def _adam_chunk(count, w_at, m_at, v_at, g_at, scale, k):
    w, m, v, g = float32_at(w_at, count), float32_at(m_at, count), float32_at(v_at, count), float32_at(g_at, count)
    beta1, beta2 = np.float32(load_float64(k + 16)), np.float32(load_float64(k + 24))
    rest1, rest2 = np.float32(1.0 - load_float64(k + 16)), np.float32(1.0 - load_float64(k + 24))
    shrink, eps = np.float32(load_float64(k + 8)), np.float32(load_float64(k + 32))
    step, root = np.float32(load_float64(k + 40)), np.float32(load_float64(k + 48))
    coupled = np.float32(load_float64(k))
    has_decay = load_float64(k) != 0.0
    for i in range(count):
        grad = scale * g[i]
        if has_decay:
            grad += coupled * w[i]
        mean = beta1 * m[i] + rest1 * grad
        square = beta2 * v[i] + rest2 * (grad * grad)
        m[i] = mean
        v[i] = square
        w[i] = shrink * w[i] - step * mean / (np.sqrt(square) * root + eps)


@njit
def _round_nearest(wide, stored, count):
    """Round floats to the nearest bf16 words, ties to even; NaN stays NaN."""
    bits, words = uint32_at(wide, count), uint16_at(stored, count)
    half, one, shift = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
    for i in range(count):
        value = bits[i]
        is_nan = value & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)
        moved = value | np.uint32(0x400000) if is_nan else value + half + (value >> shift & one)
        words[i] = np.uint16(moved >> shift)
