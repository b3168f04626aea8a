"""Table and plots of a ladder, from the results of its finished cells.

ladder.json     per row: value and interval over seeds of each metric, difference to post-CoT SFT, tokens, seconds
ladder.md       the same as tables, and which targets were met          ladder.html     the same with intervals drawn
"""

import html
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relevance.checkpoints import write_json
from relevance.evaluate import SeedInterval, label_metrics, seed_bootstrap
from relevance.ladder_rows import ROWS, Preset

if TYPE_CHECKING:
    from relevance.ladder import Cell

MEANS = (
    "hallucination_rate",
    "rule_adherence",
    "parse_rate",
    "step_category",
    "step_attribute",
    "step_rule",
    "ece",
    "greedy_agreement",
)
STEPS = ("category", "attribute", "rule")
BASELINE = "sft"
NUM_RESAMPLES = 2000


def write_ladder(out: Path, preset: Preset, cells: Sequence["Cell"]) -> Path:
    """Write the report of what is done and return the table's path."""
    results: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        path = out / "cells" / cell.name / "result.json"
        if path.exists():
            results.setdefault(cell.row.name, []).append(json.loads(path.read_text()))
    rows = [_summary(name, results[name], results.get(BASELINE)) for name in results]
    rows = [_majority(next(iter(results.values()))), *rows] if rows else rows
    report = {
        "preset": preset.name,
        "claims": preset.claims,
        "command": " ".join(["relevance", *sys.argv[1:]]),
        "commit": _commit(),
        "device": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("recis", "torch", "transformers", "trl")},
        "cells": {"done": sum(map(len, results.values())), "of": len(cells)},
        "rows": rows,
    }
    write_json(out / "ladder.json", report)
    table = out / "ladder.md"
    table.write_text(_markdown(report), encoding="utf-8")
    (out / "ladder.html").write_text(_page(report), encoding="utf-8")
    return table


