"""The next-item recipes on a small purchase log: what lines are read, both readers train, the command recommends."""

from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recis.cli import main
from recis.errors import ConfigError
from recis.recipes.online_retail import kept_snapshots
from recis.recipes.retail_lines import latest_lines
from recis.recipes.retail_log import clean
from recis.recipes.retail_sequence import retail_sasrec, scores_of
from recis.trainer import Trainer

START = datetime(2011, 1, 1)


def small_log() -> pa.Table:
    rng, lines = np.random.default_rng(0), []
    for customer in range(30):
        own, day = rng.integers(0, 50, 12), rng.uniform(0, 20)
        while day < 180:
            lines += [(len(lines), f"{20000 + 3 * int(item)}", day, 12000 + customer) for item in rng.choice(own, 4)]
            day += rng.uniform(4, 16)
    return pa.table(
        {
            "InvoiceNo": [str(line[0]) for line in lines],
            "StockCode": [line[1] for line in lines],
            "Description": ["RED THING"] * len(lines),
            "Quantity": pa.array([1] * len(lines), pa.int32()),
            "InvoiceDate": pa.array([START + timedelta(days=line[2]) for line in lines], pa.timestamp("ms")),
            "UnitPrice": [1.5] * len(lines),
            "CustomerID": pa.array([line[3] for line in lines], pa.int32()),
        }
    )


def test_latest_lines_are_the_customers_own_in_order():
    log = clean(small_log())
    for customer, rows in zip((3, 0), latest_lines(log, np.array([3, 0])), strict=True):
        assert (log.customer[rows] == customer).all()
        assert len(rows) == int((log.customer == customer).sum())
        assert all(log.day[a] <= log.day[b] for a, b in pairwise(rows))


@pytest.mark.parametrize("name", ["retail_sasrec", "retail_hstu"])
def test_train_recommend_and_no_look_ahead(name, tmp_path):
    data, run = tmp_path / "transactions.parquet", tmp_path / "run"
    pq.write_table(small_log(), data)
    assert (
        main(["train", name, "--data", str(data), "--out", str(run), "--set", "num_cutoffs=1", "--set", "epochs=1"])
        == 0
    )
    for file in (run / "lines").glob("*.parquet"):
        table = pq.read_table(file, columns=["times", "now"]).to_pylist()
        assert all(time < row["now"] for row in table for time in row["times"])
    users, out = tmp_path / "users.txt", tmp_path / "out.parquet"
    users.write_text("12003\n99\n")
    assert main(["recommend", "--run", str(run), "--users", str(users), "--k", "5", "--out", str(out)]) == 0
    rows = pq.read_table(out).to_pylist()
    assert [row["CustomerID"] for row in rows] == [12003] * 5 + [99] * 5
    assert [row["unknown_customer"] for row in rows] == [False] * 5 + [True] * 5


def test_each_half_of_the_ranker_scores_alone(tmp_path):
    """Without lines the scores change with the dense features alone, without facts with the lines alone."""
    data = tmp_path / "transactions.parquet"
    pq.write_table(small_log(), data)
    moved = {}
    for left_out in ("facts", "lines"):
        config = retail_sasrec(data=str(data), out=tmp_path / "run", num_cutoffs=1, epochs=1, **{left_out: False})
        prepared = kept_snapshots(tmp_path / "run" / "snapshots")
        trainer = Trainer(replace(config, evaluate=None, after=None), quiet=True)
        trainer.train()
        assert (len(trainer.tables) == 0) is (left_out == "lines")
        file = tmp_path / "run" / "lines" / prepared.validation_file.name
        plain, table = scores_of(trainer, prepared, file), pq.read_table(file)
        for column, values in (
            ("facts", [[value + 1.0 for value in row] for row in table["facts"].to_pylist()]),
            ("items", [row[::-1] for row in table["items"].to_pylist()]),
        ):
            at = table.column_names.index(column)
            pq.write_table(
                table.set_column(at, column, pa.array(values, table.schema.field(column).type)),
                tmp_path / "changed.parquet",
            )
            changed = scores_of(trainer, prepared, tmp_path / "changed.parquet")
            moved[left_out, column] = not torch.equal(plain, changed)
    assert moved == {
        ("facts", "facts"): False,
        ("facts", "items"): True,
        ("lines", "facts"): True,
        ("lines", "items"): False,
    }
    with pytest.raises(ConfigError, match="nothing to score by"):
        retail_sasrec(data=str(data), out=tmp_path / "run", num_cutoffs=1, facts=False, lines=False)
