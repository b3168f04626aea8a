"""Hugging Face datasets as a source: map-style and iterable, with the position semantics of files."""

import json

import pytest

datasets = pytest.importorskip("datasets", reason="needs the extra hf")

import recis.io.huggingface as huggingface  # noqa: E402
from recis.errors import ConfigError, DataError  # noqa: E402
from recis.io import Dense, Ids, Strings, TimeWindow, from_hf  # noqa: E402

COLUMNS = (Ids("row"), Ids("history"), Dense("price"), Strings("word"))


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(huggingface, "UNIT_ROWS", 7)


def make_dataset(num_rows=50):
    return datasets.Dataset.from_dict(
        {
            "row": list(range(num_rows)),
            "history": [list(range(row % 3)) for row in range(num_rows)],
            "price": [row / 4 for row in range(num_rows)],
            "word": [f"w{row}" for row in range(num_rows)],
            "unused": ["x"] * num_rows,
        }
    )


def make_iterable(num_rows=50):
    return make_dataset(num_rows).to_iterable_dataset(num_shards=3)


def read(dataset, *, state=None, stop=None, **settings):
    batches = []
    with from_hf(dataset, (Ids("row"),), **{"batch_size": 8, "num_lanes": 4, **settings}) as reader:
        if state is not None:
            reader.load_state_dict(state)
        while stop is None or len(batches) < stop:
            batch = next(reader, None)
            if batch is None:
                break
            batches.append(batch.jagged("row").flat_values.tolist())
        return batches, json.loads(json.dumps(reader.state_dict()))


@pytest.mark.parametrize("make", [make_dataset, make_iterable])
def test_columns(make):
    with from_hf(make(), COLUMNS, batch_size=64, num_lanes=1) as reader:
        batch = next(reader)
        assert next(reader, None) is None
    rows = batch.jagged("row").flat_values.tolist()
    assert rows == list(range(50))
    assert batch.jagged("history").to_lists() == [list(range(row % 3)) for row in rows]
    assert batch.tensor("price").tolist() == [row / 4 for row in rows]
    assert batch.jagged("word").to_strings() == [f"w{row}".encode() for row in rows]
    file, _, row = batch.locate(0)
    assert str(file).startswith("huggingface:")
    assert row == 0


@pytest.mark.parametrize("make", [make_dataset, make_iterable])
@pytest.mark.parametrize("shuffle_rows", [0, 12])
def test_stop_anywhere_and_go_on(make, shuffle_rows):
    settings = {"shuffle_rows": shuffle_rows, "epochs": 2}
    whole, _ = read(make(), **settings)
    assert sorted(row for batch in whole for row in batch) == sorted(list(range(50)) * 2)
    for stop in range(0, len(whole) + 1, 3):
        head, state = read(make(), stop=stop, **settings)
        assert head + read(make(), state=state, **settings)[0] == whole


@pytest.mark.parametrize("make", [make_dataset, make_iterable])
@pytest.mark.parametrize("world_size", [2, 4])
def test_steps_do_not_depend_on_the_ranks(make, world_size):
    alone, _ = read(make(28), shuffle_rows=12)
    ranks = [read(make(28), rank=rank, world_size=world_size, shuffle_rows=12)[0] for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    for number, step in enumerate(alone):
        assert sorted(step) == sorted(row for batches in ranks for row in batches[number])


def test_lengths_are_known_where_they_can_be():
    with from_hf(make_dataset(), COLUMNS, batch_size=8) as reader:
        assert (reader.num_samples, reader.steps_per_epoch) == (50, 7)
    with from_hf(make_iterable(), COLUMNS, batch_size=8) as reader:
        assert (reader.num_samples, reader.steps_per_epoch) == (None, None)


@pytest.mark.parametrize("make", [make_dataset, make_iterable])
def test_drop_last(make):
    batches, _ = read(make(), drop_last=True, epochs=2)
    assert [len(batch) for batch in batches] == [8] * 12


def test_selected_and_shuffled_datasets_are_read_in_their_own_order():
    dataset = make_dataset().shuffle(seed=3).select(range(20))
    assert [row for batch in read(dataset, num_lanes=1)[0] for row in batch] == dataset["row"][:]


def test_windows_over_a_dataset():
    window = TimeWindow(start=0, stop=50, seconds=20, column="row")
    with from_hf(make_dataset(), (Ids("row"),), batch_size=64, num_lanes=2, window=window) as reader:
        assert sorted(next(reader).jagged("row").flat_values.tolist()) == list(range(20))
        assert reader.advance_window()
        assert sorted(next(reader).jagged("row").flat_values.tolist()) == list(range(20, 40))
    with pytest.raises(ConfigError, match="windows need a map-style dataset"):
        from_hf(make_iterable(), (Ids("row"),), batch_size=8, window=window)


def test_bad_input():
    with pytest.raises(ConfigError, match=r"from_hf needs a datasets.Dataset or datasets.IterableDataset; got list"):
        from_hf([1], COLUMNS, batch_size=8)
    with pytest.raises(DataError, match=r"column 'prise': .* did you mean 'price'"):
        from_hf(make_dataset(), (Dense("prise"),), batch_size=8)
    with pytest.raises(DataError, match="Dense cannot be read from type"):
        from_hf(make_dataset(), (Dense("word"),), batch_size=8)
    with pytest.raises(DataError, match="the dataset has no rows"):
        from_hf(make_dataset(0), COLUMNS, batch_size=8)
    _, state = read(make_dataset(), stop=1)
    with pytest.raises(DataError, match="49 rows here, 50 in the checkpoint"):
        read(make_dataset(49), state=state)
