"""From exported grades to a recis ranker: the join by hand, the gain of a teacher that knows, and what is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_lm import MICRO, small_task

from recis.errors import ConfigError, DataError
from recis.recipes.teacher_ranker import RANKERS, TEACHER, Settings, ranker_run, teacher_ranker, write_rows
from recis.trainer import Trainer
from relevance.catalog import CatalogConfig, make_catalog
from relevance.cli import main
from relevance.export import COLUMNS, teacher_columns
from relevance.files import write_rows as write_pairs
from relevance.training_run import open_run


def teacher_file(path, pairs, *, certainty=0.8):
    """Write the columns of a teacher that gives the gold label a share, and the rest to all alike."""
    gold = torch.nn.functional.one_hot(torch.tensor([pair.label - 1 for pair in pairs]), 4)
    columns = teacher_columns(certainty * gold + (1 - certainty) / 4)
    keys = {"query_id": [pair.query_id for pair in pairs], "item_id": [pair.item_id for pair in pairs]}
    pq.write_table(pa.table(keys | dict(zip(COLUMNS, columns.T.numpy(), strict=True))), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("ranker")
    catalog = make_catalog(CatalogConfig(num_train=8, num_dev=800, num_test=400))
    write_pairs(home / "pairs.parquet", [*catalog.train, *catalog.dev, *catalog.test])
    teacher_file(home / "teacher.parquet", [*catalog.test, *catalog.dev])  # another order than the pairs
    return home


def test_the_recipe_reads_what_relevance_exports():
    assert TEACHER == COLUMNS


def test_rows_are_joined_by_query_and_item(folder, tmp_path):
    write_rows(folder, tmp_path, num_labelled=100)
    catalog = make_catalog(CatalogConfig(num_train=8, num_dev=800, num_test=400))
    for name, pairs in (("train", catalog.dev), ("test", catalog.test)):
        table = pq.read_table(tmp_path / f"{name}.parquet")
        labels = np.array([pair.label for pair in pairs])
        good = table["good"].to_pylist()
        if name == "test":
            assert good == (labels >= 3).astype(int).tolist()
        else:
            assert sum(value is not None for value in good) == 100
            assert all(value in (None, int(label >= 3)) for value, label in zip(good, labels, strict=True))
            labelled = pq.read_table(tmp_path / "labelled.parquet")
            assert labelled["good"].to_pylist() == [value for value in good if value is not None]
        np.testing.assert_allclose(table["teacher"].to_numpy(), np.where(labels >= 3, 0.9, 0.1), atol=1e-6)
        assert [len(words) for words in table["title_words"].to_pylist()] == [len(p.item.title.split()) for p in pairs]
        assert len(set(table["query"].to_pylist())) == len({pair.query_id for pair in pairs})


def test_a_teacher_helps_as_columns_and_as_soft_targets(folder, tmp_path):
    """With 40 labels among 800 rows a teacher that knows the answer is worth much, asked or not while serving."""
    write_rows(folder, tmp_path, num_labelled=40)
    settings, found = Settings(folder=tmp_path, epochs=6, labelled_epochs=12), {}
    for name in RANKERS:
        run = Trainer(ranker_run(name, settings, seed=0), quiet=True)
        run.train()
        found[name] = run.state.metrics["auc"]
    for name in ("+ teacher columns", "+ soft targets", "+ both"):
        assert found[name] > found["labels alone"] + 0.05, found


def test_what_is_missing_is_named(folder, tmp_path):
    for data in (None, str(tmp_path)):
        with pytest.raises(ConfigError, match=r"needs a folder with pairs\.parquet"):
            teacher_ranker(data=data, out=tmp_path / "run")
    catalog = make_catalog(CatalogConfig(num_train=8, num_dev=16, num_test=16))
    write_pairs(tmp_path / "pairs.parquet", [*catalog.dev, *catalog.test])
    teacher_file(tmp_path / "teacher.parquet", [*catalog.dev, *catalog.test[:-1]])
    with pytest.raises(DataError, match=f"{catalog.test[-1].id}.*has no row"):
        teacher_ranker(data=str(tmp_path), out=tmp_path / "run")
    write_pairs(tmp_path / "pairs.parquet", catalog.dev)
    with pytest.raises(DataError, match="part 'test'"):
        teacher_ranker(data=str(tmp_path), out=tmp_path / "run")


@pytest.mark.filterwarnings("ignore")
def test_the_commands_hand_over(tmp_path, capsys):
    """train, data, export and the ranker, as docs/relevance.md shows them."""
    run = open_run("sft", out=tmp_path / "run", settings=MICRO, say=lambda line: None)
    final = run.finish(run.train_sft())
    home = tmp_path / "ranker"
    home.mkdir()
    sizes = ["--set", "num_train=48", "--set", "num_dev=16", "--set", "num_test=16"]
    assert main(["data", "--out", str(home / "pairs.parquet"), *sizes]) == 0
    arguments = ["export", "--model", str(final), "--in", str(home / "pairs.parquet"), "--out"]
    assert main([*arguments, str(home / "teacher.parquet")]) == 1
    assert "trained on" in capsys.readouterr().err
    assert main([*arguments, str(home / "teacher.parquet"), "--part", "dev", "test"]) == 0
    assert pq.read_metadata(home / "teacher.parquet").num_rows == 32
    write_rows(home, tmp_path / "rows", num_labelled=8)
    assert pq.read_metadata(tmp_path / "rows" / "train.parquet").num_rows == len(small_task().dev)
