"""The engine as a whole: packing, sharing, order of calls, JSON, missing labels, empty batches, and bad input."""

import json
from unittest import mock

import pytest
import torch

from recis.errors import ConfigError, DataError
from recis.features import (
    Bucketize,
    Clip,
    Cross,
    Dedup,
    FeatureEngine,
    FeatureSpec,
    Hash,
    LastN,
    Log,
    Lookup,
    MinMax,
    Mod,
    MultiHash,
    Normalize,
    Sequence,
    TimeWindow,
    Truncate,
    run_ids,
)
from recis.features.spec import Kind
from recis.io.batch import RawBatch, RowOrigin
from recis.io.columns import Dense, Ids, Label, Strings
from recis.jagged import JaggedTensor


def _raw() -> RawBatch:
    columns = {
        "item": JaggedTensor.from_strings(["a", "b", "c"]),
        "tags": JaggedTensor.from_lists([["x", "y"], [], ["x"]]),
        "clicks": JaggedTensor.from_lists([[5, 3], [], [7]], weights=[[1.0, 2.0], [], [3.0]]),
        "user": torch.tensor([4, 5, 6]),
        "price": torch.tensor([1.0, 3.0, 7.0]),
        "vector": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        "click": torch.tensor([1.0, 0.0, 1.0]),
        "buy": torch.tensor([1.0, torch.nan, 0.0]),
        "importance": torch.tensor([1.0, 2.0, 0.5]),
        "row": torch.tensor([10, 11, 12]),
    }
    return RawBatch(columns=columns, num_samples=3)


def _features() -> list[FeatureSpec]:
    return [
        FeatureSpec(name="item", kind="sparse", ops=(Hash("farm", 1000),)),
        FeatureSpec(name="price", kind="dense", ops=(Log(), Normalize(1.0, 2.0))),
        FeatureSpec(name="clicks", kind="sparse"),
        FeatureSpec(name="vector", kind="dense"),
        FeatureSpec(name="user_id", kind="sparse", source="user"),
        FeatureSpec(name="click", kind="label"),
        FeatureSpec(name="buy", kind="label"),
        FeatureSpec(name="buy", kind="label_weight", source="importance"),
        FeatureSpec(name="w", kind="weight", source="importance"),
        FeatureSpec(name="session", kind="group", source="user"),
        FeatureSpec(name="row", kind="extra"),
    ]


def test_every_kind_has_its_place_in_the_batch():
    engine = FeatureEngine(_features())
    batch = engine.forward(_raw())
    assert engine.sparse_keys == batch.sparse.keys == ("item", "clicks", "user_id")
    assert engine.dense_keys == batch.dense_keys == ("price", "vector")
    assert engine.label_keys == ("click", "buy")
    assert batch.dense_widths == (1, 2)
    assert batch.dense.dtype == torch.float32
    torch.testing.assert_close(batch.dense_feature("price")[:, 0], (torch.tensor([2.0, 4.0, 8.0]).log() - 1) / 2)
    assert batch.dense_feature("vector").tolist() == [[1, 2], [3, 4], [5, 6]]
    assert batch.sparse["clicks"].to_lists() == [[5, 3], [], [7]]
    assert batch.sparse["user_id"].to_lists() == [[4], [5], [6]]
    assert batch.sparse.weights is not None
    assert batch.sparse.weights.tolist() == [1, 1, 1, 1, 2, 3, 1, 1, 1]  # features without weights count as ones
    assert batch.sparse.offsets.tolist() == [0, 1, 2, 3, 5, 5, 6, 7, 8, 9]
    assert batch.labels.tolist() == [[1, 1], [0, 0], [1, 0]]
    assert batch.label_mask is not None
    assert batch.label_mask.tolist() == [[True, True], [True, False], [True, True]]
    assert batch.label_weights is not None
    assert batch.label_weights.tolist() == [[1, 1], [1, 2], [1, 0.5]]
    assert batch.weights.tolist() == [1, 2, 0.5]
    assert batch.group_ids is not None
    assert batch.group_ids.tolist() == [4, 5, 6]
    row = batch.extras["row"]
    assert isinstance(row, torch.Tensor)
    assert row.tolist() == [10, 11, 12]


