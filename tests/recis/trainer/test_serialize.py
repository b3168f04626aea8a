"""Configs as JSON: round trips, what cannot be rebuilt says so, and differences are listed leaf by leaf."""

import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from recis.errors import ConfigError
from recis.trainer.config import DenseAdamW, Monitor
from recis.trainer.serialize import differences, from_json, to_json


@dataclass(frozen=True, kw_only=True)
class Inner:
    dtype: torch.dtype = torch.float32
    path: Path = Path("a/b")
    limit: float = math.inf
    kinds: frozenset[str] = frozenset(("x", "y"))
    names: dict[int, str] = field(default_factory=lambda: {1: "a"})


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: tuple[Inner, ...] = (Inner(), Inner(limit=2.0))
    function: object = torch.sigmoid
    own: object = math.sqrt
    partial: functools.partial = functools.partial(torch.clamp, min=0.0)  # noqa: RUF009
    cls: type = Inner
    optimizer: DenseAdamW = DenseAdamW(lr=0.5, betas=(0.1, 0.2))  # noqa: RUF009


class Source:
    def __init__(self):
        self.rows = 10
        self._position = 3
        self.data = [1, 2]


def through_text(value):
    return from_json(json.loads(json.dumps(to_json(value), allow_nan=False)))


def test_round_trip():
    got, want = through_text(Outer()), Outer()
    assert got.partial.func is want.partial.func
    assert got.partial.keywords == want.partial.keywords
    assert (got.inner, got.function, got.own, got.cls, got.optimizer) == (
        want.inner,
        want.function,
        want.own,
        want.cls,
        want.optimizer,
    )


def test_types_are_named():
    assert to_json(DenseAdamW()) == {
        "$type": "recis.trainer.config:DenseAdamW",
        "lr": 1e-3,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.0,
    }


def test_objects_are_written_for_comparison_only():
    data = to_json(Source())
    assert data["rows"] == 10
    assert "_position" not in data
    with pytest.raises(ConfigError, match="name the recipe"):
        from_json(data)


def test_tensors_do_not_belong_into_configs():
    with pytest.raises(ConfigError, match=r"config\.x\.1: a config holds no Tensor"):
        to_json({"x": [1, torch.zeros(2)]})


def test_local_function_cannot_be_rebuilt():
    def local():
        return 1

    with pytest.raises(ConfigError, match="top level of a module"):
        through_text({"f": local})


def test_only_dataclasses_are_built():
    with pytest.raises(ConfigError, match="is no dataclass"):
        from_json({"$type": "os:system", "command": "true"})


def test_differences():
    old, new = to_json(Outer()), to_json(Outer(optimizer=DenseAdamW(lr=0.25), inner=(Inner(), Inner(limit=3.0))))
    assert differences(old, new) == [
        "inner.1.limit: 2.0 -> 3.0",
        "optimizer.lr: 0.5 -> 0.25",
        "optimizer.betas.0: 0.1 -> 0.9",
        "optimizer.betas.1: 0.2 -> 0.999",
    ]
    assert differences(old, old) == []
    assert differences({"a": 1}, {"b": 2}) == ['a: 1 -> "(absent)"', 'b: "(absent)" -> 2']
    assert differences([1], [1, 2]) == [": [1] -> [1, 2]"]


def test_monitor_round_trip():
    assert through_text(Monitor(metric="gauc", patience_evals=3)) == Monitor(metric="gauc", patience_evals=3)
