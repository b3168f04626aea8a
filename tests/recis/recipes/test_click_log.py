"""The generated click log: reproducible, causal in time, growing, and with the stated click probabilities."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recis.errors import ConfigError
from recis.recipes.click_log import HISTORY, ClickLogConfig, generate

SMALL = ClickLogConfig(num_samples=24_000, num_days=4, num_users=600, num_items=300, seed=3)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return [pq.read_table(path) for path in generate(SMALL, tmp_path_factory.mktemp("log"))]


def test_same_config_same_rows(log, tmp_path):
    again = [pq.read_table(path) for path in generate(SMALL, tmp_path)]
    assert all(a.equals(b) for a, b in zip(log, again, strict=True))
    assert sum(len(day) for day in log) == SMALL.num_samples


def test_clicks_follow_the_stated_probability(log):
    table = pa.concat_tables(log)
    click, probability = table["click"].to_numpy(), table["true_probability"].to_numpy()
    for low in np.arange(0.0, 0.8, 0.1):
        inside = (probability >= low) & (probability < low + 0.1)
        spread = 4 * np.sqrt(0.25 / inside.sum())
        assert abs(click[inside].mean() - probability[inside].mean()) < spread


def test_history_holds_only_earlier_clicks_of_the_same_user(log):
    table = pa.concat_tables(log).to_pylist()
    clicked: dict[int, set[int]] = {}
    for row in table:
        assert len(row["history_items"]) <= HISTORY
        assert len(row["history_items"]) == len(row["history_categories"])
        assert set(row["history_items"]) <= clicked.get(row["user_id"], set())
        if row["click"]:
            clicked.setdefault(row["user_id"], set()).add(row["item_id"])
    assert any(row["history_items"] for row in table)


def test_new_ids_keep_coming(log):
    before = set(pa.concat_tables(log[:-1])["item_id"].to_pylist())
    last = set(log[-1]["item_id"].to_pylist())
    assert len(last - before) > 10
    ids = np.array(sorted(before))
    assert (ids < 0).any()
    assert (ids > 2**60).any()


def test_titles_carry_the_quality(tmp_path):
    config = ClickLogConfig(num_samples=20_000, num_days=2, num_users=500, num_items=400, text=True)
    table = pa.concat_tables([pq.read_table(path) for path in generate(config, tmp_path)])
    titles = dict(zip(table["item_id"].to_pylist(), table["title"].to_pylist(), strict=True))
    assert all(len(title.split()) == 7 for title in titles.values())
    assert len(set(titles.values())) == len(titles)
    words = sorted({word for title in titles.values() for word in title.split()[1:]})
    column = {word: k for k, word in enumerate(words)}
    probability = table["true_probability"].to_numpy()
    logit = np.log(probability / (1 - probability))
    counts = np.zeros((len(table), len(words)))
    for row, title in enumerate(table["title"].to_pylist()):
        for word in title.split()[1:]:
            counts[row, column[word]] += 1
    weights = np.linalg.solve(counts.T @ counts + 10 * np.eye(len(words)), counts.T @ (logit - logit.mean()))
    explained = np.corrcoef(counts @ weights, logit)[0, 1]
    assert explained > 0.5


def test_sizes_below_one_are_refused():
    with pytest.raises(ConfigError, match="num_items must be at least 1; got 0"):
        ClickLogConfig(num_items=0)
