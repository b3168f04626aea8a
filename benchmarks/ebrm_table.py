"""What quality_ebrm prints: a table per task, mean and range over seeds, and differences with their intervals.

Scores of the test pairs lie beside the results file, in FILE.scores: they are needed for differences and are too big to keep.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recis.ebrm.evaluate import EvalPairs, difference

COLUMNS = ("roc_auc", "pr_auc", "f1", "ndcg@10", "ece", "visible.roc_auc")
AGAINST = (("ebrm", "minilm"), ("ebrm", "cross_encoder"), ("ebrm", "ebrm_no_pretraining"), ("ebrm", "hand_rules"))
TRUTH = ("query", "grade", "visible", "tie")


def scores_path(file: Path, task: str, row: str, seed: int) -> Path:
    """Return where the test scores of a cell lie."""
    return file.with_suffix(".scores") / f"{task}-{row}-{seed}.npy"


def keep_scores(file: Path, task: str, row: str, seed: int, scores: np.ndarray, truth: EvalPairs) -> None:
    """Keep the test scores [P] of a cell, and the truth they are measured on."""
    path = scores_path(file, task, row, seed)
    path.parent.mkdir(exist_ok=True)
    np.save(path, scores)
    np.savez(path.parent / f"{task}-truth.npz", **{name: getattr(truth, name) for name in TRUTH})


def differences(file: Path, task: str) -> list[dict[str, Any]]:
    """Return EBRM less others in ROC-AUC: scores averaged over the seeds that both have, 95 % interval over queries."""
    home = file.with_suffix(".scores")
    if not (home / f"{task}-truth.npz").is_file():
        return []
    with np.load(home / f"{task}-truth.npz") as kept:
        truth = EvalPairs(**{name: kept[name] for name in TRUTH})
    out = []
    for ours, theirs in AGAINST:
        sides = [_mean_ranks(home, task, row) for row in (ours, theirs)]
        if sides[0] is None or sides[1] is None:
            continue
        interval = difference(truth, sides[0], sides[1])
        out.append(
            {
                "ours": ours,
                "theirs": theirs,
                "roc_auc": round(interval.value, 4),
                "low": round(interval.low, 4),
                "high": round(interval.high, 4),
            }
        )
    return out


def _mean_ranks(home: Path, task: str, row: str) -> np.ndarray | None:
    """Return the mean over seeds of the ranks of a row's scores [P]: seeds differ in scale."""
    found = [np.load(path) for path in sorted(home.glob(f"{task}-{row}-[0-9]*.npy"))]
    return np.mean([scores.argsort().argsort() for scores in found], axis=0) if found else None


def print_table(file: Path, titles: Mapping[str, str]) -> str:
    """Return the tables of a results file."""
    content = json.loads(file.read_text())
    lines = [", ".join(f"{name} {value}" for name, value in content["versions"].items())]
    tasks = dict.fromkeys(name.partition("/")[0] for name in content["parts"])
    for task in tasks:
        rows = {name: content["parts"].get(f"{task}/{name}") for name in titles}
        lines += ["", f"{task}, test part", _head()]
        lines += [_line(titles[name], part["runs"]) for name, part in rows.items() if part and part["runs"]]
        lines += _qe_lines(titles, rows)
        lines += [
            f"  {titles[d['ours']]} less {titles[d['theirs']]}: {d['roc_auc']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]"
            for d in (rows.get("ebrm") or {}).get("differences", [])
        ]
    return "\n".join(lines)


def _head() -> str:
    return f"{'row':38}{'seeds':>6}" + "".join(f"{name:>24}" for name in COLUMNS) + f"{'calls a query':>15}"


def _line(title: str, runs: Sequence[Mapping[str, Any]]) -> str:
    cells = [f"{_spread([run['metrics'][name] for run in runs]):>24}" for name in COLUMNS]
    calls = runs[0].get("encoder_calls_per_query")
    shown = f"{calls['cold']:g}, {calls['warm']:g}" if calls else "-"
    return f"{title:38}{len(runs):6}" + "".join(cells) + f"{shown:>15}"


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f}-{max(values):.4f})"


def _qe_lines(titles: Mapping[str, str], rows: Mapping[str, Any]) -> list[str]:
    """Return QE ROC-AUC per type of the rows that have it, mean over seeds."""
    lines = []
    for name, part in rows.items():
        runs = [run["qe_roc_auc"] for run in part["runs"] if "qe_roc_auc" in run] if part else []
        if runs:
            means = {kind: np.mean([run[kind] for run in runs]) for kind in runs[0]}
            lines.append(f"  QE ROC-AUC, {titles[name]}: " + ", ".join(f"{k} {v:.3f}" for k, v in means.items()))
    return lines
