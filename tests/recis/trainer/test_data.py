"""Steps read one ahead: the same steps, and a position that stays behind the step that was given out."""

from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recis.features import FeatureEngine, FeatureSpec
from recis.io import DataConfig, Ids, Label
from recis.trainer.data import StepStream

ENGINE = FeatureEngine((FeatureSpec(name="id", kind="sparse"), FeatureSpec(name="y", kind="label")))


@pytest.fixture(params=["files", "own source"])
def opened(request, toy, tmp_path):
    """Return a function that opens steps of 2 micro-batches and a last one of what is left: shuffled files, or own batches."""
    for number in range(2):
        rows = list(range(50 * number, 50 * number + 50))
        table = pa.table({"id": rows, "y": [float(row % 2) for row in rows]})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=16)
    config = DataConfig(
        paths=(str(tmp_path),),
        format="parquet",
        columns=(Ids("id"), Label("y")),
        batch_size=24,
        num_lanes=4,
        shuffle_rows=8,
        epochs=2,
    )
    if request.param == "files":
        return lambda: StepStream(config, ENGINE, micro_batches=2)
    return lambda: StepStream(toy.Source([toy.random_batch(seed, 4) for seed in range(17)]), None, micro_batches=2)


def ids(step):
    return [batch.sparse.values.tolist() for batch in step]


def test_steps_and_positions_are_those_of_reading_step_by_step(opened):
    plain, ahead = opened(), opened()
    steps = [(ids(step), plain.state_dict()) for step in plain.steps()]
    assert len(steps) >= 9
    found = []
    for step, following in ahead.steps_ahead():
        found.append((ids(step), ahead.state_dict()))
        if len(found) < len(steps):
            assert following is not None
            assert ids(following) == steps[len(found)][0]
        else:
            assert following is None
    assert found == steps
    assert ahead.state_dict() == plain.state_dict()


def test_a_position_taken_while_the_next_step_was_read_goes_on_with_that_step(opened):
    steps = [ids(step) for step in opened().steps()]
    stream = opened()
    for _ in islice(stream.steps_ahead(), 3):
        pass
    resumed = opened()
    resumed.load_state_dict(stream.state_dict())
    assert [ids(step) for step, _ in resumed.steps_ahead()] == steps[3:]


def test_nothing_is_read_behind_the_last_step_asked_for(opened):
    stream, three = opened(), opened()
    taken = list(stream.steps_ahead(3))
    assert len(taken) == 3
    assert taken[-1][1] is None
    list(islice(three.steps(), 3))
    assert stream.state_dict() == three.state_dict()
