"""Every layer: forward and gradients against a plain float64 reference; odd sizes, empty batches, empty sequences."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from recis.errors import ConfigError
from recis.jagged import JaggedTensor
from recis.models.attention import TargetAttention
from recis.models.experts import CgcLayer, MixtureOfExperts, StackedMLP
from recis.models.layers import MLP, CrossNet, DotInteraction, FactorizationMachine


def close(got: Tensor | None, want: Tensor, what: str = "") -> None:
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5, msg=(lambda text: f"{what}: {text}"))


def check(module: nn.Module, reference, *inputs: Tensor) -> Tensor:
    """Compare module(*inputs) and all gradients, in float32, with reference(weights by name, *inputs) in float64."""
    inputs32 = [x.clone().requires_grad_() for x in inputs]
    inputs64 = [x.double().requires_grad_() for x in inputs]
    weights = {name: weight.detach().double().requires_grad_() for name, weight in module.named_parameters()}
    got, want = module(*inputs32), reference(weights, *inputs64)
    close(got, want)
    upstream = torch.randn_like(want)
    got.backward(upstream.float())
    want.backward(upstream)
    for mine, theirs in zip(inputs32, inputs64, strict=True):
        close(mine.grad, zero_if_none(theirs))
    for name, weight in module.named_parameters():
        close(zero_if_none(weight), zero_if_none(weights[name]), name)
    return got


def zero_if_none(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def linear(weights, prefix: str, x: Tensor) -> Tensor:
    out = x @ weights[f"{prefix}weight"].T
    bias = f"{prefix}bias"
    return out + weights[bias] if bias in weights else out


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_mlp(batch):
    module = MLP(5, (4, 3), out_width=2, activation=nn.Tanh)
    assert module.out_width == 2

    def reference(weights, x):
        x = torch.tanh(linear(weights, "0.", x))
        x = torch.tanh(linear(weights, "2.", x))
        return linear(weights, "4.", x)

    check(module, reference, torch.randn(batch, 5))


def test_mlp_options_and_forms():
    full = MLP(4, (6,), norm=nn.LayerNorm, dropout=0.5)
    assert [type(layer) for layer in full] == [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Dropout]
    assert full.out_width == 6
    plain = MLP(4, (), out_width=3)
    assert [type(layer) for layer in plain] == [nn.Linear]
    nothing = MLP(4, ())
    x = torch.randn(2, 4)
    assert nothing(x) is x
    for make in (
        lambda: MLP(0, (3,)),
        lambda: MLP(3, (0,)),
        lambda: MLP(3, (2,), out_width=0),
        lambda: MLP(3, (2,), dropout=1.0),
    ):
        with pytest.raises(ConfigError, match="MLP"):
            make()


def test_dropout_scales_and_stops_in_eval():
    torch.manual_seed(1)
    module = MLP(1, (10_000,), dropout=0.25, activation=nn.Identity)
    nn.init.zeros_(module[0].weight)  # type: ignore[arg-type]
    nn.init.ones_(module[0].bias)  # type: ignore[arg-type]
    out = module(torch.zeros(1, 1))
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    assert (module.eval()(torch.zeros(1, 1)) == 1).all()


@pytest.mark.parametrize(("batch", "fields", "dim"), [(0, 3, 4), (1, 1, 1), (5, 4, 3)])
def test_fm_is_the_sum_of_pair_products(batch, fields, dim):
    def reference(_, v):
        pairs = [(v[:, f] * v[:, g]).sum(1) for f in range(fields) for g in range(f)]
        return torch.stack(pairs).sum(0)[:, None] if pairs else (v * 0).sum((1, 2))[:, None]

    check(FactorizationMachine(), reference, torch.randn(batch, fields, dim))


@pytest.mark.parametrize("batch", [0, 1, 6])
@pytest.mark.parametrize("rank", [None, 2])
def test_cross_net(batch, rank):
    module = CrossNet(5, 2, rank=rank)

    def reference(weights, x0):
        x = x0
        for layer in range(2):
            prefix = f"layers.{layer}."
            if rank is None:
                crossed = linear(weights, prefix, x)
            else:
                crossed = linear(weights, f"{prefix}1.", linear(weights, f"{prefix}0.", x))
            x = x0 * crossed + x
        return x

    check(module, reference, torch.randn(batch, 5))


def test_cross_net_by_hand():
    module = CrossNet(2, 1)
    with torch.no_grad():
        weight, bias = module.parameters()
        weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        bias.copy_(torch.tensor([0.5, 0.0]))
    assert module(torch.tensor([[1.0, 3.0]])).tolist() == [[1 * 7.5 + 1, 3 * 3.0 + 3]]


@pytest.mark.parametrize(("batch", "fields"), [(0, 3), (1, 1), (4, 2), (3, 5)])
def test_dot_interaction(batch, fields):
    module = DotInteraction(fields)
    assert module.out_width == fields * (fields - 1) // 2

    def reference(_, v):
        columns = [(v[:, f] * v[:, g]).sum(1) for f in range(fields) for g in range(f)]
        return torch.stack(columns, 1) if columns else v.sum(2)[:, :0]

    check(module, reference, torch.randn(batch, fields, 3))


LENGTHS = [[], [0], [0, 0], [3], [2, 0, 5, 1], [0, 40, 0]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_target_attention(lengths, softmax, weighted):
    module = TargetAttention(3, (4,), softmax=softmax, activation=nn.Tanh)
    total = sum(lengths)
    entry_weights = torch.rand(total) if weighted else None
    ends = [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]

    class OnTensors(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, target, keys):
            return self.inner(
                target, JaggedTensor(keys, lengths=torch.tensor(lengths, dtype=torch.int64), weights=entry_weights)
            )

    def reference(weights, target, keys):
        rows = []
        for b, (start, stop) in enumerate(pairwise(ends)):
            k = keys[start:stop]
            q = target[b].expand_as(k)
            hidden = torch.tanh(linear(weights, "inner.score.0.", torch.cat([q, k, q - k, q * k], 1)))
            score = linear(weights, "inner.score.2.", hidden)[:, 0]
            attention = score.softmax(0) if softmax else score
            if entry_weights is not None:
                attention = attention * entry_weights[start:stop].double()
            rows.append((attention[:, None] * k).sum(0))
        return torch.stack(rows) if rows else target * 1.0

    got = check(OnTensors(), reference, torch.randn(len(lengths), 3), torch.randn(total, 3))
    for b, length in enumerate(lengths):
        if length == 0:
            assert got[b].tolist() == [0, 0, 0]


def test_target_attention_takes_int32_lengths():
    module, target, keys = TargetAttention(3), torch.randn(2, 3), torch.randn(4, 3)
    got = module(target, JaggedTensor(keys, lengths=torch.tensor([3, 1], dtype=torch.int32)))
    torch.testing.assert_close(got, module(target, JaggedTensor(keys, lengths=torch.tensor([3, 1]))))


def test_target_attention_refuses_other_shapes():
    module = TargetAttention(3)
    flat = JaggedTensor(torch.zeros(2, 3), lengths=torch.tensor([2]))
    with pytest.raises(ValueError, match="2 targets need as many sequences; got 1"):
        module(torch.zeros(2, 3), flat)
    with pytest.raises(ValueError, match=r"vectors \[L, 4\]"):
        module(torch.zeros(1, 4), flat)


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("shared_input", [True, False])
def test_stacked_mlp(batch, shared_input):
    module = StackedMLP(3, 4, (5,), out_width=2, activation=nn.Tanh)

    def reference(weights, x):
        outs = []
        for n in range(3):
            own = x if shared_input else x[n]
            hidden = torch.tanh(own @ weights["weights.0"][n] + weights["biases.0"][n])
            outs.append(hidden @ weights["weights.1"][n] + weights["biases.1"][n])
        return torch.stack(outs)

    check(module, reference, torch.randn(batch, 4) if shared_input else torch.randn(3, batch, 4))
    with pytest.raises(ConfigError, match="would be no layer"):
        StackedMLP(2, 4, ())


def stacked_reference(weights, prefix: str, number: int, x: Tensor) -> Tensor:
    return torch.tanh(x @ weights[f"{prefix}weights.0"][number] + weights[f"{prefix}biases.0"][number])


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_mixture_of_experts(batch):
    module = MixtureOfExperts(4, 2, 3, (5,), activation=nn.Tanh)

    def reference(weights, x):
        experts = [stacked_reference(weights, "experts.", e, x) for e in range(3)]
        tasks = []
        for t in range(2):
            gate = (x @ weights["gate.weight"][3 * t : 3 * t + 3].T).softmax(1)
            tasks.append(sum(gate[:, e : e + 1] * experts[e] for e in range(3)))
        return torch.stack(tasks)

    check(module, reference, torch.randn(batch, 4))


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("path", ["tasks", "shared"])
def test_cgc_layer(batch, path):
    layer = CgcLayer(4, 2, own_experts=2, shared_experts=1, hidden=(3,), activation=nn.Tanh)
    assert layer.out_width == 3

    class OnePath(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, tasks, shared):
            return self.layer(tasks, shared)[0 if path == "tasks" else 1]

    def reference(weights, tasks, shared):
        common = stacked_reference(weights, "layer.shared.", 0, shared)
        own = [[stacked_reference(weights, "layer.own.", 2 * t + e, tasks[t]) for e in range(2)] for t in range(2)]
        if path == "tasks":
            outs = []
            for t in range(2):
                gate = (tasks[t] @ weights["layer.task_gates"][t]).softmax(1)
                read = [*own[t], common]
                outs.append(sum(gate[:, e : e + 1] * read[e] for e in range(3)))
            return torch.stack(outs)
        gate = (shared @ weights["layer.shared_gate.weight"].T).softmax(1)
        read = [*own[0], *own[1], common]
        return sum(gate[:, e : e + 1] * read[e] for e in range(5))

    check(OnePath(), reference, torch.randn(2, batch, 4), torch.randn(batch, 4))