def test_defaults_where_nothing_is_asked_for():
    raw = _raw()
    batch = FeatureEngine([FeatureSpec(name="click", kind="label")]).forward(raw)
    assert batch.label_mask is None
    assert batch.label_weights is None
    assert batch.group_ids is None
    assert batch.weights.tolist() == [1, 1, 1]
    assert (batch.sparse.keys, batch.sparse.stride, batch.dense.shape) == ((), 3, (3, 0))
    assert FeatureEngine([]).forward(raw).labels.shape == (3, 0)


def test_label_masks_can_be_columns():
    raw = _raw()
    raw.columns["has_click"] = torch.tensor([1, 1, 0])  # type: ignore[index]
    features = [
        FeatureSpec(name="click", kind="label"),
        FeatureSpec(name="click", kind="label_mask", source="has_click"),
        FeatureSpec(name="buy", kind="label"),
    ]
    batch = FeatureEngine(features).forward(raw)
    assert batch.label_mask is not None
    assert batch.label_mask.tolist() == [[True, True], [True, False], [False, True]]
    assert batch.labels.tolist() == [[1, 1], [0, 0], [0, 0]]


def test_prediction_needs_no_labels():
    engine, raw = FeatureEngine(_features()), _raw()
    columns = {name: column for name, column in raw.columns.items() if name not in ("click", "buy", "importance")}
    data = RawBatch(columns=columns, num_samples=3)
    with pytest.raises(ConfigError, match="feature 'click' needs column 'click', which is missing"):
        engine.forward(data)
    batch = engine.forward(data, labels=False)
    assert batch.labels.shape == (3, 0)
    assert torch.equal(batch.dense, engine.forward(raw).dense)
    assert set(engine.required_columns()) - set(engine.required_columns(labels=False)) == {"click", "buy", "importance"}


def test_equal_ops_of_many_features_are_one_call():
    features = [
        FeatureSpec(name=f"{name}_{n}", kind="sparse", source=name, ops=(Hash("farm"), Mod(n)))
        for name in ("item", "tags")
        for n in (10, 100)
    ]
    with (
        mock.patch.object(run_ids, "hash_strings", wraps=run_ids.hash_strings) as hashes,
        mock.patch.object(run_ids, "id_mod", wraps=run_ids.id_mod) as mods,
    ):
        batch = FeatureEngine(features).forward(_raw())
    assert hashes.call_count == mods.call_count == 1
    assert hashes.call_args.args[2] == (0, 3, 6)  # each column once, though two features use it
    assert mods.call_args.args[2] == [10, 10, 100, 100] or mods.call_args.args[2] == [10, 100, 10, 100]
    assert torch.equal(batch.sparse["item_10"].flat_values, batch.sparse["item_100"].flat_values % 10)


def test_many_features_equal_each_by_itself():
    raw = _raw()
    chains = {
        "item": (Hash("murmur"), Mod(97)),
        "tags": (Hash("farm", 0), Truncate(1)),
        "clicks": (Truncate(1), Mod(4)),
        "user": (Hash("farm"), Mod(5)),
        "price": (Clip(0, 5), Bucketize((1, 2, 4))),
        "vector": (MinMax(1, 3), Bucketize((0.5,))),
    }
    features = [FeatureSpec(name=name, kind="sparse", ops=ops) for name, ops in chains.items()]
    together = FeatureEngine(features).forward(raw).sparse
    for spec in features:
        alone = FeatureEngine([spec]).forward(raw).sparse[spec.name]
        assert together[spec.name].to_lists() == alone.to_lists()
    assert together["vector"].to_lists() == [[0, 1], [1, 1], [1, 1]]


