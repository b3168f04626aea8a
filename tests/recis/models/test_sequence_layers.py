"""Layers over jagged rows: values and gradients of plain float64 code, one sequence at a time; causality; what is kept."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recis.errors import ConfigError
from recis.models.hstu import Hstu, HstuLayer, RelativeBias
from recis.models.sasrec import SasRec
from recis.models.sequence_layers import (
    PositionEmbedding,
    SequenceAttention,
    TransformerBlock,
    is_last,
    places,
    with_start,
)

WIDTH, HEADS = 6, 2
LENGTHS = [[], [0], [1], [3, 0, 5, 1], [0, 7, 0]]


def offsets_of(lengths) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])


def linear(weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attend(weights, name: str, x: Tensor, memory: Tensor, *, causal: bool) -> Tensor:
    """One sequence: every pair in a loop."""
    query, key, value = (
        linear(weights, f"{name}.{part}", rows) for part, rows in (("query", x), ("key", memory), ("value", memory))
    )
    out = []
    for i in range(len(x)):
        seen = [j for j in range(len(memory)) if not causal or j <= i + len(memory) - len(x)]
        heads = []
        for head in torch.arange(x.shape[1]).chunk(HEADS):
            scores = torch.stack([query[i, head] @ key[j, head] for j in seen]) if seen else x.new_zeros(0)
            weight = (scores / len(head) ** 0.5).softmax(0)
            heads.append(sum((w * value[j, head] for w, j in zip(weight, seen, strict=True)), x.new_zeros(len(head))))
        out.append(torch.cat(heads))
    return linear(weights, f"{name}.out", torch.stack(out)) if out else x


def block_of(weights, x: Tensor, memory: Tensor | None, *, causal: bool, norm_first: bool) -> Tensor:
    parts = [("attention", lambda y: attend(weights, "attention", y, y, causal=causal))]
    if memory is not None:
        parts.append(("cross", lambda y: attend(weights, "cross", y, memory, causal=False)))
    parts.append(("feed", lambda y: linear(weights, "feed.2", linear(weights, "feed.0", y).relu())))
    for name, part in parts:
        x = x + part(norm(weights, f"{name}_norm", x)) if norm_first else norm(weights, f"{name}_norm", x + part(x))
    return x


def check(module: nn.Module, run, reference, lengths, *inputs: Tensor) -> None:
    """Compare run(*inputs), jagged and float32, with reference(weights, *rows of a sequence), joined, in float64."""
    inputs32 = [x.clone().requires_grad_() for x in inputs]
    inputs64 = [x.double().requires_grad_() for x in inputs]
    weights = {name: weight.detach().double().requires_grad_() for name, weight in module.named_parameters()}
    got = run(*inputs32)
    spans = [list(pairwise(offsets_of(part).tolist())) for part in lengths]
    rows = [
        reference(weights, *(x[lo:hi] for x, (lo, hi) in zip(inputs64, spans_of_b, strict=True)))
        for spans_of_b in zip(*spans, strict=True)
    ]
    want = torch.cat([inputs64[0][:0, :0].new_zeros(0, got.shape[1]), *rows])
    close(got, want)
    upstream = torch.randn_like(want)
    got.backward(upstream.float())
    want.backward(upstream) if want.requires_grad else None
    for mine, theirs in zip(inputs32, inputs64, strict=True):
        close(grad(mine), grad(theirs))
    for name, weight in module.named_parameters():
        close(grad(weight), grad(weights[name]), name)


def grad(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def close(got: Tensor, want: Tensor, what: str = "") -> None:
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}")


def shaken(module: Any) -> Any:
    """Weights that are nowhere zero or one."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return module


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention(lengths, causal):
    module, offsets = shaken(SequenceAttention(WIDTH, HEADS)), offsets_of(lengths)
    check(
        module,
        lambda x: module(x, offsets, module.remember(x, offsets), causal=causal),
        lambda weights, x: attend({f"a.{name}": w for name, w in weights.items()}, "a", x, x, causal=causal),
        [lengths],
        torch.randn(sum(lengths), WIDTH),
    )


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_block(lengths, norm_first, causal):
    module, offsets = shaken(TransformerBlock(WIDTH, HEADS, 5, norm_first=norm_first)), offsets_of(lengths)
    check(
        module,
        lambda x: module(x, offsets, causal=causal),
        lambda weights, x: block_of(weights, x, None, causal=causal, norm_first=norm_first),
        [lengths],
        torch.randn(sum(lengths), WIDTH),
    )


