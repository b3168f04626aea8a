"""Turn a pytest-benchmark result file into one table: case, ours, each peer's ratio, share of copy, target met or not.

Reads only what `recis.bench.harness.compare` stored in `extra_info`; entries without it are skipped and counted.
"""

import html
import json
from pathlib import Path
from typing import Any

from recis.errors import ConfigError


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Return one row per benchmark of a pytest-benchmark JSON file.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or holds no result of our harness.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"benchmark file {path}: cannot be read ({error.strerror}); give the JSON that `make bench` wrote"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"benchmark file {path}: is not JSON ({error}); give the JSON that `make bench` wrote"
        ) from error
    found = content.get("benchmarks", []) if isinstance(content, dict) else []
    rows = [_row(bench) for bench in found if "results" in bench.get("extra_info", {})]
    if not rows:
        raise ConfigError(f"benchmark file {path}: holds no result of recis.bench.harness.compare")
    return rows


def _row(bench: dict[str, Any]) -> dict[str, Any]:
    info = bench["extra_info"]
    ours = info["results"][info["ours"]]
    return {
        "name": bench["name"],
        "case": info["case"],
        "ours": info["ours"],
        "p50_ms": ours["p50_ms"],
        "items_per_s": ours["items_per_s"],
        "share_of_copy": ours["share_of_copy"],
        "ratio_to": info["ratio_to"],
        "missing": info["missing"],
        "load_average": info["load_average"],
        "spread": info["spread"],
        "device": info["device"],
        "targets": {name: (least, _met(info, ours, name, least)) for name, least in info["targets"].items()},
    }


def _met(info: dict[str, Any], ours: dict[str, Any], name: str, least: float) -> bool | None:
    """Return whether ours reaches `least`; None when that peer was not there to compare with."""
    value = ours["items_per_s"] if name == "items_per_s" else info["ratio_to"].get(name)
    return None if value is None else value >= least


def to_text(rows: list[dict[str, Any]]) -> str:
    """Return the table as plain text, one line per case and one below it per target."""
    lines = [f"device: {rows[0]['device']}", ""]
    for row in rows:
        rate = f", {row['items_per_s'] / 1e6:.2f} M items/s" if row["items_per_s"] else ""
        share = f", {row['share_of_copy']:.0%} of copy" if row["share_of_copy"] else ""
        lines.append(f"{row['name']}  [{row['case']}]")
        lines.append(
            f"    {row['ours']}: {row['p50_ms']:.4g} ms{rate}{share}   (load {row['load_average']}, spread {row['spread']})"
        )
        lines += [f"    {peer}: {ratio:.2f}x our time" for peer, ratio in row["ratio_to"].items()]
        lines += [f"    {peer}: not installed here" for peer in row["missing"]]
        lines += [
            f"    target {name} >= {_number(least)}: {_verdict(met)}" for name, (least, met) in row["targets"].items()
        ]
    return "\n".join(lines)


def to_html(rows: list[dict[str, Any]]) -> str:
    """Return one self-contained page with a bar per implementation, ours in the accent colour."""
    parts = []
    for row in rows:
        times = {row["ours"]: 1.0, **row["ratio_to"]}
        longest = max(times.values())
        bars = "".join(
            f'<tr><td>{html.escape(name)}</td><td><div class="bar{" ours" if name == row["ours"] else ""}" '
            f'style="width:{100 * value / longest:.1f}%"></div></td><td>{value:.2f}x</td></tr>'
            for name, value in times.items()
        )
        targets = "".join(
            f"<li>{html.escape(name)} &ge; {_number(least)}: {_verdict(met)}</li>"
            for name, (least, met) in row["targets"].items()
        )
        parts.append(
            f"<h2>{html.escape(row['case'])}</h2><p>{row['p50_ms']:.4g} ms</p><table>{bars}</table><ul>{targets}</ul>"
        )
    style = (
        "body{font:15px system-ui;max-width:60em;margin:2em auto;padding:0 1em}table{width:100%}td:nth-child(2){width:60%}"
        ".bar{background:#9ab;height:1em}.ours{background:#2563eb}"
    )
    return f"<!doctype html><meta charset=utf-8><title>recis benchmarks</title><style>{style}</style>{''.join(parts)}"


def _verdict(met: bool | None) -> str:
    return {True: "met", False: "MISSED", None: "not compared"}[met]


def _number(value: float) -> str:
    return f"{value / 1e6:g} M/s" if value >= 1e5 else f"{value:g}x"
