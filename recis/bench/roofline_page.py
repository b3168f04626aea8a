"""Show a roofline: lines of text, one self-contained page with a chart per op, and a picture where matplotlib is.

A bar is the achieved share of this machine's copy bandwidth, measured in the same run, which is the dashed line at 100 %.
Peers stand below ours in the same group, at the share that their time makes of the same least bytes. The page needs no
network and no script, follows the reader's light or dark setting, and escapes every name.
"""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from recis.bench.grid import line_of, rate

_WIDTH, _LEFT, _RIGHT, _BAR, _GAP, _HEAD = 960, 330, 150, 13, 9, 22
_STYLE = """
:root{color-scheme:light dark;--ink:#1a1d21;--soft:#69707a;--line:#d9dde3;--ground:#fff;--ours:#2563eb;--p0:#9aa6b6;
--p1:#c7a36b;--p2:#8fb59b;--p3:#b79ac8;--limit:#dc2626}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa2ad;--line:#363b43;--ground:#16181c;--ours:#6ea0ff;
--p0:#6f7a88;--p1:#a5824c;--p2:#6b917a;--p3:#93759f;--limit:#f87171}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--ground);
max-width:64rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin:2.2rem 0 .3rem}p{margin:.3rem 0}.soft{color:var(--soft)}
svg{width:100%;height:auto;display:block}text{fill:var(--ink);font-size:12px}.tick,.small{fill:var(--soft);font-size:11px}
.rule{stroke:var(--line)}.limit{stroke:var(--limit);stroke-dasharray:5 4;stroke-width:1.5}
.limit-name{fill:var(--limit);font-size:11px}
.ours{fill:var(--ours)}.p0{fill:var(--p0)}.p1{fill:var(--p1)}.p2{fill:var(--p2)}.p3{fill:var(--p3)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;font-size:13px;margin:.2rem 0}.legend i{display:inline-block;width:.8rem;
height:.8rem;margin-right:.4rem;vertical-align:-1px}i.ours{background:var(--ours)}i.p0{background:var(--p0)}
i.p1{background:var(--p1)}i.p2{background:var(--p2)}i.p3{background:var(--p3)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.8rem;margin:1rem 0}
.facts div{border:1px solid var(--line);border-radius:.5rem;padding:.5rem .8rem}.facts b{display:block;font-size:1.25rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}.scroll{overflow-x:auto;margin-top:.8rem}
td,th{padding:.2rem .8rem .2rem 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
td:first-child,th:first-child{text-align:left}code{font-size:.92em}
"""

Bar = tuple[str, str, float, str]  # CSS class, name, value, text behind the bar


def to_lines(limits: Mapping[str, Any]) -> Iterator[str]:
    """Yield the limits of a machine as lines."""
    yield f"{limits['device']}, {limits['threads']} threads, load {limits['load_average'][0]} to {limits['load_average'][1]}"
    copy = limits["copy_gb_per_s"]
    yield f"  copy                {copy:8.1f} GB/s"
    yield f"  read                {limits['read_gb_per_s']:8.1f} GB/s"
    for row_bytes, value in limits["gather_gb_per_s"].items():
        yield f"  gather, {row_bytes:>4} B rows {value:8.1f} GB/s  {value / copy:4.0%} of copy"
    yield f"  updates             {limits['updates']['per_s'] / 1e6:8.1f} M/s   {limits['updates']['what']}"
    found = limits["find"]
    yield f"  hash find           {found['keys_per_s'] / 1e6:8.1f} M keys/s, {found['slots']:,} slots, load {found['load']}"
    yield f"  {limits['seconds']} s, {limits['measured_at']}"


def to_html(result: Mapping[str, Any]) -> str:
    """Return the page of what `recis roofline --full` measured."""
    limits = result["limits"]
    title = f"Roofline: {limits['device']}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">{html.escape(_about(result))}</p>',
        _facts(limits),
        _gather_section(limits),
    ]
    for op, records in _by_op(result["records"]).items():
        parts.append(_op_section(op, records))
    parts += [_table_section(result["records"]), _notes(result)]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>{''.join(parts)}</html>"
    )


def _about(result: Mapping[str, Any]) -> str:
    limits = result["limits"]
    versions = ", ".join(f"{name} {number}" for name, number in limits["versions"].items())
    loads = [*limits["load_average"], result["load_average_at_end"]]
    return (
        f"{limits['measured_at']} | {limits['threads']} threads | load average {' / '.join(map(str, loads))} "
        f"(start, limits measured, end) | {versions}"
    )


