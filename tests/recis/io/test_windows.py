"""Time windows: the rows of one window at a time, by a column or by paths; empty windows are passed over."""

import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from io_data import make_config, rows_of, write_row_groups

from recis.errors import ConfigError, DataError
from recis.io import Reader, TimeWindow

HOUR = 3600


@pytest.fixture
def folder(tmp_path):
    """Row k happened at second 60 k; hours 0, 1 and 3 have rows, hour 2 has none."""
    times = [60 * row if row < 120 else 60 * (row + 60) for row in range(150)]
    for number in range(3):
        part = slice(50 * number, 50 * number + 50)
        table = pa.table(
            {"row": list(range(150))[part], "at": times[part], "day": pa.array(times[part], pa.timestamp("s"))}
        )
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=20)
    return tmp_path


def windows_of(config, state=None):
    """(window, rows) of each window."""
    found = []
    with Reader(config) as reader:
        if state is not None:
            reader.load_state_dict(state)
        while True:
            found.append((reader.window, sorted(row for batch in reader for row in rows_of(batch))))
            if not reader.advance_window():
                return found


@pytest.mark.parametrize("column", ["at", "day"])
@pytest.mark.parametrize("shuffle_rows", [0, 20])
def test_windows_by_column(folder, column, shuffle_rows, caplog):
    window = TimeWindow(start=0, stop=4 * HOUR, seconds=HOUR, column=column)
    with caplog.at_level(logging.INFO, logger="recis.io"):
        found = windows_of(make_config(folder, window=window, shuffle_rows=shuffle_rows))
    assert found == [(0, list(range(60))), (1, list(range(60, 120))), (3, list(range(120, 150)))]
    assert "window 2 has no rows and is passed over: seconds 7200 to 10800" in caplog.text


def test_integer_columns_in_milliseconds(tmp_path):
    pq.write_table(pa.table({"row": [0, 1, 2], "at": [0, 1999, 2000]}), tmp_path / "a.parquet")
    window = TimeWindow(start=0, stop=4, seconds=2, column="at", unit="ms")
    assert windows_of(make_config(tmp_path, window=window)) == [(0, [0, 1]), (1, [2])]


def test_the_last_window_ends_at_stop(folder):
    window = TimeWindow(start=HOUR, stop=HOUR + 600, seconds=500, column="at")
    assert windows_of(make_config(folder, window=window)) == [(0, list(range(60, 69))), (1, [69])]


def test_without_rows_in_any_window(folder):
    window = TimeWindow(start=10 * HOUR, stop=11 * HOUR, seconds=HOUR, column="at")
    with Reader(make_config(folder, window=window)) as reader:
        assert list(reader) == []
        assert not reader.advance_window()


def test_windows_by_path(tmp_path):
    made = write_row_groups(tmp_path / "made", [[6], [6], [6]])
    for number, day in enumerate(("1970-01-01", "1970-01-02", "1970-01-04")):
        (tmp_path / day).mkdir()
        (made / f"part-{number:03d}.parquet").rename(tmp_path / day / "a.parquet")
    day = 24 * HOUR
    window = TimeWindow(start=0, stop=5 * day, seconds=day)
    config = make_config(tmp_path / "%Y-%m-%d", window=window, batch_size=4)
    assert windows_of(config) == [(0, list(range(6))), (1, list(range(6, 12))), (3, list(range(12, 18)))]


@pytest.mark.parametrize("by_column", [True, False])
def test_restart_inside_a_later_window(folder, by_column):
    window = TimeWindow(start=0, stop=4 * HOUR, seconds=HOUR, column="at" if by_column else None)
    config = make_config(folder, window=window, shuffle_rows=16, epochs=2)
    with Reader(config) as reader:
        reader.advance_window()
        first = [rows_of(next(reader)) for _ in range(3)]
        state = reader.state_dict()
        rest = [rows_of(batch) for batch in reader]
    with Reader(config) as reader:
        reader.load_state_dict(state)
        assert reader.window == state["window"] == 1
        assert [rows_of(batch) for batch in reader] == rest
        reader.reset()
        assert [rows_of(next(reader)) for _ in range(3)] == first


def test_advancing_gives_up_what_is_left(folder):
    window = TimeWindow(start=0, stop=4 * HOUR, seconds=HOUR, column="at")
    with Reader(make_config(folder, window=window)) as reader:
        next(reader)
        assert reader.advance_window()
        assert min(rows_of(next(reader))) >= 60


def test_rows_without_a_time(tmp_path):
    pq.write_table(pa.table({"row": [0, 1], "at": pa.array([0, None], pa.int64())}), tmp_path / "a.parquet")
    window = TimeWindow(start=0, stop=10, seconds=10, column="at")
    with pytest.raises(DataError, match=r"a.parquet, row group 0, row 1: a row without a time; write a time"):
        Reader(make_config(tmp_path, window=window))


def test_readers_without_windows_do_not_advance(folder):
    with Reader(make_config(folder)) as reader, pytest.raises(ConfigError, match="this reader has no windows"):
        reader.advance_window()
