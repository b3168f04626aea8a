"""Jobs of the dense kernels: attention over variable-length sequences and cross-entropy over a vocabulary.

They are bound by arithmetic, not by memory: no least bytes are stated, and what counts is the time beside the peers' and
the peak of memory. Each run is forward and backward. A kernel that is not there is an ImportError when its job is built.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recis.bench.inputs import varied_offsets
from recis.bench.op_cases import Point, Work
from recis_kernels.dispatch import Impl

NUM_HEADS = 4


def _backward(loss: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def attention(point: Point, device: torch.device, impl: Impl = "auto", *, kind: str = "jagged") -> Work:
    """Self attention, causal, point.num_bags sequences of 1 to point.bag_length items, 4 heads of point.dim.

    Peer: torch's scaled_dot_product_attention on the padded batch (softmax only).
    """
    if kind == "jagged":
        from recis_kernels.jagged_attention import jagged_attention as op
    else:
        from recis_kernels.hstu_attention import hstu_attention as op
    offsets = varied_offsets(point.num_bags, point.bag_length, 6, device)
    num_items = int(offsets[-1])
    generator = torch.Generator(device).manual_seed(7)
    shape = (3, num_items, NUM_HEADS, point.dim)
    packed = [
        torch.randn(shape, generator=generator, device=device).mul_(0.1).to(point.dtype).requires_grad_()
        for _ in range(point.num_inputs)
    ]

    def forward(n: int, way: Impl) -> Tensor:
        query, key, value = packed[n % len(packed)].unbind(0)
        return op(query, key, value, offsets, causal=True, impl=way)

    def run(n: int) -> object:
        return _backward(forward(n, impl).float().square().sum(), (packed[n % len(packed)],))

    def check() -> None:
        few = min(4, point.num_bags)
        stop = int(offsets[few])
        query, key, value = packed[0].detach()[:, :stop].cpu().unbind(0)
        want = op(query, key, value, offsets[: few + 1].cpu(), causal=True, impl="reference")
        tolerance = 1e-4 if point.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(forward(0, impl)[:stop].detach().cpu(), want, rtol=tolerance, atol=tolerance)

    lengths = offsets.diff()
    longest = int(lengths.max())
    places = torch.arange(longest, device=device)[None] < lengths[:, None]

    def padded_sdpa(n: int) -> object:
        rows = packed[n % len(packed)]
        wide = rows.new_zeros(3, point.num_bags, longest, NUM_HEADS, point.dim)
        wide[:, places] = rows
        query, key, value = wide.transpose(2, 3).unbind(0)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return _backward(out.transpose(1, 2)[places].float().square().sum(), (rows,))

    return Work(
        case=f"{kind} attention, forward and backward, {point.num_bags} sequences of 1-{point.bag_length}, {num_items:,} "
        f"items, {NUM_HEADS} heads of {point.dim}, {str(point.dtype).removeprefix('torch.')}",
        run=run,
        check=check,
        num_inputs=point.num_inputs,
        bytes_moved=None,
        items=num_items,
        peers={"torch SDPA, padded": padded_sdpa} if kind == "jagged" else {},
    )


def cross_entropy(point: Point, device: torch.device, impl: Impl = "auto", *, num_words: int = 32_768) -> Work:
    """Hidden states [num_bags, dim] and an unembedding [num_words, dim] to the mean loss and both gradients.

    Peers: F.cross_entropy(F.linear()), and torch's own linear_cross_entropy where this torch has it.
    """
    from recis_kernels.linear_cross_entropy import linear_cross_entropy

    num_words = min(num_words, point.num_rows)
    generator = torch.Generator(device).manual_seed(8)
    draw = partial(torch.randn, generator=generator, device=device)
    hidden = [draw(point.num_bags, point.dim).to(point.dtype).requires_grad_() for _ in range(point.num_inputs)]
    weight = draw(num_words, point.dim).mul_(point.dim**-0.5).to(point.dtype).requires_grad_()
    targets = torch.randint(num_words, (point.num_bags,), generator=generator, device=device)

    def ours(n: int) -> object:
        states = hidden[n % len(hidden)]
        return _backward(linear_cross_entropy(states, weight, targets, impl=impl), (states, weight))

    def plain(n: int) -> object:
        states = hidden[n % len(hidden)]
        loss = torch.nn.functional.cross_entropy(torch.nn.functional.linear(states, weight), targets)
        return _backward(loss, (states, weight))

    peers = {"F.cross_entropy(F.linear)": plain}
    native = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if native is not None:

        def native_run(n: int) -> object:
            states = hidden[n % len(hidden)]
            return _backward(native(states, weight, targets), (states, weight))

        peers["torch linear_cross_entropy"] = native_run

    def check() -> None:
        few = min(64, point.num_bags)
        states = hidden[0].detach()[:few]
        got = linear_cross_entropy(states, weight.detach(), targets[:few], impl=impl)
        want = torch.nn.functional.cross_entropy(states.double() @ weight.detach().double().T, targets[:few])
        torch.testing.assert_close(got.double(), want, rtol=1e-2 if point.dtype == torch.bfloat16 else 1e-4, atol=1e-3)

    dtype = str(point.dtype).removeprefix("torch.")
    return Work(
        case=f"linear_cross_entropy, loss and gradients, {point.num_bags:,} tokens, H={point.dim}, V={num_words:,}, {dtype}",
        run=ours,
        check=check,
        num_inputs=point.num_inputs,
        bytes_moved=None,
        items=point.num_bags,
        peers=peers,
    )


_HALF = Point(dtype=torch.bfloat16, num_inputs=2)
_SMALL: Mapping[str, Any] = {"dim": 16, "num_bags": 3, "bag_length": 5, "num_rows": 40, "dtype": torch.float32}

TABLE = [
    (
        f"attention-{kind}",
        partial(attention, kind=kind),
        replace(_HALF, dim=64, num_bags=256, bag_length=1024),
        _SMALL,
    )
    for kind in ("hstu", "jagged")
] + [
    (
        f"linear_cross_entropy-V{num_words // 1024}k-T{num_tokens // 1024}k",
        partial(cross_entropy, num_words=num_words),
        replace(_HALF, dim=4096, num_bags=num_tokens),
        _SMALL,
    )
    for num_words, num_tokens in ((32_768, 4096), (32_768, 32_768), (131_072, 4096), (131_072, 16_384))
]
