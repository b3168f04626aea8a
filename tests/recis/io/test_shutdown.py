"""Threads end: after close, at the end of a with block, after an error, and when a reader is dropped half-way."""

import gc
import math
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from io_data import make_config, write_row_groups

from recis.errors import ConfigError, DataError
from recis.io import Dense, Follow, Ids, Reader


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(("recis-read", "recis-inspect"))]


def wait_for_no_threads():
    deadline = time.monotonic() + 10
    while reader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reader_threads() == []


@pytest.fixture
def folder(tmp_path):
    return write_row_groups(tmp_path / "data", [[50, 50], [50], [50, 50, 50]])


def test_close_ends_threads_and_iteration(folder):
    reader = Reader(make_config(folder, shuffle_rows=20, threads=3))
    next(reader)
    assert len(reader_threads()) > 0
    reader.close()
    reader.close()
    assert reader_threads() == []
    with pytest.raises(ConfigError, match="the reader is closed; build a new one"):
        next(reader)


def test_leaving_the_block_by_an_error_ends_threads(folder):
    def fail(batch):
        raise KeyError(batch.num_samples)

    with pytest.raises(KeyError), Reader(make_config(folder)) as reader:
        fail(next(reader))
    assert reader_threads() == []


def test_a_dropped_reader_ends_its_threads(folder):
    reader = Reader(make_config(folder, prefetch_batches=8))
    next(reader)
    del reader
    gc.collect()
    wait_for_no_threads()


def test_a_reader_that_cannot_be_built_leaves_no_threads(folder):
    with pytest.raises(DataError):
        Reader(make_config(folder, columns=(Ids("nope"),)))
    with pytest.raises(ConfigError):
        Reader(make_config(folder, batch_size=4_000_000, memory_limit_mib=1))
    wait_for_no_threads()


def test_an_error_in_a_worker_reaches_the_loop_and_threads_end(tmp_path):
    pq.write_table(pa.table({"row": range(100), "x": [math.nan] * 100}), tmp_path / "a.parquet", row_group_size=10)
    reader = Reader(make_config(tmp_path, columns=(Ids("row"), Dense("x")), threads=4))
    with pytest.raises(DataError, match="NaN"):
        list(reader)
    reader.close()
    assert reader_threads() == []


def test_close_wakes_a_reader_that_waits_for_files(tmp_path):
    reader = Reader(make_config(tmp_path, follow=Follow(poll_s=60.0)))
    outcome = []
    waiting = threading.Thread(target=lambda: outcome.append(next(reader, "ended")))
    waiting.start()
    time.sleep(0.05)
    reader.close()
    waiting.join(10)
    assert outcome == ["ended"]
