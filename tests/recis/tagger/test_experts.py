"""Experts, seeds, phrases and the pool's gate."""

import math

import numpy as np
import pytest

from recis.tagger.experts import ANSWER_SCORE, NONE, CachedExpert, ExpertTimeout, LLMExpert, MaskedLMExpert, TableExpert
from recis.tagger.phrases import PhraseConfig, find_phrases, occurrences
from recis.tagger.pool import Pool, PoolEntry, gate_scores, hashed_vectors
from recis.tagger.seeds import NoSeedsError, SeedConfig, find_seeds
from recis.tagger.text import tokenize

TEXTS = [tokenize("red shoes"), tokenize("blue shoes")]


class Counting:
    """Answers from a function and counts the questions."""

    version = "1"

    def __init__(self, answer):
        self.answer, self.asked = answer, 0

    def type_scores(self, text, span, template):
        self.asked += 1
        return self.answer(text.surface(*span), template)


def test_a_question_is_asked_once():
    inner = Counting(lambda phrase, template: {"a": 1.0})
    expert = CachedExpert(inner, ["a", "b"])
    for _ in range(3):
        assert expert.type_scores(TEXTS[0], (0, 1), "T1") == {"a": 1.0, "b": 0.0, NONE: 0.0}
    assert inner.asked == 1
    inner.version = "2"
    expert.type_scores(TEXTS[0], (0, 1), "T1")
    assert inner.asked == 2


def test_nothing_counts_as_none_and_is_counted():
    expert = CachedExpert(Counting(lambda phrase, template: {}), ["a"])
    assert expert.type_scores(TEXTS[0], (0, 1), "T1") == {"a": 0.0, NONE: ANSWER_SCORE}
    assert expert.empty == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [({"a": math.nan}, "'a' is NaN"), ({"z": 1.0}, r"type 'z', which is not in the schema \['a'\]")],
)
def test_nan_and_unknown_types_are_refused_with_the_phrase(answer, message):
    expert = CachedExpert(Counting(lambda phrase, template: answer), ["a"])
    with pytest.raises(ValueError, match=f"phrase 'red', template T1: .*{message}"):
        expert.type_scores(TEXTS[0], (0, 1), "T1")


def timing_out(phrases):
    def answer(phrase, template):
        if phrase in phrases:
            raise ExpertTimeout
        return {"a": 3.0}

    return Counting(answer)


def test_a_timeout_skips_the_phrase_and_many_abort():
    found = find_seeds(TEXTS, ["red", "blue", "shoes"], timing_out({"red"}), ["a"], SeedConfig(max_skipped=0.4))
    assert found.skipped == 1
    assert {rule.tests[0].value for rule in found.rules} == {"blue", "shoes"}
    with pytest.raises(RuntimeError, match="timed out on 1 of 3 phrases; at most 20% may"):
        find_seeds(TEXTS, ["red", "blue", "shoes"], timing_out({"red"}), ["a"])


def test_a_small_margin_gives_no_seed_and_is_told():
    expert = Counting(lambda phrase, template: {"a": 1.2, "b": 0.5})
    with pytest.raises(NoSeedsError, match=r"low margin: \{'a': 3\}"):
        find_seeds(TEXTS, ["red", "blue", "shoes"], expert, ["a", "b"])


def test_the_best_margins_become_seeds():
    margins = {"red": 2.0, "blue": 3.0, "shoes": 4.0}
    found = find_seeds(TEXTS, margins, Counting(lambda p, t: {"a": margins[p]}), ["a"], SeedConfig(top_per_type=2))
    assert [rule.tests[0].value for rule in found.rules] == ["shoes", "blue"]
    assert found.rejected["over top"] == {"a": 1}


def test_a_table_refuses_an_unknown_template():
    with pytest.raises(ValueError, match="phrase 'red': template must be one of"):
        TableExpert({"red": {"T3": "a"}})


