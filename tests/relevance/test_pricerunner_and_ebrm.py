"""PriceRunner pairs hold their promises, and EBRM's verdicts reach the steps they are about."""

import json
import math
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from graded_pairs import COMPACT, answer, make_pair, read

from recis.ebrm import EBRM, EBRMConfig
from recis.ebrm.calibrate import Calibrator
from recis.ebrm.entities import EntitySchema, Item, TypeConfig, none_id
from recis.ebrm.pricerunner import build_task
from recis.ebrm.pricerunner_titles import pricerunner_schema
from recis.ebrm.scorer import QEScorer
from relevance.catalog import CatalogConfig, make_catalog
from relevance.cli import main
from relevance.data import check_pairs
from relevance.ebrm_verifier import EbrmVerifier, agreement, fit_cuts, write_ebrm_folder
from relevance.files import read_pairs, write_rows
from relevance.grammar import parse
from relevance.labels import violations
from relevance.oracle import oracle
from relevance.pricerunner import ebrm_items, pricerunner_pairs, pricerunner_rules, visible_flags


def offers_file(path, num=160):
    """Write offers of two categories, two brands and two colours."""
    colour = [("Black", "White")[n % 3 % 2] for n in range(num)]
    brand = [("Smeg", "Lec")[n % 2] for n in range(num)]
    kind = ["Fridges" if n % 4 else "Digital Cameras" for n in range(num)]
    noun = ["fridge" if n % 4 else "digital camera" for n in range(num)]
    shown = [colour[n].lower() if n % 5 else "" for n in range(num)]
    table = {
        "product_id": list(range(num)),
        "product_title": [f"{brand[n].lower()} fab{n}x {shown[n]} {noun[n]}" for n in range(num)],
        "cluster_id": list(range(num)),
        "cluster_label": [f"{brand[n]} FAB{n}X {colour[n]}" for n in range(num)],
        "category_label": kind,
    }
    pq.write_table(pa.table(table), path)
    return path


@pytest.fixture(scope="module")
def offers(tmp_path_factory):
    return offers_file(tmp_path_factory.mktemp("offers") / "offers.parquet")


@pytest.fixture(scope="module")
def task(offers):
    return build_task(offers, num_queries={"train": 40, "dev": 10, "test": 10})


class TestPriceRunner:
    def test_gold_rationales_break_no_rule_and_parse(self, task):
        pairs = pricerunner_pairs(task)
        check_pairs(pairs)
        rules = pricerunner_rules()
        with_steps = [pair for pair in pairs if pair.steps is not None]
        assert len(with_steps) > 0.5 * len(pairs)
        for pair in with_steps:
            assert pair.steps is not None
            assert pair.steps.rule is not None
            parsed = parse(oracle(pair, COMPACT), COMPACT, rule_ids=rules.ids)
            assert parsed.ok
            assert violations(parsed, pair) == ()
            assert rules.deciding_labels[pair.steps.rule] == pair.label

    def test_steps_follow_the_title_and_the_grade(self, task):
        for pair in pricerunner_pairs(task):
            if pair.steps is None:
                continue
            assert (pair.steps.category == "mismatch") == (pair.label == 1)
            wanted = pair.steps.wanted.get("brand")
            if wanted:
                assert pair.steps.attributes is not None
                said = pair.steps.attributes["brand"]
                assert said == ("ok" if wanted in pair.item.title.split() else "miss" if pair.item.brand else "unknown")
            if (pair.steps.attributes or {}).get("colour") == "unknown":
                assert not {"black", "white"} & set(pair.item.title.split())

    def test_no_query_text_in_two_parts_and_test_queries_stay(self, task):
        pairs = pricerunner_pairs(task)
        home = {}
        for pair in pairs:
            assert home.setdefault(pair.query, pair.split) == pair.split
        kept = {pair.query for pair in pairs if pair.split == "test"}
        part = task.parts["test"]
        asked = set(part.pairs.query.tolist())
        assert kept == {query.text for place, query in enumerate(part.queries) if place in asked}

    def test_chunks_say_what_their_kind_promises(self, task):
        pairs = pricerunner_pairs(task, with_chunks=True)
        assert pairs == pricerunner_pairs(task, with_chunks=True)
        by_title = {offer.title: offer for offer in task.catalogue.offers}
        kinds = set()
        for pair in pairs:
            assert pair.chunk is not None
            kinds.add(pair.chunk.kind)
            if pair.chunk.kind == "misleading":
                assert pair.item.brand not in pair.chunk.text.split()
            elif pair.chunk.kind == "irrelevant":
                other = by_title[pair.chunk.text]
                assert task.catalogue.categories[other.cluster_id] != pair.item.category
        assert kinds >= {"misleading", "irrelevant"}

    def test_visible_flags_name_the_pairs(self, task):
        flags = visible_flags(task, "test")
        ids = {pair.id for pair in pricerunner_pairs(task) if pair.split == "test"}
        assert ids <= flags.keys()

    def test_command_writes_pairs(self, offers, tmp_path):
        out = tmp_path / "pairs.jsonl"
        assert main(["data", "--offers", str(offers), "--out", str(out), "--queries", "12"]) == 0
        pairs = read_pairs(out, deciding_labels=pricerunner_rules().deciding_labels)
        assert {pair.split for pair in pairs} == {"train", "dev", "test"}


