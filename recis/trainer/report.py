"""Make one self-contained HTML page of a run: curves, calibration, AUC per group, table growth, throughput.

Reads config.json, metrics.jsonl and, where it exists, predictions/eval.parquet (prediction, label, weight, group per
evaluated sample). The page needs no network and no script, follows the reader's light or dark setting, and escapes every
name that comes from the run.
"""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recis.errors import CheckpointError, ConfigError
from recis.trainer.charts import bar_chart, line_chart
from recis.trainer.log import read_log
from recis.trainer.run_folder import CONFIG_NAME, LOG_NAME, read_config

PREDICTIONS = Path("predictions") / "eval.parquet"
MAX_TABLES = 12  # lines in the chart of tables: more cannot be told apart
CALIBRATION_BINS = 20
GROUP_BINS = 20
_NOT_METRICS = {"kind", "step", "loss", "samples", "samples_per_s", "tables"}
_STYLE = """
:root{color-scheme:light dark;--ink:#1a1d21;--soft:#69707a;--line:#d9dde3;--ground:#fff;
--c0:#2563eb;--c1:#d97706;--c2:#059669;--c3:#9333ea;--c4:#dc2626;--c5:#0891b2}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa2ad;--line:#363b43;--ground:#16181c;
--c0:#6ea0ff;--c1:#f0a94a;--c2:#34d399;--c3:#c084fc;--c4:#f87171;--c5:#22d3ee}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--ground);
max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
.grid{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr))}
figure{margin:0}figcaption{font-weight:600;margin-bottom:.25rem}svg{width:100%;height:auto}
text{fill:var(--soft);font-size:12px}line.rule,line.axis{stroke:var(--line)}
line.diagonal{stroke:var(--soft);stroke-dasharray:4 4}
.line{fill:none;stroke-width:2}.bar{fill:var(--c0)}.dot{fill:var(--ground)}
.s0{stroke:var(--c0)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}
.s3{stroke:var(--c3)}.s4{stroke:var(--c4)}.s5{stroke:var(--c5)}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1rem;font-size:13px}.key{border-left:1rem solid;padding-left:.4rem}
.key.s0{border-color:var(--c0)}.key.s1{border-color:var(--c1)}.key.s2{border-color:var(--c2)}
.key.s3{border-color:var(--c3)}.key.s4{border-color:var(--c4)}.key.s5{border-color:var(--c5)}
.d1{stroke-dasharray:6 3}.key.d1{border-left-style:dashed;border-left-width:.9rem}.soft{color:var(--soft)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .8rem .2rem 0;text-align:right;border-bottom:1px solid var(--line)}
td:first-child,th:first-child{text-align:left}td:last-child,th:last-child{padding-right:0}.scroll{overflow-x:auto;margin-top:1rem}pre{overflow-x:auto;font-size:12px}
"""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run and return its path, `run/report.html` unless `out` is given.

    Raises:
        ConfigError: the folder holds no run, or its log is empty.
        CheckpointError: the page cannot be written; one that was there before is left as it was.
    """
    config = read_config(run)
    records = read_log(run / LOG_NAME)
    if not records:
        raise ConfigError(
            f"{run}: {LOG_NAME} has no line yet; train first, and with log_every_steps below the number of steps"
        )
    train = [record for record in records if record["kind"] == "train"]
    evals = [record for record in records if record["kind"] == "eval"]
    name = config.get("name") or config.get("config", {}).get("name", run.name)
    parts = [
        f"<h1>{html.escape(str(name))}</h1><p>{html.escape(_summary(train, evals))}</p>",
        f'<p class="soft">{html.escape(str(run.resolve()))}</p>',
        _metric_table(evals),
        _section("Learning", [_loss_chart(train, evals), *_metric_charts(train, evals)]),
        _section("Predictions on the evaluation data", _prediction_charts(run / PREDICTIONS)),
        _section("Tables and speed", _table_charts(train)),
        _counter_table(train),
        _config_section(config),
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(str(name))} - recis run</title><style>{_STYLE}</style>{''.join(parts)}</html>"
    )
    target = out or run / "report.html"
    part = target.with_name(f".tmp-{target.name}")
    try:
        part.write_text(page)
        part.replace(target)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"{target}: cannot be written ({reason}); free space, or name another file") from error
    finally:
        if target.parent.is_dir():
            part.unlink(missing_ok=True)
    return target


def _config_section(config: Any) -> str:
    text = html.escape(json.dumps(config, indent=1))
    return f"<h2>Config</h2><details><summary>{CONFIG_NAME}</summary><pre>{text}</pre></details>"


def _summary(train: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]]) -> str:
    step = max(record["step"] for record in (*train, *evals))
    parts = [f"{step:,} steps", f"{len(evals)} evaluation{'' if len(evals) == 1 else 's'}"]
    if train:
        rates = [record["samples_per_s"] for record in train if record.get("samples_per_s") is not None]
        rows = sum(counters.get("size", 0) for counters in train[-1].get("tables", {}).values())
        parts.insert(1, f"{train[-1]['samples']:,} samples")
        parts += [f"{rows:,} rows in tables", *([f"median {np.median(rates):,.0f} samples/s"] if rates else [])]
    return ", ".join(parts)


def _section(title: str, charts: Sequence[str]) -> str:
    return f'<h2>{title}</h2><div class="grid">{"".join(charts)}</div>' if charts else ""


def _metric_table(evals: Sequence[dict[str, Any]]) -> str:
    if not evals:
        return "<p>No evaluation in this run.</p>"
    keys = [key for key in evals[-1] if key not in ("kind", "step")]
    head = "".join(f"<th>{html.escape(key)}</th>" for key in keys)
    shown = evals if len(evals) <= 12 else [*evals[:2], *evals[-10:]]
    rows = "".join(_row(f"{record['step']:,}", [record.get(key) for key in keys]) for record in shown)
    return f'<div class="scroll"><table><tr><th>step</th>{head}</tr>{rows}</table></div>'


def _loss_chart(train: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]]) -> str:
    series = [("training", *_curve(train, "loss")), ("evaluation", *_curve(evals, "loss"))]
    return line_chart("Loss", series, x_label="step", y_label="loss per sample")


def _metric_charts(train: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for record in (*evals, *train) for key in record if key not in _NOT_METRICS)
    charts = []
    for key in keys:
        series = [("training", *_curve(train, key)), ("evaluation", *_curve(evals, key))]
        charts.append(line_chart(key, series, x_label="step", y_label=key))
    return charts


def _curve(records: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [float(x) for x, _ in points], [float(y) for _, y in points]


def _table_charts(train: Sequence[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for record in train for name in record.get("tables", {}))
    growth = []
    for name in names:
        having = [record for record in train if name in record.get("tables", {})]
        growth.append((name, [r["step"] for r in having], [r["tables"][name]["size"] for r in having]))
    growth.sort(key=lambda line: -line[2][-1])
    title = (
        "Rows per table" if len(growth) <= MAX_TABLES else f"Rows of the {MAX_TABLES} largest of {len(growth)} tables"
    )
    speed = [("training", *_curve(train, "samples_per_s"))]
    return [
        line_chart(title, growth[:MAX_TABLES], x_label="step", y_label="rows", from_zero=True),
        line_chart("Throughput", speed, x_label="step", y_label="samples per second", from_zero=True),
    ]


def _counter_table(train: Sequence[dict[str, Any]]) -> str:
    tables = train[-1].get("tables", {}) if train else {}
    if not tables:
        return ""
    keys = list(next(iter(tables.values())))
    head = "".join(f"<th>{html.escape(key)}</th>" for key in keys)
    rows = "".join(_row(name, [counters.get(key) for key in keys]) for name, counters in tables.items())
    return f'<div class="scroll"><table><tr><th>table</th>{head}</tr>{rows}</table></div>'


def _prediction_charts(path: Path) -> list[str]:
    if not path.exists():
        return []
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    columns = {name: table[name].to_numpy() for name in table.column_names}
    weight = columns.get("weight", np.ones(len(table)))
    charts = [calibration_chart(columns["prediction"], columns["label"], weight)]
    if "group" in columns:
        charts.append(group_auc_chart(columns["prediction"], columns["label"], columns["group"]))
    return charts


def calibration_chart(prediction: np.ndarray, label: np.ndarray, weight: np.ndarray) -> str:
    """Return mean label against mean prediction in 20 bins of equal weight; on the diagonal the model is calibrated."""
    order = np.argsort(prediction, kind="stable")
    share = np.cumsum(weight[order]) / max(weight.sum(), 1e-12)
    bin_of = np.minimum((share * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    mass = np.bincount(bin_of, weights=weight[order], minlength=CALIBRATION_BINS)
    filled = mass > 0
    mean_p, mean_y = (
        np.bincount(bin_of, weights=(values * weight)[order], minlength=CALIBRATION_BINS)[filled] / mass[filled]
        for values in (prediction, label)
    )
    return line_chart(
        "Calibration",
        [("bins of equal weight", mean_p.tolist(), mean_y.tolist())],
        x_label="mean prediction",
        y_label="mean label",
        diagonal=True,
    )


def group_auc_chart(prediction: np.ndarray, label: np.ndarray, group: np.ndarray) -> str:
    """Return a histogram of the AUC of each group that has both classes."""
    values = group_aucs(prediction, label, group)
    counts, edges = np.histogram(values, bins=GROUP_BINS, range=(0.0, 1.0))
    labels = [f"{edge:.2f}" for edge in edges[:-1]]
    return bar_chart(
        f"AUC per group ({len(values):,} groups with both classes)",
        labels,
        counts.tolist(),
        x_label="AUC",
        y_label="groups",
    )


def group_aucs(prediction: np.ndarray, label: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return the AUC of each group with both classes, ties counting one half, in ascending group order."""
    order = np.lexsort((prediction, group))
    p, y, g = prediction[order], label[order] > 0.5, group[order]
    if len(g) == 0:
        return np.zeros(0)
    starts = np.flatnonzero(np.concatenate([[True], g[1:] != g[:-1]]))
    group_of = np.repeat(np.arange(len(starts)), np.diff(np.concatenate([starts, [len(g)]])))
    new_value = np.concatenate([[True], (p[1:] != p[:-1]) | (g[1:] != g[:-1])])
    tie = np.cumsum(new_value) - 1
    rank = np.arange(len(p)) - starts[group_of] + 1.0
    mean_rank = (np.bincount(tie, weights=rank) / np.bincount(tie))[tie]  # tied scores share their mean rank
    positives = np.bincount(group_of, weights=y)
    negatives = np.bincount(group_of) - positives
    both = (positives > 0) & (negatives > 0)
    rank_sum = np.bincount(group_of, weights=mean_rank * y)[both]
    positives, negatives = positives[both], negatives[both]
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def _row(name: str, values: Sequence[Any]) -> str:
    return f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{_number(value)}</td>' for value in values)}</tr>"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) or (isinstance(value, float) and value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}"
    if not isinstance(value, float):
        return html.escape(str(value))
    return f"{value:.5f}" if 1e-3 <= abs(value) < 100 else f"{value:.5g}"
