"""Conformance cases of feature ops, run through the engine: hashing, crosses, buckets, truncation, shared columns."""

import math
from typing import Any

import pytest
import torch

from recis.errors import DataError
from recis.features import Bucketize, Cross, FeatureEngine, FeatureSpec, Flatten, Hash, Mod, MultiHash, Op, Truncate
from recis.io.batch import RawBatch
from recis.jagged import JaggedTensor


def _run(ops: tuple[Op, ...], column, *, name: str = "x") -> Any:
    """Return what one chain makes of one column."""
    raw = RawBatch(columns={name: column}, num_samples=len(column))
    return FeatureEngine([FeatureSpec(name=name, kind="extra", ops=ops)]).forward(raw).extras[name]


def _ids(*rows, weights=None) -> JaggedTensor:
    return JaggedTensor.from_lists(list(rows), weights=weights)


def test_a5_buckets():
    words = JaggedTensor.from_strings(["hello", "abc"])
    for num_buckets, want in ((None, -5436999610281751320), (0, 3786372426573024488), (1000, 296)):
        assert _run((Hash("farm", num_buckets),), words)[0] == want
    for num_buckets, want in ((0, 2074403734047776507), (1000, 315)):
        assert _run((Hash("murmur", num_buckets),), words)[1] == want


def test_a6_hash_drops_the_byte_level_and_keeps_the_rest():
    byte_level = JaggedTensor(torch.tensor([0, 1, 2, 1, 2, 3], dtype=torch.uint8), offsets=torch.tensor([0, 3, 6]))
    want = [-7736835464683084646, -5546720800891377920]
    # two lists around the strings: one sample of one list of both
    lists = JaggedTensor(byte_level, offsets=torch.tensor([0, 2]), weights=torch.tensor([0.5, 2.0]))
    hashed = _run((Hash("farm"),), JaggedTensor(lists, offsets=torch.tensor([0, 1])))
    assert hashed.to_lists() == [[want]]
    assert hashed.offsets.tolist() == [0, 1]
    assert hashed.inner.offsets.tolist() == [0, 2]
    assert hashed.inner.weights.tolist() == [0.5, 2.0]
    # the offsets (0, 1) right around two strings leave the second outside of any sample, as they say
    short = _run((Hash("farm"),), JaggedTensor(byte_level, offsets=torch.tensor([0, 1]), weights=torch.ones(2)))
    assert short.flat_values.tolist() == want
    assert short.offsets.tolist() == [0, 1]
    assert short.weights.tolist() == [1.0, 1.0]


def test_a7_mod_is_unsigned_and_fused():
    assert _run((Mod(1000),), _ids([1001, -1], [-5, 2**62])).to_lists() == [[1, 615], [611, 904]]
    raw = RawBatch(columns={"a": _ids([-1, 7]), "b": _ids([-5])}, num_samples=1)
    features = [FeatureSpec(name=n, kind="sparse", ops=(Mod(m),)) for n, m in (("a", 10), ("b", 7))]
    batch = FeatureEngine(features).forward(raw)
    assert batch.sparse["a"].to_lists() == [[5, 7]]
    assert batch.sparse["b"].to_lists() == [[4]]


def test_a8_multi_hash_outputs():
    spec = FeatureSpec(name="item", kind="sparse", ops=(MultiHash((1000, 1000, 1000)),))
    engine = FeatureEngine([spec])
    assert engine.sparse_keys == ("item_multi_hash_0", "item_multi_hash_1", "item_multi_hash_2")
    batch = engine.forward(RawBatch(columns={"item": _ids([28979], [], [28980, -1])}, num_samples=3))
    assert batch.sparse["item_multi_hash_0"].to_lists() == [[0], [], [1, 978]]
    assert batch.sparse["item_multi_hash_1"].to_lists() == [[940], [], [943, 994]]


def test_a9_a10_cross():
    one_to_three = _ids([1], [2], [3])
    spec = FeatureSpec(name="x", kind="sparse", ops=(Cross("a", "b"),))
    modded = FeatureSpec(name="m", kind="sparse", ops=(Cross("a", "b"), Mod(1000)))
    raw = RawBatch(columns={"a": one_to_three, "b": one_to_three}, num_samples=3)
    batch = FeatureEngine([spec, modded]).forward(raw)
    assert batch.sparse["x"].flat_values.tolist() == [5425063201540042216, -4861409480480049614, 1479261497018993783]
    assert batch.sparse["m"].flat_values.tolist() == [216, 2, 783]
    raw = RawBatch(columns={"a": _ids([1001], [1002], [1003]), "b": one_to_three}, num_samples=3)
    assert FeatureEngine([spec]).forward(raw).sparse.values.tolist() == [
        -7808879811642834040,
        -4967483181219983279,
        1752425377096056168,
    ]
    turned = FeatureSpec(name="y", kind="sparse", ops=(Cross("b", "a"),))
    raw = RawBatch(columns={"a": _ids([1]), "b": _ids([2])}, num_samples=1)
    batch = FeatureEngine([spec, turned]).forward(raw)
    assert batch.sparse.values.tolist() == [2346165840139155392, -1274954391096260390]