def _summary(
    name: str, results: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Return a row of the report."""
    queries = np.array(results[0]["query"])
    runs = [_columns(result) for result in results]
    hard = np.array(results[0]["hard"])
    summary: dict[str, Any] = {"row": name, "title": ROWS[name].title, "seeds": [result["seed"] for result in results]}
    for metric in ("macro_f1", "accuracy"):
        summary[metric] = _interval(runs, queries, metric)
    hard_runs = [{key: values[hard] for key, values in run.items()} for run in runs]
    if hard.any():
        summary["hard_macro_f1"] = _interval(hard_runs, queries[hard], "macro_f1")
    is_comparable = baseline is not None and len(baseline) == len(results) and not ROWS[name].is_rag
    if is_comparable and baseline is not None and name != BASELINE:
        found = seed_bootstrap(
            runs,
            queries,
            _metric("macro_f1"),
            baseline=[_columns(result) for result in baseline],
            num_resamples=NUM_RESAMPLES,
        )
        summary["over_sft"] = _numbers(found)
    for metric in (*MEANS, "with_chunk", "without_chunk", "random_chunk"):
        values = [result[metric] for result in results if result.get(metric) is not None]
        if values:
            summary[metric] = float(np.mean(values))
    if "by_kind" in results[0]:
        summary["by_kind"] = results[0]["by_kind"]
    summary["tokens"] = int(np.mean([result["tokens"] for result in results]))
    summary["seconds"] = float(np.mean([result["seconds"] for result in results]))
    return summary


def _majority(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the row of always saying the most frequent label."""
    gold = np.array(results[0]["gold"])
    said = np.full_like(gold, np.bincount(gold).argmax())
    runs, queries = [{"gold": gold, "said": said}], np.array(results[0]["query"])
    return {
        "row": "majority",
        "title": "most frequent label",
        "seeds": [],
        "macro_f1": _interval(runs, queries, "macro_f1"),
        "accuracy": _interval(runs, queries, "accuracy"),
        "tokens": 0,
        "seconds": 0.0,
    }


def _columns(result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {"gold": np.array(result["gold"]), "said": np.array(result["said"])}


def _metric(name: str) -> Any:
    return lambda columns: label_metrics(columns["gold"], columns["said"])[name]


def _interval(runs: Sequence[Mapping[str, np.ndarray]], queries: np.ndarray, metric: str) -> dict[str, float]:
    return _numbers(seed_bootstrap(runs, queries, _metric(metric), num_resamples=NUM_RESAMPLES))


def _numbers(found: SeedInterval) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def _commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


_HEAD = (
    "row",
    "macro-F1",
    "hard macro-F1",
    "accuracy",
    "over SFT",
    "adherence",
    "hallucination",
    "steps c / a / r",
    "tokens",
    "s",
)
_RAG_HEAD = ("row", "with chunk", "without", "random chunk", "helpful", "misleading")
_Cells = list[tuple[str, ...]]


def _tables(report: Mapping[str, Any]) -> list[_Cells]:
    """Return the tables as cells of text: the first line of each is its head."""
    tables: list[_Cells] = [[_HEAD, *map(_measured, report["rows"])]]
    rag = [row for row in report["rows"] if "with_chunk" in row]
    if rag:
        tables.append([_RAG_HEAD, *map(_asked_with_chunks, rag)])
    return tables


def _measured(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["title"],
        *(_shown(row.get(name)) for name in ("macro_f1", "hard_macro_f1", "accuracy", "over_sft")),
        *(_short(row.get(name)) for name in ("rule_adherence", "hallucination_rate")),
        " / ".join(_short(row.get(f"step_{name}")) for name in STEPS),
        f"{row['tokens']:,}",
        f"{row['seconds']:.0f}",
    )


def _asked_with_chunks(row: Mapping[str, Any]) -> tuple[str, ...]:
    asked = [_short(row[name]) for name in ("with_chunk", "without_chunk", "random_chunk")]
    return (row["title"], *asked, _kind(row, "helpful"), _kind(row, "misleading"))


def _intro(report: Mapping[str, Any]) -> str:
    return (
        f"`{report['command']}` at {report['commit'][:12]} on {report['device']}; {report['cells']['done']} of "
        f"{report['cells']['of']} cells. {report['claims']}"
    )


def _markdown(report: Mapping[str, Any]) -> str:
    lines = [f"# Ladder, preset {report['preset']}", "", _intro(report)]
    for head, *rows in _tables(report):
        lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    found = targets(report["rows"])
    if found:
        lines += ["", *(f"- {line}" for line in found)]
    return "\n".join(lines) + "\n"


def targets(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return, for each row that has a target and whose rivals are there, one line that says whether it was met.

    Better means intervals apart where there are intervals, a higher value else. Source of the targets: our own.
    """
    by_name = {row["row"]: row for row in rows}
    found = []
    for name, metric, what in (("taosr1", "macro_f1", "macro-F1"), ("agrl", "hard_macro_f1", "macro-F1 of hard pairs")):
        rivals = [by_name[rival] for rival in ("sft", "grpo") if rival in by_name]
        if name in by_name and len(rivals) == 2:
            own, others = by_name[name][metric], [rival[metric] for rival in rivals]
            met = all(own["low"] > other["high"] for other in others)
            beside = ", ".join(f"{other['value']:.3f}" for other in others)
            found.append(
                f"{by_name[name]['title']} above post-CoT SFT and GRPO in {what}, intervals apart: {_verdict(met)} "
                f"({own['value']:.3f} beside {beside})"
            )
    if {"she", "sft", "grpo"} <= by_name.keys():
        own, *others = ([by_name[name][f"step_{step}"] for step in STEPS] for name in ("she", "sft", "grpo"))
        steps = all(mine > theirs for other in others for mine, theirs in zip(own, other, strict=True))
        kept = by_name["she"]["macro_f1"]["high"] >= by_name["sft"]["macro_f1"]["low"]
        found.append(
            f"{by_name['she']['title']} above post-CoT SFT and GRPO in all three steps, macro-F1 not lower: "
            f"{_verdict(steps and kept)}"
        )
    for name in ("dyknow", "dyknow_fixed", "dyknow_centered"):
        if "by_kind" in by_name.get(name, {}):
            row = by_name[name]
            helpful, misleading = row["by_kind"].get("helpful"), row["by_kind"].get("misleading")
            met = (
                helpful is not None
                and misleading is not None
                and helpful["with"] > helpful["without"]
                and misleading["with"] >= misleading["without"]
                and row["random_chunk"] >= row["without_chunk"]
            )
            found.append(f"{row['title']}: helpful chunks help, misleading and random ones do no harm: {_verdict(met)}")
    return found


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def _kind(row: Mapping[str, Any], kind: str) -> str:
    found = row.get("by_kind", {}).get(kind)
    return "" if found is None else f"{found['with']:.3f} (without {found['without']:.3f})"


def _shown(value: Mapping[str, float] | None) -> str:
    return "" if value is None else f"{value['value']:.3f} ({value['low']:.3f}, {value['high']:.3f})"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _page(report: Mapping[str, Any]) -> str:
    """Return a page with the intervals of macro-F1 drawn, the table, and nothing from the network."""
    bars = []
    for number, row in enumerate(report["rows"]):
        value, y = row["macro_f1"], 24 * number + 20
        low, mid, high = (260 + 400 * value[name] for name in ("low", "value", "high"))
        bars.append(
            f'<text x="250" y="{y + 4}" text-anchor="end">{html.escape(row["title"])}</text>'
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="#2563eb" stroke-width="2"/>'
            f'<circle cx="{mid:.1f}" cy="{y}" r="4" fill="#2563eb"/>'
            f'<text x="{high + 8:.1f}" y="{y + 4}">{value["value"]:.3f}</text>'
        )
    height = 24 * len(report["rows"]) + 30
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}text{font-size:12px;fill:#444}"
        "table{border-collapse:collapse;font-size:13px;margin:1rem 0}td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd;"
        "text-align:left}"
    )
    tables = "".join(_html_table(table) for table in _tables(report))
    verdicts = "".join(f"<li>{html.escape(line)}</li>" for line in targets(report["rows"]))
    picture = f'<svg viewBox="0 0 740 {height}" role="img">{"".join(bars)}</svg>'
    title = f"Ladder, preset {html.escape(report['preset'])}: macro-F1 with 95 % intervals"
    return (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style><h1>{title}</h1>"
        f"<p>{html.escape(_intro(report))}</p>{picture}{tables}<ul>{verdicts}</ul>\n"
    )


def _html_table(table: Sequence[Sequence[str]]) -> str:
    rows = [
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(("th", *["td"] * (len(table) - 1)), table, strict=True)
    ]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
