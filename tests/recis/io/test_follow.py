"""A watched folder: complete files only, each once, in the order they were found, across restarts."""

import json

import pytest
from io_data import make_config, rows_of, write_row_groups

from recis.errors import ConfigError, DataError
from recis.io import Follow, Reader


class Clock:
    """Time that only passes when someone sleeps; `events` happen when their time comes."""

    def __init__(self):
        self.now = 0.0
        self.events = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds
        for event in [event for event in self.events if event[0] <= self.now]:
            self.events.remove(event)
            event[1]()

    def at(self, when, action):
        self.events.append((when, action))


@pytest.fixture
def parts(tmp_path):
    """Five finished files of ten rows elsewhere, to be copied in."""
    folder = write_row_groups(tmp_path / "made", [[5, 5]] * 5)
    return [(folder / f"part-{number:03d}.parquet").read_bytes() for number in range(5)]


def put(folder, name, content, *, done=True):
    (folder / name).write_bytes(content)
    if done:
        (folder / (name + ".done")).touch()


def open_reader(folder, clock, **follow):
    settings = Follow(**{"stop_after_idle_s": 30.0, **follow})
    return Reader(make_config(folder, follow=settings), clock=clock, sleep=clock.sleep)


def test_files_are_read_as_they_are_marked_done(tmp_path, parts):
    folder, clock = tmp_path / "in", Clock()
    folder.mkdir()
    put(folder, "b.parquet", parts[1])
    put(folder, "unfinished.parquet", parts[0][:50], done=False)
    clock.at(7, lambda: (put(folder, "z.parquet", parts[2]), put(folder, "a.parquet", parts[0])))
    clock.at(19, lambda: put(folder, "unfinished.parquet", parts[3]))
    with open_reader(folder, clock) as reader:
        epochs, rows = [], []
        for batch in reader:
            epochs.append(reader.epoch)
            rows += rows_of(batch)
    assert sorted(rows[:10]) == list(range(10, 20))
    assert sorted(rows[10:30]) == [*range(10), *range(20, 30)]
    assert sorted(rows[30:]) == list(range(30, 40))
    assert sorted(set(epochs)) == [0, 1, 2]
    assert clock.now >= 19 + 30


def test_stable_size_closes_a_file(tmp_path, parts):
    folder, clock = tmp_path / "in", Clock()
    folder.mkdir()
    put(folder, "a.parquet", parts[0][:100], done=False)
    put(folder, "empty.parquet", b"", done=False)
    clock.at(9, lambda: put(folder, "a.parquet", parts[0], done=False))
    with open_reader(folder, clock, closed="stable", stable_s=10.0, poll_s=5.0) as reader:
        batch = next(reader)
        assert clock.now == 20.0  # seen at its new size at 10, the same at 20
        assert sorted(rows_of(batch) + [row for rest in reader for row in rows_of(rest)]) == list(range(10))


@pytest.mark.parametrize("stop", range(6))
def test_restart_anywhere(tmp_path, parts, stop):
    folder, clock = tmp_path / "in", Clock()
    folder.mkdir()
    put(folder, "a.parquet", parts[0])
    put(folder, "b.parquet", parts[1])
    with open_reader(folder, clock) as reader:
        rows = [row for _ in range(min(stop, 3)) for row in rows_of(next(reader))]
        put(folder, "c.parquet", parts[2])
        rows += [row for _ in range(stop - 3) for row in rows_of(next(reader))]
        state = json.loads(json.dumps(reader.state_dict()))
    with open_reader(folder, clock) as reader:
        reader.load_state_dict(state)
        put(folder, "d.parquet", parts[3])
        rows += [row for batch in reader for row in rows_of(batch)]
        assert len(reader.state_dict()["consumed"]) == 4
    assert sorted(rows) == list(range(40))


def test_consumed_files_may_be_removed_and_are_not_read_again(tmp_path, parts):
    folder, clock = tmp_path / "in", Clock()
    folder.mkdir()
    put(folder, "a.parquet", parts[0])
    with open_reader(folder, clock) as reader:
        assert len(list(reader)) == 2
        state = reader.state_dict()
    assert state["consumed"] == [str(folder / "a.parquet")]
    (folder / "a.parquet").unlink()
    put(folder, "b.parquet", parts[1])
    with open_reader(folder, clock) as reader:
        reader.load_state_dict(state)
        assert sorted(row for batch in reader for row in rows_of(batch)) == list(range(10, 20))


def test_a_file_missing_in_the_middle_of_its_round_is_an_error(tmp_path, parts):
    folder, clock = tmp_path / "in", Clock()
    folder.mkdir()
    put(folder, "a.parquet", parts[0])
    with open_reader(folder, clock) as reader:
        next(reader)
        state = reader.state_dict()
    (folder / "a.parquet").unlink()
    with open_reader(folder, clock) as reader, pytest.raises(DataError, match=r"a\.parquet: no parquet file there"):
        reader.load_state_dict(state)


def test_nothing_arrives(tmp_path):
    clock = Clock()
    with open_reader(tmp_path / "not yet there", clock) as reader:
        assert list(reader) == []
        assert reader.num_samples is None
    assert clock.now == 30.0


def test_several_ranks_and_reset_are_refused(tmp_path):
    config = make_config(tmp_path, follow=Follow())
    with pytest.raises(ConfigError, match="follow reads in one process: 2 could see different files"):
        Reader(config, world_size=2)
    with Reader(config) as reader, pytest.raises(ConfigError, match="a watched folder is read once"):
        reader.reset()