def test_a11_a12_bucketize():
    hundreds = Bucketize((0, 100, 200))
    assert _run((hundreds,), torch.tensor([-1, 0, 0.5, 10, 11.6, 200, 201])).tolist() == [0, 1, 1, 1, 1, 3, 3]
    special = JaggedTensor(
        torch.tensor([math.nan, math.inf, -math.inf]), offsets=torch.tensor([0, 1, 3]), weights=torch.rand(3)
    )
    buckets = _run((hundreds,), special)
    assert buckets.flat_values.dtype == torch.int64
    assert buckets.to_lists() == [[3], [3, 0]]
    assert torch.equal(buckets.offsets, special.offsets)
    assert buckets.weights is special.weights


def test_a15_a16_truncate():
    rows = _ids([1, 2, 3, 4], [5, 6, 7], [8, 9, 10])
    left, right = (_run((Truncate(2, drop=drop),), rows) for drop in ("left", "right"))
    assert left.flat_values.tolist() == [3, 4, 6, 7, 9, 10]
    assert right.flat_values.tolist() == [1, 2, 5, 6, 8, 9]
    assert left.offsets.tolist() == right.offsets.tolist() == [0, 2, 4, 6]
    assert _run((Truncate(4),), rows).to_lists() == rows.to_lists()


def test_a17_weights_are_cut_and_strict_raises():
    rows = _ids([1, 2, 3], [4], weights=[[0.1, 0.2, 0.3], [0.4]])
    cut = _run((Truncate(2),), rows)
    assert cut.to_lists() == [[2, 3], [4]]
    torch.testing.assert_close(cut.weights, torch.tensor([0.2, 0.3, 0.4]))
    with pytest.raises(DataError, match=r"row 0.*feature 'clicks': a row has 3 entries") as caught:
        _run((Truncate(2, strict=True),), rows, name="clicks")
    assert (caught.value.row, caught.value.column, caught.value.value) == (0, "clicks", 3)


def test_a18_shared_columns_are_not_overwritten():
    column = _ids([23])
    before = column.flat_values.clone()
    features = [
        FeatureSpec(name=name, kind="sparse", source="c", ops=(Mod(n),))
        for name, n in (("a", 10), ("b", 7), ("c2", 10))
    ]
    batch = FeatureEngine(features).forward(RawBatch(columns={"c": column}, num_samples=1))
    assert batch.sparse.values.tolist() == [3, 2, 3]
    assert torch.equal(column.flat_values, before)


def test_truncate_nested_rows():
    nested = _ids([[1], [2, 3], [4]], [[5]])
    assert _run((Truncate(2),), nested).to_lists() == [[[2, 3], [4]], [[5]]]
    assert _run((Truncate(2, pad=True),), nested).to_lists() == [[[2, 3], [4]], [[5], []]]
    assert _run((Truncate(1, level=1, drop="right"),), nested).to_lists() == [[[1], [2], [4]], [[5]]]
    outer_weights = JaggedTensor(nested.inner, offsets=nested.offsets, weights=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    padded = _run((Truncate(2, pad=True),), outer_weights)
    assert padded.weights.tolist() == [2.0, 3.0, 4.0, 0.0]
    inner = JaggedTensor.from_lists([[1], [2, 3], [4], [5]], weights=[[0.1], [0.2, 0.3], [0.4], [0.5]])
    cut = _run((Truncate(1),), JaggedTensor(inner, offsets=nested.offsets))
    assert cut.to_lists() == [[[4]], [[5]]]
    torch.testing.assert_close(cut.inner.weights, torch.tensor([0.4, 0.5]))
    with pytest.raises(DataError, match=r"row 0.*has 2 entries") as caught:
        _run((Truncate(1, level=1, strict=True),), nested)
    assert caught.value.row == 0
    words = _run((Truncate(1, drop="right"),), _ids(["a", "bc"], ["def"]))
    assert words.inner.to_strings() == [b"a", b"def"]


def test_flatten_joins_the_outer_levels():
    nested = _ids([[1], [2, 3]], [], [[4], []])
    assert _run((Flatten(),), nested).to_lists() == [[1, 2, 3], [], [4]]
    weighted = JaggedTensor(nested.inner, offsets=nested.offsets, weights=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert _run((Flatten(),), weighted).weights.tolist() == [1.0, 2.0, 2.0, 3.0]
    deep = _run((Truncate(1), Flatten()), nested)
    assert deep.to_lists() == [[2, 3], [], []]
