"""Items by their text: samples and groups by hand, nothing of the future is read, and the run prints every stage."""

from datetime import datetime, timedelta
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recis.cli import main
from recis.errors import ConfigError
from recis.recipes.item_text import fresh_encoder, learn_halves, title_encoder
from recis.recipes.retail_log import clean
from recis.recipes.retail_purchases import MAX_ITEMS, Baskets, write_questions, write_samples
from recis.recipes.retail_ranks import Targets, group_quality, mean_interval, table, targets_at
from recis.recipes.retail_tower_lists import item_scores, kept_log
from recis.runs import open_run

START = datetime(2011, 1, 1)
DAY_0 = float((START - datetime(1970, 1, 1)).days)
WORDS = ("red", "blue", "lace", "heart", "box", "frame", "candle", "small", "large", "vintage")


def log_of(lines):
    """lines: (customer, day since START, item)."""
    return clean(
        pa.table(
            {
                "InvoiceNo": [str(at) for at in range(len(lines))],
                "StockCode": [line[2] for line in lines],
                "Description": [
                    f"{WORDS[hash_of(line[2]) % 10]} {WORDS[hash_of(line[2]) // 10 % 10]}" for line in lines
                ],
                "Quantity": pa.array([1] * len(lines), pa.int32()),
                "InvoiceDate": pa.array([START + timedelta(days=line[1]) for line in lines], pa.timestamp("ms")),
                "UnitPrice": [1.5] * len(lines),
                "CustomerID": pa.array([line[0] for line in lines], pa.int32()),
            }
        )
    )


def hash_of(code: str) -> int:
    return sum(ord(letter) * 7**at for at, letter in enumerate(code))


LINES = [(1, 0.1, "a"), (1, 0.2, "b"), (1, 70.0, "c"), (1, 80.0, "a"), (1, 90.0, "d"), (2, 85.0, "a"), (2, 95.0, "b")]


def test_histories_by_hand(tmp_path):
    log = log_of(LINES)
    assert write_samples(log, DAY_0 + 100, 20, ["ta", "tb", "tc", "td"], tmp_path / "s.parquet") == 3
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert [(row["item"], row["title"], row["last_day"], row["lately"], row["earlier"]) for row in rows] == [
        (0, "ta", [2], [], [1, 0]),  # customer 1, day 80: day 70 was the last, day 0 lies more than 60 days before
        (3, "td", [0], [2], [1, 0]),
        (1, "tb", [0], [], []),
    ]
    write_questions(log, DAY_0 + 100, np.array([0, 1]), tmp_path / "q.parquet")
    asked = pq.read_table(tmp_path / "q.parquet").to_pylist()
    assert asked[0] == {"last_day": [3], "lately": [0, 2], "earlier": [1, 0]}
    assert asked[1] == {"last_day": [1], "lately": [0], "earlier": []}


def test_a_basket_counts_by_the_root_of_its_size_and_histories_are_cut(tmp_path):
    lines = [(1, day, f"i{day:03d}") for day in range(60)] + [(1, 70.0, f"x{at}") for at in range(4)]
    write_samples(log_of(lines), DAY_0 + 71, 5, ["t"] * 64, tmp_path / "s.parquet")
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert [row["weight"] for row in rows] == [0.5] * 4
    assert rows[0]["lately"] == list(range(58, 58 - MAX_ITEMS, -1))


def test_what_lies_behind_the_cutoff_is_not_read(tmp_path):
    files = []
    for lines in (LINES, [*LINES, (1, 101.0, "b"), (3, 120.0, "a")]):
        log = log_of(lines)
        write_samples(log, DAY_0 + 100, 50, ["t"] * 4, tmp_path / "s.parquet")
        write_questions(log, DAY_0 + 100, np.array([0, 1]), tmp_path / "q.parquet")
        files.append([pq.read_table(tmp_path / name).to_pylist() for name in ("s.parquet", "q.parquet")])
    assert files[0] == files[1]
    with pytest.raises(ConfigError, match="nobody shops a second time in the 4 days"):
        write_samples(log_of(LINES), DAY_0 + 100, 4, ["t"] * 4, tmp_path / "s.parquet")


def test_baskets_join_the_lines_of_a_day():
    baskets = Baskets(log_of([(1, 0.9, "b"), (1, 0.1, "a"), (1, 0.5, "b"), (1, 1.0, "a")]))
    assert [baskets.of(number).tolist() for number in range(2)] == [[0, 1], [0]]


def test_groups_and_their_quality_by_hand():
    bought = np.zeros((2, 30), dtype=bool)
    bought[0, [0, 25]] = True
    bought[1, [29]] = True
    groups = {"all items": np.ones(30, dtype=bool), "new": np.arange(30) >= 24}
    targets = Targets(np.arange(2), bought, groups)
    scores = -torch.arange(30.0).expand(2, -1)  # item 0 first
    over_all = group_quality(scores, targets, "all items", within=False)
    assert over_all.recall.tolist() == [0.5, 0.0]
    assert over_all.ndcg[0] == pytest.approx(1 / (1 + 1 / np.log2(3)))
    new = group_quality(scores, targets, "new", within=False)
    assert new.recall.tolist() == [0.0, 0.0]
    within = group_quality(scores, targets, "new", within=True)
    assert within.recall.tolist() == [1.0, 1.0]
    assert within.ndcg.tolist() == pytest.approx([1 / np.log2(3), 1 / np.log2(7)])
    lines = table({"one": [scores], "two": [scores, scores]}, targets).splitlines()
    assert sum(line.strip().startswith("one") for line in lines) == 2
    assert lines[3].split()[1] == "0.2500"


