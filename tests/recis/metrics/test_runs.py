"""Sorted runs: the order is that of a plain sort, spilled or not, and memory stays bounded."""

import errno
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recis.metrics.runs import SortedRuns, sort_columns

COLUMNS = (("group", np.int64), ("score", np.float64), ("weight", np.float64))


def random_rows(rng, num_rows, num_groups=5):
    group = rng.integers(-num_groups, num_groups, num_rows)
    return group, rng.integers(0, 7, num_rows) / 4.0, rng.choice([-1.0, -0.5, 1.0, 2.0], num_rows)


def lexsorted(columns):
    return tuple(column[np.lexsort(columns[::-1])] for column in columns)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 1000])
@pytest.mark.parametrize("num_columns", [1, 2, 3])
def test_sort_columns_is_lexsort(num_rows, num_columns):
    columns = random_rows(np.random.default_rng(num_rows), num_rows)[:num_columns]
    for got, want in zip(sort_columns(columns), lexsorted(columns), strict=True):
        np.testing.assert_array_equal(got, want)


def runs_of_limit(max_rows: int) -> SortedRuns:
    runs = SortedRuns(COLUMNS, memory_mib=1)
    runs._max_rows = max_rows  # a mebibyte holds too many rows for a fast test
    return runs


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 700), max_size=8), st.integers(1, 900), st.integers(0, 2**31))
def test_spilled_rows_come_out_sorted(sizes, max_rows, seed):
    rng = np.random.default_rng(seed)
    parts = [random_rows(rng, size, num_groups=2) for size in sizes]
    runs = runs_of_limit(max_rows)
    for part in parts:
        runs.append(part)
    joined = tuple(np.concatenate([*column, np.empty(0)]) for column in zip(*parts, strict=True)) or (np.empty(0),) * 3
    want = lexsorted(joined)
    got = [np.concatenate([*column, np.empty(0)]) for column in zip(*runs.sorted(), strict=True)] or [np.empty(0)] * 3
    assert runs.num_rows == sum(sizes)
    for got_column, want_column in zip(got, want, strict=True):
        np.testing.assert_array_equal(got_column, want_column)
    in_memory = SortedRuns(COLUMNS, memory_mib=64)
    in_memory.extend(runs)
    assert not in_memory.is_spilled
    for name, tensor in runs.export().items():
        assert torch.equal(tensor, in_memory.export()[name])


def test_constant_rows_longer_than_a_block():
    runs = runs_of_limit(300)
    for _ in range(10):
        runs.append((np.zeros(250, np.int64), np.zeros(250), np.ones(250)))
    assert runs.is_spilled
    assert sum(len(part[0]) for part in runs.sorted()) == 2500


def test_memory_stays_bounded():
    """16 MiB of rows through 4 MiB; the merged export is mapped from a file, not held."""
    rows = tuple(
        column.astype(dtype)
        for column, (_, dtype) in zip(random_rows(np.random.default_rng(0), 43_690), COLUMNS, strict=True)
    )
    runs = SortedRuns(COLUMNS, memory_mib=4)
    tracemalloc.start()
    try:
        for _ in range(16):
            runs.append(tuple(column.copy() for column in rows))
        total = sum(len(part[0]) for part in runs.sorted())
        exported = runs.export()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 16 * 43_690 == len(exported["group"])
    assert peak < 4 << 20


def test_full_disk_is_named(monkeypatch):
    class FullDisk:
        def seek(self, _):
            pass

        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("recis.metrics.runs.tempfile.TemporaryFile", lambda prefix: FullDisk())
    runs = runs_of_limit(10)
    rows = random_rows(np.random.default_rng(0), 10)
    runs.append(rows)
    with pytest.raises(
        OSError, match=r"cannot write 0 MB of metric rows \(No space left on device\); free space"
    ) as caught:
        runs.append(rows)
    assert caught.value.errno == errno.ENOSPC


def test_load_replaces_rows_and_checks_types():
    runs = runs_of_limit(100)
    runs.append(random_rows(np.random.default_rng(1), 50))
    other = runs_of_limit(20)
    other.append(random_rows(np.random.default_rng(2), 333))
    runs.load(other.export())
    assert runs.num_rows == 333
    assert all(torch.equal(tensor, other.export()[name]) for name, tensor in runs.export().items())
    bad = runs.export() | {"score": torch.zeros(333)}
    with pytest.raises(ValueError, match="column 'score' of a state must be float64"):
        runs.load(bad)
    with pytest.raises(ValueError, match="memory_mib must be at least 1"):
        SortedRuns(COLUMNS, memory_mib=0)
