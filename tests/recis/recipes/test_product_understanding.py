"""Products understood: records, tasks and metrics by hand, values for EBRM, and a small run from end to end."""

import random
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recis.cli import main
from recis.ebrm.synthetic import SyntheticConfig, make_data
from recis.errors import ConfigError
from recis.recipes.product_metrics import attribute_counts, is_right, measure, rouge_l
from recis.recipes.product_records import Record, falls_in_test, generated_records, oa_mine_records, pricerunner_records
from recis.recipes.product_tasks import LETTERS, TASKS, TEMPLATES, UNKNOWN, make_sample, make_samples, read_attributes
from recis.recipes.product_understanding import SOURCES, Answer, Corpus, chosen_sources, values_in
from recis.recipes.product_uses import ReadValue, ebrm_lines, filled_in, value_confidences

RECORD = Record(
    id="1", source="generated", title="acme red lace dress", category="dress",
    attributes={"brand": ("acme",), "colour": ("red", "blue")}, spellings={"crimson": "red"}, is_test=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return make_data(SyntheticConfig(num_items=120, num_queries=30, num_impressions=2000, num_candidates=20))


def sample_of(task, seed=0, record=RECORD):
    return make_sample(
        task, record, ("dress", "shoe", "hat", "coat", "sock"), ("brand", "colour", "size"), random.Random(seed)
    )


def test_rouge_by_hand():
    assert rouge_l("the red lace dress", "red dress") == pytest.approx(2 * 2 / 6)
    assert rouge_l("dress red", "red dress") == 0.5
    assert rouge_l("", "") == 1.0
    assert rouge_l("", "a") == 0.0


def test_tasks_by_hand():
    caption = sample_of("caption")
    assert caption.answer == RECORD.title
    assert set(caption.side) == {"category:dress", "brand:acme", "colour:red", "colour:blue"}
    assert sum(f"{name} = " in caption.prompt for name in ("category", "brand", "colour")) <= 2  # half of four facts
    category = sample_of("category")
    letter = LETTERS.index(category.answer)
    assert category.prompt.count(" ) ") == 4
    assert f"{LETTERS[letter]} ) dress" in category.prompt
    assert sample_of("extract").answer == "brand = acme ; colour = red ; colour = blue"
    assert read_attributes("brand = acme ; colour ; size = 4  l;=x") == [("brand", "acme"), ("size", "4 l")]
    assert (sample_of("complete").prompt.split()[-2:], sample_of("complete").answer) == (["acme", "red"], "lace dress")
    corrected = sample_of("correct")
    assert corrected.answer == RECORD.title


def test_a_sixth_of_the_questions_has_no_answer():
    asked = [sample_of("question", seed) for seed in range(600)]
    unknown = [sample for sample in asked if sample.answer == UNKNOWN]
    assert {sample.name for sample in unknown} == {"size"}
    assert 0.15 <= len(unknown) / len(asked) <= 0.2
    assert {sample.answer for sample in asked} == {UNKNOWN, "acme", "red or blue"}


def test_every_template_is_used_and_a_seed_gives_the_same_samples():
    prompts = {task: {sample_of(task, seed).prompt for seed in range(40)} for task in TASKS}
    assert all(len(found) >= len(TEMPLATES[task]) for task, found in prompts.items())
    assert make_samples([RECORD], per_record=12, seed=3) == make_samples([RECORD], per_record=12, seed=3)
    plain = replace(RECORD, attributes={}, source="pricerunner")
    assert {sample.task for sample in make_samples([plain], per_record=9, seed=0)} == {
        "category",
        "complete",
        "correct",
    }


def test_metrics_by_hand():
    extract, question = sample_of("extract"), [sample_of("question", seed) for seed in range(40)]
    assert attribute_counts(extract, "brand = acme ; colour = crimson ; size = 4") == (2, 3, 3)
    both = next(sample for sample in question if sample.answer == "red or blue")
    assert is_right(both, "blue or crimson")
    assert not is_right(both, "red")
    none = next(sample for sample in question if sample.answer == UNKNOWN)
    found = measure([extract, both, none, none], ["brand = acme", "unknown", "unknown", "acme"])
    assert found == {
        "extract.micro_f1": pytest.approx(2 * 1 / 4), "question.accuracy": pytest.approx(1 / 3),
        "question.rejection_f1": pytest.approx(2 * 1 / 4),
    }  # fmt: skip


def test_records_of_public_forms(tmp_path):
    brand = {"attribute": "Brand", "value": "Acme", "start": 0, "end": 4}
    rows = [{"split": "test", "category": "Shoes", "title": "Acme Red", "attributes": [brand]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "titles.parquet")
    (record,) = oa_mine_records(tmp_path / "titles.parquet")
    assert (record.title, record.category, record.attributes, record.is_test) == (
        "acme red",
        "shoes",
        {"brand": ("acme",)},
        True,
    )
    offers = [{"product_id": at, "product_title": f"Phone {at}", "category_label": "Phones"} for at in range(9)]
    pq.write_table(pa.Table.from_pylist(offers), tmp_path / "offers.parquet")
    assert len(pricerunner_records(tmp_path / "offers.parquet", most=4)) == 4
    with pytest.raises(ConfigError, match="has no column 'split'"):
        oa_mine_records(tmp_path / "offers.parquet")


def test_generated_records_know_what_titles_spell(data):
    records = generated_records(data)
    assert 0.1 < sum(record.is_test for record in records) / len(records) < 0.3
    spelled = [(r, other) for r in records for other, value in r.spellings.items() if (value,) in r.attributes.values()]
    record, other = spelled[0]
    assert record.normalised(other.upper()) == record.spellings[other]


def test_confidence_is_the_geometric_mean_of_a_parts_tokens():
    assert value_confidences([7, 8, 5, 9], [-1.0, -3.0, -9.0, 0.0], separator=5) == [
        pytest.approx(0.1353353, rel=1e-5),
        1.0,
    ]
    read = values_in(Answer("brand = acme ; nothing ; colour = crimson", [0.9, 0.1, 0.5]), RECORD)
    assert read == [ReadValue("brand", "acme", 0.9), ReadValue("colour", "red", 0.5)]


def test_values_fill_only_types_that_list_none(data):
    number = next(
        at
        for at, item in enumerate(data.items)
        if "colour" not in {e.type for e in item.entities} and data.values[at].get("colour")
    )
    item, colour = data.items[number], data.values[number]["colour"][0]
    listed = item.entities[0]
    filled = filled_in(
        data, item, [ReadValue("colour", colour, 0.7), ReadValue(listed.type, "other", 1.0), ReadValue("x", "y", 1.0)]
    )
    (new,) = filled.entities[len(item.entities) :]
    assert (new.type, new.value, new.conf, new.source) == ("colour", colour, 0.7, "tagger")
    assert filled.entities[: len(item.entities)] == item.entities


def test_right_values_raise_ebrm_and_wrong_ones_do_not(data):
    test = [number for number, item in enumerate(data.items) if falls_in_test(item.id)]
    right = {at: [ReadValue(k, v, 1.0) for k, own in data.values[at].items() for v in own] for at in test}
    before, after = (float(line.split()[-2]) for line in ebrm_lines(data, right)[2:])
    assert before < after
    assert after > 0.99  # with every value listed the gold verdicts give the gold relevance
    nothing = [float(line.split()[-2]) for line in ebrm_lines(data, {at: [] for at in test})[2:]]
    assert nothing[0] == nothing[1] == before


def public_data(folder):
    """A few titles and offers in the form of the public files."""
    kinds = (("shoes", "acme"), ("hats", "zeta"), ("socks", "acme"))
    titles = [
        {
            "split": "test" if at % 3 == 0 else "train",
            "category": kind,
            "title": f"{brand} {kind} {at}",
            "attributes": [{"attribute": "Brand", "value": brand, "start": 0, "end": len(brand)}],
        }
        for at, (kind, brand) in enumerate(kinds * 4)
    ]
    offers = [
        {"product_id": at, "product_title": f"{brand} {kind} {at}", "category_label": kind}
        for at, (kind, brand) in enumerate(kinds * 10)
    ]
    for name, file, rows in (("oa_mine", "titles", titles), ("pricerunner", "offers", offers)):
        (folder / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), folder / name / f"{file}.parquet")


def test_sources_by_hand(tmp_path, data):
    corpus = Corpus(root=str(tmp_path), sources=SOURCES, num_items=40, seed=0)
    assert chosen_sources((), None) == ("generated",)
    assert chosen_sources((), "data") == SOURCES
    assert chosen_sources(("generated", "pricerunner"), "data") == ("generated", "pricerunner")
    with pytest.raises(ConfigError, match="no source 'pricerun'; did you mean 'pricerunner'"):
        chosen_sources(("generated", "pricerun"), "data")
    with pytest.raises(ConfigError, match="need 'generated' among them"):
        chosen_sources(("oa_mine",), "data")
    with pytest.raises(ConfigError, match=r"source 'oa_mine': no file .* or leave the source out"):
        corpus.records(data)
    public_data(tmp_path)
    found = corpus.records(data)
    count = {source: sum(record.source == source for record in found) for source in SOURCES}
    assert count == {"generated": 120, "oa_mine": 12, "pricerunner": 20}


def test_a_small_run(tmp_path, capsys):
    pytest.importorskip("transformers")
    public_data(tmp_path)
    settings = ("num_items=40", "per_record=2", "epochs=1", "num_test=2")
    command = ["train", "product_understanding", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main([*command, *(part for setting in settings for part in ("--set", setting))]) == 0
    out = capsys.readouterr().out
    told = (
        "caption.rouge_l",
        "category.accuracy",
        "extract.micro_f1",
        "question.rejection_f1",
        "+ item tower",
        "+ values read",
    )
    assert [name for name in told if name not in out] == []
    head = next(line for line in out.splitlines() if line.startswith("  test part"))
    assert head.split()[2:] == list(SOURCES)
    captions = next(line for line in out.splitlines() if "caption.rouge_l" in line).split()
    assert captions[-1] == "-"  # PriceRunner's records have no attribute to write a title from
    assert "-" not in captions[1:3]
    assert (tmp_path / "run" / "trained_decoder" / "config.json").is_file()
