"""The recipe on the purchase log: what is dropped and where it is split, the baselines by hand, no look ahead, recommend."""

import os
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recis.cli import main
from recis.errors import ConfigError
from recis.metrics import Ndcg, Recall
from recis.recipes.online_retail import hide, online_retail, read_customers, whole_ranking
from recis.recipes.retail_baselines import own_items, popular, quality, ratio_interval, top_hits
from recis.recipes.retail_features import FEATURES, candidate_features
from recis.recipes.retail_history import History
from recis.recipes.retail_log import active_customers, clean, read_log
from recis.recipes.retail_model import RankerConfig, list_loss
from recis.recipes.retail_snapshots import (
    HISTORY_ITEMS,
    Snapshot,
    prepare,
    read_summary,
    recent_items,
    take_snapshot,
    training_cutoffs,
)
from recis.trainer import Trainer

START = datetime(2011, 1, 1)
DAY_0 = float((START - datetime(1970, 1, 1)).days)


def table_of(lines):
    """lines: (invoice, item, quantity, days since START, customer)."""
    return pa.table(
        {
            "InvoiceNo": [str(line[0]) for line in lines],
            "StockCode": [line[1] for line in lines],
            "Description": [f"RED THING {line[1]}" for line in lines],
            "Quantity": pa.array([line[2] for line in lines], pa.int32()),
            "InvoiceDate": pa.array([START + timedelta(days=line[3]) for line in lines], pa.timestamp("ms")),
            "UnitPrice": [1.5] * len(lines),
            "CustomerID": pa.array([line[4] for line in lines], pa.int32()),
        }
    )


def random_lines(*, num_days=215, num_customers=40, num_items=60, seed=0):
    """Customers who keep buying from a small set of their own, with a basket every week or two."""
    rng = np.random.default_rng(seed)
    lines, invoice = [], 1000
    for customer in range(num_customers):
        own = rng.integers(0, num_items, 12)
        day = rng.uniform(0, 20)
        while day < num_days:
            items = sorted({*rng.choice(own, 4).tolist(), int(rng.integers(0, num_items))})
            lines += [
                (invoice, f"{20000 + 3 * item}", int(rng.integers(1, 9)), day, 12000 + customer) for item in items
            ]
            invoice += 1
            day += rng.uniform(4, 16)
    return lines


