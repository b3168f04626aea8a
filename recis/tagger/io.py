"""Read and write the tagger's files: rules and types as JSON; texts, pools and spans as JSON lines; labelled texts.

Files are written whole under another name and renamed, with sorted content, so the same rules give the same bytes.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recis.errors import DataError
from recis.tagger.evaluate import Typed, bio_spans, check_spans
from recis.tagger.pool import PoolEntry
from recis.tagger.rules import Condition, Rule, RuleFormatError, RuleSet, Span
from recis.tagger.text import TOKENIZER, Text, from_words, tokenize

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """A text with gold spans."""

    text_id: str
    text: Text
    spans: tuple[Typed, ...]
    split: str = ""


def save_rules(rules: RuleSet, path: str | Path) -> None:
    """Write a rule file; the order of the rules is kept."""
    head: dict[str, Any] = {"format": FORMAT, "schema": list(rules.schema), "tokenizer": rules.tokenizer}
    if rules.dictionaries:
        head["dictionaries"] = {name: sorted(values) for name, values in sorted(rules.dictionaries.items())}
    lines = ",\n".join("  " + json.dumps(_rule_record(rule), ensure_ascii=False) for rule in rules.rules)
    text = json.dumps(head, ensure_ascii=False)[:-1] + ', "rules": [\n' + lines + "\n]}\n"
    _write(path, text)


def load_rules(path: str | Path) -> RuleSet:
    """Read a rule file.

    Raises:
        RuleFormatError: it has another format or tokenizer version.
        ValueError: it is no rule file, or a rule in it breaks a rule of the language; the text names its rule_id.
    """
    content = _parse(path)
    if not isinstance(content, dict) or "rules" not in content:
        raise DataError("is no rule file: it needs the keys format, schema, tokenizer and rules", file=str(path))
    if content.get("format") != FORMAT:
        raise RuleFormatError(f"{path}: rule file format {content.get('format')!r}; this version reads format {FORMAT}")
    try:
        return RuleSet(
            schema=tuple(content["schema"]),
            rules=tuple(_rule(record) for record in content["rules"]),
            tokenizer=content.get("tokenizer", ""),
            dictionaries={name: frozenset(values) for name, values in content.get("dictionaries", {}).items()},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"a field is missing or of the wrong kind ({error!r})", file=str(path)) from error


def _rule_record(rule: Rule) -> dict[str, Any]:
    conditions = [
        {"kind": test.kind, "value": int(test.value) if test.kind == "length" else test.value}
        for test in sorted(rule.conditions, key=lambda test: (test.kind == "length", test))
    ]
    return {
        "rule_id": rule.rule_id,
        "type": rule.type,
        "conditions": conditions,
        "precision": round(rule.precision, 6),
        "support": rule.support,
        "source": rule.source,
        "round": rule.round,
        "enabled": rule.enabled,
        "note": rule.note,
    }


def _rule(record: Mapping[str, Any]) -> Rule:
    return Rule(
        type=record["type"],
        conditions=tuple(Condition(test["kind"], str(test["value"])) for test in record["conditions"]),
        precision=float(record.get("precision", 1.0)),
        support=int(record.get("support", 0)),
        source=record.get("source", "human"),
        round=int(record.get("round", 0)),
        enabled=bool(record.get("enabled", True)),
        note=str(record.get("note", "")),
    )


def load_types(path: str | Path) -> dict[str, list[str]]:
    """Read the types of a schema: a JSON list of names, or an object name -> words that say it.

    Raises:
        ValueError: it is neither.
    """
    content = _parse(path)
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return {name: [] for name in content}
    if isinstance(content, dict) and all(isinstance(words, list) for words in content.values()):
        return content
    raise DataError("must be a list of type names, or an object type -> list of words", file=str(path))


def load_texts(path: str | Path, tokenizer: str = TOKENIZER) -> tuple[list[str], list[Text]]:
    """Read unlabelled texts: JSON lines {"text_id", "text"} or {"text_id", "tokens"}, or a Parquet file as in load_labelled.

    The line number from 0 stands for a missing text_id.

    Raises:
        ValueError: a line has neither text nor tokens.
    """
    ids, texts = [], []
    for number, record in enumerate(_records(path)):
        text_id, text = _text(record, number, str(path), tokenizer)
        ids.append(text_id)
        texts.append(text)
    return ids, texts


def load_labelled(
    path: str | Path,
    tokenizer: str = TOKENIZER,
    *,
    types: Iterable[str] | None = None,
    split: str | None = None,
    repair_bio: bool = False,
) -> list[Labelled]:
    """Read texts with gold labels, from Parquet or JSON lines.

    Columns: `tokens` and `labels` (BIO, one per word), or `text` and `spans` ({"start", "end", "type"} in tokens); and
    `split`, `example_id` or `text_id` where there are. With split, only rows of that split are returned.

    Raises:
        ValueError: a row has no labels, labels that are no BIO, or spans outside its text or overlapping; with its id.
    """
    found: list[Labelled] = []
    for number, record in enumerate(_records(path)):
        if split is not None and record.get("split") != split:
            continue
        text_id, text = _text(record, number, str(path), tokenizer)
        if record.get("labels") is not None:
            if len(record["labels"]) != len(text.tokens):
                raise DataError(
                    f"{len(text.tokens)} words have {len(record['labels'])} labels", file=str(path), row=number
                )
            spans, _ = bio_spans(record["labels"], text_id=text_id, types=types, repair_bio=repair_bio)
        elif record.get("spans") is not None:
            spans = [(span["start"], span["end"], span["type"]) for span in record["spans"]]
            check_spans(spans, len(text.tokens), text_id=text_id, types=types)
        else:
            raise DataError("needs `labels` or `spans`", file=str(path), row=number)
        found.append(Labelled(text_id=text_id, text=text, spans=tuple(spans), split=str(record.get("split") or "")))
    return found


def _text(record: Mapping[str, Any], number: int, path: str, tokenizer: str) -> tuple[str, Text]:
    given = record.get("text_id", record.get("example_id"))
    text_id = str(number if given is None else given)
    if record.get("tokens") is not None:
        return text_id, from_words(list(record["tokens"]))
    for name in ("text", "query", "title"):
        if isinstance(record.get(name), str):
            return text_id, tokenize(record[name], tokenizer)
    raise DataError("needs `text`, `query`, `title` or `tokens`", file=path, row=number)


def _records(path: str | Path) -> list[dict[str, Any]]:
    if str(path).endswith(".parquet"):
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pylist()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines()):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"is no JSON: {error}", file=str(path), row=number) from error
            if not isinstance(record, dict):
                raise DataError("must be a JSON object", file=str(path), row=number, value=record)
            records.append(record)
    return records


def save_pool(entries: Iterable[PoolEntry], path: str | Path) -> None:
    """Write a pool as JSON lines."""
    lines = [
        json.dumps(
            {
                "text_id": entry.text_id,
                "start": entry.start,
                "end": entry.end,
                "type": entry.type,
                "rules": list(entry.rules),
                "round": entry.round,
                "score": round(entry.score, 6),
            },
            ensure_ascii=False,
        )
        for entry in entries
    ]
    _write(path, "".join(line + "\n" for line in lines))


def load_pool(path: str | Path) -> list[PoolEntry]:
    """Read a pool."""
    return [
        PoolEntry(
            text_id=str(record["text_id"]),
            start=record["start"],
            end=record["end"],
            type=record["type"],
            rules=tuple(record["rules"]),
            round=record["round"],
            score=record["score"],
        )
        for record in _records(path)
    ]


def save_spans(text_ids: Sequence[str], spans: Sequence[Sequence[Span]], path: str | Path) -> None:
    """Write the spans of each text as JSON lines."""
    lines = []
    for text_id, found in zip(text_ids, spans, strict=True):
        records = [
            {
                "start": span.start,
                "end": span.end,
                "char_start": span.char_start,
                "char_end": span.char_end,
                "type": span.type,
                "conf": round(span.conf, 6),
            }
            for span in found
        ]
        lines.append(json.dumps({"text_id": text_id, "spans": records}, ensure_ascii=False) + "\n")
    _write(path, "".join(lines))


def _parse(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"is no JSON: {error}", file=str(path)) from error


def _write(path: str | Path, text: str) -> None:
    target = Path(path)
    part = target.with_name(target.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(target)
