"""Schedules: factors by hand, several optimizers at once, torch's LambdaLR, resuming."""

import pytest
import torch

from recis.embedding import EmbeddingBagCollection, TableConfig
from recis.errors import CheckpointError, ConfigError
from recis.optim import Constant, Cosine, Linear, Sgd, SparseOptimizer, build_schedule


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        (Constant(), [1, 1, 1, 1, 1, 1]),
        (Constant(warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1]),
        (Linear(total_steps=4), [0.75, 0.5, 0.25, 0, 0, 0]),
        (Linear(warmup_steps=2, total_steps=4, final=0.5), [0.5, 1, 0.75, 0.5, 0.5, 0.5]),
        (Cosine(total_steps=4), [0.8535534, 0.5, 0.1464466, 0, 0, 0]),
        (Cosine(warmup_steps=1, total_steps=5, final=0.2), [1, 0.8828427, 0.6, 0.3171573, 0.2, 0.2]),
    ],
    ids=repr,
)
def test_factors(schedule, want):
    assert [schedule.factor(step) for step in range(1, 7)] == pytest.approx(want, abs=1e-6)
    assert [schedule.after(done) for done in range(6)] == pytest.approx(want, abs=1e-6)


def optimizers():
    config = TableConfig(name="item", features=("f",), optimizer=Sgd(lr=2.0))
    sparse = SparseOptimizer(EmbeddingBagCollection([config], seed=1))
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1), sparse


def rates(pair):
    return [group["lr"] for optimizer in pair for group in optimizer.param_groups]


def test_drives_dense_and_sparse_together():
    pair = optimizers()
    schedule = build_schedule(Linear(total_steps=4), pair)
    assert rates(pair) == pytest.approx([0.075, 1.5])
    schedule.step()
    assert rates(pair) == pytest.approx([0.05, 1.0])
    build_schedule(None, other := optimizers())
    assert rates(other) == [0.1, 2.0]


def test_resumes():
    pair = optimizers()
    schedule = build_schedule(Cosine(total_steps=10), pair)
    for _ in range(3):
        schedule.step()
    again = optimizers()
    resumed = build_schedule(Cosine(total_steps=10), again)
    resumed.load_state_dict(schedule.state_dict())
    assert rates(again) == rates(pair)
    schedule.step()
    resumed.step()
    assert rates(again) == rates(pair)
    with pytest.raises(CheckpointError, match="param groups"):
        build_schedule(None, again[:1]).load_state_dict(schedule.state_dict())


def test_torch_schedulers_take_them():
    pair = optimizers()
    schedule = Constant(warmup_steps=4)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.after) for optimizer in pair]
    assert rates(pair) == pytest.approx([0.025, 0.5])
    for scheduler in schedulers:
        scheduler.optimizer.step()
        scheduler.step()
        scheduler.load_state_dict(scheduler.state_dict())
    assert rates(pair) == pytest.approx([0.05, 1.0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Constant(warmup_steps=-1), "warmup_steps must be at least 0"),
        (lambda: Linear(total_steps=3, warmup_steps=3), "total_steps must be above warmup_steps"),
        (lambda: Cosine(total_steps=3, final=1.5), r"final must lie in \[0, 1\]"),
        (lambda: build_schedule(torch.optim.SGD, []), "schedule must be"),  # type: ignore[arg-type]
    ],
)
def test_refusals(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
