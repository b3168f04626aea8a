"""The same rows from every format, path and cut: folders, globs, memory://, compressed text, byte ranges, stripes."""

import gzip
import json

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from io_data import ROW_COLUMNS, make_config, read_all, rows_table, write_format
from pyarrow import orc
from pyarrow import parquet as pq

from recis.io import Csv, Ids, Reader
from recis.io.files import resolve
from recis.io.orc import stripe_sizes
from recis.io.text import count_rows, line_blocks, without_blank_lines

FORMATS = ["parquet", "orc", "csv", "jsonl"]


def contents(config):
    """Every row as plain values, ordered by row number."""
    rows = []
    with Reader(config) as reader:
        for batch in reader:
            history = batch.jagged("history").to_lists()
            words = batch.jagged("word").to_strings()
            prices, clicks = batch.tensor("price").tolist(), batch.tensor("click").tolist()
            ids = batch.jagged("row").flat_values.tolist()
            rows += list(zip(ids, history, prices, clicks, words, strict=True))
    return sorted(rows)


def expected(num_rows):
    return [
        (row, [row * 10 + k for k in range(row % 4)], row / 4, float(row % 3 == 0), f"w{row}".encode())
        for row in range(num_rows)
    ]


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("shuffle_rows", [0, 16])
def test_all_formats_give_the_same_rows(tmp_path, format_name, shuffle_rows):
    for number in range(3):
        write_format(tmp_path / f"{number}.{format_name}", rows_table(number * 25, 25), format_name)
    config = make_config(tmp_path, format=format_name, columns=ROW_COLUMNS, shuffle_rows=shuffle_rows)
    assert contents(config) == expected(75)


@pytest.mark.parametrize("format_name", FORMATS)
def test_fsspec_paths(tmp_path, format_name):
    local = write_format(tmp_path / f"a.{format_name}", rows_table(0, 30), format_name)
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/io/{format_name}/a.{format_name}", local.read_bytes())
    for path in (
        f"memory://io/{format_name}/a.{format_name}",
        f"memory://io/{format_name}",
        f"memory://io/{format_name}/*",
    ):
        config = make_config(path, format=format_name, columns=ROW_COLUMNS)
        assert contents(config) == expected(30)
        _, state = read_all(config, stop=2)
        assert state["files"][0][0] == f"memory://io/{format_name}/a.{format_name}"
    assert contents(make_config(f"file://{local}", format=format_name, columns=ROW_COLUMNS)) == expected(30)


@pytest.mark.parametrize("format_name", ["csv", "jsonl"])
def test_compressed_text_is_one_unit(tmp_path, format_name):
    plain = write_format(tmp_path / f"plain.{format_name}", rows_table(0, 30), format_name)
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / f"a.{format_name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    config = make_config(folder, format=format_name, columns=ROW_COLUMNS)
    assert contents(config) == expected(30)
    straight, _ = read_all(config)
    head, state = read_all(config, stop=2)
    assert head + read_all(config, state=state)[0] == straight
    assert [place[0] for place in state["lanes"]] == [0, -1, -1, -1]


def test_stripes_have_the_rows_that_the_tail_announces(tmp_path):
    path = write_format(tmp_path / "a.orc", rows_table(0, 400), "orc")
    reader = orc.ORCFile(path)
    sizes = stripe_sizes(reader.reader.serialized_file_tail())
    assert len(sizes) == reader.nstripes > 3
    assert [rows for rows, _ in sizes] == [reader.read_stripe(index).num_rows for index in range(reader.nstripes)]


@pytest.mark.parametrize("format_name", ["csv", "jsonl"])
def test_byte_ranges_meet_at_line_ends(tmp_path, format_name, monkeypatch):
    monkeypatch.setattr("recis.io.text.RANGE_BYTES", 200)
    path = write_format(tmp_path / f"a.{format_name}", rows_table(0, 60), format_name)
    config = make_config(path, format=format_name, columns=ROW_COLUMNS)
    with Reader(config) as reader:
        units = {batch.locate(row)[1] for batch in reader for row in range(batch.num_samples)}
    assert len(units) > 5
    assert contents(config) == expected(60)
    straight, _ = read_all(config)
    for stop in (1, 4, 7):
        head, state = read_all(config, stop=stop)
        assert head + read_all(config, state=state)[0] == straight


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=6), max_size=12), st.integers(1, 30), st.integers(1, 40), st.booleans())
def test_ranges_give_each_line_to_one_range(tmp_path_factory, lines, range_bytes, block_bytes, ends_with_newline):
    lines = [line.replace(b"\n", b"x") for line in lines]
    text = b"\n".join(lines) + (b"\n" if lines and ends_with_newline else b"")
    path = tmp_path_factory.mktemp("lines") / "a"
    path.write_bytes(text)
    found = b""
    with path.open("rb") as handle:
        for start in range(0, len(text), range_bytes):
            stop = min(start + range_bytes, len(text))
            blocks = list(line_blocks(handle, "a", start=start, stop=stop, first=0, block_bytes=block_bytes))
            for block in blocks:
                assert block.endswith(b"\n") or found + block == text
                begin = len(found)
                assert start <= begin < stop
                found += block
    assert found == text