@pytest.mark.parametrize(
    ("lengths", "memory_lengths"),
    [([2, 0, 3, 1], [4, 2, 1, 0]), ([1], [0]), ([], [])],
    ids=["mixed", "nothing", "none"],
)
def test_block_with_cross_attention(lengths, memory_lengths):
    module = shaken(TransformerBlock(WIDTH, HEADS, 5, cross=True))
    offsets, memory_offsets = offsets_of(lengths), offsets_of(memory_lengths)
    assert module.cross is not None
    check(
        module,
        lambda x, m: module(x, offsets, causal=True, memory=module.cross.remember(m, memory_offsets)),
        lambda weights, x, m: block_of(weights, x, m, causal=True, norm_first=True),
        [lengths, memory_lengths],
        torch.randn(sum(lengths), WIDTH),
        torch.randn(sum(memory_lengths), WIDTH),
    )
    with pytest.raises(ValueError, match="needs a memory"):
        module(torch.randn(sum(lengths), WIDTH), offsets, causal=True)


def hstu_of(weights, x: Tensor, times: Tensor, *, divisor: int, num_targets: int) -> Tensor:
    """One sequence: every pair in a loop."""
    projected = linear(weights, "project", norm(weights, "norm", x))
    gate, value, query, key = (projected * projected.sigmoid()).chunk(4, dim=1)
    position, time = weights["bias.position"], weights["bias.time"]
    reach, head_width = position.shape[1] // 2, query.shape[1] // HEADS
    out = []
    for i in range(len(x)):
        row = torch.zeros(query.shape[1], dtype=torch.float64)
        for j in range(i + 1):
            if i != j and j >= len(x) - num_targets:
                continue
            difference = int(times[i] - times[j])
            bucket = 0 if difference < 2 else min(difference.bit_length() - 1, time.shape[1] - 1)  # unit 2
            for head in range(HEADS):
                at = slice(head * head_width, (head + 1) * head_width)
                score = query[i, at] @ key[j, at] / head_width**0.5
                score = score + position[head, min(i - j, reach) + reach] + time[head, bucket]
                row = row + nn.functional.pad(
                    score * score.sigmoid() / divisor * value[j, at], (at.start, len(row) - at.stop)
                )
        out.append(row)
    mixed = torch.stack(out) if out else x.new_zeros(0, query.shape[1])
    return x + linear(weights, "out", norm(weights, "mixed_norm", mixed) * gate)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("most_targets", [0, 2])
def test_hstu_layer(lengths, most_targets):
    bias = RelativeBias(HEADS, 4, 2, 5)
    module = shaken(HstuLayer(WIDTH, HEADS, 4, bias=bias, divisor=9))
    offsets = offsets_of(lengths)
    times = torch.cat([torch.randint(0, 70, (n,)).sort().values for n in lengths] or [torch.zeros(0)]).long()
    targets = torch.tensor([min(most_targets, n) for n in lengths], dtype=torch.int64)
    spans = {
        lo: (times[lo:hi], int(n)) for (lo, hi), n in zip(pairwise(offsets.tolist()), targets, strict=True) if hi > lo
    }
    starts = iter(
        [spans.get(lo, (times[:0], 0)) if hi > lo else (times[:0], 0) for lo, hi in pairwise(offsets.tolist())]
    )

    def reference(weights, x):
        own, num_targets = next(starts)
        return hstu_of(weights, x, own, divisor=9, num_targets=num_targets)

    run = lambda x: module(x, offsets, times, num_targets=targets)  # noqa: E731
    check(module, run, reference, [lengths], torch.randn(sum(lengths), WIDTH))


def test_time_buckets_by_hand():
    bias = RelativeBias(1, 1, 60, 4)
    assert bias.boundaries.tolist() == [60, 120, 240]


