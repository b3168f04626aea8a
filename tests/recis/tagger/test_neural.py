"""The neural tagger: training on gold and on a pool, windows, files."""

import itertools

import pytest
import tagger_titles
import torch

from recis.tagger.encoders import OVERLAP_WORDS, WordEncoder, gram_cells
from recis.tagger.neural import NeuralConfig, TaggerModel, allowed_tags
from recis.tagger.rules import Span
from recis.tagger.text import Text, from_words
from recis.tagger.train import examples_of, train

SMALL = NeuralConfig(dim=16, gram_dim=16, epochs=12, batch_size=4, head_lr=2e-2, dropout=0.1)


def gold_spans() -> list[list[Span]]:
    return [[Span(start=a, end=b, type=name) for a, b, name in spans] for spans in tagger_titles.toy_gold()]


def trained(config: NeuralConfig = SMALL, *, outside_known: bool = True) -> TaggerModel:
    model = TaggerModel(tagger_titles.TYPES, config)
    examples = examples_of(model, tagger_titles.toy_texts(), gold_spans(), outside_known=outside_known)
    train(model, examples)
    return model


def triples(spans: list[list[Span]]) -> list[list[tuple[int, int, str]]]:
    return [[(span.start, span.end, span.type) for span in found] for found in spans]


def test_it_learns_the_toy_titles():
    found = trained().tag_texts(tagger_titles.toy_texts())
    assert triples(found) == triples(gold_spans())
    assert all(0 < span.conf <= 1 for spans in found for span in spans)


def test_words_outside_a_pool_may_be_anything():
    model = TaggerModel(("a",), SMALL)
    known = allowed_tags(model.tags, [(1, 3, "a")], 4, outside_known=True)
    assert known.int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]  # O, B-a, I-a
    unknown = allowed_tags(model.tags, [(1, 3, "a")], 4, outside_known=False, loose=True)
    assert unknown.int().tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1], [1, 1, 1]]


def test_the_same_seed_gives_the_same_weights():
    one, two = trained(), trained()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_a_loaded_model_tags_as_the_saved_one(tmp_path):
    model = trained()
    model.save(tmp_path / "model")
    texts = tagger_titles.toy_texts()
    assert TaggerModel.load(tmp_path / "model").tag_texts(texts) == model.tag_texts(texts)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="is no tagger model"):
        TaggerModel.load(tmp_path)


def test_empty_texts_have_no_spans_and_do_not_disturb_others():
    model = trained()
    empty = Text("", (), (), ())
    texts = [empty, *tagger_titles.toy_texts(), empty]
    assert model.tag_texts(texts)[1:-1] == model.tag_texts(tagger_titles.toy_texts())
    assert model.tag_texts([empty]) == [[]]
    with pytest.raises(ValueError, match="at least one text with words"):
        train(TaggerModel(("a",), SMALL), [])


@pytest.mark.parametrize("num_words", [1, 511, 512, 513, 1500])
def test_windows_cover_a_text_and_overlap_by_64_words(num_words):
    windows = WordEncoder().windows([[]] * num_words)
    assert windows[0][0] == 0
    assert windows[-1][1] == num_words
    assert all(end - start <= 512 for start, end in windows)
    assert all(before[1] - after[0] == OVERLAP_WORDS for before, after in itertools.pairwise(windows))


def test_a_long_text_is_tagged_in_full_and_as_in_one_window():
    model = trained()
    words = [word for text in tagger_titles.toy_texts() for word in text.tokens] * 9
    long = from_words(words)
    assert len(words) > 512
    scores = model._whole(long.tokens, [[]] * len(words))
    assert scores.shape[0] == len(words)
    with torch.no_grad():
        whole = model.emissions([long.tokens], [[[]] * len(words)])[0][0]
    torch.testing.assert_close(scores, whole, atol=1e-3, rtol=1e-3)  # 32 words of context stand on each side of a seam
    assert model.tag_text(long)[-1].end > len(words) - 10


def test_spelling_is_read_through_hashed_n_grams():
    assert gram_cells("nike") == gram_cells("nike")
    assert len(gram_cells("nike")) == 2 + 5 + 4 + 3 + 2
    assert set(gram_cells("nike")) & set(gram_cells("nikes"))
