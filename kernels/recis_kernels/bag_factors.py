"""What each position's row is multiplied with when bags are pooled: weighted sums and means.

    sum   f_p = w_p
    mean  f_p = w_p / S,  S = sum of the bag's w;  0 where S = 0
          d loss / d w_q = (a_q - sum over the bag of f_p a_p) / S,  a = d loss / d f

No weights: all w = 1. Sums are in float64 in ascending position, so the numba and Triton versions give equal bits. Cost: two
passes over the positions.
"""

import numpy as np
import torch
from torch import Tensor

from recis_kernels.bag_factors_triton import mean_factor_grads, mean_factors
from recis_kernels.contents import check_offsets
from recis_kernels.dispatch import Impl, choose, njit
from recis_kernels.threads import run_parts, split


def bag_factors(
    offsets: Tensor,
    weights: Tensor | None,
    mean: Tensor | bool,
    *,
    num_positions: int | None = None,
    impl: Impl = "auto",
) -> Tensor | None:
    """Return the factor of each position, float32 [L], or None for all ones; differentiable in weights.

    Args:
        offsets: [N + 1] int64, positions of each bag; they need not start at 0 nor end at L. Trusted.
        weights: [L] floating point; None: all 1 and L = offsets[-1]. Positions outside all bags keep their weight.
        mean: for all bags, or bool [F] with F dividing N: for the bags of each feature, key-major.
        num_positions: L, for means without weights; None reads offsets[-1], which is a host sync on a GPU.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if offsets.ndim != 1 or offsets.numel() == 0 or offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be [N + 1] int64; got {tuple(offsets.shape)} {offsets.dtype}")
    num_bags = offsets.numel() - 1
    if isinstance(mean, Tensor) and (
        mean.dtype != torch.bool or mean.ndim != 1 or not _divides(mean.numel(), num_bags)
    ):
        raise ValueError(f"mean must be bool [F] with F dividing {num_bags} bags; got {tuple(mean.shape)} {mean.dtype}")
    if weights is not None and (weights.ndim != 1 or not weights.is_floating_point()):
        raise ValueError(f"weights must be floating point [L]; got {tuple(weights.shape)} {weights.dtype}")
    check_offsets(offsets, num_positions if weights is None else weights.shape[0])
    if not isinstance(mean, Tensor):
        if not mean:
            return None if weights is None else weights.float()
        mean = torch.ones(1, dtype=torch.bool, device=offsets.device)
    if weights is None:
        weights = torch.ones(int(offsets[-1]) if num_positions is None else num_positions, device=offsets.device)
    version = choose(impl, offsets, triton=_factors_op, numba=_factors_op, torch=_torch, reference=_reference)
    given = (weights.float(), offsets, mean)
    return version(*given, impl) if version is _factors_op else version(*given)


def _divides(num_features: int, num_bags: int) -> bool:
    return num_bags % num_features == 0 if num_features else num_bags == 0


def _reference(weights: Tensor, offsets: Tensor, mean: Tensor) -> Tensor:
    factors, stride = weights.double().clone(), (offsets.numel() - 1) // max(mean.numel(), 1)
    for bag in range(offsets.numel() - 1):
        part = slice(int(offsets[bag]), int(offsets[bag + 1]))
        if mean[bag // stride]:
            total = weights[part].double().sum()
            factors[part] = weights[part].double() / total if total != 0 else 0.0
    return factors.float()


def _torch(weights: Tensor, offsets: Tensor, mean: Tensor) -> Tensor:
    num_bags, positions = offsets.numel() - 1, torch.arange(weights.numel(), device=weights.device)
    # the last entry of `sums` stands for positions outside all bags: they keep their weight
    bag = torch.searchsorted(offsets[1:].contiguous(), positions, right=True)
    bag = torch.where(positions < offsets[0], num_bags, bag)
    sums = torch.zeros(num_bags + 1, dtype=torch.float64, device=weights.device).index_add(0, bag, weights.double())
    takes_mean = torch.zeros(num_bags + 1, dtype=torch.bool, device=weights.device)
    takes_mean[:num_bags] = mean.repeat_interleave(num_bags // max(mean.numel(), 1))
    is_zero = takes_mean & (sums == 0)
    scale = torch.where(is_zero, 0.0, 1.0 / torch.where(takes_mean & ~is_zero, sums, 1.0))
    return (weights.double() * scale[bag]).float()


@torch.library.custom_op("recis::bag_factors", mutates_args=())
def _factors_op(weights: Tensor, offsets: Tensor, mean: Tensor, impl: str) -> Tensor:
    version = choose(impl, offsets, triton=mean_factors, numba=_numba)  # type: ignore[arg-type]
    return version(weights.contiguous(), offsets.contiguous(), mean.contiguous())


@torch.library.custom_op("recis::bag_factor_grads", mutates_args=())
def _factor_grads_op(
    weights: Tensor, offsets: Tensor, mean: Tensor, factors: Tensor, grad: Tensor, impl: str
) -> Tensor:
    version = choose(impl, offsets, triton=mean_factor_grads, numba=_numba_grads)  # type: ignore[arg-type]
    return version(*(t.contiguous() for t in (weights, offsets, mean, factors, grad)))


@_factors_op.register_fake
def _(weights, offsets, mean, impl):
    return torch.empty_like(weights, memory_format=torch.contiguous_format)


@_factor_grads_op.register_fake
def _(weights, offsets, mean, factors, grad, impl):
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _keep_for_backward(ctx, inputs, output) -> None:
    weights, offsets, mean, ctx.impl = inputs
    ctx.save_for_backward(weights, offsets, mean, output)


def _backward(ctx, grad):
    return _factor_grads_op(*ctx.saved_tensors, grad, ctx.impl), None, None, None


_factors_op.register_autograd(_backward, setup_context=_keep_for_backward)


def _numba(weights: Tensor, offsets: Tensor, mean: Tensor) -> Tensor:
    factors = weights.clone()
    _run(_mean_loop, offsets, mean, weights, factors)
    return factors


def _numba_grads(weights: Tensor, offsets: Tensor, mean: Tensor, factors: Tensor, grad: Tensor) -> Tensor:
    pulled = grad.clone()
    _run(_mean_grad_loop, offsets, mean, weights, factors, pulled)
    return pulled


def _run(loop, offsets: Tensor, mean: Tensor, *arrays: Tensor) -> None:
    num_bags = offsets.numel() - 1
    args = (offsets.numpy(), mean.numpy(), num_bags // max(mean.numel(), 1), *(array.numpy() for array in arrays))
    run_parts(lambda start, stop: loop(*args, start, stop), split(num_bags))


@njit
def _mean_loop(offsets, mean, stride, weights, factors, start, stop):
    for bag in range(start, stop):
        if mean[bag // stride]:
            total = np.float64(0.0)
            for p in range(offsets[bag], offsets[bag + 1]):
                total += np.float64(weights[p])
            for p in range(offsets[bag], offsets[bag + 1]):
                factors[p] = np.float32(np.float64(weights[p]) / total) if total != 0.0 else np.float32(0.0)


@njit
def _mean_grad_loop(offsets, mean, stride, weights, factors, grads, start, stop):
    for bag in range(start, stop):
        if mean[bag // stride]:
            total, pulled = np.float64(0.0), np.float64(0.0)
            for p in range(offsets[bag], offsets[bag + 1]):
                total += np.float64(weights[p])
                pulled += np.float64(factors[p]) * np.float64(grads[p])
            for p in range(offsets[bag], offsets[bag + 1]):
                grads[p] = np.float32((np.float64(grads[p]) - pulled) / total) if total != 0.0 else np.float32(0.0)
