"""OA-Mine for benchmarks/quality_tagger.py: attribute values in product titles of ten categories."""

import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from recis.tagger.evaluate import score_spans
from recis.tagger.neural import NeuralConfig, TaggerModel
from recis.tagger.rules import RuleSet, RuleTagger, Span, surface_rule
from recis.tagger.text import tokenize
from recis.tagger.train import examples_of, train

OA_NEURAL = NeuralConfig(epochs=15)


def oa_mine_dictionary(data: Path, seed: int) -> dict[str, Any]:
    """Return the figures of the values of train as surface rules, one rule file per category."""
    del seed  # nothing here is drawn
    parts = _parts(data)
    dictionary = _dictionary(parts["train"])
    return {
        **{part: _scores(parts[part], dictionary) for part in ("dev", "test")},
        "titles": {part: len(rows) for part, rows in parts.items()},
    }


def oa_mine(data: Path, seed: int) -> dict[str, Any]:
    """Return the figures of one neural tagger for all categories."""
    parts = _parts(data)
    tagger, values = _neural(parts, seed)
    return {
        **{part: _scores(parts[part], tagger) for part in ("dev", "test")},
        "dev_span_f1_per_epoch": [round(value, 4) for value in values],
    }


def _parts(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the titles of train, dev (a fifth of train by hash of the title) and test."""
    import pyarrow.parquet as pq

    rows = pq.read_table(data / "oa_mine" / "titles.parquet").to_pylist()
    seen: set[str] = set()
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": []}
    for row in sorted(rows, key=lambda row: row["split"] == "test"):
        if row["title"] in seen:
            continue  # five titles are there twice; none may be both learnt from and tested on
        seen.add(row["title"])
        part = "test" if row["split"] == "test" else "dev" if zlib.crc32(row["title"].encode()) % 5 == 0 else "train"
        parts[part].append(row)
    return parts


def _dictionary(rows: Sequence[dict[str, Any]]) -> Any:
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


def _neural(parts: dict[str, list[dict[str, Any]]], seed: int) -> tuple[Any, list[float]]:
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

    model = TaggerModel(types, replace(OA_NEURAL, seed=seed))
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


def _scores(rows: Sequence[dict[str, Any]], tag: Any) -> dict[str, Any]:
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
