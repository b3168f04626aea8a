"""metrics.jsonl: strict JSON, cut back on resume, unfinished lines dropped."""

import json
import math

from recis.trainer.log import MetricsLog, read_log


def test_lines(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"kind": "train", "step": 1, "loss": math.nan, "tables": {"t": {"x": math.inf}}, "list": [1, math.nan]})
    log.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {
        "kind": "train",
        "step": 1,
        "loss": None,
        "tables": {"t": {"x": None}},
        "list": [1, None],
    }


def test_cut_back(tmp_path):
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    for step, kind in ((1, "train"), (2, "train"), (2, "eval"), (3, "train")):
        log.write({"step": step, "kind": kind})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')  # killed inside a line
    assert log.cut_back(2, 2) == 3
    log.write({"step": 3})
    log.close()
    assert [line["step"] for line in read_log(path)] == [1, 2, 2, 3]
    assert log.cut_back(2, None) == 2  # the evaluation came after the checkpoint


def test_unfinished_line_is_not_read(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2')
    assert read_log(tmp_path / "m.jsonl") == [{"step": 1}]
    assert read_log(tmp_path / "none") == []


def test_no_file():
    log = MetricsLog(None)
    log.write({"step": 1})
    assert log.cut_back(0, None) == 0
    log.sync()
    log.close()