SCHEMA = EntitySchema(types=tuple(TypeConfig(name=name) for name in ("category", "brand", "colour")))


def ebrm(logits, query="red boots"):
    """Return a model that knows some (query, entity id) logits; everything else is a clear no."""
    pairs = {(query, name): logit for name, logit in logits.items()}
    return EBRM(EBRMConfig(schema=SCHEMA), QEScorer.table(pairs, default=-6.0))


def boots(**stated):
    return Item(id="i-p1", entities=tuple(SCHEMA.entity(name, value) for name, value in stated.items()), title="boots")


RED_BOOTS = {
    "category:boots": 6.0,
    "colour:red": 6.0,
    # the query does not ask for a brand: having none is fine, and so is any
    none_id("brand"): 6.0,
    "brand:norvik": 6.0,
}


class TestVerifier:
    def verifier(self, item, logits=RED_BOOTS):
        return EbrmVerifier(model=ebrm(logits), items={"i-p1": item})

    def steps(self, verifier, text, pair=None):
        row = verifier([read(text)], [pair or make_pair()], COMPACT)[0]
        return dict(zip(COMPACT.steps, row.tolist(), strict=True))

    def test_category_and_attributes_are_compared_with_its_verdicts(self):
        verifier = self.verifier(boots(category="boots", brand="norvik", colour="red"))
        good = self.steps(verifier, answer(4, "match", {"colour": "ok"}))
        assert (good["category"], good["attribute"]) == (1.0, 1.0)
        assert all(math.isnan(good[name]) for name in ("label", "rule", "verdict"))
        wrong = self.steps(verifier, answer(1, "mismatch", {"colour": "miss"}))
        assert (wrong["category"], wrong["attribute"]) == (0.0, 0.0)

    def test_a_missed_and_an_unstated_value(self):
        blue = self.verifier(boots(category="boots", colour="blue"))
        assert self.steps(blue, answer(2, "match", {"colour": "miss"}))["attribute"] == 1.0
        silent = self.verifier(boots(category="boots", brand="norvik"))
        assert self.steps(silent, answer(3, "match", {"colour": "unknown"}))["attribute"] == 1.0
        assert self.steps(silent, answer(4, "match", {"colour": "ok"}))["attribute"] == 0.0

    def test_what_it_cannot_judge_is_nan(self):
        verifier = self.verifier(boots(category="boots", colour="red"))
        other = self.steps(verifier, answer(4, "match", {"price": "ok"}))
        assert math.isnan(other["attribute"])
        assert other["category"] == 1.0
        assert all(math.isnan(value) for value in self.steps(verifier, "nonsense").values())
        stranger = make_pair(id="p9")
        assert all(math.isnan(value) for value in self.steps(verifier, answer(4), stranger).values())

    def test_items_it_only_estimates_are_skipped(self):
        verifier = self.verifier(boots())
        explanation = verifier.explain(make_pair())
        assert explanation is not None
        assert explanation.is_approximate
        assert verifier.verdicts(make_pair()) is None

    def test_it_overrides_nothing_that_gold_says(self):
        from relevance.verify import Hybrid, gold_verdicts

        pair = make_pair(attributes={"colour": "ok"})
        hybrid = Hybrid(
            verifiers={"gold": gold_verdicts, "ebrm": self.verifier(boots(category="boots", colour="blue"))}
        )
        text = read(answer(4, "match", {"colour": "ok"}))
        merged, source = hybrid.with_sources([text], [pair], COMPACT)
        assert merged[0, 2] == 1.0
        assert source[0, 2] == 0
        hidden = replace(pair, steps=None)
        merged, source = hybrid.with_sources([text], [hidden], COMPACT)
        assert (float(merged[0, 2]), int(source[0, 2])) == (0.0, 1)

    def test_agreement_with_gold_by_hand(self):
        items = {"i-a": boots(category="boots", colour="red"), "i-b": boots(category="boots", colour="blue")}
        verifier = EbrmVerifier(model=ebrm(RED_BOOTS), items=items)
        right = make_pair(id="a", attributes={"colour": "ok"})
        wrong = make_pair(4, id="b", attributes={"colour": "ok", "price": "ok"})
        found = agreement(verifier, [right, wrong, make_pair(id="unknown")])
        assert found["category"] == 1.0
        assert (found["attribute"], found["num_attribute"]) == (0.5, 2.0)
        assert (found["constraints"], found["num_constraints"]) == (1.0, 2.0)

    def test_disagreement_is_the_gap_to_label_4(self):
        verifier = self.verifier(boots(category="boots", colour="red"))
        verifier.model.calibrator = Calibrator(a=1.0, b=0.0)
        explanation = verifier.explain(make_pair())
        assert explanation is not None
        gaps = verifier.disagreement([make_pair(), make_pair(id="x")], torch.tensor([[0.1, 0.1, 0.1, 0.7]] * 2))
        assert gaps[0] == pytest.approx(abs(explanation.p - 0.7), abs=1e-6)
        assert gaps[1] == 0.0

    def test_its_words_stand_in_for_a_rationale(self):
        verifier = self.verifier(boots(category="boots", colour="blue"))
        assert verifier.why(make_pair()) == "category match, colour miss"

    def test_items_of_offers_come_from_their_titles(self, task):
        pairs = pricerunner_pairs(task)
        items = ebrm_items(pairs, task.dictionaries, pricerunner_schema())
        offer = next(n for n, own in enumerate(task.catalogue.offers) if str(own.product_id) in items)
        assert items[str(task.catalogue.offers[offer].product_id)].entities == task.entities(offer)


