"""The Triton kernels of `logit_rows`: statistics of each token's logits, and their gradient.

The statistics kernel reads a row once, tile by tile, and keeps the sum of exp(x - base) for the largest x so far, base:

    total' = total e^(base - base') + sum e^(x - base')
    gaps' = (gaps + (base - base') total) e^(base - base') + sum e^(x - base') (x - base')
    lse = base + log total;   entropy = log total - gaps / total

The gradient kernel has lse, so tiles are independent: 4 bytes read and 2 or 4 written per logit. fp32 gradients replace
the products; bf16 ones go to a buffer of their own. No atomics: results do not differ from run to run.
"""

import torch
from torch import Tensor

from recis_kernels.dispatch import jit, launch, tl, triton
from recis_kernels.logit_rows import IGNORED, Head

_MOST_PER_TILE = 4096
assert IGNORED == -1  # as the kernels say: label != -1


class TritonRows:
    """One block: products [n, V] fp32, labels as `labels_of` gives them; the products may be overwritten."""

    def __init__(self, products: Tensor, labels: Tensor, head: Head, lse: Tensor | None = None) -> None:
        self._products, self._labels, self._head, self._lse = products, labels, head, lse
        vocab = products.shape[1]
        tile = min(_MOST_PER_TILE, triton.next_power_of_2(vocab))
        self._numbers = (vocab, head.softcap or 1.0, (head.softcap or 1.0) / head.temperature)
        self._options = {
            "HAS_BIAS": head.bias is not None,
            "HAS_CAP": head.softcap is not None,
            "TILE": tile,
            "num_warps": 8 if tile > 1024 else 4,
        }

    def stats(self, out: Tensor, *, with_mean: bool, with_entropy: bool) -> None:
        """Write logprob, lse and what is asked of mean_logprob and entropy into out [4, n]; zeros where ignored."""
        launch(
            _token_stats_kernel,
            (self._products.shape[0],),
            self._products,
            self._labels,
            self._bias(),
            out,
            *self._numbers,
            out.stride(0),
            WITH_MEAN=with_mean,
            WITH_ENTROPY=with_entropy,
            **self._options,
        )
        self._lse = out[1]

    def grad(self, upstream: Tensor, dtype: torch.dtype, *, with_mean: bool) -> Tensor:
        """Return the gradient of the products, [n, V], from upstream [3, n] of logprob, lse and mean_logprob.

        Without with_mean the last of these is taken as zeros.
        """
        del with_mean  # adding zeros costs a kernel that waits for memory nothing
        products = self._products
        if self._lse is None:
            self.stats(products.new_zeros(4, products.shape[0]), with_mean=False, with_entropy=False)
        at_label, of_lse, of_mean = upstream / self._head.temperature
        factors = torch.stack((of_lse - at_label - of_mean, at_label, of_mean / products.shape[1]))
        out = products if dtype == products.dtype else products.new_empty(products.shape, dtype=dtype)
        grid = (products.shape[0], triton.cdiv(products.shape[1], self._options["TILE"]))
        tensors = (products, self._labels, self._bias(), self._lse, factors, out)
        launch(_token_grad_kernel, grid, *tensors, *self._numbers, products.shape[0], **self._options)
        return out

    def _bias(self) -> Tensor:
        return self._products if self._head.bias is None else self._head.bias.contiguous()


@jit
def _capped(products, softcap, HAS_CAP: tl.constexpr):
    """Return the products; with a cap, tanh(products / softcap)."""
    if HAS_CAP:
        power = tl.exp(-2.0 * tl.abs(products / softcap))
        tanh = (1.0 - power) / (1.0 + power)
        products = tl.where(products < 0.0, -tanh, tanh)
    return products


@jit
def _token_stats_kernel(
    products_ptr,
    labels_ptr,
    bias_ptr,
    out_ptr,
    vocab,
    softcap,
    scale,
    out_stride,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + token)
    counts = label != -1
    row_ptr = products_ptr + token * vocab
    lowest = float("-inf")
    top, base, total, gaps, plain = lowest, 0.0, 0.0, 0.0, 0.0
    for start in range(0, tl.where(counts, vocab, 0), TILE):
        columns = start + tl.arange(0, TILE)
        mask = columns < vocab
        products = tl.load(row_ptr + columns, mask=mask, other=0.0)
        if HAS_BIAS:
            products += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        logits = _capped(products, softcap, HAS_CAP) * scale
        logits = tl.where(mask, logits, lowest)
        top = tl.maximum(top, tl.max(logits, axis=0))
        new_base = tl.where(top == lowest, 0.0, top)  # a tile may hold only masked words, bias -inf
        shrink = tl.where(total == 0.0, 0.0, tl.exp(base - new_base))
        powers = tl.exp(logits - new_base)
        if WITH_ENTROPY:
            distances = tl.where(powers == 0.0, 0.0, logits - new_base)
            gaps = shrink * (gaps + (base - new_base) * total) + tl.sum(powers * distances, axis=0)
        if WITH_MEAN:
            plain = plain + tl.sum(tl.where(mask, logits, 0.0), axis=0)  # type: ignore[operator]
        total = shrink * total + tl.sum(powers, axis=0)
        base = new_base
    log_total = tl.log(tl.where(counts, total, 1.0))
    seen = (label >= 0) & (label < vocab)
    column = tl.where(seen, label, 0)
    at_label = tl.load(row_ptr + column)
    if HAS_BIAS:
        at_label += tl.load(bias_ptr + column).to(tl.float32)
    at_label = _capped(at_label, softcap, HAS_CAP) * scale
    logprob = tl.where(seen, (at_label - base) - log_total, float("nan"))
    tl.store(out_ptr + token, tl.where(counts, logprob, 0.0))
    tl.store(out_ptr + out_stride + token, tl.where(counts, base + log_total, 0.0))
    if WITH_MEAN:
        mean = (plain / vocab - base) - log_total
        tl.store(out_ptr + 2 * out_stride + token, tl.where(counts, mean, 0.0))
    if WITH_ENTROPY:
        entropy = log_total - gaps / tl.where(counts, total, 1.0)
        tl.store(out_ptr + 3 * out_stride + token, tl.where(counts, entropy, 0.0))


@jit
def _token_grad_kernel(
    products_ptr,
    labels_ptr,
    bias_ptr,
    lse_ptr,
    factors_ptr,
    out_ptr,
    vocab,
    softcap,
    scale,
    num_tokens,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + token)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < vocab
    counts = label != -1
    read = columns < tl.where(counts, vocab, 0)
    products = tl.load(products_ptr + token * vocab + columns, mask=read, other=0.0)
    if HAS_BIAS:
        products += tl.load(bias_ptr + columns, mask=read, other=0.0).to(tl.float32)
    capped = _capped(products, softcap, HAS_CAP)
    grad = tl.exp(capped * scale - tl.load(lse_ptr + token)) * tl.load(factors_ptr + token)
    at_label = tl.load(factors_ptr + num_tokens + token)
    grad += tl.load(factors_ptr + 2 * num_tokens + token) + tl.where(columns == label, at_label, 0.0)
    if HAS_CAP:
        grad *= 1.0 - capped * capped
    grad = tl.where(counts, grad, 0.0)
    tl.store(out_ptr + token * vocab + columns, grad.to(out_ptr.dtype.element_ty), mask=mask)
