"""The expert learns from the first pool, and the better of two passes is kept."""

from dataclasses import replace

import pytest
import tagger_titles
import torch

from recis.tagger.distil import DistilConfig, distil
from recis.tagger.evaluate import score_spans
from recis.tagger.experts import NONE, MaskedLMExpert
from recis.tagger.rules import RuleTagger
from recis.tagger.second_pass import TASK_TEMPLATES, TuneConfig, pool_agreement, second_pass, tune_expert
from recis.tagger.seeds import SeedConfig, find_seeds

transformers = pytest.importorskip("transformers")
TEXTS = tagger_titles.toy_texts()
IDS = [str(number) for number in range(len(TEXTS))]
DISTIL = DistilConfig(
    precision_floor=0.6, min_support=2, top_k=3, kinds=("prev", "next"), max_ngram=1, max_span_tokens=2
)
WORDS = {"Brand": ["brand"], "Product": ["product"], "Color": ["color"], NONE: ["thing"]}


@pytest.fixture(scope="module")
def expert(tmp_path_factory) -> MaskedLMExpert:
    """A masked language model of one layer that knows the words of the toy titles and nothing of what they mean."""
    folder = tmp_path_factory.mktemp("lm")
    known = {token for text in TEXTS for token in text.tokens} | set(" ".join(TASK_TEMPLATES.values()).split())
    known = {word for word in known if not word.startswith("{")} | {word for said in WORDS.values() for word in said}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(known)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return MaskedLMExpert(folder, WORDS)


@pytest.fixture(scope="module")
def first():
    phrases = list(tagger_titles.ANSWERS)
    seeds = find_seeds(TEXTS, phrases, tagger_titles.toy_expert(), tagger_titles.TYPES)
    return distil(TEXTS, IDS, tagger_titles.TYPES, seeds.rules, DISTIL)


TUNE = TuneConfig(epochs=25, batch_size=8, lr=1e-2)


def dev_f1(rules) -> float:
    found = [RuleTagger(rules).tag_text(text) for text in TEXTS]
    return score_spans(tagger_titles.toy_gold(), found, [len(text.tokens) for text in TEXTS]).micro.f1


def test_a_tuned_expert_says_what_the_pool_says_and_the_old_one_stays(expert, first):
    before = {name: weight.clone() for name, weight in expert.model.state_dict().items()}
    version, asked = expert.version, (TEXTS[0], (0, 1), "T1")
    said = expert.type_scores(*asked)
    tuned = tune_expert(expert, TEXTS, IDS, first.pool.entries, TUNE)
    assert expert.version == version
    assert expert.type_scores(*asked) == said
    assert all(torch.equal(weight, before[name]) for name, weight in expert.model.state_dict().items())
    assert tuned.version != version
    right = 0
    for entry in first.pool.entries:
        question = (TEXTS[int(entry.text_id)], (entry.start, entry.end), "T2")
        scores = {name: value.item() for name, value in tuned.log_probs([question]).items()}
        right += max(scores, key=lambda name: scores[name]) == entry.type
    assert right >= 0.9 * len(first.pool)
    again = tune_expert(expert, TEXTS, IDS, first.pool.entries, TUNE)
    assert again.version == tuned.version  # the same seed gives the same weights


def test_the_better_pass_is_kept(expert, first):
    phrases = list(tagger_titles.ANSWERS)
    options = {"tune": TUNE, "seeds": SeedConfig(min_margin=0.0, min_agreement=0.5), "config": DISTIL}
    found = second_pass(first, expert, TEXTS, IDS, phrases, **options, measure=dev_f1)
    assert found.second is not None
    assert found.values == (dev_f1(first.rules), dev_f1(found.second.rules))
    assert found.kept is (found.second if found.values[1] > found.values[0] else first)
    ranks = {"first": 1.0, "second": 0.0}

    def prefer_first(rules):
        return ranks["first" if rules is first.rules else "second"]

    assert second_pass(first, expert, TEXTS, IDS, phrases, **options, measure=prefer_first).kept is first
    ranks.update(first=0.0, second=1.0)
    other = second_pass(first, expert, TEXTS, IDS, phrases, **options, measure=prefer_first)
    assert other.kept is other.second


def test_without_seeds_or_dev_the_first_pass_stays(expert, first):
    nothing = SeedConfig(min_margin=1e6)
    found = second_pass(first, expert, TEXTS, IDS, ["nike"], tune=replace(TUNE, epochs=1), seeds=nothing, config=DISTIL)
    assert found.second is None
    assert found.kept is first
    assert found.values == (pool_agreement(first, TEXTS, IDS), -1.0)


def test_pool_agreement_by_hand(first):
    assert pool_agreement(first, TEXTS, IDS) > 0.9
    none = replace(first, rules=replace(first.rules, rules=first.rules.rules[:0]))
    assert pool_agreement(none, TEXTS, IDS) == 0.0


def test_an_empty_pool_and_unknown_types_are_refused(expert, first):
    with pytest.raises(ValueError, match="cannot learn from an empty pool"):
        tune_expert(expert, TEXTS, IDS, [])
    with pytest.raises(ValueError, match="its text or its type is not known"):
        tune_expert(expert, TEXTS, IDS, [replace(first.pool.entries[0], type="size")])
