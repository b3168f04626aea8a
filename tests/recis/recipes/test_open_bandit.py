"""The bandit recipe: how a log is cut and weighted, and the printed intervals on the real logs."""

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recis.errors import ConfigError
from recis.recipes.open_bandit import ITEM_FEATURES, TRAIN_SHARE, USER_FEATURES, LogisticConfig, prepare
from recis.runs import start_run


@pytest.fixture
def log(tmp_path):
    """A made log of 50 impressions of 3 items, newest first in the file."""
    rng = np.random.default_rng(0)
    begin = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    columns = {
        "timestamp": [begin + datetime.timedelta(seconds=60 - k) for k in range(50)],
        "item_id": rng.integers(0, 3, 50).astype(np.int16),
        "position": rng.integers(1, 4, 50).astype(np.int16),
        "click": (np.arange(50) % 10 == 0).astype(np.int16),
        "propensity_score": np.full(50, 0.5),
    }
    columns |= {name: ["u"] * 50 for name in USER_FEATURES}
    columns |= {f"user-item_affinity_{k}": np.full(50, float(k)) for k in range(3)}
    pq.write_table(pa.table(columns), tmp_path / "random_men.parquet")
    items = {"item_id": np.arange(3, dtype=np.int16), "item_feature_0": np.zeros(3)}
    items |= {name: ["a", "b", "c"] for name in ITEM_FEATURES}
    pq.write_table(pa.table(items), tmp_path / "random_men_items.parquet")
    return tmp_path / "random_men.parquet"


def test_cut_by_time_with_the_shown_items_own_columns(log):
    train, test, candidates = prepare(log)
    whole = pq.read_table(log).sort_by("timestamp")
    assert len(train) == int(50 * TRAIN_SHARE)
    assert pa.concat_tables([train, test])["item_id"].to_pylist() == whole["item_id"].to_pylist()
    assert train["affinity"].to_pylist() == [float(item) for item in train["item_id"].to_pylist()]
    assert set(train["weight"].to_pylist()) == {1 / 3 / 0.5}
    assert train["item_feature_1"].to_pylist() == ["abc"[item] for item in train["item_id"].to_pylist()]
    assert candidates["item_id"].to_pylist() == [0, 1, 2] * len(test)
    assert candidates["position"].to_pylist()[::3] == test["position"].to_pylist()


def test_a_log_without_clicks_is_refused():
    with pytest.raises(ConfigError, match="base_rate must lie in"):
        LogisticConfig(tables=(), base_rate=0.0)


@pytest.mark.data
def test_real_log_prints_intervals(data_dir, tmp_path, capsys):
    data = str(data_dir / "open_bandit")
    run = start_run("open_bandit", data=data, out=tmp_path / "run", settings=("max_steps=20",), resume=False)
    metrics = run.train()
    out = capsys.readouterr().out
    assert "test impressions 3,280" in out
    assert out.count("[") == 5  # AUC, NE, PCOC, IPS, SNIPS, each with its interval
    assert 0.3 < metrics["pcoc"] < 3.0
