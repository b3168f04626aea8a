"""The report page: AUC per group against a plain count, calibration by hand, and a page from a made run folder."""

import json
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recis.errors import ConfigError
from recis.trainer.charts import bar_chart, line_chart
from recis.trainer.report import group_aucs, write_report


def plain_auc(scores, labels):
    pairs = [(p, n) for (p, y), (n, z) in product(zip(scores, labels, strict=True), repeat=2) if y and not z]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(-2, 2)), max_size=40))
def test_group_aucs_count_pairs(rows):
    prediction, label, group = (np.array(column) for column in zip(*rows, strict=True)) if rows else (np.zeros(0),) * 3
    got = group_aucs(prediction.astype(float), label.astype(float), group.astype(np.int64))
    want = []
    for g in sorted(set(group.tolist())):
        inside = group == g
        if 0 < label[inside].sum() < inside.sum():
            want.append(plain_auc(prediction[inside].tolist(), label[inside].tolist()))
    np.testing.assert_allclose(got, want)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"name": "<script>alert(1)</script>", "max_steps": 20}))
    counters = {"found": 3, "inserted": 5, "size": 8}
    lines = [
        {
            "kind": "train",
            "step": s,
            "loss": 1 / s,
            "samples": 8 * s,
            "samples_per_s": 100.0,
            "tables": {"item": counters},
        }
        for s in (10, 20)
    ]
    lines.append({"kind": "eval", "step": 20, "loss": None, "auc": 0.75})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "predictions").mkdir()
    table = {
        "prediction": [0.2, 0.8, 0.5, 0.4],
        "label": [0.0, 1.0, 1.0, 0.0],
        "weight": [1.0] * 4,
        "group": [1, 1, 2, 2],
    }
    pq.write_table(pa.table(table), tmp_path / "predictions" / "eval.parquet")
    return tmp_path


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_page_of_a_run(run):
    page = write_report(run).read_text()
    reader = Reader()
    reader.feed(page)
    names = [tag for tag, _ in reader.tags]
    assert "script" not in names
    assert not [attrs for _, attrs in reader.tags if any(key in attrs for key in ("src", "href"))]
    captions = [page.split("<figcaption>")[k + 1].split("<")[0] for k in range(page.count("<figcaption>"))]
    assert captions[:3] == ["Loss", "auc", "Calibration"]
    assert captions[4:] == ["Rows per table", "Throughput"]
    assert "AUC per group (2 groups with both classes)" in reader.text
    assert names.count("svg") == 6
    assert "0.75000" in reader.text


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no run here"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no line yet"):
        write_report(tmp_path)


def test_charts_place_the_ends_of_a_line_inside_the_frame():
    svg = line_chart("t", [("a", [0, 1, 2], [5, float("nan"), 7])], x_label="x", y_label="y")
    points = svg.split('points="')[1].split('"')[0].split()
    assert len(points) == 2
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in points)
    assert 0 <= x0 < x1 <= 640
    assert 0 <= y1 < y0 <= 260


def test_charts_without_values_say_so():
    assert "no values" in line_chart("t", [], x_label="x", y_label="y")
    assert "no values" in bar_chart("t", [], [], x_label="x", y_label="y")
    assert bar_chart("t", ["a", "b"], [1, 2], x_label="x", y_label="y").count("<rect") == 2