def test_the_generated_catalogue_as_a_training_folder_of_ebrm(tmp_path):
    from recis.ebrm.datasets import folder_set

    catalog = make_catalog(CatalogConfig(num_train=24, num_dev=8, num_test=0))
    found = folder_set(write_ebrm_folder(tmp_path / "ebrm", catalog.train, catalog.dev))
    assert (len(found.train), len(found.dev)) == (24, 8)
    assert found.train.label.tolist() == [float(pair.label == 4) for pair in catalog.train]
    assert "colour" in found.schema.names


def test_cuts_are_fitted_on_gold_by_hand():
    """s of "no colour" is .7 for a query that wants one and .9 for one that does not: the default cut .5 calls both free."""
    logits = {
        **RED_BOOTS,
        none_id("brand"): math.log(9.0),
        none_id("colour"): math.log(7 / 3),
        "colour:red": math.log(0.4 / 0.6),  # g .4 where it is met
    }
    items = {"i-a": boots(category="boots", colour="red"), "i-b": boots(category="boots", colour="blue")}
    verifier = EbrmVerifier(model=ebrm(logits), items=items)
    pairs = [make_pair(id="a", attributes={"colour": "ok"}), make_pair(2, id="b", attributes={"colour": "miss"})]
    assert agreement(verifier, pairs)["num_constraints"] == 0
    fitted = fit_cuts(verifier, pairs)
    assert fitted.model.thresholds.constrained == pytest.approx(0.8, abs=1e-3)  # between .7 and .9
    assert 0.01 < fitted.model.thresholds.ok < 0.4
    found = agreement(fitted, pairs)
    assert (found["attribute"], found["constraints"], found["num_constraints"]) == (1.0, 1.0, 2.0)


