"""What is delivered and in which order: each sample once, whatever ranks, threads, prefetch and restarts do (B23)."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from io_data import make_config, read_all, read_steps, rows_of, write_row_groups

from recis.errors import CheckpointError, ConfigError, DataError
from recis.io import Reader

B23 = [[10, 10], [10], [10, 10, 10]]  # units 0 .. 5 with rows 0-9, 10-19, ...


@pytest.fixture(scope="module")
def b23(tmp_path_factory):
    return write_row_groups(tmp_path_factory.mktemp("b23"), B23)


def lanes_of(steps):
    """The rows of each lane {0,4} {1,5} {2} {3} of the unshuffled order, as they were delivered."""
    lane_of_unit = [0, 1, 2, 3, 0, 1]
    lanes = [[], [], [], []]
    for step in steps:
        for row in step:
            lanes[lane_of_unit[row // 10]].append(row)
    return lanes


def units_of(steps):
    """The rows of each unit as they were delivered: whatever the epoch's order, a unit lies in one lane."""
    units = [[] for _ in range(6)]
    for step in steps:
        for row in step:
            units[row // 10].append(row)
    return units


def test_b23_lanes_and_order(b23):
    steps = read_steps(make_config(b23))
    assert steps[0] == [0, 1, 10, 11, 20, 21, 30, 31]
    assert lanes_of(steps) == [
        [*range(10), *range(40, 50)],
        [*range(10, 20), *range(50, 60)],
        [*range(20, 30)],
        [*range(30, 40)],
    ]


@pytest.mark.parametrize("shuffle_rows", [0, 12, 1000])
@pytest.mark.parametrize("world_size", [2, 4])
def test_b23_steps_do_not_depend_on_the_ranks(b23, shuffle_rows, world_size):
    config = make_config(b23, shuffle_rows=shuffle_rows, epochs=2, prefetch_batches=4)
    alone = read_steps(config)
    ranks = [read_steps(config, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(steps) for steps in ranks} == {len(alone)}
    for number, step in enumerate(alone):
        assert sorted(step) == sorted(row for steps in ranks for row in steps[number])
    joined = [[row for steps in ranks for row in steps[number]] for number in range(len(alone))]
    assert units_of(joined) == units_of(alone)


def test_steps_have_full_size_while_lanes_run_out(b23):
    assert [len(step) for step in read_steps(make_config(b23))] == [8, 8, 8, 8, 8, 8, 8, 4]


def test_ranks_that_do_not_divide_the_lanes_still_read_everything_once(b23):
    config = make_config(b23, batch_size=9, num_lanes=4)
    ranks = [read_steps(config, rank=rank, world_size=3) for rank in range(3)]
    assert {len(steps) for steps in ranks} == {7}
    assert sorted(row for steps in ranks for step in steps for row in step) == list(range(60))


@pytest.mark.parametrize("shuffle_rows", [0, 12])
def test_threads_and_prefetch_do_not_change_the_order(b23, shuffle_rows):
    orders = [
        read_steps(make_config(b23, shuffle_rows=shuffle_rows, threads=threads, prefetch_batches=prefetch, epochs=2))
        for threads, prefetch in ((1, 1), (2, 4), (5, 9))
    ]
    assert orders[0] == orders[1] == orders[2]


def test_micro_batches_split_the_same_steps(b23):
    config = make_config(b23)
    whole = read_steps(config)
    assert read_steps(config, micro_batches=2) == whole
    assert read_steps(config, micro_batches=8) == whole


def test_shuffling_permutes_units_and_rows_and_changes_per_epoch(b23):
    steps = read_steps(make_config(b23, shuffle_rows=40, epochs=2, seed=5))
    rows = [row for step in steps for row in step]
    assert sorted(rows[:60]) == sorted(rows[60:]) == list(range(60))
    assert rows[:60] != rows[60:]
    assert rows[:60] != sorted(rows[:60])
    assert rows != [row for step in read_steps(make_config(b23, shuffle_rows=40, epochs=2, seed=6)) for row in step]


def test_drop_last_leaves_out_the_small_step_of_each_epoch(b23):
    steps = read_steps(make_config(b23, drop_last=True, epochs=2))
    assert [len(step) for step in steps] == [8] * 14


def test_epochs_do_not_mix(b23):
    steps = read_steps(make_config(b23, batch_size=7, epochs=2))
    assert sorted(row for step in steps[:9] for row in step) == list(range(60))
    assert steps[:9] == steps[9:]


@pytest.mark.parametrize("shuffle_rows", [0, 9, 1000])
def test_stop_anywhere_and_go_on(b23, shuffle_rows):
    config = make_config(b23, shuffle_rows=shuffle_rows, epochs=2)
    whole, _ = read_all(config)
    for stop in range(len(whole) + 1):
        head, state = read_all(config, stop=stop)
        tail, _ = read_all(config, state=state)
        assert head + tail == whole


def test_position_counts_delivered_batches_only(b23):
    with Reader(make_config(b23, prefetch_batches=4)) as reader:
        next(reader)
        assert reader.state_dict()["rows"] == 8
        assert reader.state_dict()["lanes"] == [[0, 2, 0], [1, 2, 0], [2, 2, 0], [3, 2, 0]]


def test_position_inside_a_shuffle_block_is_where_the_block_begins(b23):
    with Reader(make_config(b23, shuffle_rows=16, num_lanes=4)) as reader:  # blocks of 4 rows
        for _ in range(3):
            next(reader)
        lanes = reader.state_dict()["lanes"]
        assert [place[1:] for place in lanes] == [[4, 2]] * 4


def test_one_saved_position_serves_other_ranks_and_batch_sizes(b23):
    config = make_config(b23, shuffle_rows=12)
    head, state = read_all(config, stop=3)
    other = make_config(b23, shuffle_rows=12, batch_size=12, threads=1, memory_limit_mib=64)
    delivered = [row for batch in head for row in batch]
    for rank in range(2):
        with Reader(other, rank=rank, world_size=2) as reader:
            reader.load_state_dict(state)
            delivered += [row for batch in reader for row in rows_of(batch)]
    assert sorted(delivered) == list(range(60))


def test_a_rank_without_units_joins_every_step_with_empty_batches(tmp_path):
    folder = write_row_groups(tmp_path, [[10]])
    with Reader(make_config(folder), rank=1, world_size=2) as reader:
        batches = list(reader)
    assert [batch.num_samples for batch in batches] == [0] * 3  # steps of 8 and 2 rows in micro-batches of at most 4
    assert [batch.ends_step for batch in batches] == [False, True, True]
    assert batches[0].jagged("row").num_bags == 0


def test_every_rank_saves_the_same_state_between_steps(b23):
    config = make_config(b23, shuffle_rows=12)
    states = []
    prints = set()
    for rank in range(4):
        with Reader(config, rank=rank, world_size=4) as reader:
            for _ in range(2):
                next(reader)
            states.append(json.dumps(reader.state_dict(), sort_keys=True))
            prints.add(reader.fingerprint)
    assert len(set(states)) == len(prints) == 1


def test_a_position_inside_a_step_needs_the_same_split(b23):
    config = make_config(b23)
    whole, _ = read_all(config, micro_batches=4)
    head, state = read_all(config, stop=6, micro_batches=4)
    assert state["micro_batch"] == 2
    tail, _ = read_all(config, state=state, micro_batches=4)
    assert head + tail == whole
    with pytest.raises(ConfigError, match=r"inside a step, by .* \(8, 1, 4\); here it is \(8, 1, 2\)"):
        read_all(config, state=state, micro_batches=2)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_layout_any_interruption(data, tmp_path_factory):
    """Read with changing ranks, threads and prefetch, saved and resumed at random steps: each sample once, in one order."""
    files = data.draw(
        st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=4), label="files"
    )
    total = sum(map(sum, files))
    if total == 0:
        files, total = [*files, [1]], 1
    folder = write_row_groups(tmp_path_factory.mktemp("layout"), files)
    num_lanes = data.draw(st.sampled_from([2, 4, 6]), label="lanes")
    order = {
        "num_lanes": num_lanes,
        "shuffle_rows": data.draw(st.sampled_from([0, 1, 5, 30]), label="shuffle_rows"),
        "seed": data.draw(st.integers(0, 3), label="seed"),
        "epochs": data.draw(st.integers(1, 2), label="epochs"),
        "batch_size": data.draw(st.sampled_from([2, 4, 12]), label="batch_size"),
    }
    straight = read_steps(make_config(folder, **order))
    assert sorted(row for step in straight for row in step) == sorted(list(range(total)) * order["epochs"])
    state, resumed = None, []
    while len(resumed) < len(straight):
        world_size = data.draw(st.sampled_from([1, 2]), label="world_size")
        num_steps = data.draw(st.integers(1, 5), label="steps")
        threads = {"threads": data.draw(st.integers(1, 3)), "prefetch_batches": data.draw(st.integers(1, 5))}
        piece: list[list[int]] = []
        after = None
        for rank in range(world_size):
            steps, after = _some_steps(make_config(folder, **order, **threads), state, num_steps, rank, world_size)
            piece = steps if rank == 0 else [a + b for a, b in zip(piece, steps, strict=True)]
        state = after
        resumed += piece
    assert [sorted(step) for step in resumed] == [sorted(step) for step in straight]


def _some_steps(config, state, num_steps, rank, world_size):
    with Reader(config, rank=rank, world_size=world_size) as reader:
        if state is not None:
            reader.load_state_dict(state)
        steps = []
        while len(steps) < num_steps:
            rows, ended = [], False
            while not ended:
                batch = next(reader, None)
                if batch is None:
                    return steps, reader.state_dict()
                rows += rows_of(batch)
                ended = batch.ends_step
            steps.append(rows)
        return steps, json.loads(json.dumps(reader.state_dict()))


def test_reset_starts_over(b23):
    with Reader(make_config(b23)) as reader:
        first = [rows_of(batch) for batch in reader]
        assert list(reader) == []
        reader.reset()
        assert [rows_of(batch) for batch in reader] == first
        assert reader.num_samples == 60
        assert reader.steps_per_epoch == 8


def test_batches_say_where_their_rows_came_from(b23):
    with Reader(make_config(b23, shuffle_rows=12)) as reader:
        for batch in reader:
            for place, row in enumerate(rows_of(batch)):
                file, unit, number = batch.locate(place)
                first_of_file = {"part-000": 0, "part-001": 20, "part-002": 30}
                begin = next(first for name, first in first_of_file.items() if name in str(file))
                assert row == begin + 10 * int(str(unit).removeprefix("row group ")) + number


def test_other_order_settings_are_refused(b23):
    _, state = read_all(make_config(b23, shuffle_rows=12), stop=1)
    with pytest.raises(ConfigError, match="num_lanes=8 here, 4 when the position was saved"):
        read_all(make_config(b23, shuffle_rows=12, num_lanes=8), state=state)
    with pytest.raises(ConfigError, match="seed=1 here, 0 when"):
        read_all(make_config(b23, shuffle_rows=12, seed=1), state=state)
    with pytest.raises(ConfigError, match="shuffle_rows=0 here, 12 when"):
        read_all(make_config(b23), state=state)


def test_altered_states_are_refused(b23):
    _, state = read_all(make_config(b23), stop=2)
    with pytest.raises(CheckpointError, match="lanes of the saved position are not where its rows lead"):
        read_all(make_config(b23), state={**state, "rows": 17})
    with pytest.raises(CheckpointError, match="999 rows into an epoch of 60"):
        read_all(make_config(b23), state={**state, "rows": 999})
    with pytest.raises(CheckpointError, match="version 2; this release reads version 1"):
        read_all(make_config(b23), state={**state, "version": 2})
    with pytest.raises(CheckpointError, match="not the state of a reader"):
        read_all(make_config(b23), state={})


def test_changed_files_are_named(tmp_path):
    folder = write_row_groups(tmp_path / "data", B23)
    _, state = read_all(make_config(folder), stop=2)
    third = folder / "part-002.parquet"
    content = third.read_bytes()
    third.unlink()
    with pytest.raises(
        DataError, match=r"part-002.parquet: 2 files here, 3 in the checkpoint; .* in the checkpoint only"
    ):
        read_all(make_config(folder), state=state)
    (folder / "part-0015.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"file 2 of the list is .*part-0015.parquet' here and .*part-002.parquet'"):
        read_all(make_config(folder), state=state)
    (folder / "part-0015.parquet").unlink()
    write_row_groups(tmp_path / "other", [[10, 10], [10], [10, 10, 9]])
    third.write_bytes((tmp_path / "other" / "part-002.parquet").read_bytes())
    with pytest.raises(DataError, match=r"part-002.parquet: \d+ bytes here, \d+ in the checkpoint"):
        read_all(make_config(folder), state=state)
    third.write_bytes(content)
    assert read_all(make_config(folder), state=state)[0]