@pytest.fixture(scope="module")
def log():
    return clean(table_of(random_lines()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of the command on a small log, and the file of that log."""
    folder = tmp_path_factory.mktemp("retail")
    data = folder / "transactions.parquet"
    pq.write_table(table_of(random_lines()), data)
    assert main(["train", "online_retail", "--data", str(data), "--out", str(folder / "run")]) == 0
    return folder / "run", data


# ---- the log and its split


def test_unknown_customers_cancellations_and_returns_are_dropped():
    lines = [
        ("1", "b", 2, 3.0, 7), ("C2", "b", -2, 4.0, 7), ("3", "a", 1, 1.0, None), ("4", "a", 0, 1.0, 7),
        ("5", "a", 1, 0.5, 5),
    ]  # fmt: skip
    log = clean(table_of(lines))
    assert log.day.tolist() == [DAY_0 + 0.5, DAY_0 + 3.0]
    assert log.customer_ids[log.customer].tolist() == [5, 7]
    assert [log.stock_codes[item] for item in log.item] == ["a", "b"]
    assert log.end == DAY_0 + 4
    assert log.descriptions == ("RED THING a", "RED THING b")


def test_nothing_left_is_an_error():
    with pytest.raises(ConfigError, match="no purchase is left"):
        clean(table_of([("C1", "a", -1, 0.0, 1)]))


def test_a_line_on_the_cutoff_belongs_to_the_window():
    log = clean(table_of([(k, "a", 1, day, 1) for k, day in enumerate((0.0, 9.99, 10.0, 37.99, 38.0))]))
    cutoff = DAY_0 + 10
    assert len(log.before(cutoff)) == 2
    assert (log.window(cutoff).day - DAY_0).tolist() == pytest.approx([10.0, 37.99])


def test_active_customers_are_seen_before_and_buy_after():
    log = clean(table_of([(1, "a", 1, 0, 1), (2, "a", 1, 0, 2), (3, "b", 1, 11, 2), (4, "b", 1, 12, 3)]))
    assert log.customer_ids[active_customers(log, DAY_0 + 10)].tolist() == [2]


def test_training_windows_end_before_the_split(log):
    split = log.end - 28
    cutoffs = training_cutoffs(log, split - 28)
    assert all(cutoff + 28 <= split for cutoff in cutoffs)
    assert np.diff(cutoffs).tolist() == [-14] * (len(cutoffs) - 1)
    assert cutoffs[-1] - log.day[0] > 90 - 14
    assert training_cutoffs(log, split - 28, 2) == cutoffs[:2]


def test_a_log_too_short_says_so():
    log = clean(table_of(random_lines(num_days=100)))
    with pytest.raises(ConfigError, match="this recipe needs more than 146"):
        training_cutoffs(log, log.end - 56)


def test_hidden_weeks_are_gone(log):
    assert hide(log, 4).day[-1] < log.end - 28
    assert len(hide(log, 0)) == len(log)
    with pytest.raises(ConfigError, match="hide_weeks=400 leaves nothing"):
        hide(log, 400)


# ---- baselines, by hand


@pytest.fixture
def three():
    """Cut-off at day 100: customer 1 has a (twice) and b, customer 2 has a, customer 3 has b and c long ago."""
    lines = [(1, "a", 1, 10.0, 1), (2, "a", 5, 90.0, 1), (2, "b", 1, 90.0, 1), (3, "a", 1, 95.0, 2)]
    lines += [(4, "b", 1, 20.0, 3), (4, "c", 1, 20.0, 3), (5, "d", 1, 100.0, 3)]
    return clean(table_of(lines)), DAY_0 + 100


def test_hand_rule_by_hand(three):
    log, cutoff = three
    history = History(log, cutoff)
    assert history.popularity.tolist() == [1.0, 0.5, 0.0, 0.0]
    ab = 1 / np.sqrt(2 * 2)  # one customer has both, two have each
    bc = 1 / np.sqrt(2 * 1)
    assert history.similarity[:3, :3].numpy() == pytest.approx(np.array([[0, ab, 0], [ab, 0, bc], [0, bc, 0]]))
    a, b = np.exp(-90 / 90) + np.exp(-10 / 90), np.exp(-10 / 90)
    assert history.knn(np.array([0]))[0].numpy() == pytest.approx([b * ab, a * ab, b * bc, 0])
    want = [a * 1.2 + 0.02 * b * ab, b * 0.7 + 0.02 * a * ab, 0.02 * b * bc, 0]
    assert history.rule(np.array([0]))[0].numpy() == pytest.approx(want)


def test_popular_and_own_items_by_hand(three):
    log, cutoff = three
    history = History(log, cutoff)
    customers = np.array([0, 1, 2])
    assert popular(history, customers)[2].tolist() == [1.0, 0.5, 0.0, 0.0]
    order = own_items(history, customers).argsort(dim=1, descending=True, stable=True)
    assert order.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 0, 3]]  # b before c: equal lines, b is more popular


def test_quality_is_that_of_the_metrics():
    rng = np.random.default_rng(1)
    scores, bought = torch.from_numpy(rng.normal(size=(50, 70))), rng.random((50, 70)) < 0.2
    bought[np.arange(50), rng.integers(0, 70, 50)] = True
    found = quality(top_hits(scores, bought), bought.sum(1))
    groups = torch.arange(50).repeat_interleave(70)
    for metric, values in ((Recall(k=20), found.recall), (Ndcg(k=20), found.ndcg)):
        metric.update(scores.reshape(-1), torch.from_numpy(bought.reshape(-1)).float(), groups=groups)
        assert values.mean() == pytest.approx(metric.compute(), rel=1e-12)


def test_quality_counts_what_was_bought_outside_the_list():
    found = quality(np.array([[True, False, True]]), np.array([4]))
    assert found.recall.tolist() == [0.5]
    gain = 1 + 1 / np.log2(4)
    assert found.ndcg[0] == pytest.approx(gain / (1 + 1 / np.log2(3) + 1 / np.log2(4) + 1 / np.log2(5)))


def test_interval_holds_the_ratio_and_is_a_point_for_equal_rankings():
    rng = np.random.default_rng(2)
    theirs = rng.random(400)
    ours = theirs * 1.1 + rng.normal(0, 0.05, 400)
    low, high = ratio_interval(ours, theirs)
    assert low < ours.mean() / theirs.mean() < high
    assert high - low < 0.05
    assert ratio_interval(theirs, theirs) == (1.0, 1.0)


# ---- features


def test_features_never_read_a_later_line():
    lines = random_lines()
    cutoff_days = 150.0
    changed = [
        line if line[3] < cutoff_days else (line[0], lines[-1 - k][1], 99, line[3], lines[-1 - k][4])
        for k, line in enumerate(lines)
    ]
    taken = []
    for table in (table_of(lines), table_of(changed)):
        log = clean(table)
        history = History(log, DAY_0 + cutoff_days)
        customers = np.unique(history.lines.customer)
        taken.append((take_snapshot(log, history, customers), recent_items(history, customers)))
    (first, first_items), (second, second_items) = taken
    assert not np.array_equal(first.num_bought, second.num_bought)  # the later lines do differ
    assert np.array_equal(first.candidates, second.candidates)
    assert np.array_equal(first.facts, second.facts)
    assert np.array_equal(first.customer, second.customer)
    assert all(np.array_equal(a, b) for a, b in zip(first_items[1], second_items[1], strict=True))


def test_features_by_hand(three):
    log, cutoff = three
    history = History(log, cutoff)
    customers, candidates = np.array([0, 2]), np.array([[0, 1, 3], [2, 0, 1]])
    values = candidate_features(history, customers, candidates, history.rule(customers))
    assert values.shape == (2, 3, len(FEATURES))
    assert np.isfinite(values).all()
    of = {name: values[:, :, k] for k, name in enumerate(FEATURES)}
    assert of["owned"].tolist() == [[1, 1, 0], [1, 0, 1]]
    assert of["invoices"][0] == pytest.approx(np.log1p([2, 1, 0]))
    assert of["last"][0] == pytest.approx(np.log1p([10, 10, 500]))
    assert of["gap"][0, 0] == pytest.approx(np.log1p(80))
    assert of["lines_90d"][0, 0] == pytest.approx(np.log1p(10 * (np.exp(-1) + np.exp(-1 / 9))), rel=1e-6)
    assert of["buyers_30d"][1] == pytest.approx(np.log(np.array([0, 2, 1]) + 0.3))
    assert of["days"][:, 0] == pytest.approx(np.log1p([2, 1]))
    assert of["in_last_basket"].tolist() == [[1, 1, 0], [1, 0, 1]]


def test_recent_items_are_latest_first_and_at_most_fifty():
    lines = [(k, f"{k % 60:05d}", 1, float(k), 1) for k in range(130)] + [(999, "00003", 1, 5.5, 2)]
    log = clean(table_of(lines))
    items, ages = recent_items(History(log, log.end), np.array([0, 1]))
    assert len(items[0]) == HISTORY_ITEMS
    assert [log.stock_codes[item] for item in items[0][:3]] == ["00009", "00008", "00007"]
    assert np.diff(ages[0]).tolist() == [1.0] * (HISTORY_ITEMS - 1)
    assert [log.stock_codes[item] for item in items[1]] == ["00003"]


def test_no_history_is_an_error(log):
    with pytest.raises(ValueError, match="no purchase lies before"):
        History(log, log.day[0])


# ---- snapshots, model


def test_prepared_files_are_found_again_and_split_by_use(log, tmp_path):
    made = prepare(log, Path("there.parquet"), tmp_path)
    assert read_summary(tmp_path) == made
    assert made.split == log.end - 28
    train, final = made.training_files(made.split - 28), made.training_files(made.split)
    assert set(final) - set(train) == {made.validation_file, final[1]}
    rows = pq.read_table(made.validation_file)
    assert len(rows) == made.num_rows([made.validation_file]) == len(active_customers(log, made.split))
    assert len(rows["candidates"][0]) == made.num_candidates == 60


def test_a_preparation_that_was_killed_is_not_taken_for_whole(log, tmp_path):
    prepare(log, Path("there.parquet"), tmp_path, num_cutoffs=1)
    (tmp_path / "summary.json").unlink()
    assert read_summary(tmp_path) is None


def test_loss_by_hand():
    lists: Any = SimpleNamespace(
        extras={"bought": torch.tensor([[1.0, 0, 1], [0, 0, 0]]), "num_bought": torch.tensor([30.0, 1.0])},
        weights=torch.tensor([1.0, 5.0]),
    )
    scores = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    normal = torch.tensor([1.0, 2.0, 3.0]).exp().sum().log()
    assert float(list_loss(scores, lists)) == pytest.approx(float(-(4 - 2 * normal) / 20))


def test_padding_of_the_history_changes_nothing(log, tmp_path):
    config = online_retail_config(log, tmp_path)
    assert isinstance(config.model, RankerConfig)
    trainer = Trainer(config, quiet=True)
    longer = Trainer(replace(config, model=replace(config.model, history_items=HISTORY_ITEMS + 13)), quiet=True)
    (ours, theirs) = (torch.cat(list(t.predict(config.train_data))) for t in (trainer, longer))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def online_retail_config(log, folder):
    data = folder / "transactions.parquet"
    prepare(log, data, folder / "snapshots", num_cutoffs=1)
    return online_retail(data=str(data), out=folder)


def test_whole_ranking_holds_every_item_once():
    snapshot = Snapshot(
        cutoff=0.0, customers=np.array([0]), candidates=np.array([[3, 1]]), rule=torch.tensor([[0.0, 5, 0, 9, 2]]),
        facts=np.zeros(0), customer=np.zeros(0), bought=np.zeros(0), num_bought=np.zeros(0),
    )  # fmt: skip
    items, scores = whole_ranking(snapshot, torch.tensor([[0.5, 0.7]]), np.array([0.1, 0, 0.3, 0, 0]))
    assert items.tolist() == [[1, 3, 4, 2, 0]]
    assert (np.diff(scores) < 0).all()


# ---- the commands


def test_the_run_is_compared_and_finished(trained, capsys):
    run, data = trained
    assert (run / "final" / "metrics.jsonl").is_file()
    assert main(["train", "online_retail", "--data", str(data), "--out", str(run), "--resume"]) == 0
    printed = capsys.readouterr().out
    for name in ("20 most popular", "own 20 most frequent", "item-kNN", "hand rule", "recis"):
        assert name in printed


def test_recommend_ranks_known_customers_and_flags_others(trained, tmp_path):
    run, data = trained
    users = tmp_path / "users.csv"
    users.write_text("CustomerID\n12003\n99\n12001\n12003\n")
    out = tmp_path / "out.parquet"
    assert main(["recommend", "--run", str(run), "--users", str(users), "--k", "7", "--out", str(out)]) == 0
    table = pq.read_table(out)
    assert table.column_names[:4] == ["CustomerID", "rank", "StockCode", "score"]
    rows = table.to_pylist()
    assert [row["CustomerID"] for row in rows] == [12003] * 7 + [99] * 7 + [12001] * 7
    assert [row["rank"] for row in rows] == list(range(1, 8)) * 3
    assert [row["unknown_customer"] for row in rows] == [False] * 7 + [True] * 7 + [False] * 7
    for start in (0, 7, 14):
        part = rows[start : start + 7]
        assert len({row["StockCode"] for row in part}) == 7
        assert [row["score"] for row in part] == sorted((row["score"] for row in part), reverse=True)
    log = read_log(data)
    buyers = History(log, log.end).buyers(30)
    assert buyers[log.stock_codes.index(rows[7]["StockCode"])] == buyers.max()
    own = {log.stock_codes[item] for item in log.item[log.customer_ids[log.customer] == 12003]}
    assert rows[0]["StockCode"] in own


def test_eval_gives_the_metrics_of_the_split(trained, capsys):
    run, data = trained
    assert main(["eval", "--run", str(run), "--data", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "recall@20" in printed
    assert "ndcg@20" in printed


@pytest.mark.parametrize(
    ("name", "content"), [("u.txt", "12001\n\n12002\n"), ("u.txt", "CustomerID\n12001\n12002\n"),
                          ("u.csv", "x,CustomerID\n1,12001\n2,12002\n")],
)  # fmt: skip
def test_customers_from_files(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_customers(tmp_path / name).tolist() == [12001, 12002]


@pytest.mark.parametrize(
    ("name", "content", "message"), [("u.txt", "12001\nbob\n", "must be a whole number"),
                                     ("u.csv", "user\n1\n", "has no column 'CustomerID'; it has user"),
                                     ("u.csv", "CustomerID,x\n1,2\n,3\n", "1 rows have no CustomerID")],
)  # fmt: skip
def test_wrong_files_of_customers(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_customers(tmp_path / name)


def test_a_missing_column_is_named(tmp_path):
    path = tmp_path / "transactions.parquet"
    pq.write_table(table_of([(1, "a", 1, 0.0, 1)]).drop_columns(["UnitPrice"]), path)
    with pytest.raises(ConfigError, match="has no column 'UnitPrice'"):
        online_retail(data=str(path), out=tmp_path / "run")


# ---- the public file


@pytest.mark.data
@pytest.mark.skipif("RECIS_DATA" not in os.environ, reason="RECIS_DATA is not set: no public purchase log")
def test_counts_and_rule_of_the_public_file():
    log = read_log(Path(os.environ["RECIS_DATA"]) / "online_retail" / "transactions.parquet")
    assert (len(log), len(np.unique(log.customer)), len(np.unique(log.item))) == (333_639, 4_086, 3_628)
    split = log.end - 28
    customers = active_customers(log, split)
    bought = log.window(split).bought(customers)
    recall = quality(top_hits(History(log, split).rule(customers), bought), bought.sum(1)).recall.mean()
    assert len(customers) == 1049
    assert recall == pytest.approx(0.3126, abs=2e-4)
