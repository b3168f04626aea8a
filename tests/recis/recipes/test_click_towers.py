"""Clicks with and without titles: the table by hand, and a small run of both."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recis.cli import main
from recis.recipes.click_towers import comparison


def test_groups_and_the_share_of_the_gap_by_hand(tmp_path):
    days = [tmp_path / "day-00.parquet", tmp_path / "day-01.parquet"]
    first = {"item_id": pa.array([7] * 10 + [8], pa.int64())}
    pq.write_table(pa.table(first), days[0])
    last = {
        "item_id": pa.array([7, 7, 8, 8, 9, 9, 9, 9], pa.int64()),
        "click": pa.array([1, 0, 1, 0, 1, 1, 0, 0], pa.int8()),
        "true_probability": [0.9, 0.1, 0.9, 0.1, 0.9, 0.8, 0.2, 0.1],
    }
    pq.write_table(pa.table(last), days[1])
    ids = np.array([0.9, 0.1, 0.9, 0.1, 0.5, 0.5, 0.5, 0.5])
    tower = np.array([0.9, 0.1, 0.9, 0.1, 0.9, 0.3, 0.4, 0.2])  # of the four pairs of the new item one is wrong
    lines = [line.split() for line in comparison(ids, tower, days).splitlines()]
    assert lines[1][:2] == ["all", "items"]
    assert lines[1][2:] == ["8", "0.8750", "0.9375", "1.0000", "50.0%"]
    assert lines[2][4:] == ["6", "0.7778", "0.8889", "1.0000", "50.0%"]  # 8 had one impression, 7 ten
    assert lines[3][3:] == ["4", "0.5000", "0.7500", "1.0000", "50.0%"]


def test_a_small_run(tmp_path, capsys):
    pytest.importorskip("transformers")
    settings = ("num_samples=4000", "num_items=300")
    command = ["train", "click_towers", "--out", str(tmp_path / "run")]
    assert main([*command, *(part for setting in settings for part in ("--set", setting))]) == 0
    out = capsys.readouterr().out
    assert "never seen before" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  title")] == ["title"]
    assert (
        main(["eval", "--run", str(tmp_path / "run"), "--data", str(tmp_path / "run" / "data" / "day-07.parquet")]) == 0
    )