def test_inputs_are_never_changed():
    raw = _raw()
    before = {name: column.clone() for name, column in raw.columns.items() if isinstance(column, torch.Tensor)}
    clicks = raw.columns["clicks"]
    assert isinstance(clicks, JaggedTensor)
    ids = clicks.flat_values.clone()
    FeatureEngine(_features()).forward(raw)
    FeatureEngine([FeatureSpec(name="price", kind="dense", ops=(Clip(2, 3), Log()))]).forward(raw)
    for name, column in before.items():
        torch.testing.assert_close(raw.columns[name], column, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(clicks.flat_values, ids)


def test_crosses_take_finished_and_hidden_features():
    features = [
        FeatureSpec(name="x", kind="sparse", ops=(Cross("tag_ids", "user", num_buckets=50),)),
        FeatureSpec(name="tag_ids", kind="hidden", source="tags", ops=(Hash("farm"),)),
        FeatureSpec(name="xx", kind="sparse", ops=(Cross("x", "clicks"),)),
    ]
    batch = FeatureEngine(features).forward(_raw())
    assert batch.sparse.keys == ("x", "xx")
    assert batch.sparse["x"].lengths.tolist() == [2, 0, 1]
    assert batch.sparse["xx"].lengths.tolist() == [4, 0, 1]
    assert batch.sparse.weights is not None
    assert batch.sparse["xx"].weights is not None
    assert batch.sparse["xx"].weights.tolist() == [1, 2, 1, 2, 3]  # the clicks' weights


def test_weights_from_a_column_of_their_own():
    raw = _raw()
    raw.columns["tag_scores"] = JaggedTensor.from_lists([[0.5, 0.25], [], [2.0]])  # type: ignore[index]
    spec = FeatureSpec(name="tags", kind="sparse", weights="tag_scores", ops=(Hash(), Truncate(1, drop="right")))
    batch = FeatureEngine([spec]).forward(raw)
    assert batch.sparse.weights is not None
    assert batch.sparse.weights.tolist() == [0.5, 2.0]
    raw.columns["tag_scores"] = JaggedTensor.from_lists([[0.5], [], [2.0]])  # type: ignore[index]
    with pytest.raises(ConfigError, match="one number per entry of 'tags', 3 in all"):
        FeatureEngine([spec]).forward(raw)


def test_integers_as_dense_features_keep_their_digits():
    time_ms = torch.tensor([1_760_000_000_123, 1_760_000_000_001])
    spec = FeatureSpec(name="t", kind="dense", ops=(Normalize(1_760_000_000_000.0, 1.0),))
    batch = FeatureEngine([spec]).forward(RawBatch(columns={"t": time_ms}, num_samples=2))
    assert batch.dense.tolist() == [[123.0], [1.0]]


def test_int32_columns_become_int64():
    ids = JaggedTensor(torch.tensor([1, -1], dtype=torch.int32), offsets=torch.tensor([0, 1, 2], dtype=torch.int32))
    batch = FeatureEngine([FeatureSpec(name="i", kind="sparse", ops=(Mod(10),))]).forward(
        RawBatch(columns={"i": ids}, num_samples=2)
    )
    assert batch.sparse.values.tolist() == [1, 5]
    assert batch.sparse.lengths.dtype == torch.int64


ALL_OPS = [
    FeatureSpec(name="a", kind="hidden", source="s", ops=(Hash("murmur", 7), Mod(5))),
    FeatureSpec(name="b", kind="sparse", source="f", ops=(Clip(None, 3.0), MinMax(0.0, 2.0), Bucketize((0.5, 1.5)))),
    FeatureSpec(name="c", kind="sparse", ops=(Cross("a", "ids", 0), Truncate(3, drop="right", strict=True))),
    FeatureSpec(name="ids", kind="sparse", ops=(Sequence(Dedup(by="ids")), Sequence(LastN(4)), MultiHash((10, 20)))),
    FeatureSpec(
        name="d",
        kind="sparse",
        source="ids",
        weights="scores",
        ops=(Sequence(TimeWindow(9, time="t", now="n", unit="ms")),),
    ),
    FeatureSpec(name="e", kind="extra", source="s", ops=(Lookup({"x": 1, "y": -2}, unknown=-1),)),
    FeatureSpec(name="f", kind="dense", ops=(Log(0.5), Normalize(1.0, 2.0))),
]


def test_json_round_trip():
    without_circle = [spec for spec in ALL_OPS if spec.name != "c"]
    engine = FeatureEngine(without_circle)
    data = json.loads(json.dumps(engine.to_json()))
    again = FeatureEngine.from_json(data)
    assert again.features == engine.features
    assert again.to_json() == engine.to_json()
    for spec in ALL_OPS:
        assert FeatureSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    full = FeatureEngine(_features())
    one, other = full.forward(_raw()), FeatureEngine.from_json(full.to_json()).forward(_raw())
    assert torch.equal(one.sparse.values, other.sparse.values)
    assert torch.equal(one.dense, other.dense)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": "other"}, "no feature engine"),
        ({"version": 99}, "version 99, this program knows up to 1"),
        ({"features": [{"name": "a", "kind": "sparse", "ops": [{"op": "Hsh"}]}]}, "no op 'Hsh'; did you mean 'Hash'"),
        ({"features": [{"name": "a", "kind": "sparse", "ops": [{"op": "Mod", "m": 3}]}]}, "op Mod has no field 'm'"),
        ({"features": [{"name": "a", "kind": "sparse", "ops": [{"op": "Mod"}]}]}, "op Mod: .*missing"),
        ({"features": [{"name": "a", "kind": "spars", "ops": []}]}, "no kind 'spars'; did you mean 'sparse'"),
        ({"features": [{"name": "a", "kind": "sparse", "sourc": "b"}]}, "has no field 'sourc'; did you mean 'source'"),
    ],
    ids=str,
)
def test_damaged_json_is_refused(change, text):
    data = FeatureEngine([FeatureSpec(name="a", kind="sparse")]).to_json() | change
    with pytest.raises(ConfigError, match=text):
        FeatureEngine.from_json(data)


