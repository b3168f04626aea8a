"""Table and plots of a ladder, from the results of its finished cells.

ladder.json     per row: value and interval over seeds of each metric, difference to post-CoT SFT, tokens, seconds
ladder.md       the same as a table          ladder.html     the same with intervals drawn
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


def _markdown(report: Mapping[str, Any]) -> str:
    head = "| row | macro-F1 | hard macro-F1 | accuracy | over SFT | adherence | hallucination | steps c / a / r | tokens | s |"
    lines = [
        f"# Ladder, preset {report['preset']}",
        "",
        f"`{report['command']}` at {report['commit'][:12]} on {report['device']}; {report['cells']['done']} of "
        f"{report['cells']['of']} cells. {report['claims']}",
        "",
        head,
        "|" + "---|" * (head.count("|") - 1),
    ]
    for row in report["rows"]:
        steps = " / ".join(_short(row.get(f"step_{name}")) for name in ("category", "attribute", "rule"))
        lines.append(
            f"| {row['title']} | {_shown(row.get('macro_f1'))} | {_shown(row.get('hard_macro_f1'))} | "
            f"{_shown(row.get('accuracy'))} | {_shown(row.get('over_sft'))} | {_short(row.get('rule_adherence'))} | "
            f"{_short(row.get('hallucination_rate'))} | {steps} | {row['tokens']:,} | {row['seconds']:.0f} |"
        )
    rag = [row for row in report["rows"] if "with_chunk" in row]
    if rag:
        lines += [
            "",
            "| row | with chunk | without | random chunk | helpful | misleading |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['title']} | {_short(row['with_chunk'])} | {_short(row['without_chunk'])} | "
            f"{_short(row['random_chunk'])} | {_kind(row, 'helpful')} | {_kind(row, 'misleading')} |"
            for row in rag
        ]
    return "\n".join(lines) + "\n"


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
    style = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto}text{font-size:12px;fill:#444}"
    picture = f'<svg viewBox="0 0 740 {height}" role="img">{"".join(bars)}</svg>'
    title = f"Ladder, preset {html.escape(report['preset'])}: macro-F1 with 95 % intervals"
    return (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style><h1>{title}</h1>"
        f"<p>{html.escape(report['claims'])}</p>{picture}<pre>{html.escape(_markdown(report))}</pre>\n"
    )
