"""Losses by hand, against plain float64 sums, under masks that hide NaN, and additive over micro-batches."""

import math
from dataclasses import replace

import pytest
import torch

from recis.errors import ConfigError
from recis.io.batch import Batch
from recis.jagged import KeyedJaggedTensor
from recis.models.losses import MultiTaskLoss, Task, binary_loss, cross_entropy, poisson, softmax_loss, squared_error


def make_batch(labels, *, weights=None, mask=None, label_weights=None) -> Batch:
    size = len(labels)
    return Batch(
        sparse=KeyedJaggedTensor((), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), stride=size),
        dense=torch.empty(size, 0),
        dense_keys=(),
        dense_widths=(),
        labels=labels,
        label_mask=mask,
        label_weights=label_weights,
        weights=torch.ones(size) if weights is None else weights,
        group_ids=None,
        extras={},
        num_samples=size,
    )


def test_binary_loss_by_hand():
    batch = make_batch(torch.tensor([[1.0], [0.0]]), weights=torch.tensor([2.0, 3.0]))
    want = -2 * math.log(1 / (1 + math.exp(-0.5))) - 3 * math.log(1 - 1 / (1 + math.exp(1.0)))
    assert float(binary_loss(torch.tensor([[0.5], [-1.0]]), batch)) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("size", [0, 1, 9])
@pytest.mark.parametrize("masked", [False, True])
def test_multi_task_equals_plain_sums(size, masked):
    logits = torch.randn(size, 3, requires_grad=True)
    labels = torch.cat([torch.rand(size, 2).round(), torch.randn(size, 1)], dim=1)
    mask = torch.rand(size, 3) < 0.6 if masked else None
    weights, label_weights = torch.rand(size), torch.rand(size, 3)
    loss = MultiTaskLoss(tasks=(Task(), Task(weight=0.5), Task(loss=squared_error, weight=2.0)))
    if mask is not None:
        labels = torch.where(mask, labels, math.nan)
    got = loss(logits, make_batch(labels, weights=weights, mask=mask, label_weights=label_weights))
    got.backward()

    plain = logits.detach().double().requires_grad_()
    want = plain.sum() * 0
    for b in range(size):
        for t in range(3):
            if mask is None or mask[b, t]:
                z, y = plain[b, t], labels[b, t].double()
                point = (z - y) ** 2 if t == 2 else -(y * z.sigmoid().log() + (1 - y) * (1 - z.sigmoid()).log())
                want = want + weights[b].double() * (1.0, 0.5, 2.0)[t] * label_weights[b, t].double() * point
    want.backward()
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
    assert logits.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(logits.grad, plain.grad.float(), rtol=1e-5, atol=1e-6)


def test_micro_batches_add_up():
    labels, weights = torch.rand(10, 2).round(), torch.rand(10)
    logits = torch.randn(10, 2)
    whole = binary_loss(logits, make_batch(labels, weights=weights))
    parts = [
        binary_loss(logits[part], make_batch(labels[part], weights=weights[part]))
        for part in (slice(0, 3), slice(3, 10))
    ]
    torch.testing.assert_close(whole, parts[0] + parts[1])


def test_point_losses():
    z, y = torch.tensor([0.3, -2.0]), torch.tensor([1.0, 0.25])
    p = z.sigmoid()
    torch.testing.assert_close(cross_entropy(z, y), -(y * p.log() + (1 - y) * (1 - p).log()))
    torch.testing.assert_close(squared_error(z, y), (z - y) ** 2)
    torch.testing.assert_close(poisson(z, y), z.exp() - y * z)


def test_bfloat16_logits_are_added_in_float32():
    batch = make_batch(torch.ones(4096, 1))
    got = binary_loss(torch.zeros(4096, 1, dtype=torch.bfloat16), batch)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(4096 * math.log(2), rel=1e-5)


def test_softmax_loss_by_hand_and_weights():
    logits = torch.tensor([[1.0, 0.0, -math.inf], [0.0, 0.0, 0.0], [2.0, -math.inf, -math.inf]], requires_grad=True)
    batch = make_batch(torch.tensor([[1.0], [1.0], [1.0]]), weights=torch.tensor([1.0, 2.0, 5.0]))
    want = -math.log(math.e / (math.e + 1)) + 2 * math.log(3)
    loss = softmax_loss(logits, batch)
    assert float(loss.detach()) == pytest.approx(want, rel=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    no_click = replace(batch, labels=torch.tensor([[1.0], [0.0], [1.0]]))
    assert float(softmax_loss(logits, no_click).detach()) == pytest.approx(-math.log(math.e / (math.e + 1)), rel=1e-6)
    assert float(softmax_loss(logits, replace(batch, labels=torch.empty(3, 0))).detach()) == pytest.approx(
        want, rel=1e-6
    )


def test_shapes_and_weights_are_checked():
    with pytest.raises(ValueError, match=r"2 tasks need logits and labels \[3, 2\]; got \[3, 1\] and \[3, 2\]"):
        MultiTaskLoss(tasks=(Task(), Task()))(torch.zeros(3, 1), make_batch(torch.zeros(3, 2)))
    with pytest.raises(ConfigError, match="Task: weight"):
        Task(weight=-1.0)