@pytest.mark.parametrize("num_samples", [0, 3])
def test_empty_batches_and_empty_bags(num_samples):  # B24
    columns = {
        "s": JaggedTensor.from_lists([[]] * num_samples),
        "words": JaggedTensor(JaggedTensor.from_strings([]), lengths=torch.zeros(num_samples, dtype=torch.int64)),
        "ids": JaggedTensor.from_lists([[]] * num_samples),
        "scores": JaggedTensor.from_lists([[]] * num_samples, dtype=torch.float32),
        "t": JaggedTensor.from_lists([[]] * num_samples),
        "n": torch.zeros(num_samples, dtype=torch.int64),
        "f": torch.ones(num_samples),
        "y": torch.zeros(num_samples),
    }
    features = [
        *(spec for spec in ALL_OPS if spec.name not in ("c", "e")),
        FeatureSpec(name="x", kind="sparse", ops=(Cross("s", "t"), Truncate(2))),
        FeatureSpec(name="words", kind="sparse", ops=(Hash(), Lookup({1: 1}), Truncate(1))),
        FeatureSpec(name="y", kind="label"),
    ]
    batch = FeatureEngine(features).forward(RawBatch(columns=columns, num_samples=num_samples))
    assert batch.num_samples == batch.sparse.stride == num_samples
    assert batch.sparse.lengths.numel() == num_samples * len(batch.sparse.keys)
    assert batch.dense.shape == (num_samples, 1)
    assert batch.labels.shape == (num_samples, 1)
    assert batch.label_mask is None
    assert batch.sparse["x"].to_lists() == [[]] * num_samples


