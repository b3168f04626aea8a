"""TrainConfig: rules with names and ways out; Monitor's comparison."""

import math

import pytest

from recis.errors import ConfigError
from recis.trainer.config import InitFrom, Monitor


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": ""}, "name must not be empty"),
        ({"tasks": ("a", "a")}, "tasks must be distinct names"),
        ({"max_steps": 0}, "max_steps must be at least 1 or None; got 0"),
        ({"epochs": -1}, "epochs must be at least 1"),
        ({"accumulate_steps": 0}, "accumulate_steps must be at least 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm must be above 0"),
        ({"clip_grad_norm": math.nan}, "clip_grad_norm must be above 0"),
        ({"monitor": Monitor()}, "monitor needs eval_data"),
    ],
)
def test_rules(toy, changes, text):
    with pytest.raises(ConfigError, match=text):
        toy.config(**changes)


def test_monitor():
    higher = Monitor(min_delta=0.1)
    assert higher.is_better(0.5, None)
    assert higher.is_better(0.7, 0.5)
    assert not higher.is_better(0.55, 0.5)
    assert not higher.is_better(math.nan, None)
    lower = Monitor(metric="loss", higher_is_better=False)
    assert lower.is_better(0.4, 0.5)
    assert not lower.is_better(0.5, 0.5)
    with pytest.raises(ConfigError, match="patience_evals"):
        Monitor(patience_evals=0)
    with pytest.raises(ConfigError, match="min_delta"):
        Monitor(min_delta=-1)


def test_init_from_needs_a_path():
    with pytest.raises(ConfigError, match="paths must name at least one"):
        InitFrom(paths=())