def test_targets_count_buyers_before_the_split():
    lines = [(c, 1.0, "a") for c in range(6)] + [(0, 1.0, "b"), (0, 40.0, "a"), (1, 41.0, "b"), (2, 42.0, "n")]
    targets = targets_at(log_of(lines), DAY_0 + 39)
    assert targets.customers.tolist() == [0, 1, 2]
    assert {name: mask.tolist() for name, mask in targets.groups.items()} == {
        "all items": [True] * 3,
        "< 5 buyers before": [False, True, False],
        "new items": [False, False, True],
    }
    assert targets.pairs("new items") == 1


def test_the_interval_of_a_mean_holds_it():
    values = np.random.default_rng(0).random(400)
    low, high = mean_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert np.isnan(mean_interval(np.zeros(0))).all()


def test_the_small_encoder_learns_which_words_go_together(tmp_path):
    pytest.importorskip("transformers")
    titles = [f"{a} {b} {c}" for a, b in (("red", "rose"), ("blue", "sea"), ("old", "box")) for c in "uvwxyz"]
    fresh_encoder(titles, tmp_path / "e", hidden=32, num_layers=1)
    losses = learn_halves(titles, tmp_path / "e", steps=40)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert title_encoder(titles, tmp_path / "e", name="small") == tmp_path / "e"
    with pytest.raises(ConfigError, match="give minilm, small, auto, or the folder"):
        title_encoder(titles, tmp_path, name=str(tmp_path / "nowhere"))


def test_the_run_trains_every_stage_and_prints_them(tmp_path, capsys):
    pytest.importorskip("transformers")
    rng, lines = np.random.default_rng(0), []
    for customer in range(25):
        own, day = rng.integers(0, 40, 10), rng.uniform(0, 20)
        while day < 150:
            lines += [(customer, day, f"{20000 + 3 * int(item)}") for item in rng.choice(own, 3)]
            day += rng.uniform(4, 16)
    lines += [(customer, 140.0, "99999") for customer in range(8)]  # an item that the training days do not know
    log = log_of(lines)
    columns = {
        "InvoiceNo": [str(at) for at in range(len(lines))], "StockCode": [line[2] for line in lines],
        "Description": [log.descriptions[log.stock_codes.index(line[2])] for line in lines],
        "Quantity": pa.array([1] * len(lines), pa.int32()),
        "InvoiceDate": pa.array([START + timedelta(days=line[1]) for line in lines], pa.timestamp("ms")),
        "UnitPrice": [1.5] * len(lines), "CustomerID": pa.array([line[0] for line in lines], pa.int32()),
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "transactions.parquet")
    encoder = tmp_path / "encoder"
    fresh_encoder(list(log.descriptions), encoder, hidden=32, num_layers=2)
    settings = ("epochs=1", f"encoder={encoder}")
    command = ["train", "retail_towers", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main([*command, *(part for setting in settings for part in ("--set", setting))]) == 0
    out = capsys.readouterr().out
    assert "new items: 1 items, 8 pairs, 8 customers" in out
    rows = [line for line in out.splitlines() if line.startswith("  + joint top layers")]
    assert len(rows) == 3
    assert [
        name for name in ("memory, MiB", "hand rule", "+ frozen item tower", "+ trained projection") if name not in out
    ] == []
    stages = {path.name for path in (tmp_path / "run").iterdir() if path.name.endswith("-0")}
    assert stages == {"ids-0", "frozen-0", "projected-0"}
    users, best = tmp_path / "users.txt", tmp_path / "best.parquet"
    users.write_text("3\n99999\n7\n")
    asked = ["--users", str(users), "--k", "6", "--out", str(best)]
    assert main(["recommend", "--run", str(tmp_path / "run"), *asked]) == 0
    rows = pq.read_table(best).to_pylist()
    assert [row["CustomerID"] for row in rows] == [3] * 6 + [99999] * 6 + [7] * 6
    assert [row["unknown_customer"] for row in rows] == [False] * 6 + [True] * 6 + [False] * 6
    assert [row["rank"] for row in rows] == [*range(1, 7)] * 3
    assert all(len({row["StockCode"] for row in rows[at : at + 6]}) == 6 for at in (0, 6, 12))
    assert all(a["score"] >= b["score"] for a, b in pairwise(rows) if a["rank"] < b["rank"])
    # by hand for one customer: its histories at the log's end, each item's score, the best first
    trainer = open_run(tmp_path / "run").trainer
    ends = np.searchsorted(Baskets(log).customer, 7, side="right")
    histories = Baskets(log).histories(int(ends), log.end)
    assert histories is not None
    scores = item_scores(trainer, [[own] for own in histories], np.arange(log.num_items))[0]
    wanted = scores.sort(descending=True, stable=True).indices[:6].tolist()
    assert [row["StockCode"] for row in rows[12:]] == [log.stock_codes[item] for item in wanted]
    (tmp_path / "run" / "purchases" / "source.json").unlink()
    with pytest.raises(ConfigError, match="its log is not known; train it again"):
        kept_log(tmp_path / "run" / "purchases")
