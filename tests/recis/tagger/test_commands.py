"""`recis tag ...` from the command line, and the files it reads and writes."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tagger_titles

from recis.cli import main
from recis.ebrm import EBRM, EBRMConfig, QEScorer
from recis.ebrm.entities import EntitySchema, Item, TypeConfig
from recis.tagger.check import check
from recis.tagger.combine import combine, load_tagger
from recis.tagger.entities import to_entities
from recis.tagger.evaluate import bio_labels
from recis.tagger.impact import relevance_changes, tagged_item
from recis.tagger.io import Labelled, load_labelled, load_pool, load_rules, load_texts, load_types, save_rules
from recis.tagger.rules import RuleSet, RuleTagger, Span, surface_rule
from recis.tagger.text import tokenize


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the toy titles: unlabelled lines, labelled Parquet, types and answers."""
    monkeypatch.chdir(tmp_path)
    texts, gold = tagger_titles.toy_texts(), tagger_titles.toy_gold()
    lines = [json.dumps({"text_id": f"t{n}", "text": text.text}) for n, text in enumerate(texts)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    columns = {
        "split": ["train"] * 12 + ["dev"] * 3,
        "example_id": list(range(15)),
        "query": [text.text for text in texts],
        "tokens": [list(text.tokens) for text in texts],
        "labels": [bio_labels(spans, len(text.tokens)) for text, spans in zip(texts, gold, strict=True)],
    }
    pq.write_table(pa.table(columns), tmp_path / "queries.parquet")
    (tmp_path / "types.json").write_text(json.dumps(tagger_titles.TYPES))
    answers = {phrase: {"T1": one, "T2": two} for phrase, (one, two) in tagger_titles.ANSWERS.items()}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    return tmp_path


def distil_here(out: str) -> int:
    return main(
        "tag distil --texts texts.jsonl --types types.json --expert table:answers.json "
        f"--precision-floor 0.6 --min-support 2 --pool pool.jsonl --out {out}".split()
    )


def test_distil_apply_and_eval(folder, capsys):
    assert distil_here("rules.json") == 0
    assert main(["tag", "apply", "--model", "rules.json", "--texts", "texts.jsonl", "--out", "spans.jsonl"]) == 0
    capsys.readouterr()
    assert main(["tag", "eval", "--model", "rules.json", "--data", "queries.parquet", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"command", "model", "data", "n", "metrics", "versions"}
    assert {"precision", "recall", "micro_f1"} <= set(told["metrics"])
    assert told["n"] == 15
    assert told["metrics"]["precision"] > 0.8
    spans = [json.loads(line) for line in (folder / "spans.jsonl").read_text().splitlines()]
    assert spans[0]["text_id"] == "t0"
    assert spans[0]["spans"][0]["char_end"] == 4
    pool = load_pool(folder / "pool.jsonl")
    assert {entry.type for entry in pool} <= set(tagger_titles.TYPES)


def test_the_same_seed_writes_the_same_bytes(folder):
    assert distil_here("a.json") == distil_here("b.json") == 0
    assert (folder / "a.json").read_bytes() == (folder / "b.json").read_bytes()


def test_train_and_eval_of_a_neural_tagger(folder, capsys):
    train = "tag train --data queries.parquet --split train --dev-split dev --epochs 2 --out model"
    assert main(train.split()) == 0
    assert main(train.split()) == 2  # the folder is not empty
    capsys.readouterr()
    assert main(["tag", "eval", "--model", "model", "--data", "queries.parquet", "--split", "dev", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 3


def test_check_measures_again_and_fails_under_the_floor(folder, capsys):
    rules = (
        surface_rule("Brand", "nike", source="human", precision=0.1),
        surface_rule("Product", "zara", source="human"),
        surface_rule("Brand", "zara", source="human"),
        surface_rule("Color", "mauve"),
        surface_rule("Product", "shoes"),
    )
    save_rules(RuleSet(schema=tagger_titles.TYPES, rules=rules), "r.json")
    command = "tag check --rules r.json --data queries.parquet --floor 0.9 --out measured.json"
    assert main(command.split()) == 1
    out = capsys.readouterr().out
    assert "5 rules, 1 under the floor, 2 matched nothing" in out
    assert "equal conditions, different types" in out
    found = {rule.tests[0].value + rule.type: rule for rule in load_rules("measured.json").rules}
    assert (found["nikeBrand"].precision, found["nikeBrand"].support) == (1.0, 3)
    assert (found["zaraProduct"].precision, found["zaraProduct"].support) == (0.0, 0)


def test_shoes_inside_running_shoes_does_not_count_against_its_rule():
    rows = [
        _labelled("nike running shoes", [(0, 1, "Brand"), (1, 3, "Product")]),
        _labelled("red shoes", [(1, 2, "Product")]),
    ]
    found = check(RuleSet(schema=tagger_titles.TYPES, rules=(surface_rule("Product", "shoes"),)), rows, floor=0.5)
    assert (found.rules.rules[0].precision, found.rules.rules[0].support) == (1.0, 1)


def _labelled(title, spans):
    return Labelled(text_id=title, text=tokenize(title), spans=tuple(spans))


def test_diff_lists_the_spans_that_change(folder, capsys):
    one, two = surface_rule("Brand", "nike"), surface_rule("Color", "red")
    save_rules(RuleSet(schema=tagger_titles.TYPES, rules=(one,)), "old.json")
    save_rules(RuleSet(schema=tagger_titles.TYPES, rules=(two,)), "new.json")
    assert main(["tag", "diff", "old.json", "new.json", "--texts", "texts.jsonl"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "t3: -nike:Brand  +red:Color" in out
    assert out[-1] == "4 of 15 texts change"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "a b", "spans": [{"start": 0, "end": 3, "type": "x"}]},
            r"text '0': span \[0, 3\) must lie inside its 2",
        ),
        ({"tokens": ["a"], "labels": ["I-x"]}, "text '0', word 0: 'I-x' follows no x span"),
        ({"tokens": ["a"], "labels": ["O", "O"]}, "1 words have 2 labels"),
        ({"text": "a"}, "needs `labels` or `spans`"),
        ({"labels": ["O"]}, "needs `text`, `query`, `title` or `tokens`"),
    ],
)
def test_labelled_lines_that_cannot_be_are_refused(tmp_path, record, message):
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=message):
        load_labelled(tmp_path / "x.jsonl")


def test_files_that_are_no_json_or_of_another_kind_are_named(tmp_path):
    (tmp_path / "x.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"x\.jsonl, row 0: is no JSON"):
        load_texts(tmp_path / "x.jsonl")
    (tmp_path / "t.json").write_text('{"brand": "nike"}')
    with pytest.raises(ValueError, match="must be a list of type names"):
        load_types(tmp_path / "t.json")
    with pytest.raises(ValueError, match="holds no tagger"):
        load_tagger(tmp_path)


def test_rules_win_over_the_neural_tagger_only_when_they_are_sure():
    neural = [Span(start=0, end=2, type="a"), Span(start=3, end=4, type="a")]
    unsure, sure = Span(start=1, end=2, type="b", conf=0.9), Span(start=1, end=2, type="b", conf=0.95)
    alone = Span(start=5, end=6, type="b", conf=0.2)
    assert combine([unsure, alone], neural) == [*neural, alone]
    assert combine([sure, alone], neural) == [sure, neural[1], alone]


def test_spans_become_entities_of_a_schema():
    schema = EntitySchema(types=(TypeConfig(name="brand"), TypeConfig(name="colour", synonyms={"schwarz": "black"})))
    rules = (surface_rule("Brand", "nike", precision=0.8), surface_rule("Color", "schwarz"), surface_rule("Size", "xl"))
    spans = RuleTagger(RuleSet(schema=("Brand", "Color", "Size"), rules=rules)).tag("Nike hoodie schwarz XL")
    table = {"Brand": "brand", "Color": "colour"}
    found = to_entities(spans[:2], schema, types=table)
    assert [(entity.id, entity.source, entity.conf) for entity in found] == [
        ("brand:nike", "tagger", 0.8),
        ("colour:black", "tagger", 1.0),
    ]
    with pytest.raises(ValueError, match="span 'xl': type 'Size' leads to no type of the schema"):
        to_entities(spans, schema, types=table)
    with pytest.raises(ValueError, match="type 'Brand' leads to no type of the schema"):
        to_entities(spans, schema)


SHOES = EntitySchema(types=(TypeConfig(name="brand"), TypeConfig(name="colour")))
LOGITS = {"brand:nike": 4.0, "brand:puma": -4.0, "brand:none": -2.0, "colour:red": 3.0, "colour:none": 2.9}


def shoes_model() -> EBRM:
    return EBRM(EBRMConfig(schema=SHOES), QEScorer.table({("nike", name): logit for name, logit in LOGITS.items()}))


def test_items_whose_relevance_changes_are_listed_largest_change_first():
    old = RuleTagger(RuleSet(schema=("make", "colour"), rules=(surface_rule("make", "puma"),)))
    new = RuleTagger(
        RuleSet(
            schema=("make", "colour"),
            rules=(surface_rule("make", "nike", precision=0.9), surface_rule("colour", "red")),
        )
    )
    types = {"make": "brand", "colour": "colour"}
    stated = (SHOES.entity("brand", "nike"),)
    items = [Item(id="a", title="nike red"), Item(id="b", title="puma"), Item(id="c", title="red", entities=stated)]
    before, after = ([tagged_item(item, rules.tag, SHOES, types=types) for item in items] for rules in (old, new))
    assert [entity.id for entity in after[0].entities] == ["brand:nike", "colour:red"]
    assert [entity.conf for entity in after[0].entities] == [0.9, 1.0]
    assert after[2].entities[0].source == "catalog"  # what the catalogue says stays
    model = shoes_model()
    changes = relevance_changes(model, ["nike"], before, after)
    assert [(change.query, change.item_id) for change in changes] == [("nike", "a"), ("nike", "b")]
    assert changes[0].before == pytest.approx(float(model.score("nike", [before[0]]).r[0]))
    assert changes[0].after > changes[0].before + 0.5
    assert relevance_changes(model, ["nike"], before, before) == []
    # red for item c moves its r by 0.004 only: below 0.05, but there
    assert {change.item_id for change in relevance_changes(model, ["nike"], before, after, least=0.001)} == set("abc")
    with pytest.raises(ValueError, match="must be the same items in one order; got 3 and 2"):
        relevance_changes(model, ["nike"], before, after[:2])


def test_diff_with_an_ebrm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(EBRM, "load", staticmethod(lambda folder: shoes_model()))
    old = RuleSet(schema=("brand",), rules=(surface_rule("brand", "puma"),))
    save_rules(old, "old.json")
    save_rules(RuleSet(schema=("brand",), rules=(*old.rules, surface_rule("brand", "nike"))), "new.json")
    lines = [json.dumps(Item(id=name, title=f"{name} cap").to_json()) for name in ("nike", "puma")]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    (tmp_path / "queries.txt").write_text("nike\n\n")
    asked = ["tag", "diff", "old.json", "new.json", "--ebrm", "run"]
    assert main([*asked, "--items", "items.jsonl", "--queries", "queries.txt"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("'nike', item nike: r 0.11")
    assert told[-1] == "1 of 2 pairs of query and item change r by more than 0.05"
    assert main(asked) != 0
    assert "diff --ebrm needs --items FILE and --queries FILE" in capsys.readouterr().err
    assert main(["tag", "diff", "old.json", "new.json"]) != 0
    assert "diff needs --texts FILE" in capsys.readouterr().err
