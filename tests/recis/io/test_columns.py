"""Column kinds by hand: what becomes which tensor, defaults for nulls, no copies, JSON."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from io_data import make_config

from recis.errors import ConfigError
from recis.io import (
    Csv,
    DataConfig,
    Dense,
    Floats,
    Follow,
    Group,
    Ids,
    Integer,
    Label,
    Reader,
    Strings,
    TimeWindow,
    Weight,
)
from recis.io.batch import RawBatch
from recis.io.columns import from_json, to_json
from recis.io.decode import decode


def read(tmp_path, columns, **data):
    """One batch that holds all rows."""
    pq.write_table(pa.table(data), tmp_path / "a.parquet")
    with Reader(make_config(tmp_path, columns=columns, batch_size=64, num_lanes=1)) as reader:
        batch = next(reader)
        assert next(reader, None) is None
    return batch


def test_numbers(tmp_path):
    got = read(
        tmp_path,
        (
            Dense("a"),
            Dense("b", default=-1.0),
            Dense("c", nonfinite=0.0),
            Dense("d", width=2, default=5.0),
            Dense("flag"),
            Label("y"),
            Label("z", optional=True),
            Label("stars", low=1, high=5),
            Weight("w", default=1.0),
            Group("g"),
            Integer("when"),
        ),
        a=[1, 2, 3],
        b=[0.5, None, 2.0],
        c=[math.nan, math.inf, 2.5],
        d=[[1.0, 2.0], None, [3.0, None]],
        flag=[True, False, True],
        y=[0, 1, 1],
        z=[0.0, None, 1.0],
        stars=[1.0, 5.0, 2.5],
        w=[0.0, None, 2.0],
        g=[2**40, -1, 0],
        when=pa.array([1, 2, 3], pa.timestamp("ms")),
    )
    assert got.tensor("a").dtype == torch.float32
    assert got.tensor("a").tolist() == [1, 2, 3]
    assert got.tensor("b").tolist() == [0.5, -1, 2]
    assert got.tensor("c").tolist() == [0, 0, 2.5]
    assert got.tensor("d").tolist() == [[1, 2], [5, 5], [3, 5]]
    assert got.tensor("flag").tolist() == [1, 0, 1]
    assert got.tensor("y").tolist() == [0, 1, 1]
    assert torch.equal(got.tensor("z").isnan(), torch.tensor([False, True, False]))
    assert got.tensor("stars").tolist() == [1, 5, 2.5]
    assert got.tensor("w").tolist() == [0, 1, 2]
    assert (got.tensor("g").dtype, got.tensor("g").tolist()) == (torch.int64, [2**40, -1, 0])
    assert got.tensor("when").tolist() == [1, 2, 3]


def test_ids(tmp_path):
    got = read(
        tmp_path,
        (
            Ids("one"),
            Ids("empty", default=(), source="nullable"),
            Ids("filled", default=(9, 8), source="nullable"),
            Ids("single", default=(7,), source="nullable"),
            Ids("list", default=(3,)),
            Ids("holes", drop_nulls=True),
            Ids("nested", depth=2, default=()),
            Ids("weighted", weights="scores"),
            Ids("unsigned"),
        ),
        one=pa.array([5, -6, 7], pa.int32()),
        nullable=[1, None, 2],
        list=[[1, 2], None, []],
        holes=[[1, None, 2], [None], [3]],
        nested=[[[1], [], [2, 3]], [], [None, [4]]],
        weighted=[[1, 2], [], [3]],
        scores=[[0.5, 1.0], [], [2.0]],
        unsigned=pa.array([2**64 - 1, 2**63, 1], pa.uint64()),
    )
    assert got.jagged("one").to_lists() == [[5], [-6], [7]]
    assert got.jagged("empty").to_lists() == [[1], [], [2]]
    assert got.jagged("filled").to_lists() == [[1], [9, 8], [2]]
    assert got.jagged("single").to_lists() == [[1], [7], [2]]
    assert got.jagged("list").to_lists() == [[1, 2], [3], []]
    assert got.jagged("holes").to_lists() == [[1, 2], [], [3]]
    assert got.jagged("nested").to_lists() == [[[1], [], [2, 3]], [], [[], [4]]]
    assert got.jagged("weighted").to_lists() == [[1, 2], [], [3]]
    weights = got.jagged("weighted").weights
    assert weights is not None
    assert weights.tolist() == [0.5, 1.0, 2.0]
    assert got.jagged("unsigned").to_lists() == [[-1], [-(2**63)], [1]]
    assert all(got.jagged(name).offsets.dtype == torch.int64 for name in got.columns)


def test_floats_and_strings(tmp_path):
    got = read(
        tmp_path,
        (
            Floats("f", default=(0.5,), nonfinite=-1.0),
            Floats("ff", depth=2),
            Strings("s", default="none"),
            Strings("ss", depth=1, default=("x", "yz"), drop_nulls=True),
            Strings("sss", depth=2),
            Strings("raw", utf8=False),
        ),
        f=[[1.0, math.nan, None], None, []],
        ff=[[[1.0], []], [], [[2.0, 3.0]]],
        s=["a", None, "çé"],
        ss=[["a", None, ""], None, []],
        sss=[[["a"], []], [], [["b", "c"]]],
        raw=pa.array([b"\xff", b"", b"ok"]),
    )
    assert got.jagged("f").to_lists() == [[1, -1, -1], [0.5], []]
    assert got.jagged("ff").to_lists() == [[[1], []], [], [[2, 3]]]
    assert got.jagged("s").to_strings() == [b"a", b"none", "çé".encode()]
    assert got.jagged("ss").lengths.tolist() == [2, 2, 0]
    assert got.jagged("ss").inner.to_strings() == [b"a", b"", b"x", b"yz"]
    assert got.jagged("sss").inner.inner.to_strings() == [b"a", b"b", b"c"]
    assert got.jagged("raw").to_strings() == [b"\xff", b"", b"ok"]


def test_a_batch_without_rows_has_every_column():
    columns = (Ids("a"), Ids("n", depth=2), Dense("d", width=3), Strings("s"), Label("y"))
    nested = pa.list_(pa.list_(pa.int64()))
    fields = [
        ("a", pa.list_(pa.int64())),
        ("n", nested),
        ("d", pa.list_(pa.float32())),
        ("s", pa.binary()),
        ("y", pa.float32()),
    ]
    columns_read, faults = decode(pa.RecordBatch.from_pylist([], pa.schema(fields)), columns)
    assert not faults
    got = RawBatch(columns=columns_read, num_samples=0)
    assert got.tensor("d").shape == (0, 3)
    assert got.jagged("n").to_lists() == []
    assert [got.jagged(name).num_bags for name in ("a", "n", "s")] == [0, 0, 0]


def test_buffers_are_shared_with_arrow():
    floats, ids = pa.array([1.0, 2.0, 3.0], pa.float32()), pa.array([[1], [2, 3], []])
    words, vectors = pa.array([b"ab", b"c", b""]), pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32()))
    names = ["f", "i", "w", "v"]
    batch = pa.RecordBatch.from_arrays([floats, ids, words, vectors], names=names).slice(1)
    columns, _ = decode(batch, (Dense("f"), Ids("i"), Strings("w"), Dense("v", width=2)))
    got = RawBatch(columns=columns, num_samples=2)
    assert got.tensor("f").data_ptr() == floats.buffers()[1].address + 4
    assert got.jagged("i").flat_values.data_ptr() == ids.values.buffers()[1].address + 8
    assert got.jagged("w").flat_values.data_ptr() == words.buffers()[2].address + 2
    assert got.tensor("v").data_ptr() == vectors.values.buffers()[1].address + 8
    assert got.jagged("i").to_lists() == [[2, 3], []]
    assert got.jagged("w").to_strings() == [b"c", b""]


@pytest.mark.parametrize(
    "column",
    [
        Ids("a"),
        Ids("a", depth=2, default=(), source="b"),
        Ids("a", default=(1, 2), weights=None, drop_nulls=True),
        Dense("a", width=3, default=0.5, nonfinite=0.0),
        Strings("a", depth=1, default=("x",), utf8=False),
        Label("a", low=None, high=5.0, optional=True),
        Floats("a"),
        Weight("a", default=1.0),
        Group("a"),
        Integer("a", default=-1),
    ],
    ids=repr,
)
def test_columns_round_trip_through_json(column):
    assert from_json(to_json(column)) == column


def test_config_round_trips_through_json():
    columns = (Ids("a", default=()), Dense("b"), Label("y"))
    for changes in (
        {},
        {"follow": Follow(stop_after_idle_s=3.0)},
        {"window": TimeWindow(start=0, stop=100, seconds=10, column="t", unit="ms")},
        {"format": "csv", "csv": Csv(delimiter="\t", column_names=("a", "b", "y"))},
    ):
        config = make_config("x", columns=columns, **changes)
        assert DataConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dense("a", width=0), "column 'a': width must be at least 1; got 0"),
        (lambda: Ids("a", depth=0), "column 'a': depth must be at least 1; got 0"),
        (lambda: Ids("a", depth=2, default=(1,)), r"a nested list's default can only be \(\); got \(1,\)"),
        (lambda: Ids("a", weights="w", drop_nulls=True), "drop_nulls would part the ids from their weights"),
        (lambda: Strings("a", default=("b",)), "the default of one string is a string"),
        (lambda: Strings("a", depth=1, default="b"), "the default of a list is a tuple"),
        (lambda: Label("a", low=2), "low must not be above high; got 2 and 1.0"),
        (lambda: make_config("x", columns=()), "columns must name at least one column"),
        (
            lambda: make_config("x", columns=(Ids("a"), Dense("a"))),
            r"column 'a' is given twice; rename one: Dense\(name, so",
        ),
        (lambda: make_config("x", columns=("a",)), "columns must be Dense, Ids, .*; got 'a'"),
        (lambda: make_config("x", columns=(Ids("__recis_row__"),)), "must not be empty or begin with '__recis_'"),
        (
            lambda: make_config("x", format="parqet"),
            "format must be one of parquet, orc, csv, jsonl.*'parqet'.*did you mean 'parquet'",
        ),
        (lambda: make_config("x", paths=()), "paths must name at least one file"),
        (lambda: make_config("x", paths="x"), "paths must be a tuple of strings; got 'x'"),
        (lambda: make_config("x", batch_size=0), "batch_size must be at least 1; got 0"),
        (lambda: make_config("x", seed=2**64), r"seed must be below 2\*\*64"),
        (lambda: make_config("x", on_bad_row="drop"), "on_bad_row must be 'raise' or 'skip'; got 'drop'"),
        (lambda: make_config("x", follow=Follow(), epochs=2), "follow reads each file once"),
        (
            lambda: make_config("x", follow=Follow(), window=TimeWindow(start=0, stop=1, seconds=1)),
            "window and follow cannot be combined",
        ),
        (lambda: make_config("x", format="csv", columns=(Ids("a", depth=2),)), "CSV has no nested lists"),
        (lambda: make_config("x", format="csv", columns=(Strings("a", depth=2),)), "CSV has no nested lists"),
        (lambda: TimeWindow(start=5, stop=5, seconds=1), "stop must be after start; got start=5, stop=5"),
        (lambda: TimeWindow(start=0, stop=5, seconds=0), "seconds must be at least 1"),
        (lambda: Csv(delimiter="||"), "delimiter must be one character"),
        (lambda: Csv(delimiter="|"), "delimiter and list_separator must differ"),
        (lambda: Follow(closed="soon"), "closed must be 'done' or 'stable'; got 'soon'"),  # type: ignore[arg-type]
        (lambda: DataConfig.from_json({"batch_sise": 1}), "no field 'batch_sise'; did you mean 'batch_size'"),
        (lambda: from_json({"kind": "Dence", "name": "a"}), "no column kind 'Dence'; did you mean 'Dense'"),
        (
            lambda: from_json({"kind": "Dense", "name": "a", "with": 1}),
            "Dense has no field 'with'; did you mean 'width'",
        ),
    ],
)
def test_settings_that_break_a_rule_say_so(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
