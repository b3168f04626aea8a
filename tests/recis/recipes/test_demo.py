"""The demo as `make demo` runs it, small: trains, shows exact resume, reports; and the comparison can fail."""

from pathlib import Path

import pytest

from recis.errors import ConfigError
from recis.recipes.demo import demo, differing_parts, run_demo
from recis.runs import start_run

SMALL = ("num_samples=24000", "num_users=600", "num_items=300")


def test_demo_trains_resumes_and_reports(tmp_path, capsys):
    out = tmp_path / "run"
    assert run_demo(out, settings=SMALL)
    text = capsys.readouterr().out
    assert "Bayes-optimal AUC" in text
    assert "every byte equal to the straight run's" in text
    assert (out / "report.html").read_text().count("<svg") >= 8
    assert (out / "predictions" / "eval.parquet").exists()


def test_comparison_finds_another_seed(tmp_path):
    runs = []
    for seed in ("0", "1"):
        folder = tmp_path / seed
        settings = (*SMALL, f"seed={seed}", "max_steps=2")
        start_run("demo", data=None, out=folder, settings=settings, resume=False).train()
        runs.append(folder)
    found = differing_parts(*runs)
    assert "seed" in found
    assert any(name.startswith("table-") for name in found)
    assert differing_parts(runs[0], runs[0]) == []


def test_too_few_days_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"at least two files day-NN\.parquet; found 0"):
        demo(data=str(tmp_path), out=Path(tmp_path))
