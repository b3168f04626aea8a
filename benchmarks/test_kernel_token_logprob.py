"""Speed of token log-probabilities from hidden states: forward alone (scoring) and forward with backward (training).

    make bench, or: pytest benchmarks/test_kernel_token_logprob.py --benchmark-json=out.json

Peer: log_softmax of all logits and a gather, as trainers write it.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from recis.bench.harness import compare
from recis_kernels.token_logprob import token_logprob, token_stats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "triton" if DEVICE == "cuda" else "torch"
CASES = {  # tokens, words, width, dtype
    "cpu": [(512, 32768, 256, torch.float32), (256, 151936, 128, torch.float32)],
    "cuda": [(4096, 32768, 4096, torch.bfloat16), (16384, 151936, 4096, torch.bfloat16)],
}[DEVICE]
ROUNDS = 15 if DEVICE == "cpu" else 30  # a call takes a second on a CPU
PLAIN = "log_softmax and gather"
TEMPERATURE = 0.9


def _make(num_tokens: int, vocab: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, width, device=DEVICE).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocab, width, device=DEVICE)).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (num_tokens,), device=DEVICE)


def _plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight).float() / TEMPERATURE
    return logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)


def _name(case: tuple[int, int, int, torch.dtype]) -> str:
    num_tokens, vocab, width, dtype = case
    return f"T={num_tokens} V={vocab} H={width} {str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_scoring(benchmark, case):
    inputs = [tensor.detach() for tensor in _make(*case)]
    ours = partial(token_logprob, *inputs, temperature=TEMPERATURE)
    plain = partial(_plain, *inputs)
    tolerance = 1e-4 if case[3] == torch.float32 else 5e-2  # plain rounds bf16 logits
    torch.testing.assert_close(ours(), plain(), rtol=tolerance, atol=tolerance)
    compare(
        benchmark,
        case=f"forward, {_name(case)}",
        ours=OURS,
        impls={
            OURS: ours,
            f"{OURS}, with entropy": partial(token_stats, *inputs, temperature=TEMPERATURE, with_entropy=True),
            PLAIN: plain,
        },
        items=case[0],
        targets={PLAIN: 1.0},
        rounds=ROUNDS,
        device=DEVICE,
    )


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_training(benchmark, case):
    """Backward makes the logits again: four products against the plain three."""
    hidden, weight, targets = _make(*case)
    upstream = torch.linspace(-1, 1, case[0], device=DEVICE)

    def step(logprob) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(logprob(hidden, weight, targets), (hidden, weight), upstream)

    ours = partial(step, partial(token_logprob, temperature=TEMPERATURE))
    plain = partial(step, _plain)
    tolerance = 1e-3 if case[3] == torch.float32 else 5e-2
    for got, want in zip(ours(), plain(), strict=True):
        scale = want.abs().max()
        torch.testing.assert_close(got / scale, want / scale, rtol=tolerance, atol=tolerance)
    compare(
        benchmark,
        case=f"forward and backward, {_name(case)}",
        ours=OURS,
        impls={OURS: ours, PLAIN: plain},
        items=case[0],
        targets={PLAIN: 1 / 1.4},
        rounds=ROUNDS,
        device=DEVICE,
    )
