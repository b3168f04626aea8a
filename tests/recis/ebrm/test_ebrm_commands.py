"""`recis ebrm`: a model of a table through eval, score, explain, override and precompute; one-line errors."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from recis.cli import main
from recis.ebrm import EBRM, EBRMConfig, QEScorer
from recis.ebrm.datasets import folder_set, labels_eval, synthetic_set
from recis.ebrm.precompute import precompute
from recis.ebrm.runs import log_r_at_half, measure
from recis.ebrm.synthetic import SyntheticConfig, make_data
from recis.errors import ConfigError

SMALL = SyntheticConfig(num_items=60, num_queries=30, num_impressions=2_000, num_candidates=10, seed=3)


@pytest.fixture(scope="module")
def data():
    return make_data(SMALL)


@pytest.fixture
def home(data, tmp_path):
    """A folder with the data's files and a model whose logits are nearly gold."""
    data.write(tmp_path / "data")
    entities = {e.id: e for item in data.items for e in item.entities}
    entities |= {data.schema.none(name).id: data.schema.none(name) for name in data.schema.names}
    logits = {
        (query.text, name): 3.0 if data.gold_qe(place, entity) else -3.0
        for place, query in enumerate(data.queries)
        for name, entity in entities.items()
    }
    model = EBRM(EBRMConfig(schema=data.schema), QEScorer.table(logits, default=0.0))
    dev = labels_eval(tmp_path / "data" / "labels_dev.jsonl", data.items)
    measured, _ = measure(model, dev)
    assert measured["roc_auc"] > 0.9
    from recis.ebrm.pairs import score_pairs

    model.fit_calibrator(score_pairs(model, dev.pairs)[0], dev.pairs.label)
    model.save(tmp_path / "run")
    return tmp_path


def test_eval_prints_one_json_object(home, capsys):
    assert main(["ebrm", "eval", "--model", f"{home}/run", "--data", f"{home}/data/labels_test.jsonl", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    names = {"roc_auc", "pr_auc", "f1", "ndcg@10", "ece"}
    assert set(out["metrics"]) == names | {f"visible.{name}" for name in names}
    assert out["metrics"]["visible.roc_auc"] > 0.95
    assert out["command"] == "ebrm eval"
    assert out["n"] == len((home / "data" / "labels_test.jsonl").read_text().splitlines()) - 1


def test_score_explain_and_overrule(home, data, capsys):
    query = data.queries[0].text
    common = ["--model", f"{home}/run", "--query", query, "--items", f"{home}/data/items.jsonl"]
    assert main(["ebrm", "score", *common, "--top", "3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["items"]
    assert [row["r"] for row in rows] == sorted((row["r"] for row in rows), reverse=True)
    assert main(["ebrm", "explain", *common, "--item", rows[0]["item"]]) == 0
    assert f"r {rows[0]['r']:.4f}" in capsys.readouterr().out
    rule = ["--query", query, "--type", "category", "--op", "set", "--value", "0", "--owner", "me"]
    assert main(["ebrm", "override", "--model", f"{home}/run", "add", *rule]) == 0
    assert main(["ebrm", "override", "--model", f"{home}/run", "list"]) == 0
    assert capsys.readouterr().out.count("o1: ") == 2
    assert main(["ebrm", "score", *common, "--json"]) == 0
    assert {row["r"] < 1e-9 for row in json.loads(capsys.readouterr().out)["items"]} == {True}
    assert main(["ebrm", "override", "--model", f"{home}/run", "remove", "--version", "1", "--owner", "me"]) == 0
    assert main(["ebrm", "override", "--model", f"{home}/run", "audit"]) == 0
    assert capsys.readouterr().out.count('"action"') == 2


def test_precompute_goes_on_where_it_ended(home, data, capsys):
    (home / "queries.txt").write_text("\n".join(query.text for query in data.queries[:5]))
    words = ["ebrm", "precompute", "--model", f"{home}/run", "--items", f"{home}/data/items.jsonl"]
    assert main([*words, "--queries", f"{home}/queries.txt", "--top", "3"]) == 0
    assert "3 queries" in capsys.readouterr().out
    model = EBRM.load(home / "run")
    again = precompute(model, [query.text for query in data.queries[:5]], data.items, flush_pairs=1)
    assert again.num_encoded == again.num_pairs * 2 // 5
    assert precompute(model, [query.text for query in data.queries[:5]], data.items).num_encoded == 0
    assert model.score(data.queries[4].text, data.items[:5]).encoder_calls == 0
    with pytest.raises(ConfigError, match="cache in a folder"):
        precompute(EBRM(model.config, QEScorer.table({}, default=0.0)), ["a"], data.items)


def test_a_folder_gives_what_the_data_gives(home, data):
    told, made = folder_set(home / "data"), synthetic_set(data)
    assert told.schema == made.schema
    assert len(told.train) == len(made.train)
    assert told.train.label.sum() == made.train.label.sum()
    # a text that was drawn twice is one query in the files: it has more candidates there, and its clicks add up
    texts = Counter(query.text for query in data.queries)
    once = {text for text, count in texts.items() if count == 1}
    named = [
        {(r.query, r.entity, r.y) for r in rows if r.src == "mention" and r.query in once}
        for rows in (told.qe_rows, made.qe_rows)
    ]
    assert named[0] == named[1]
    assert len(named[0]) > 100
    assert {r.src for r in told.qe_rows} == {"mention", "clicks"}
    assert told.corpus() == made.corpus()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["eval", "--model", "nowhere", "--data", "x.jsonl"], 2, "no EBRM model at nowhere"),
        (["eval", "--model", "run", "--data", "offers.parquet"], 2, "only a model trained on offers"),
        (["override", "--model", "run", "add", "--type", "colour"], 2, "needs --op, --value, --owner"),
        (["train", "--out", "run"], 2, "is not empty"),
        (["train", "--data", "run", "--out", "new"], 2, "items.jsonl, labels_train.jsonl, labels_dev.jsonl missing"),
    ],
)
def test_errors_are_one_line(home, monkeypatch, capsys, words, code, text):
    monkeypatch.chdir(home)
    assert main(["ebrm", *words]) == code
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1


def test_half_of_the_probability():
    from recis.ebrm.calibrate import Calibrator

    calibrator = Calibrator(a=0.8, b=-1.5)
    import numpy as np

    assert calibrator.probability(np.array([log_r_at_half(calibrator)]))[0] == pytest.approx(0.5)
    assert replace(SMALL, seed=4) != SMALL