def test_a_language_model_answers_one_label_of_a_closed_list():
    prompts = []

    def generate(prompt):
        prompts.append(prompt)
        return " Colour.\n" if "red" in prompt.split("part ")[-1].split(" in it")[0] else "I think it is a shoe"

    expert = LLMExpert(generate, {"colour": "a colour", "item": "what it is"}, version="stub")
    assert expert.type_scores(TEXTS[0], (0, 1), "T1") == {"colour": ANSWER_SCORE}
    assert expert.type_scores(TEXTS[0], (1, 2), "T1") == {}
    assert expert.not_a_label == 1
    assert "- colour: a colour" in prompts[0]
    assert expert.prompt(TEXTS[0], (0, 1), "T1") != expert.prompt(TEXTS[0], (0, 1), "T2")


def test_a_masked_language_model_scores_words_against_a_blank_span(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "red",
        "shoes",
        "is",
        "a",
        "type",
        "of",
        ".",
        "color",
        "thing",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config).eval()
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    expert = MaskedLMExpert(tmp_path, {"colour": ["color", "red"], "none": ["thing"]})

    def log_probs(sentence):
        ids = tokenizer(sentence, return_tensors="pt")
        place = (ids["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]
        with torch.no_grad():
            return model(**ids).logits[0, place].log_softmax(0)

    said, blank = log_probs("red shoes red is a [MASK] ."), log_probs("shoes is a [MASK] .")
    scores = expert.type_scores(TEXTS[0], (0, 1), "T1")
    change = said - blank
    color, red, thing = (tokenizer.convert_tokens_to_ids(word) for word in ("color", "red", "thing"))
    assert scores["colour"] == pytest.approx(float((change[color] + change[red]) / 2), abs=1e-5)
    assert scores["none"] == pytest.approx(float(change[thing]), abs=1e-5)
    with pytest.raises(ValueError, match="type 'x': word 'purple' must be one token"):
        MaskedLMExpert(tmp_path, {"x": ["purple"]})


def test_phrases_are_tokens_that_stay_together():
    texts = [
        tokenize(t) for t in ["new balance shoes", "new balance cap", "new balance hoodie", "red shoes", "red cap"]
    ]
    found = find_phrases(texts, PhraseConfig(max_tokens=2, min_count=2))
    assert list(found) == sorted(found, key=lambda phrase: (-found[phrase], phrase))
    assert {"new", "balance", "red", "shoes", "cap", "new balance"} == set(found)
    # 3 of 8 bigrams; 3 of 13 tokens each: log((3/8) / (3/13)^2) * log(1 + 3)
    assert found["new balance"] == pytest.approx(math.log((3 / 8) / (3 / 13) ** 2) * math.log(4))
    assert "hoodie" in find_phrases(texts, PhraseConfig(max_tokens=2, min_count=2), field_values=["hoodie"])
    assert occurrences(texts, ["new balance"])["new balance"] == [(0, 0, 2), (1, 0, 2), (2, 0, 2)]


def entry(start, kind="a"):
    return PoolEntry(text_id="t", start=start, end=start + 1, type=kind, rules=("r",), round=0)


def test_a_pool_only_grows_and_the_first_label_stays():
    pool = Pool()
    assert pool.add(entry(0))
    assert not pool.add(entry(0, "b"))
    assert pool.add(entry(1))
    assert [(e.start, e.type) for e in pool.entries] == [(0, "a"), (1, "a")]
    assert pool.type_of("t", 0, 1) == "a"
    assert pool.type_of("t", 5, 6) is None


def test_what_is_like_the_members_scores_higher():
    texts = [tokenize(t) for t in ["nike shoes", "nikes shoes", "nike cap", "zebra print"]]
    members = hashed_vectors(texts, [(0, 0, 1), (1, 0, 1), (2, 0, 1)])
    same, other = hashed_vectors(texts, [(0, 0, 1), (3, 1, 2)])
    scores, floor = gate_scores(np.stack([same, other]), members, np.random.default_rng(0))
    assert scores[0] > floor > scores[1]
    again, _ = gate_scores(np.stack([same, other]), members, np.random.default_rng(0))
    assert (scores == again).all()
    np.testing.assert_allclose(np.linalg.norm(members, axis=1), 1, rtol=1e-6)
