"""Bad input: one line that names file, unit, row, column, value and the way out; nothing else is disturbed."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from io_data import make_config, read_all, rows_table, write_format, write_row_groups

from recis.errors import ConfigError, DataError
from recis.io import Csv, Dense, Floats, Group, Ids, Integer, Label, Reader, Strings, Weight
from recis.io.arrow_types import has_negative_lengths


def write(path, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def fails(path, *columns, **changes):
    """The error of reading a file to its end."""
    with pytest.raises(DataError) as caught:
        read_all(make_config(path, columns=(Ids("row"), *columns), **changes))
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_value_is_named_with_its_place(tmp_path):
    path = write(tmp_path / "a.parquet", row=[0, 1, 2, 3], x=[0.0, 1.0, 2.0, math.nan])
    error = fails(path, Dense("x"))
    assert str(error) == (
        f"{path}, row group 1, row 1, column 'x', value nan: NaN or infinite in a dense column; "
        "set Dense('x', nonfinite=0.0) to replace such values, or set on_bad_row='skip' to leave such rows out"
    )
    assert (error.file, error.unit, error.row, error.column) == (str(path), "row group 1", 1, "x")
    assert math.isnan(error.value)  # type: ignore[arg-type]
    assert "nonfinite" in str(error.option)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (Dense("x"), [0.0, math.inf], r"row 1, column 'x', value inf: NaN or infinite"),
        (Dense("x"), [0.0, 1e300], r"row 1, column 'x', value inf: NaN or infinite"),
        (Dense("x"), [0.0, None], r"row 1, column 'x': a null, and the column has no default; set default=... for 'x'"),
        (Dense("x", width=2), [[1.0, 2.0], [1.0]], r"value 1: a list must have 2 numbers; set Dense\('x', width=1\)"),
        (Dense("x", width=2), [[1.0, 2.0], [1.0, math.nan]], r"row 1, column 'x', value nan: NaN or infinite"),
        (Dense("x", width=2), [[1.0, 2.0], None], r"row 1, column 'x': a null, and the column has no default"),
        (
            Label("x"),
            [0.0, 1.5],
            r"row 1, column 'x', value 1.5: label outside \[0.0, 1.0\]; set Label\('x', low=..., high=",
        ),
        (Label("x", low=None), [0.0, -math.inf], r"value -inf: label outside \[-inf, 1.0\]"),
        (Label("x"), [0.0, math.nan], r"row 1, column 'x', value nan: label outside"),
        (Label("x"), [0, None], r"row 1, column 'x': a null"),
        (Weight("x"), [1.0, -0.5], r"row 1, column 'x', value -0.5: a weight must be finite and not negative"),
        (Group("x"), [1, None], r"row 1, column 'x': a null"),
        (Ids("x"), [1, None], r"row 1, column 'x': a null"),
        (Ids("x"), [[1], [2, None]], r"row 1, column 'x': a null inside a list; set Ids\('x', drop_nulls=True\)"),
        (Ids("x"), [[1], None], r"row 1, column 'x': a null"),
        (Ids("x", depth=2), [[[1]], [[2], [None]]], r"row 1, column 'x': a null inside a list"),
        (
            Floats("x"),
            [[1.0], [2.0, math.nan]],
            r"row 1, column 'x', value nan: NaN or infinite inside a list; set Floats",
        ),
        (Strings("x"), ["a", None], r"row 1, column 'x': a null"),
        (
            Strings("x"),
            [b"a", b"\xff\xfe"],
            r"value b'\\xff\\xfe': bytes that are no UTF-8; set Strings\('x', utf8=False\)",
        ),
        (
            Strings("x", depth=1),
            [[b"a"], [b"b", b"\xff"]],
            r"row 1, column 'x', value b'\\xff': bytes that are no UTF-8",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_rows_that_break_their_columns_rule(tmp_path, column, values, message):
    path = write(tmp_path / "a.parquet", row=[0, 1], x=values)
    with pytest.raises(DataError, match=message):
        read_all(make_config(path, columns=(Ids("row"), column)))


def test_weights_that_do_not_go_with_their_ids(tmp_path):
    path = write(tmp_path / "a.parquet", row=[0, 1], x=[[1], [2, 3]], w=[[0.5], [0.5]])
    assert "row 1, column 'x', value 1: 2 ids but 1 weights; give one weight per id" in str(
        fails(path, Ids("x", weights="w"))
    )
    path = write(tmp_path / "a.parquet", row=[0, 1], x=[[1], [2, 3]], w=[[0.5], [0.5, math.nan]])
    assert "row 1, column 'x', value nan: NaN or infinite inside a list" in str(fails(path, Ids("x", weights="w")))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (Ids("x"), [1.5], r"column 'x': Ids cannot be read from type double; read it as Dense\('x'\)"),
        (Ids("x"), ["a"], r"Ids cannot be read from type string; read it as Strings\('x'\) and hash it"),
        (Ids("x"), [[[1]]], r"Ids cannot be read from type list<.*; read it as Ids\('x', depth=2\)"),
        (Dense("x"), ["a"], r"Dense cannot be read from type string; read it as Strings"),
        (Dense("x"), [[1.0]], r"Dense cannot be read from type list<.*>; read it as Floats\('x', depth=1\)"),
        (Dense("x", width=2), [1.0], r"Dense cannot be read from type double; read it as Dense\('x'\)"),
        (
            Strings("x"),
            [1],
            r"Strings cannot be read from type int64; read it as Ids\('x'\), Integer\('x'\) or Dense\('x'\)",
        ),
        (Strings("x", depth=1), ["a"], r"read it as Strings\('x'\)"),
        (Group("x"), ["a"], r"Group cannot be read from type string"),
        (Integer("x"), [1.5], r"Integer cannot be read from type double"),
        (Floats("x"), [1.5], r"Floats cannot be read from type double; read it as Dense\('x'\)"),
        (Ids("x"), [{"a": 1}], r"Ids cannot be read from type struct<a: int64>; no column kind reads this type"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_types_are_found_before_anything_is_read(tmp_path, column, values, message):
    path = write(tmp_path / "a.parquet", row=[0], x=values)
    with pytest.raises(DataError, match=message):
        Reader(make_config(path, columns=(Ids("row"), column)))


def test_types_that_differ_between_files(tmp_path):
    write(tmp_path / "a.parquet", row=[0])
    write(tmp_path / "b.parquet", row=[[0]])
    with pytest.raises(
        DataError, match=r"b.parquet, column 'row': type list<.*> here does not go with int64 in .*a.parquet"
    ):
        Reader(make_config(tmp_path))


@pytest.mark.parametrize("format_name", ["parquet", "orc", "csv", "jsonl"])
def test_missing_columns_suggest_near_names(tmp_path, format_name):
    path = write_format(tmp_path / f"a.{format_name}", rows_table(0, 3), format_name)
    with pytest.raises(DataError, match=r"a\.\w+, column 'prise': .*; did you mean 'price'\?"):
        Reader(make_config(path, format=format_name, columns=(Dense("prise"),)))


@pytest.mark.parametrize("format_name", ["parquet", "orc"])
def test_damaged_files(tmp_path, format_name):
    path = write_format(tmp_path / f"a.{format_name}", rows_table(0, 300), format_name)
    content = path.read_bytes()
    config = make_config(path, format=format_name, columns=(Ids("row"), Strings("word")))
    for damaged in (content[: len(content) // 2], b"not a file of this format", content[:-20] + bytes(20)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a.{format_name}: cannot be read as \w+: .*; write the file again"):
            Reader(config)


def test_a_damaged_page_is_named_when_it_is_reached(tmp_path):
    path = tmp_path / "a.parquet"
    table = rows_table(0, 3000)
    pq.write_table(table, path, row_group_size=1000, compression="none", write_page_checksum=True, use_dictionary=False)
    content = bytearray(path.read_bytes())
    place = content.find((2502).to_bytes(8, "little") + (2503).to_bytes(8, "little"))
    content[place] ^= 0xFF
    path.write_bytes(content)
    with Reader(make_config(path, num_lanes=1, batch_size=500, prefetch_batches=3)) as reader:
        for _ in range(4):
            next(reader)  # what comes before the damage is delivered
        before = reader.state_dict()
        for _ in range(2):  # asking again does not get past it
            with pytest.raises(DataError, match=r"a.parquet, row group 2: cannot be read as Parquet: .*"):
                next(reader)
        assert reader.state_dict() == before


@pytest.mark.parametrize("format_name", ["parquet", "orc", "csv", "jsonl"])
def test_empty_and_absent_files(tmp_path, format_name):
    columns = (Ids("row"),)
    config = make_config(tmp_path / "none", format=format_name, columns=columns)
    with pytest.raises(
        DataError, match=rf"none: no {format_name} file there; give a file, a folder with \*\.\w+, or a glob"
    ):
        Reader(config)
    with pytest.raises(DataError, match=r"\*\.x: no"):
        Reader(make_config(tmp_path / "*.x", format=format_name, columns=columns))
    path = tmp_path / f"a.{format_name}"
    path.touch()
    with pytest.raises(DataError, match=r"a\.\w+: the file is empty \(0 bytes\)"):
        Reader(make_config(tmp_path, format=format_name, columns=columns))


def test_files_without_rows(tmp_path):
    write_format(tmp_path / "a.parquet", rows_table(0, 0), "parquet")
    with pytest.raises(DataError, match=r"no rows at all in 1 files, the first is .*a.parquet"):
        Reader(make_config(tmp_path))
    write_format(tmp_path / "b.parquet", rows_table(0, 3), "parquet")
    assert read_all(make_config(tmp_path))[0] == [[0, 1, 2]]
    (tmp_path / "a.csv").write_text("row\n")
    with pytest.raises(DataError, match="no rows at all"):
        Reader(make_config(tmp_path / "a.csv", format="csv"))


def test_a_file_named_twice(tmp_path):
    path = write(tmp_path / "a.parquet", row=[0])
    with pytest.raises(ConfigError, match=r"a.parquet is named twice: by '.*a.parquet' and by a path before it"):
        Reader(make_config(path, paths=(str(tmp_path), str(path))))


def test_unknown_file_system():
    with pytest.raises(DataError, match="no file system for this path"):
        Reader(make_config("nonsense://bucket/a.parquet"))


CSV = "row,x,history\n0,1.5,1|2\n1,{}\n2,2.5,\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("abc,3", r"row 1, column 'x', value 'abc': 'abc' is no number; read it as Strings\('x'\)"),
        ("1.5,3|b", r"row 1, column 'history', value '3\|b': 'b' is no integer"),
        ("1.5", r"row 1, value '1,1.5': 2 cells where the header has 3; quote cells"),
        ('1.5,"3', r"row 1.*: "),
        ("nan,3", r"row 1, column 'x', value nan: NaN or infinite in a dense column"),
        (",3", r"row 1, column 'x': a null, and the column has no default"),
    ],
)
def test_csv_lines(tmp_path, line, message):
    path = tmp_path / "a.csv"
    path.write_text(CSV.format(line))
    columns = (Ids("row"), Dense("x"), Ids("history"))
    with pytest.raises(DataError, match=r"a.csv, bytes 0:\d+, " + message):
        read_all(make_config(path, format="csv", columns=columns))
    with Reader(make_config(path, format="csv", columns=columns, on_bad_row="skip")) as reader:
        assert 0 in next(reader).jagged("row").flat_values.tolist()
        assert reader.num_bad_rows >= 1


def test_csv_bytes_that_are_no_utf8(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"row,word\n0,ok\n1,\xff\n")
    error = fails(path, Strings("word"), format="csv")
    assert "row 1" in str(error)
    assert "UTF-8" in str(error)


def test_csv_headers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("row,row\n1,2\n")
    assert "the file has 2 columns of this name; rename them" in str(fails(path, format="csv"))
    path.write_text("\n1,2\n")
    assert "no header in the first line; give Csv(column_names=...)" in str(fails(path, format="csv"))
    with pytest.raises(ConfigError, match="cannot be read as Ids and Strings at once"):
        read_all(make_config(path, format="csv", columns=(Ids("row"), Strings("s", source="row")), csv=Csv()))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"row": 1, "x": "abc"}', r"row 1, column 'x', value 'abc': cannot be read as float"),
        ('{"row": 1.5, "x": 1}', r"row 1, column 'row', value 1.5: cannot be read as int64"),
        ('{"row": 1, "x": ', r"row 1, .*: no JSON: .*; put the line right, or set on_bad_row='skip'"),
        ("[1, 2]", r"row 1, value '\[1, 2\]': a JSON object is needed, not list; write one object per line"),
        ('{"row": 1, "x": NaN}', r"row 1, column 'x', value nan: NaN or infinite"),
        ('{"row": 1, "x": null}', r"row 1, column 'x': a null"),
        ('{"row": 1, "x": 1}{"row": 2, "x": 1}', r"row 1, .*: no JSON: Extra data"),
        ('{"row": 99999999999999999999, "x": 1}', r"row 1, column 'row', value 9+: cannot be read as int64"),
    ],
)
def test_jsonl_lines(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"row": 0, "x": 0.5}}\n{line}\n{{"row": 2, "x": 2.5}}\n')
    config = make_config(path, format="jsonl", columns=(Ids("row"), Dense("x")))
    with pytest.raises(DataError, match=r"a.jsonl, bytes 0:\d+, " + message):
        read_all(config)
    with Reader(make_config(path, format="jsonl", columns=(Ids("row"), Dense("x")), on_bad_row="skip")) as reader:
        assert next(reader).jagged("row").flat_values.tolist() == [0, 2]
        assert [row.row for row in reader.bad_rows] == [1]


def test_corrupt_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"\x1f\x8b\x08\x00garbage")
    assert "a.jsonl.gz: cannot be read: " in str(fails(path, format="jsonl"))


def test_negative_lengths_are_found():
    offsets = pa.array([0, 3, 1, 4], pa.int32())
    broken = pa.Array.from_buffers(
        pa.list_(pa.int64()), 3, [None, offsets.buffers()[1]], children=[pa.array([1, 2, 3, 4])]
    )
    assert has_negative_lengths(broken)
    assert not has_negative_lengths(pa.array([[1, 2], [], [3]]))
    assert has_negative_lengths(pa.ListArray.from_arrays(pa.array([0, 3], pa.int32()), broken))


def test_row_group_above_the_memory_limit_states_both_numbers(tmp_path):
    pq.write_table(pa.table({"row": range(400_000)}), tmp_path / "a.parquet", row_group_size=400_000)
    with pytest.raises(
        DataError,
        match=r"row group 0: its columns take about 4.6 MiB in memory; memory_limit_mib=2; "
        r"set memory_limit_mib=5 or more, or write smaller row groups",
    ):
        Reader(make_config(tmp_path, memory_limit_mib=2))


def test_good_batches_before_a_bad_row_are_delivered(tmp_path):
    write(tmp_path / "a.parquet", row=list(range(8)), x=[0.0, 1, 2, 3, 4, math.nan, 6, 7])
    config = make_config(tmp_path, columns=(Ids("row"), Dense("x")), batch_size=2, num_lanes=1)
    with Reader(config) as reader:
        assert [next(reader).jagged("row").flat_values.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
        state = reader.state_dict()
        with pytest.raises(DataError, match="row group 2, row 1, column 'x'"):
            next(reader)
        assert reader.state_dict() == state
    fixed = make_config(tmp_path, columns=(Ids("row"), Dense("x", nonfinite=0.0)), batch_size=2, num_lanes=1)
    assert read_all(fixed, state=state)[0] == [[4, 5], [6, 7]]


def test_bad_rows_are_skipped_counted_and_listed(tmp_path):
    folder = write_row_groups(tmp_path / "d", [[10, 10], [10]])
    bad = {3, 4, 17, 29}
    for path in folder.iterdir():
        table = pq.read_table(path)
        prices = [math.nan if row in bad else row / 4 for row in table["row"].to_pylist()]
        pq.write_table(table.set_column(2, "price", pa.array(prices)), path, row_group_size=10)
    columns = (Ids("row"), Dense("price"))
    config = make_config(folder, columns=columns, on_bad_row="skip", shuffle_rows=8)
    unhurt, _ = read_all(make_config(folder, shuffle_rows=8))
    batches, state = read_all(config)
    assert batches == [[row for row in batch if row not in bad] for batch in unhurt]  # nothing else moves
    assert state["bad_rows"]["count"] == 4
    assert {(row["unit"], row["row"], row["column"]) for row in state["bad_rows"]["first"]} == {
        ("row group 0", 3, "price"),
        ("row group 0", 4, "price"),
        ("row group 1", 7, "price"),
        ("row group 0", 9, "price"),
    }
    head, saved = read_all(config, stop=2)
    tail, after = read_all(config, state=saved)
    assert head + tail == batches
    assert after["bad_rows"] == state["bad_rows"]


def test_steps_of_bad_rows_only_are_passed_over(tmp_path):
    write(tmp_path / "a.parquet", row=list(range(6)), x=[0.0, 1.0, math.nan, math.nan, 4.0, 5.0])
    config = make_config(tmp_path, columns=(Ids("row"), Dense("x")), batch_size=2, num_lanes=1, on_bad_row="skip")
    batches, state = read_all(config)
    assert batches == [[0, 1], [4, 5]]
    assert state["bad_rows"]["count"] == 2