@pytest.mark.parametrize("kind", ["near", "mismatch"])
def test_near_is_said_only_where_gold_knows_it(kind):
    """g of the category: boots .9, shoes .4, clogs .3, sofas .01; the cut for match lies between boots and shoes."""
    shares = {"boots": 0.9, "shoes": 0.4, "clogs": 0.3, "sofas": 0.01}
    logits = RED_BOOTS | {f"category:{noun}": math.log(g / (1 - g)) for noun, g in shares.items()}
    stated = [("boots", "match")] * 3 + [("clogs", "match"), ("shoes", kind), ("sofas", "mismatch")]
    items = {f"i-{number}": boots(category=noun) for number, (noun, _) in enumerate(stated)}
    pairs = [make_pair(id=str(number), category=gold) for number, (_, gold) in enumerate(stated)]
    fitted = fit_cuts(EbrmVerifier(model=ebrm(logits), items=items), pairs)
    cuts = fitted.model.thresholds
    assert 0.4 < cuts.match < 0.9
    assert (cuts.near < cuts.match) == (kind == "near")
    found = agreement(fitted, pairs)
    assert found["category"] == pytest.approx(5 / 6)  # clogs
    assert found["balanced_category"] == pytest.approx((3 / 4 + 2) / 3 if kind == "near" else (3 / 4 + 1) / 2)


class TestAgreementCommand:
    def pairs_file(self, tmp_path, pairs):
        write_rows(tmp_path / "pairs.jsonl", pairs)
        return str(tmp_path / "pairs.jsonl")

    def test_agreement_by_family_is_printed(self, tmp_path, monkeypatch, capsys):
        items = {"i-a": boots(category="boots", colour="red"), "i-b": boots(category="boots", colour="blue")}
        verifier = EbrmVerifier(model=ebrm(RED_BOOTS), items=items)
        monkeypatch.setattr("relevance.ebrm_verifier.load_verifier", lambda folder, pairs: verifier)
        pairs = [
            make_pair(id="a", attributes={"colour": "ok"}, split="test"),
            make_pair(id="b", attributes={"colour": "ok"}, split="test", family="negation"),
            replace(make_pair(id="c", query_id="q2", split="train"), query="boots"),
        ]
        source = self.pairs_file(tmp_path, pairs)
        assert main(["eval", "--ebrm", str(tmp_path), "--data", source, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["num_pairs"] == 2
        assert report["slices"].keys() == {"all", "plain", "negation"}
        assert (report["slices"]["all"]["attribute"], report["slices"]["negation"]["attribute"]) == (0.5, 0.0)
        assert (report["slices"]["all"]["judged"], report["slices"]["all"]["always_match"]) == (1.0, 1.0)
        assert main(["eval", "--ebrm", str(tmp_path), "--data", source]) == 0
        assert "negation" in capsys.readouterr().out

    def test_what_it_needs_is_named(self, tmp_path, capsys):
        source = self.pairs_file(tmp_path, [replace(make_pair(), steps=None)])
        for arguments, code, says in (
            (["eval"], 2, "give --model, or --ebrm"),
            (["eval", "--model", "m", "--ebrm", "e"], 2, "one thing"),
            (["eval", "--ebrm", "e"], 2, "needs --data"),
            (["eval", "--ebrm", "e", "--data", source, "--part", "train"], 1, "no pair has gold steps"),
            (["eval", "--ebrm", "e", "--data", source, "--fit"], 2, "--data needs one"),
            (["data", "--out", "x", "--for-ebrm", "--offers", "o"], 2, "generated catalogue"),
        ):
            assert main(arguments) == code
            assert says in capsys.readouterr().err

    def test_the_catalogue_is_written_for_ebrm(self, tmp_path):
        sizes = ["--set", "num_train=24", "--set", "num_dev=8", "--set", "num_test=0"]
        assert main(["data", "--out", str(tmp_path / "ebrm"), "--for-ebrm", *sizes]) == 0
        assert {path.name for path in (tmp_path / "ebrm").iterdir()} >= {"items.jsonl", "labels_train.jsonl"}