@pytest.mark.parametrize("from_end", [False, True])
def test_positions(from_end):
    module, offsets = PositionEmbedding(WIDTH, 3, from_end=from_end), offsets_of([4, 0, 1])

    def reference(weights, x):
        place = [min(n, 2) for n in range(len(x))]
        return x + weights["table"][place[::-1] if from_end else place]

    check(module, lambda x: module(x, offsets), reference, [[4, 0, 1]], torch.randn(5, WIDTH))


def test_places_and_start_by_hand():
    offsets = offsets_of([2, 0, 1])
    assert places(offsets, 3).tolist() == [0, 1, 0]
    assert is_last(offsets, 3).tolist() == [False, True, True]
    rows, longer = with_start(torch.tensor([9.0]), torch.tensor([[1.0], [2.0], [3.0]]), offsets)
    assert rows.flatten().tolist() == [9, 1, 2, 9, 9, 3]
    assert longer.tolist() == [0, 3, 4, 6]


def encoder(config) -> Any:
    torch.manual_seed(0)
    return shaken(config.build(8)).eval()


ENCODERS = [
    SasRec(num_layers=2, num_heads=2, num_positions=5),
    Hstu(num_layers=2, num_heads=2, head_width=4, divisor=7, num_distances=4, num_time_buckets=6),
]


@pytest.mark.parametrize("config", ENCODERS, ids=lambda c: type(c).__name__)
def test_later_items_change_nothing_before_them(config):
    module = encoder(config)
    rows, times = torch.randn(12, 8), torch.randint(0, 100, (12,)).sort().values
    whole = module(rows, offsets_of([12]), times)
    for kept in (1, 5, 11):
        torch.testing.assert_close(
            module(rows[:kept], offsets_of([kept]), times[:kept]), whole[:kept], rtol=1e-5, atol=1e-6
        )
    changed = rows.clone()
    changed[7:] += torch.randn(5, 8)
    other = module(changed, offsets_of([12]), times)
    torch.testing.assert_close(other[:7], whole[:7], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(other[7:], whole[7:])
    assert not torch.allclose(other[11], whole[11])


@pytest.mark.parametrize("config", ENCODERS, ids=lambda c: type(c).__name__)
def test_a_batch_equals_its_sequences_one_by_one(config):
    module, lengths = encoder(config), [3, 0, 40, 1, 17, 0]
    offsets = offsets_of(lengths)
    rows, times = torch.randn(sum(lengths), 8, requires_grad=True), torch.arange(sum(lengths)) * 3
    together = module(rows, offsets, times)
    upstream = torch.randn_like(together)
    want_grad = torch.autograd.grad(together, rows, upstream)[0]
    for lo, hi in pairwise(offsets.tolist()):
        own = rows[lo:hi].detach().requires_grad_()
        alone = module(own, offsets_of([hi - lo]), times[lo:hi])
        torch.testing.assert_close(alone, together[lo:hi], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(alone, own, upstream[lo:hi])[0], want_grad[lo:hi], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("config", ENCODERS, ids=lambda c: type(c).__name__)
def test_8192_items_keep_rows_and_no_scores(config):
    """What autograd keeps, and the peak of the whole step, stay far below one [L, L] of scores, 256 MiB."""
    length = 8192
    module = encoder(config)
    rows, times = torch.randn(length, 8, requires_grad=True), torch.arange(length)
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = module(rows, offsets_of([length]), times)
    (grad_rows,) = torch.autograd.grad(out.square().sum(), rows)
    assert resident_mib("VmHWM") - before < 100
    assert sum(kept.values()) < 400 * length * 8 * 4
    assert torch.isfinite(grad_rows).all()


def resident_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match="width must be a multiple of num_heads; got 6 and 4"):
        SequenceAttention(6, 4)
    with pytest.raises(ConfigError, match="dropout must lie in"):
        SasRec(dropout=1.0)
    with pytest.raises(ConfigError, match=r"below 2\^63"):
        Hstu(time_unit=2**60)
    with pytest.raises(ConfigError, match="at least 1"):
        Hstu(divisor=0)
