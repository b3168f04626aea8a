"""Sequence rules: aligned columns are cut together, rules follow one another, times decide exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.errors import ConfigError, DataError
from recis.features import Dedup, FeatureEngine, FeatureSpec, Hash, LastN, Op, Sequence, TimeWindow, Truncate
from recis.io.batch import RawBatch
from recis.jagged import JaggedTensor


def _cut(columns: dict, ops: tuple[Op, ...], names: tuple[str, ...]) -> dict[str, list]:
    data = {
        name: column if isinstance(column, torch.Tensor | JaggedTensor) else JaggedTensor.from_lists(column)
        for name, column in columns.items()
    }
    features = [FeatureSpec(name=name, kind="extra", ops=ops) for name in names]
    batch = FeatureEngine(features).forward(RawBatch(columns=data, num_samples=len(next(iter(data.values())))))
    return {name: batch.extras[name].to_lists() for name in names}  # type: ignore[union-attr]


EVENTS = {
    "item": [[5, 3, 5, 8], [], [3, 3]],
    "action": [[1, 2, 3, 4], [], [5, 6]],
    "time": [[10, 20, 30, 40], [], [5, 50]],
    "now": torch.tensor([35, 0, 50]),
}


def test_last_n():
    cut = _cut(EVENTS, (Sequence(LastN(2)),), ("item", "action"))
    assert cut == {"item": [[5, 8], [], [3, 3]], "action": [[3, 4], [], [5, 6]]}


def test_dedup_by_an_aligned_column():
    last = _cut(EVENTS, (Sequence(Dedup(by="item")),), ("item", "action"))
    assert last == {"item": [[3, 5, 8], [], [3]], "action": [[2, 3, 4], [], [6]]}
    first = _cut(EVENTS, (Sequence(Dedup(by="item", keep="first")),), ("item", "action"))
    assert first == {"item": [[5, 3, 8], [], [3]], "action": [[1, 2, 4], [], [5]]}
    own = _cut(EVENTS, (Sequence(Dedup()),), ("item", "action"))
    assert own == {"item": [[3, 5, 8], [], [3]], "action": [[1, 2, 3, 4], [], [5, 6]]}


@pytest.mark.parametrize(("unit", "ticks"), [("s", 1), ("ms", 1000), ("ns", 10**9)])
def test_time_window_drops_old_and_future_entries(unit, ticks):
    base = 1_760_000_000 * ticks  # real times: a float64 could not tell nanoseconds apart
    events = EVENTS | {
        "time": [[base + t * ticks + 1 for t in row] for row in EVENTS["time"]],
        "now": base + EVENTS["now"] * ticks + 1,
    }
    cut = _cut(events, (Sequence(TimeWindow(15, time="time", now="now", unit=unit)),), ("item", "action"))
    assert cut == {"item": [[3, 5], [], [3]], "action": [[2, 3], [], [6]]}  # ages 15 and 5; 25 is old, -5 is the future


def test_rules_follow_one_another():
    ops = (Sequence(TimeWindow(25, time="time", now="now")), Sequence(Dedup(by="item")), Sequence(LastN(1)))
    cut = _cut(EVENTS, ops, ("item", "action", "time"))
    assert cut == {"item": [[5], [], [3]], "action": [[3], [], [6]], "time": [[30], [], [50]]}
    cut = _cut(EVENTS, (Sequence(LastN(3)), Sequence(Dedup(by="item"))), ("item", "action"))
    assert cut == {"item": [[3, 5, 8], [], [3]], "action": [[2, 3, 4], [], [6]]}
    ops = (Hash("murmur", 100), Truncate(3, drop="right"), Sequence(Dedup(by="item", keep="first")))
    assert [len(row) for row in _cut(EVENTS, ops, ("item",))["item"]] == [2, 0, 1]


def test_weights_strings_and_nested_entries_are_cut_alike():
    events = EVENTS | {
        "item": JaggedTensor.from_lists(EVENTS["item"], weights=[[1.0, 2.0, 3.0, 4.0], [], [5.0, 6.0]]),
        "title": [["a", "bb", "ccc", ""], [], ["d", "e"]],
        "parts": [[[1], [], [2, 3], [4]], [], [[5], [6]]],
    }
    features = [
        FeatureSpec(name=name, kind="extra", ops=(Sequence(Dedup(by="item")),)) for name in ("item", "title", "parts")
    ]
    data = {
        n: c if isinstance(c, torch.Tensor | JaggedTensor) else JaggedTensor.from_lists(c) for n, c in events.items()
    }
    extras = FeatureEngine(features).forward(RawBatch(columns=data, num_samples=3)).extras
    item, title, parts = extras["item"], extras["title"], extras["parts"]
    assert isinstance(item, JaggedTensor)
    assert isinstance(title, JaggedTensor)
    assert isinstance(parts, JaggedTensor)
    assert item.weights is not None
    assert item.weights.tolist() == [2, 3, 4, 6]
    assert title.inner.to_strings() == [b"bb", b"ccc", b"", b"e"]
    assert title.lengths.tolist() == [3, 0, 1]
    assert parts.to_lists() == [[[], [2, 3], [4]], [], [[6]]]


def test_columns_that_are_not_aligned_are_named():
    events = EVENTS | {"item": [[5, 3, 5, 8], [1], [3, 3]]}
    with pytest.raises(DataError, match="column 'item' has 1 entries where 'action' has 0") as caught:
        _cut(events, (Sequence(Dedup(by="item")),), ("action",))
    assert caught.value.row == 1
    with pytest.raises(ConfigError, match="'now' must be lists of ids"):
        _cut(EVENTS, (Sequence(Dedup(by="now")),), ("action",))


rows = st.lists(st.lists(st.integers(-3, 3), max_size=60), max_size=5)


@settings(max_examples=40, deadline=None)
@given(rows=rows, last=st.integers(0, 5), keep=st.sampled_from(["first", "last"]))
def test_any_sequence_matches_plain_python(rows, last, keep):
    positions = [list(range(len(row))) for row in rows]
    ops = (Sequence(Dedup(by="key", keep=keep)), Sequence(LastN(last)))
    cut = _cut({"key": rows, "position": positions}, ops, ("key", "position"))
    for row, kept in zip(rows, cut["position"], strict=True):
        chosen = {}
        for position in range(len(row)) if keep == "first" else reversed(range(len(row))):
            chosen.setdefault(row[position], position)
        want = sorted(chosen.values())
        assert kept == want[len(want) - min(last, len(want)) :]
    assert cut["key"] == [[row[p] for p in kept] for row, kept in zip(rows, cut["position"], strict=True)]
