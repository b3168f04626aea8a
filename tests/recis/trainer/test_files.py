"""Runs on files: features in training, evaluation and prediction, data without labels, configs through JSON, windows."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from integration.kill_recipe import recipe, write_data

from recis.errors import ConfigError, DataError
from recis.io import Integer, Reader
from recis.io.config import TimeWindow
from recis.trainer import Trainer, from_json, to_json


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "clicks")


def short(data, **changes):
    config = recipe(data=str(data), out=Path())
    return replace(config, **{"max_steps": 3, "save_every_steps": None, "monitor": None, **changes})


def test_config_through_json(data):
    config = recipe(data=str(data), out=Path())
    again = from_json(json.loads(json.dumps(to_json(config), allow_nan=False)))
    assert again == config


def test_a_run_from_its_stored_config(data, tmp_path):
    first = Trainer(short(data), tmp_path / "run", quiet=True)
    first.train()
    stored = from_json(json.loads((tmp_path / "run" / "config.json").read_text()))
    second = Trainer(stored, quiet=True)
    second.load(tmp_path / "run")
    assert second.evaluate() == first.evaluate()


def test_epochs_and_accumulation(data):
    """320 samples in steps of 32: ten per epoch, the last step of an epoch included."""
    config = short(data, max_steps=None, epochs=2, eval_every_steps=None)
    trainer = Trainer(config, quiet=True)
    trainer.train()
    assert trainer.state.step == 20
    assert trainer.state.samples == 640
    whole = Trainer(replace(config, epochs=1, train_data=replace(config.train_data, batch_size=48)), quiet=True)
    whole.train()
    assert (whole.state.step, whole.state.samples) == (7, 320)


def test_the_data_config_decides_without_max_steps(data):
    config = short(data, max_steps=None, eval_every_steps=None)
    trainer = Trainer(replace(config, train_data=replace(config.train_data, epochs=3)), quiet=True)
    trainer.train()
    assert trainer.state.step == 30


def test_tasks_are_named_by_their_features(data):
    trainer = Trainer(short(data), quiet=True)
    assert trainer.tasks == ("click",)
    assert set(trainer.train()) == {"loss", "auc", "gauc", "logloss"}


def test_predict_in_the_order_of_the_file_and_without_labels(data, tmp_path):
    trainer = Trainer(short(data), quiet=True)
    trainer.train()
    table = pq.read_table(data / "clicks-0.parquet")
    pq.write_table(table.drop_columns(["click"]), tmp_path / "new.parquet", row_group_size=11)
    files = replace(trainer.config.train_data, paths=(str(tmp_path / "new.parquet"),))
    scores = torch.cat(list(trainer.predict(files)))
    assert scores.shape == (table.num_rows, 1)
    one_by_one = replace(files, batch_size=1)
    torch.testing.assert_close(torch.cat(list(trainer.predict(one_by_one))), scores)
    reversed_rows = table.take(list(range(table.num_rows))[::-1])
    pq.write_table(reversed_rows.drop_columns(["click"]), tmp_path / "back.parquet", row_group_size=11)
    back = replace(files, paths=(str(tmp_path / "back.parquet"),))
    torch.testing.assert_close(torch.cat(list(trainer.predict(back))).flip(0), scores)


def test_a_reader_of_ones_own(data):
    """A Reader is a Source: its own micro-batches are taken as they come."""
    config = short(data, eval_every_steps=None, eval_data=None)
    want = Trainer(config, quiet=True)
    want.train()
    with Reader(config.train_data, micro_batches=2) as reader:
        have = Trainer(replace(config, train_data=reader), quiet=True)
        have.train()
    assert torch.equal(have.model.state_dict()["bias"], want.model.state_dict()["bias"])


def test_windows_follow_one_another(data, tmp_path):
    table = pq.read_table(data / "clicks-0.parquet")
    times = [100 + 10 * (row // 50) for row in range(table.num_rows)]
    pq.write_table(table.append_column("time", [times]), tmp_path / "timed.parquet")
    config = short(data, max_steps=None, eval_data=None, eval_every_steps=None)
    window = TimeWindow(start=100, stop=140, seconds=10, column="time")
    files = replace(
        config.train_data,
        paths=(str(tmp_path / "timed.parquet"),),
        columns=(*config.train_data.columns, Integer("time")),
        window=window,
        shuffle_rows=0,
    )
    trainer = Trainer(replace(config, train_data=files), quiet=True)
    trainer.train()
    assert trainer.state.samples == 160
    assert trainer.state.step == 7  # windows of 50, 50, 50 and 10 rows: two steps each, and one


def test_files_need_features(data):
    config = short(data, features=(), tasks=("click",))
    with pytest.raises(ConfigError, match="needs `features`"):
        Trainer(config, quiet=True).train()


def test_bad_data_stops_the_run_and_leaves_the_folder_usable(data, tmp_path):
    table = pq.read_table(data / "clicks-1.parquet")
    bad = table.set_column(
        table.schema.get_field_index("click"), "click", [[1] * 100 + [7] + [0] * (table.num_rows - 101)]
    )
    good = tmp_path / "data"
    good.mkdir()
    pq.write_table(pq.read_table(data / "clicks-0.parquet"), good / "a.parquet", row_group_size=50)
    pq.write_table(bad, good / "b.parquet", row_group_size=50)
    config = short(good, max_steps=None, eval_data=None, eval_every_steps=None, save_every_steps=2)
    files = replace(config.train_data, shuffle_rows=0, num_lanes=1)
    config = replace(config, train_data=files)
    with pytest.raises(DataError, match=r"b\.parquet.*column 'click', value 7"):
        Trainer(config, tmp_path / "run", quiet=True).train()
    again = Trainer(config, tmp_path / "run", resume=True, quiet=True)
    assert again.state.step >= 2
    assert again.state.step % 2 == 0
    again.close()