def test_log_names_feature_file_and_row():
    origin = RowOrigin(
        units=[("a.parquet", "row group 7")], unit=torch.zeros(3, dtype=torch.int32), row=torch.arange(40, 43)
    )
    raw = RawBatch(columns={"cost": torch.tensor([1.0, -1.0, 2.0])}, num_samples=3, origin=origin)
    engine = FeatureEngine([FeatureSpec(name="log_cost", kind="dense", source="cost", ops=(Log(1.0),))])
    with pytest.raises(DataError, match="Log needs x \\+ offset above 0") as caught:
        engine.forward(raw)
    error = caught.value
    assert (error.file, error.unit, error.row, error.column, error.value) == (
        "a.parquet",
        "row group 7",
        41,
        "cost",
        -1.0,
    )
    assert "log_cost" in str(error)
    assert "Clip" in str(error)
    lists = RawBatch(columns={"cost": JaggedTensor.from_lists([[1.0], [2.0, -3.0], []])}, num_samples=3)
    spec = FeatureSpec(name="c", kind="extra", source="cost", ops=(Log(),))
    with pytest.raises(DataError) as caught:
        FeatureEngine([spec]).forward(lists)
    assert (caught.value.row, caught.value.value) == (1, -3.0)


def _spec(*ops, kind: Kind = "sparse", name: str = "x", **fields) -> FeatureSpec:
    return FeatureSpec(name=name, kind=kind, ops=ops, **fields)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: [_spec(name="a"), _spec(name="a", kind="dense")], "two features are called 'a'"),
        (lambda: [_spec(MultiHash((5, 5)), name="a"), _spec(name="a_multi_hash_1")], "two features are called"),
        (lambda: [_spec(name="y", kind="label"), _spec(name="z", kind="label_mask")], "belongs to no label"),
        (lambda: [_spec(name="a", kind="weight"), _spec(name="b", kind="weight")], "one weight; got 2"),
        (lambda: [_spec(Mod(5), Cross("a", "b"))], "so it stands first; it stands at 1"),
        (lambda: [_spec(MultiHash((5,)), Mod(5))], "so it stands last; it stands at 0"),
        (lambda: [_spec(MultiHash((5,)), kind="extra")], "MultiHash makes sparse features"),
        (lambda: [_spec(Cross("a", "b"), source="a")], "leave source and weights out"),
        (lambda: [_spec(Cross("y", "b"), name="x"), _spec(Cross("x", "b"), name="y")], "circle: x -> y -> x"),
        (lambda: [_spec(Cross("m", "b")), _spec(MultiHash((5, 5)), name="m")], "MultiHash makes 2 features"),
        (lambda: [_spec("Hash")], "op 0 is 'Hash'"),
        (lambda: [_spec(Log(), Hash())], "takes string or ids, not numbers; Bucketize makes ids"),
        (lambda: [_spec(Log())], r"\(sparse\) takes ids, not numbers"),
        (lambda: [_spec(Normalize(0, 1), Lookup({"a": 1}))], "Lookup takes string or ids"),
        (lambda: [_spec(Hash(), Lookup({"a": 1}))], "Lookup takes strings, not ids"),
        (lambda: [_spec(Truncate(2, pad=True), Sequence(Dedup(by="k")))], "put Sequence first"),
        (lambda: [FeatureSpec(name="", kind="sparse")], "non-empty string"),
    ],
    ids=range(17),
)
def test_chains_are_checked_when_they_are_built(make, text):
    with pytest.raises(ConfigError, match=text):
        FeatureEngine(make())


