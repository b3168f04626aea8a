"""Metrics per task: names, masks, weights, groups, state."""

import pytest
import torch

from recis.errors import ConfigError
from recis.metrics.auc import ExactAuc
from recis.metrics.gauc import Gauc
from recis.trainer.metric_set import MetricSet

LABELS = torch.tensor([1.0, 0, 1, 0, 0])
SCORES = torch.tensor([0.8, 0.4, 0.4, 0.1, 0.6])


def five(toy, labels=LABELS, **more):
    return toy.batch_of([0] * 5, [[]] * 5, torch.zeros(5, 1), labels, **more)


def test_by_hand(toy):  # conformance B25
    metrics = MetricSet((ExactAuc(),), ("label",))
    metrics.update(SCORES, five(toy))
    assert metrics.compute() == {"auc": pytest.approx(0.75)}
    metrics.reset()
    metrics.update(SCORES.unsqueeze(1), five(toy, weights=torch.tensor([1.0, 2, 1, 1, 3])))
    assert metrics.compute()["auc"] == pytest.approx(2 / 3)


def test_tasks_masks_and_label_weights(toy):
    labels = torch.stack([LABELS, 1 - LABELS], dim=1)
    mask = torch.ones(5, 2, dtype=torch.bool)
    mask[0, 1] = False
    weights = torch.stack([torch.tensor([1.0, 2, 1, 1, 3]), torch.ones(5)], dim=1)
    metrics = MetricSet((ExactAuc(),), ("click", "buy"))
    metrics.update(SCORES[:, None].repeat(1, 2), five(toy, labels, label_mask=mask, label_weights=weights))
    other = ExactAuc()
    other.update(SCORES[1:], 1 - LABELS[1:])
    assert metrics.compute() == {"click.auc": pytest.approx(2 / 3), "buy.auc": other.compute()}


def test_groups(toy):  # conformance A40
    batch = five(toy, torch.tensor([1.0, 0, 1, 0, 1]), group_ids=torch.tensor([0, 1, 1, 1, 2]))
    metrics = MetricSet((Gauc(),), ("label",))
    metrics.update(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), batch)
    assert metrics.compute() == {"gauc": pytest.approx(0.5)}


def test_state(toy):
    first, second = (MetricSet((ExactAuc(), Gauc()), ("label",)) for _ in range(2))
    batch = five(toy, group_ids=torch.tensor([0, 0, 1, 1, 1]))
    first.update(SCORES, batch)
    second.load_state_dict(first.state_dict())
    assert second.compute() == first.compute()
    with pytest.raises(ConfigError, match=r"saved metrics are \['auc', 'gauc'\], this run has \['auc'\]"):
        MetricSet((ExactAuc(),), ("label",)).load_state_dict(first.state_dict())


def test_shapes_and_names(toy):
    metrics = MetricSet((ExactAuc(),), ("a", "b"))
    with pytest.raises(ConfigError, match="T = 2 tasks"):
        metrics.update(SCORES, five(toy))
    with pytest.raises(ConfigError, match="two of them are called 'auc'"):
        MetricSet((ExactAuc(), ExactAuc()), ("a",))
    empty = MetricSet((), ("a", "b"))
    empty.update(SCORES, five(toy))  # nothing to feed: outputs of any kind will do
    assert empty.compute() == {}
