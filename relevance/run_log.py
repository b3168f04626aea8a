"""The log of a run, one JSON object per step, and the page with its curves.

    train.jsonl     {"step": 12, "loss": 0.31, "reward/total/mean": 0.6, "reward/label/mean": 0.7, ..}
    write_curves(run)      curves.html: no script, no network; one chart per group of series

A run that goes on cuts the log back to its checkpoint first, so a step stands in it once.
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recis.errors import ConfigError, DataError

LOG_NAME, PAGE_NAME = "train.jsonl", "curves.html"
_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#65a30d", "#be185d")
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1a1d21}
.grid{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr))}figure{margin:0}
figcaption{font-weight:600}svg{width:100%;height:auto}text{fill:#69707a;font-size:12px}.key{font-size:13px;margin-right:1rem}
.key i{display:inline-block;width:1rem;height:.25rem;margin-right:.3rem;vertical-align:middle}"""
CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss",)),
    ("reward components", ("reward/*/mean",)),
    ("accuracy of rollouts", ("accuracy", "accuracy/without", "accuracy/with", "replay/accuracy")),
    ("accuracy by family", ("accuracy/family=*",)),
    ("steps right", ("step/*/mean",)),
    ("steps that all rollouts agree on", ("step/*/unanimous",)),
    ("groups", ("groups/dead", "groups/refilled", "groups/dropped", "replay/groups")),
    ("broken hard rules", ("violation/*",)),
    ("faults", ("fault/*",)),
    ("KL and entropy", ("kl", "entropy")),
    ("gate", ("gate/alpha", "gate/beta", "gap/mean")),
    ("context decisions", ("context/*",)),
    ("completion length", ("completions/mean_length",)),
    ("gradient norm", ("grad_norm",)),
    ("seconds", ("seconds/*",)),
)


def append_log(path: Path, entry: Mapping[str, Any]) -> None:
    """Add one object; numbers that are not finite become null."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in entry.items()
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a log; a last line that a kill cut off is left out.

    Raises:
        ConfigError: there is no such file.
        DataError: a line in the middle is no JSON.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no log; give the folder of a run that has trained")
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise DataError("not a JSON object", file=str(path), unit=f"line {number}", value=line) from None
    return entries


def cut_log(path: Path, step: int) -> None:
    """Keep the entries up to a step; they come again from there."""
    if path.is_file():
        kept = [entry for entry in read_log(path) if entry["step"] <= step]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")


def write_curves(run: Path, *, title: str = "") -> Path:
    """Write the page of a run and return its path; one section per log below the folder."""
    logs = sorted(run.rglob(LOG_NAME))
    if not logs:
        raise ConfigError(f"{run}: no {LOG_NAME} below this folder; give the folder of a run that has trained")
    sections = []
    for path in logs:
        entries = read_log(path)
        charts = "".join(_chart(name, entries, patterns) for name, patterns in CHARTS)
        where = path.parent.relative_to(run)
        sections.append(f"<h2>{html.escape(str(where))}</h2><div class=grid>{charts}</div>")
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title or run.name)}</title><style>{_STYLE}</style>"
    out = run / PAGE_NAME
    out.write_text(f"{page}<h1>{html.escape(title or run.name)}</h1>{''.join(sections)}\n", encoding="utf-8")
    return out


def _chart(name: str, entries: Sequence[Mapping[str, Any]], patterns: Sequence[str]) -> str:
    keys = sorted({key for entry in entries for key in entry if any(_fits(key, pattern) for pattern in patterns)})
    series = {
        key: [(entry["step"], entry[key]) for entry in entries if isinstance(entry.get(key), int | float)]
        for key in keys
    }
    return line_chart(name, {key: points for key, points in series.items() if points})


def _fits(key: str, pattern: str) -> bool:
    before, star, after = pattern.partition("*")
    return (
        key == pattern if not star else key.startswith(before) and key.endswith(after) and len(key) > len(pattern) - 1
    )


def line_chart(name: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return a figure of lines over steps, "" without any point."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5

    def place(x: float, y: float) -> str:
        across = (x - left) / (right - left) if right > left else 0.5
        return f"{48 + across * 400:.1f},{170 - (y - low) / (high - low) * 150:.1f}"

    lines, keys = [], []
    for number, (key, line) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        dash = ' stroke-dasharray="6 3"' if number >= len(_COLOURS) else ""
        route = " ".join(place(x, y) for x, y in line)
        lines.append(f'<polyline points="{route}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if len(line) == 1:
            x, y = place(*line[0]).split(",")
            lines.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        keys.append(f'<span class=key><i style="background:{colour}"></i>{html.escape(key)} {line[-1][1]:.3g}</span>')
    ticks = "".join(
        f'<text x="44" y="{170 - share * 150 + 4:.0f}" text-anchor="end">{low + share * (high - low):.3g}</text>'
        f'<line x1="48" x2="448" y1="{170 - share * 150:.0f}" y2="{170 - share * 150:.0f}" stroke="#d9dde3"/>'
        for share in (0.0, 0.5, 1.0)
    )
    ends = f'<text x="48" y="188">{left:g}</text><text x="448" y="188" text-anchor="end">step {right:g}</text>'
    picture = f'<svg viewBox="0 0 456 194" role="img">{ticks}{ends}{"".join(lines)}</svg>'
    return f"<figure><figcaption>{html.escape(name)}</figcaption>{picture}<div>{''.join(keys)}</div></figure>"
