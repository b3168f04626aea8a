"""The synthetic log: repeatable, resumable, with the AUC ceiling its own probabilities give."""

import pytest
import torch

from recis.errors import ConfigError
from recis.metrics import Calibration, ExactAuc
from recis.models.synthetic import SyntheticClicks


def test_same_settings_same_batches_and_resume():
    source = SyntheticClicks(num_samples=1000, batch_size=300)
    straight = list(source)
    assert [batch.num_samples for batch in straight] == [300, 300, 300, 100]
    assert [torch.equal(a.labels, b.labels) for a, b in zip(source, straight, strict=True)] == [True] * 4
    reader = iter(source)
    next(reader)
    resumed = SyntheticClicks(num_samples=1000, batch_size=300)
    resumed.load_state_dict(source.state_dict())
    rest = list(resumed)
    assert len(rest) == 3
    assert torch.equal(rest[0].sparse.values, straight[1].sparse.values)
    other = next(iter(SyntheticClicks(num_samples=1000, batch_size=300, seed=1)))
    assert not torch.equal(other.sparse.values, straight[0].sparse.values)


def test_probabilities_are_calibrated_and_leave_room():
    auc, calibration = ExactAuc(), Calibration()
    for batch in SyntheticClicks(num_samples=20_000, batch_size=1000):
        for metric in (auc, calibration):
            metric.update(batch.extras["probability"], batch.labels[:, 0])  # type: ignore[arg-type]
    assert calibration.compute() == pytest.approx(1.0, abs=0.02)
    assert 0.82 < auc.compute() < 0.88


def test_tasks_histories_and_items():
    batch = next(iter(SyntheticClicks(num_tasks=2, batch_size=500)))
    assert batch.label_mask is not None
    assert torch.equal(batch.label_mask[:, 1], batch.labels[:, 0] > 0)
    history = batch.sparse["clicked_items"]
    assert torch.equal(history.lengths, batch.sparse["clicked_categories"].lengths)
    assert int((history.lengths == 0).sum()) > 20
    items = SyntheticClicks().items()
    assert len(items.sparse["item_id"].flat_values.unique()) == items.num_samples == 100
    with pytest.raises(ConfigError, match="num_tasks must be 1 or 2"):
        SyntheticClicks(num_tasks=3)
    with pytest.raises(ConfigError, match="num_items must be at least 1"):
        SyntheticClicks(num_items=0)