def _facts(limits: Mapping[str, Any]) -> str:
    facts = [
        (f"{limits['copy_gb_per_s']:.1f} GB/s", "copy, read + written: the limit line"),
        (f"{limits['read_gb_per_s']:.1f} GB/s", "read"),
        (f"{limits['updates']['per_s'] / 1e6:,.1f} M/s", limits["updates"]["what"]),
        (
            f"{limits['find']['keys_per_s'] / 1e6:,.1f} M keys/s",
            f"hash find, {limits['find']['slots'] / 2**20:.0f} Mi slots, load {limits['find']['load']}",
        ),
    ]
    cells = "".join(
        f'<div><b>{html.escape(big)}</b><span class="soft">{html.escape(small)}</span></div>' for big, small in facts
    )
    return f'<div class="facts">{cells}</div>'


def _gather_section(limits: Mapping[str, Any]) -> str:
    copy = limits["copy_gb_per_s"]
    groups = [
        (f"{row_bytes} B", [("ours", "gather", value / copy, f"{value / copy:.0%}  {value:.1f} GB/s")])
        for row_bytes, value in limits["gather_gb_per_s"].items()
    ]
    chart = _chart("Random rows by size", groups, limit=1.0)
    return f"<h2>Random rows</h2><p class=soft>What a gather of rows in random order reaches, by row size.</p>{chart}"


def _by_op(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault(record["op"], []).append(record)
    return found


def _op_section(op: str, records: Sequence[Mapping[str, Any]]) -> str:
    timed = [record for record in records if "error" not in record]
    names = list(dict.fromkeys(name for r in timed for name, peer in r["peers"].items() if "p50_ms" in peer))
    style = {name: f"p{number % 4}" for number, name in enumerate(names)}
    by_share = bool(timed) and all(record["share"] is not None for record in timed)
    groups = []
    for record in timed:
        bars: list[Bar] = []
        everyone = [
            ("ours", "recis", record),
            *((style[n], n, record["peers"][n]) for n in names if n in record["peers"]),
        ]
        for css, name, result in everyone:
            if "p50_ms" not in result:
                continue
            value = result["share"] if by_share else result["items_per_s"] / 1e3
            text = f"{value:.0%}" if by_share else rate(result["items_per_s"])
            bars.append((css, name, value, f"{text}  {result['p50_ms']:.3g} ms"))
        groups.append((_short(record["label"]), bars))
    errors = "".join(
        f'<p class="soft">{html.escape(record["case"])}: {html.escape(record["error"])}</p>'
        for record in records
        if "error" in record
    )
    legend = "".join(
        f'<span><i class="{css}"></i>{html.escape(name)}</span>' for name, css in {"recis": "ours", **style}.items()
    )
    unit = (
        "share of copy bandwidth" if by_share else "thousands of items per second (bound by arithmetic: no limit line)"
    )
    chart = _chart(op, groups, limit=1.0 if by_share else None) if groups else ""
    return f'<h2>{html.escape(op)}</h2><p class="soft">{unit}</p><div class="legend">{legend}</div>{chart}{errors}'


def _short(label: str) -> str:
    return label if len(label) <= 48 else label[:46] + "…"


def _chart(title: str, groups: Sequence[tuple[str, Sequence[Bar]]], *, limit: float | None) -> str:
    """Return an SVG with a group of horizontal bars per case, and a dashed line at the limit."""
    values = [value for _, bars in groups for _, _, value, _ in bars if math.isfinite(value)]
    high = max(1e-12, 1.05 * (limit or 0.0), *values)
    across = (_WIDTH - _LEFT - _RIGHT) / high
    height = _HEAD + sum(len(bars) * _BAR + _GAP for _, bars in groups) + 20
    marks = []
    for tick in _ticks(high):
        x = _LEFT + tick * across
        name = f"{tick:.0%}" if limit else f"{tick:g}"
        marks.append(f'<line class="rule" x1="{x:.1f}" y1="{_HEAD}" x2="{x:.1f}" y2="{height - 18}"/>')
        marks.append(f'<text class="tick" x="{x:.1f}" y="{height - 4}" text-anchor="middle">{name}</text>')
    y = float(_HEAD) + _GAP / 2
    for label, bars in groups:
        middle = y + len(bars) * _BAR / 2 + 4
        marks.append(f'<text x="{_LEFT - 8}" y="{middle:.1f}" text-anchor="end">{html.escape(label)}</text>')
        for css, name, value, text in bars:
            wide = max(1.0, value * across)
            marks.append(
                f'<rect class="{css}" x="{_LEFT}" y="{y + 1:.1f}" width="{wide:.1f}" height="{_BAR - 2}" rx="2">'
                f"<title>{html.escape(f'{name}: {text}')}</title></rect>"
                f'<text class="small" x="{_LEFT + wide + 5:.1f}" y="{y + _BAR - 3:.1f}">{html.escape(text)}</text>'
            )
            y += _BAR
        y += _GAP
    if limit:
        x = _LEFT + limit * across
        marks.append(f'<line class="limit" x1="{x:.1f}" y1="{_HEAD - 4}" x2="{x:.1f}" y2="{height - 18}"/>')
        marks.append(f'<text class="limit-name" x="{x:.1f}" y="{_HEAD - 8}" text-anchor="middle">copy bandwidth</text>')
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{html.escape(title)}">{"".join(marks)}</svg>'
    )


