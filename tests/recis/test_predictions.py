"""Predictions: rows in order beside their scores, whatever the format; bad rows keep their place; whole or not at all."""

import gzip
import json
import math

import click_recipe
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
import torch
from command import recis

import recis.predictions as predictions_module
from recis.errors import ConfigError, DataError
from recis.input_rows import InputRows
from recis.io import Csv, DataConfig
from recis.predictions import write_eval_predictions
from recis.runs import open_run

NUM_ROWS = 256
ODD = {"id": list(range(NUM_ROWS)), "note": [None if n % 5 else f"n{n}" for n in range(NUM_ROWS)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("predictions")


@pytest.fixture(scope="module")
def rows():
    """Rows with two columns more than the run needs, and without labels."""
    return click_recipe.table(NUM_ROWS, **ODD).drop_columns(["click"])


@pytest.fixture(scope="module")
def run(folder):
    data = click_recipe.write(folder / "train.parquet", click_recipe.table())
    assert recis("train", "click_recipe:clicks", "--data", data, "--out", folder / "run").code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def want(run, rows, folder):
    """The scores, from the model itself: the whole table as one batch."""
    opened = open_run(run)
    path = click_recipe.write(folder / "whole.parquet", rows, row_group_size=NUM_ROWS)
    data = opened.data(str(path))
    (scores,) = opened.trainer.predict(DataConfig(**{**vars_of(data), "batch_size": NUM_ROWS}))
    return scores[:, 0].numpy()


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def predicted(run, data, out, *more, code=0):
    done = recis("predict", "--run", run, "--data", data, "--out", out, *more)
    assert done.code == code, done.err
    return pq.read_table(out)


def flat(rows, separator="|"):
    """Return the rows as CSV can hold them: lists in one cell."""
    lists = [separator.join(map(str, items)) for items in rows["items"].to_pylist()]
    return rows.set_column(rows.column_names.index("items"), "items", pa.array(lists))


def same_scores(got, want):
    np.testing.assert_allclose(got["prediction"].to_numpy(), want, rtol=1e-6)


def test_rows_and_order_are_the_input_s(run, rows, want, tmp_path):
    path = click_recipe.write(tmp_path / "in.parquet", rows, row_group_size=37)
    got = predicted(run, path, tmp_path / "out.parquet")
    assert got.drop_columns(["prediction"]).equals(rows)
    assert got.schema.field("prediction").type == pa.float32()
    same_scores(got, want)
    assert not list(tmp_path.glob(".tmp*"))


def test_several_files_are_read_by_path(run, rows, want, tmp_path):
    for name, start, stop in (("b", 100, 256), ("a", 0, 100)):
        click_recipe.write(tmp_path / "in" / f"{name}.parquet", rows.slice(start, stop - start), row_group_size=64)
    got = predicted(run, tmp_path / "in", tmp_path / "out.parquet")
    assert got["id"].to_pylist() == ODD["id"]
    same_scores(got, want)


def test_orc(run, rows, want, tmp_path):
    pyarrow.orc.write_table(rows, tmp_path / "in.orc", stripe_size=1)
    got = predicted(run, tmp_path / "in.orc", tmp_path / "out.parquet")
    assert got["items"].to_pylist() == rows["items"].to_pylist()
    assert got["note"].to_pylist() == ODD["note"]
    same_scores(got, want)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_csv(run, rows, want, tmp_path, packed):
    path = tmp_path / "in.csv"
    pyarrow.csv.write_csv(flat(rows), path)
    if packed:
        path = tmp_path / "in.csv.gz"
        path.write_bytes(gzip.compress((tmp_path / "in.csv").read_bytes()))
    got = predicted(run, path, tmp_path / "out.parquet")
    assert got.schema.field("id").type == pa.int64()
    assert got["id"].to_pylist() == ODD["id"]
    assert got["note"].to_pylist() == [note or "" for note in ODD["note"]]
    same_scores(got, want)


def test_jsonl(run, rows, want, tmp_path):
    lines = [json.dumps(row) + "\n\n" for row in rows.to_pylist()]  # blank lines are no rows
    (tmp_path / "in.jsonl").write_text("".join(lines))
    got = predicted(run, tmp_path / "in.jsonl", tmp_path / "out.parquet")
    assert (
        got.select(["user", "items", "brand", "id", "note"]).to_pylist()
        == rows.select(["user", "items", "brand", "id", "note"]).to_pylist()
    )
    same_scores(got, want)


def test_scores_do_not_depend_on_labels(run, rows, want, tmp_path):
    labelled = rows.append_column("click", pa.array([7.0] * NUM_ROWS))  # outside its range, and never looked at
    got = predicted(run, click_recipe.write(tmp_path / "in.parquet", labelled), tmp_path / "out.parquet")
    same_scores(got, want)


def test_one_column_per_task(folder, tmp_path):
    buy = [None if n % 3 else n % 2 for n in range(NUM_ROWS)]
    data = click_recipe.write(tmp_path / "train.parquet", click_recipe.table(NUM_ROWS, buy=buy))
    assert recis("train", "click_recipe:two_tasks", "--data", data, "--out", tmp_path / "run").code == 0
    bare = click_recipe.table(50).drop_columns(["click"])
    got = predicted(tmp_path / "run", click_recipe.write(tmp_path / "in.parquet", bare), tmp_path / "out.parquet")
    assert got.column_names == [*bare.column_names, "prediction.click", "prediction.buy"]
    (scores,) = open_run(tmp_path / "run").trainer.predict(
        DataConfig(**{**vars_of(open_run(tmp_path / "run").data(str(tmp_path / "in.parquet"))), "batch_size": 50})
    )
    for task, name in enumerate(("prediction.click", "prediction.buy")):
        np.testing.assert_allclose(got[name].to_numpy(), scores[:, task].numpy(), rtol=1e-6)


# ---- bad rows


BAD = (0, 5, 130, 131, 254, 255)


@pytest.fixture
def dirty(rows, tmp_path):
    prices = rows["price"].to_pylist()
    for row in BAD:
        prices[row] = math.nan if row % 2 else None
    spoilt = rows.set_column(rows.column_names.index("price"), "price", pa.array(prices, pa.float64()))
    return click_recipe.write(tmp_path / "dirty.parquet", spoilt, row_group_size=50)


def test_a_bad_row_stops_the_command_and_leaves_nothing(run, dirty, tmp_path):
    done = recis("predict", "--run", run, "--data", dirty, "--out", tmp_path / "out.parquet")
    assert done.code == 1
    assert "row group 0, row 0, column 'price': a null" in done.error
    assert [path.name for path in tmp_path.iterdir()] == ["dirty.parquet"]


def test_bad_rows_keep_their_place(run, dirty, want, tmp_path):
    argv = ("--set", "train_data.on_bad_row=skip")
    done = recis("predict", "--run", run, "--data", dirty, "--out", tmp_path / "out.parquet", *argv)
    assert done.code == 3
    listed = [line for line in done.err.splitlines() if line.startswith("left out: ")]
    assert len(listed) == len(BAD)
    assert listed[1].startswith(f"left out: {dirty}, row group 0, row 5, column 'price': NaN")
    assert "6 rows were left out" in done.err
    got = pq.read_table(tmp_path / "out.parquet")
    assert got["id"].to_pylist() == ODD["id"]
    scores = got["prediction"].to_pylist()
    assert [row for row, score in enumerate(scores) if score is None] == list(BAD)
    kept = [row for row in range(NUM_ROWS) if row not in BAD]
    np.testing.assert_allclose([scores[row] for row in kept], want[kept], rtol=1e-6)


@pytest.mark.parametrize("setting", ["eval_data.on_bad_row=skip", "train_data.on_bad_row=skip"])
def test_eval_counts_what_is_left(run, dirty, tmp_path, setting):
    labelled = pq.read_table(dirty).append_column("click", pa.array([0, 1] * (NUM_ROWS // 2)))
    path = click_recipe.write(tmp_path / "labelled.parquet", labelled)
    assert recis("eval", "--run", run, "--data", path).code == 1
    done = recis("eval", "--run", run, "--data", path, "--json", "--set", setting)
    assert (done.code, json.loads(done.out)["n"]) == (3, NUM_ROWS - len(BAD))


def test_a_run_that_skipped_bad_rows_goes_on_skipping(dirty, tmp_path):
    labelled = pq.read_table(dirty).append_column("click", pa.array([0, 1] * (NUM_ROWS // 2)))
    path = click_recipe.write(tmp_path / "labelled.parquet", labelled)
    argv = ("train", "click_recipe:clicks", "--data", path, "--out", tmp_path / "run")
    settings = ("--set", "train_data.on_bad_row=skip", "--set", "evaluated=no", "--set", "epochs=2")
    done = recis(*argv, *settings)
    assert done.code == 3
    assert done.err.count("left out: ") == len(BAD)  # each once, though it was met in two epochs
    assert recis(*argv, "--resume").code == 3
    assert recis("predict", "--run", tmp_path / "run", "--data", dirty, "--out", tmp_path / "out.parquet").code == 3


def test_lines_that_cannot_be_read_are_empty_rows(run, rows, want, tmp_path):
    pyarrow.csv.write_csv(flat(rows), tmp_path / "in.csv")
    lines = (tmp_path / "in.csv").read_text().splitlines()
    lines[11] += ",1,2"  # line 0 is the header
    lines[41] = "garbage"
    lines[200] = lines[200].replace(",", ",x", 3)
    (tmp_path / "in.csv").write_text("\n".join(lines) + "\n")
    assert recis("predict", "--run", run, "--data", tmp_path / "in.csv", "--out", tmp_path / "o.parquet").code == 1
    got = predicted(run, tmp_path / "in.csv", tmp_path / "out.parquet", "--set", "train_data.on_bad_row=skip", code=3)
    scores = got["prediction"].to_pylist()
    assert [row for row, score in enumerate(scores) if score is None] == [10, 40, 199]
    assert got["id"].to_pylist()[9:12] == [9, None, 11]
    np.testing.assert_allclose(scores[:10], want[:10], rtol=1e-6)
    np.testing.assert_allclose(scores[41:199], want[41:199], rtol=1e-6)


def test_all_rows_bad(run, rows, tmp_path):
    spoilt = rows.set_column(rows.column_names.index("price"), "price", pa.array([math.nan] * NUM_ROWS))
    path = click_recipe.write(tmp_path / "in.parquet", spoilt)
    got = predicted(run, path, tmp_path / "out.parquet", "--set", "train_data.on_bad_row=skip", code=3)
    assert got.num_rows == got["prediction"].null_count == NUM_ROWS


# ---- the output


def test_an_output_that_was_there_is_replaced_whole(run, rows, dirty, tmp_path):
    out = tmp_path / "out.parquet"
    predicted(run, click_recipe.write(tmp_path / "in.parquet", rows), out)
    before = out.read_bytes()
    assert recis("predict", "--run", run, "--data", dirty, "--out", out).code == 1
    assert out.read_bytes() == before


def test_the_input_is_never_overwritten(run, rows, tmp_path):
    path = click_recipe.write(tmp_path / "in.parquet", rows)
    before = path.read_bytes()
    done = recis("predict", "--run", run, "--data", path, "--out", path)
    assert done.code == 2
    assert "is the input; name another file" in done.error
    assert path.read_bytes() == before


def test_a_column_of_that_name_is_refused(run, rows, tmp_path):
    path = click_recipe.write(tmp_path / "in.parquet", rows.append_column("prediction", rows["price"]))
    done = recis("predict", "--run", run, "--data", path, "--out", tmp_path / "out.parquet")
    assert done.code == 2
    assert "already has a column 'prediction'; rename it" in done.error


def test_only_settings_of_reading_are_taken(run, tmp_path):
    path = click_recipe.write(tmp_path / "in.parquet", click_recipe.table(10))
    for setting, text in (
        ("max_steps=3", "takes only settings of how files are read"),
        ("train_data.on_bad_rows=skip", "DataConfig has no field 'on_bad_rows'; did you mean 'on_bad_row'?"),
        ("train_data.on_bad_row=maybe", "'maybe' is not one of raise, skip"),
    ):
        done = recis("predict", "--run", run, "--data", path, "--out", tmp_path / "o.parquet", "--set", setting)
        assert done.code == 2
        assert text in done.error


def test_row_groups_are_bounded(run, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions_module, "ROW_GROUP_ROWS", 100)
    path = click_recipe.write(tmp_path / "in.parquet", rows)
    predicted(run, path, tmp_path / "out.parquet")
    meta = pq.ParquetFile(tmp_path / "out.parquet").metadata
    sizes = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
    assert sum(sizes) == NUM_ROWS
    assert max(sizes) <= 100 + 32
    assert len(sizes) == 2 or len(sizes) == 3


# ---- all columns of text files


def text_rows(tmp_path, name, content, **more):
    path = tmp_path / name
    path.write_text(content)
    config = DataConfig(
        paths=(str(path),),
        format="csv" if name.endswith("csv") else "jsonl",
        columns=click_recipe.COLUMNS[3:4],
        batch_size=4,
        **more,
    )
    return InputRows(config)


def test_types_of_csv_columns_hold_all_values(tmp_path):
    content = "a;b;c;d;brand;e\n1;1;x;;007;true\n\n2;2.5;1;;8;false\n3;;2;;;true\n"
    got = text_rows(tmp_path, "a.csv", content, csv=Csv(delimiter=";"))
    assert [str(field.type) for field in got.schema] == ["int64", "double", "string", "null", "string", "bool"]
    table = pa.Table.from_batches(got.batches())
    assert table.num_rows == got.num_rows == 3
    assert table["brand"].to_pylist() == ["007", "8", ""]  # the run reads it as text, so it is no number
    assert table["b"].to_pylist() == [1.0, 2.5, None]


def test_types_across_blocks_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr("recis.io.text.BLOCK_BYTES", 16)
    got = text_rows(tmp_path, "a.csv", "a,b\n1,1\n2,2\n3,3\n4,4\n5,5\n6,6\n7,x\n8.5,8\n")
    assert [str(field.type) for field in got.schema] == ["double", "string"]
    assert pa.Table.from_batches(got.batches())["b"].to_pylist() == ["1", "2", "3", "4", "5", "6", "x", "8"]


def test_nested_and_missing_keys_of_jsonl(tmp_path):
    lines = ['{"a": [], "b": {"x": 1}}', '{"a": [1.5]}', '{"c": "late"}', "broken", '{"a": null, "b": {"y": "t"}}']
    got = text_rows(tmp_path, "a.jsonl", "\n".join(lines) + "\n")
    rows = pa.Table.from_batches(got.batches()).to_pylist()
    assert [row["a"] for row in rows] == [[], [1.5], None, None, None]
    assert [row["c"] for row in rows] == [None, None, "late", None, None]
    assert rows[0]["b"] == {"x": 1, "y": None}
    with pytest.raises(DataError, match=r"column 'a': holds values of different types: list.* and int64"):
        text_rows(tmp_path, "b.jsonl", '{"a": [1]}\n{"a": 1}\n')


def test_files_of_other_columns_are_refused(run, rows, tmp_path):
    click_recipe.write(tmp_path / "in" / "a.parquet", rows)
    click_recipe.write(tmp_path / "in" / "b.parquet", rows.drop_columns(["note"]))
    done = recis("predict", "--run", run, "--data", tmp_path / "in", "--out", tmp_path / "out.parquet")
    assert done.code == 1
    assert "b.parquet, column 'note': missing here, string in " in done.error


# ---- the evaluation data of a run


def test_scores_of_the_evaluation_data(run, folder):
    opened = open_run(run)
    write_eval_predictions(opened.trainer, folder / "eval" / "eval.parquet")
    got = pq.read_table(folder / "eval" / "eval.parquet")
    table = pq.read_table(folder / "train.parquet")
    assert got["label"].to_pylist() == table["click"].to_pylist()
    assert got["group"].to_pylist() == table["user"].to_pylist()
    assert got["weight"].to_pylist() == [1.0] * NUM_ROWS
    scores = torch.cat(list(opened.trainer.predict(opened.config.eval_data)))
    np.testing.assert_array_equal(got["prediction"].to_numpy(), scores[:, 0].numpy())


def test_a_model_with_scores_for_other_tasks(run, tmp_path):
    opened = open_run(run)
    opened.trainer.tasks = ("click", "buy")
    path = click_recipe.write(tmp_path / "in.parquet", click_recipe.table(10))
    with pytest.raises(ConfigError, match=r"the model gives 1 scores per row for the 2 tasks \(click, buy\)"):
        predictions_module.write_predictions(opened, str(path), tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