COLUMNS = (
    Ids("item_id"),
    Strings("title"),
    Dense("price"),
    Dense("vector", width=3),
    Ids("nested", depth=2),
    Label("y"),
)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (_spec(name="item_idd"), "needs column 'item_idd', which is missing; did you mean 'item_id'"),
        (_spec(name="title"), r"'title' \(sparse\) takes ids, not one string per sample; end the chain with Hash"),
        (_spec(name="title", kind="dense"), "takes number or ids, not one string per sample"),
        (_spec(Mod(5), name="price"), "Mod takes ids, not one number per sample; put a Hash before it"),
        (_spec(Truncate(3), name="price"), "Truncate needs lists of values per sample"),
        (_spec(Truncate(3, pad=True), name="item_id"), "with pad=True needs lists of lists of values"),
        (_spec(name="nested"), r"add Flatten\(\)"),
        (_spec(Cross("nested", "item_id")), r"add Flatten\(\) there"),
        (_spec(name="item_id", kind="dense"), "takes one value per sample, not lists of ids"),
        (_spec(name="vector", kind="label"), "takes one value per sample, not 3 numbers per sample"),
        (_spec(name="price", kind="group"), r"\(group\) takes ids"),
        (_spec(Sequence(Dedup(by="title")), name="item_id"), "column 'title' takes ids"),
        (_spec(Sequence(Dedup(by="id")), name="item_id"), "needs column 'id', which is missing"),
        (_spec(Sequence(Dedup()), name="nested"), "compares ids, not lists of lists of ids"),
        (_spec(Sequence(TimeWindow(5, time="price", now="y")), name="item_id"), "'price' must be lists of times"),
        (_spec(Sequence(TimeWindow(5, time="item_id", now="vector")), name="item_id"), "'vector' takes one value"),
        (_spec(name="item_id", weights="title"), "weights column 'title' must hold numbers"),
    ],
    ids=range(17),
)
def test_chains_are_checked_against_declared_columns(spec, text):
    with pytest.raises(ConfigError, match=text):
        FeatureEngine([spec], columns=COLUMNS)


def test_ids_are_numbers_where_numbers_are_asked_for():
    features = [
        _spec(Bucketize((5, 6)), name="bucket", source="user", kind="dense"),
        _spec(Cross("user", "item"), name="user", kind="sparse"),  # its own name means the column
        _spec(Hash(), name="item", kind="hidden"),
    ]
    batch = FeatureEngine(features).forward(_raw())
    assert batch.dense.tolist() == [[0.0], [1.0], [2.0]]
    assert batch.sparse["user"].lengths.tolist() == [1, 1, 1]


def test_columns_that_arrive_otherwise_are_named():
    engine = FeatureEngine([_spec(Mod(5), name="a")])
    good = RawBatch(columns={"a": JaggedTensor.from_lists([[1]])}, num_samples=1)
    assert engine.forward(good).sparse.values.tolist() == [1]
    with pytest.raises(ConfigError, match="Mod takes ids, not one number per sample"):
        engine.forward(RawBatch(columns={"a": torch.ones(1)}, num_samples=1))
    with pytest.raises(ConfigError, match="column 'a' has 1 rows; the batch has 2"):
        engine.forward(RawBatch(columns=good.columns, num_samples=2))
    with pytest.raises(ConfigError, match=r"needs column 'a', which is missing; .* 'aa'"):
        engine.forward(RawBatch(columns={"aa": torch.ones(1)}, num_samples=1))
    assert engine.forward(good).sparse.values.tolist() == [1]


class _DeviceFlag:
    """Stands for a flag on a GPU: it may be read, but only when a whole step has passed."""

    device = torch.device("cuda")

    def __init__(self, is_set: bool) -> None:
        self.is_set, self.was_read = is_set, False

    def __bool__(self) -> bool:
        self.was_read = True
        return self.is_set


def test_faults_on_a_gpu_are_read_one_forward_later():
    engine = FeatureEngine([_spec(Mod(5), name="a")])
    good, bad = _DeviceFlag(False), _DeviceFlag(True)
    for flag in (good, bad):
        engine._faults.check(flag, lambda: DataError("late", row=3))  # type: ignore[arg-type]
    assert not good.was_read
    assert not bad.was_read
    raw = RawBatch(columns={"a": JaggedTensor.from_lists([[1]])}, num_samples=1)
    with pytest.raises(DataError, match="late"):
        engine.forward(raw)
    assert engine.forward(raw).sparse.values.tolist() == [1]  # reported once