def _ticks(high: float) -> list[float]:
    scale = 10 ** math.floor(math.log10(high))
    step = next(scale * factor for factor in (0.1, 0.2, 0.25, 0.5, 1) if high / (scale * factor) <= 8)
    return [k * step for k in range(int(high / step) + 1)]


def _table_section(records: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("case", "ms", "p20-p80", "items/s", "GB/s", "of copy", "peers"))
    rows = []
    for record in records:
        if "error" in record:
            rows.append(
                f'<tr><td>{html.escape(record["case"])}</td><td colspan="6">{html.escape(record["error"])}</td></tr>'
            )
            continue
        peers = "; ".join(
            f"{name} {peer['p50_ms'] / record['p50_ms']:.2f}x" if "p50_ms" in peer else f"{name}: {peer['error']}"
            for name, peer in record["peers"].items()
        )
        cells = (
            f"{record['p50_ms']:.3f}",
            f"{record['p20_ms']:.3f}-{record['p80_ms']:.3f}",
            rate(record["items_per_s"]).removesuffix("/s"),
            "-" if record["gb_per_s"] is None else f"{record['gb_per_s']:.1f}",
            "-" if record["share"] is None else f"{record['share']:.0%}",
            html.escape(peers) or "-",
        )
        rows.append(f"<tr><td>{html.escape(record['case'])}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return (
        "<h2>All numbers</h2><p class=soft>Medians; a peer's figure is its time over ours.</p>"
        f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    )


def _notes(result: Mapping[str, Any]) -> str:
    missing = f"<li>Not installed here: {html.escape(', '.join(result['missing']))}.</li>" if result["missing"] else ""
    return (
        "<h2>How to read this</h2><ul>"
        "<li>The share is the least bytes the job must move over its time, over the copy bandwidth of the same run. Where "
        "ids repeat, rows come from cache, and the share can pass 100 %.</li>"
        "<li>Every result was compared with a plain computation before it was timed; all of a chart's group took turns in "
        "one process.</li>"
        "<li>A step is de-duplication, pooled forward, backward and update; FBGEMM's table runs them as one.</li>"
        f"{missing}<li>Made with <code>recis roofline --full</code>; run it on your machine and compare shares, not "
        "milliseconds.</li></ul>"
    )


def to_text(result: Mapping[str, Any]) -> str:
    """Return all records as lines."""
    return "\n".join(line_of(record) for record in result["records"])


def write_picture(result: Mapping[str, Any], path: Path) -> str | None:
    """Draw shares of the copy bandwidth per op as a PNG; returns why not where it cannot be drawn."""
    try:
        import_module("matplotlib").use("agg")
        plt: Any = import_module("matplotlib.pyplot")
    except ImportError:
        return "matplotlib is not installed: pip install matplotlib"

    timed = [r for r in result["records"] if "error" not in r and r["share"] is not None]
    if not timed:
        return "no op with a share of the copy bandwidth was measured"
    figure, axes = plt.subplots(figsize=(11, 1.5 + 0.28 * len(timed)), layout="constrained")
    places = range(len(timed))
    axes.barh(places, [record["share"] for record in timed], color="#2563eb", label="recis")
    for number, record in enumerate(timed):
        best = [peer["share"] for peer in record["peers"].values() if "share" in peer]
        if best:
            axes.plot(
                max(best), number, "D", color="#d97706", label="best peer" if "best peer" not in _labels(axes) else None
            )
    axes.axvline(1.0, color="#dc2626", linestyle="--", label=f"copy {result['limits']['copy_gb_per_s']:.0f} GB/s")
    axes.set_yticks(places, [record["case"] for record in timed], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("share of copy bandwidth")
    axes.margins(y=0.01)
    axes.set_title(f"Share of the copy bandwidth: {result['limits']['device']}, {result['limits']['measured_at'][:10]}")
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return None


def _labels(axes: Any) -> list[str]:
    return axes.get_legend_handles_labels()[1]
