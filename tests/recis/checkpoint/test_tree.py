"""Nested states: whatever goes in comes out with its types, and what cannot is refused by path."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recis.checkpoint import tree
from recis.errors import CheckpointError
from recis.trainer.randomness import random_state, seed_everything, set_random_state

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3).map(lambda values: torch.tensor(values, dtype=torch.int64))
)
keys = st.text(max_size=4) | st.integers() | st.sampled_from(["$tensor", "$items", "a.b", "a"])
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


def equal(have, want) -> bool:
    if isinstance(want, torch.Tensor):
        return isinstance(have, torch.Tensor) and have.dtype == want.dtype and torch.equal(have, want)
    if isinstance(want, dict):
        return have.keys() == want.keys() and all(equal(have[key], want[key]) for key in want)
    if isinstance(want, list | tuple):
        same_length = type(have) is type(want) and len(have) == len(want)
        return same_length and all(equal(a, b) for a, b in zip(have, want, strict=True))
    return type(have) is type(want) and have == want


@given(values)
def test_round_trip_through_text(value):
    packed, tensors = tree.pack(value)
    assert equal(tree.unpack(tree.from_text(tree.to_text(packed)), tensors), value)


def test_floats_that_json_lacks():
    packed, _ = tree.pack([math.nan, math.inf, -math.inf, -0.0])
    got = tree.unpack(tree.from_text(tree.to_text(packed)), {})
    assert math.isnan(got[0])
    assert got[1:3] == [math.inf, -math.inf]
    assert math.copysign(1, got[3]) == -1


def test_arrays_stay_arrays():
    packed, tensors = tree.pack({"x": np.arange(3, dtype=np.float64), "y": np.float32(0.5), "z": np.int64(4)})
    got = tree.unpack(packed, tensors)
    assert isinstance(got["x"], np.ndarray)
    assert got["x"].tolist() == [0, 1, 2]
    assert (got["y"], got["z"]) == (0.5, 4)


def test_names_that_collide():
    packed, tensors = tree.pack({"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}})
    got = tree.unpack(packed, tensors)
    assert (int(got["a.b"]), int(got["a"]["b"])) == (1, 2)


def test_refused_by_path():
    with pytest.raises(CheckpointError, match=r"state 'hook\.1': a set cannot be saved"):
        tree.pack({"hook": [1, {2}]})
    with pytest.raises(CheckpointError, match="must be str or int"):
        tree.pack({(1, 2): 3})


def test_random_generators_go_on_where_they_were():
    seed_everything(11)
    random.gauss(0, 1)  # leaves a cached second value behind
    np.random.standard_normal()  # noqa: NPY002
    packed, tensors = tree.pack(random_state())

    def draw() -> tuple:
        return (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1))  # noqa: NPY002

    want = draw()
    set_random_state(tree.unpack(tree.from_text(tree.to_text(packed)), tensors))
    assert draw() == want
