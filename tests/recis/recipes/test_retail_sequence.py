"""The next-item recipes on a small purchase log: what lines are read, both readers train, the command recommends."""

from datetime import datetime, timedelta
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recis.cli import main
from recis.recipes.retail_lines import latest_lines
from recis.recipes.retail_log import clean

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