@pytest.mark.parametrize(
    ("block", "rows"),
    [(b"", 0), (b"a", 1), (b"a\n", 1), (b"\n\na\n\r\n  \nb\n\n", 2), (b"\n", 0), (b"a\n\tb\n", 2), (b"a\r\nb\r\n", 2)],
)
def test_blank_lines_are_no_rows(block, rows):
    assert count_rows(block) == rows
    assert b"".join(without_blank_lines(block).split()) == b"".join(block.split())


def test_blank_lines_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfrow,x\r\n\r\n1,2\r\n\r\n3,4\r\n  \r\n")
    assert read_all(make_config(path, format="csv"))[0] == [[1, 3]]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"row": 1}\r\n\r\n{"row": 3}')
    assert read_all(make_config(path, format="jsonl"))[0] == [[1, 3]]


def test_csv_options(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text('1\t"a\tb"\t5;6\n2\tc\t\n')
    options = Csv(delimiter="\t", column_names=("row", "word", "history"), list_separator=";")
    with Reader(make_config(path, format="csv", csv=options, columns=(Ids("row"), Ids("history")))) as reader:
        batch = next(reader)
    assert batch.jagged("row").to_lists() == [[1], [2]]
    assert batch.jagged("history").to_lists() == [[5, 6], []]


def test_jsonl_keys_may_be_missing_and_unread_keys_may_change(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"row": 1, "other": {"deep": 1}}, {"row": 2, "other": 5, "ids": [7]}, {"row": 3, "ids": None}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with Reader(make_config(path, format="jsonl", columns=(Ids("row"), Ids("ids", default=())))) as reader:
        assert next(reader).jagged("ids").to_lists() == [[], [7], []]


def test_files_may_differ_in_width_and_encoding_of_a_type(tmp_path):
    pq.write_table(pa.table({"row": pa.array([1, 2], pa.int16())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"row": pa.array([3]).dictionary_encode()}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"row": pa.array([2**64 - 4], pa.uint64())}), tmp_path / "c.parquet")
    rows = [row for batch in read_all(make_config(tmp_path))[0] for row in batch]
    assert rows == [1, 2, 3, -4] or sorted(rows) == [-4, 1, 2, 3]


def test_hidden_and_foreign_files_below_a_folder_are_left_out(tmp_path):
    for name in ("a.parquet", "sub/b.pq", "_tmp/c.parquet", ".d.parquet", "e.txt", "_SUCCESS"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = [file.url.removeprefix(str(tmp_path)) for file in resolve([str(tmp_path)], "parquet")]
    assert names == ["/a.parquet", "/sub/b.pq"]


def test_parquet_rows_keep_their_numbers_behind_an_empty_row_group(tmp_path):
    with pq.ParquetWriter(tmp_path / "a.parquet", rows_table(0, 0).schema) as writer:
        for first, num_rows in ((0, 3), (3, 0), (3, 4)):
            writer.write_table(rows_table(first, num_rows))
    batches, state = read_all(make_config(tmp_path, num_lanes=1))
    assert batches == [[0, 1, 2, 3, 4, 5, 6]]
    assert state["files"][0][2] == 7


def test_large_ids_survive_every_format(tmp_path):
    ids = [-(2**63), 2**63 - 1, -1, 0]
    for format_name in FORMATS:
        table = rows_table(0, 4).set_column(0, "row", pa.array(ids))
        path = write_format(tmp_path / f"a.{format_name}", table, format_name)
        assert read_all(make_config(path, format=format_name))[0] == [ids] if format_name != "orc" else True
    assert np.int64(ids[0]) == np.iinfo(np.int64).min
