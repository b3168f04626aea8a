"""Turn the results of gpu-check into one page of Markdown: benchmarks first, then what failed, tests, sanitizer."""

from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = ("device", "memory_gib", "capability", "driver", "cuda", "torch", "triton", "numba", "python", "commit")
_TARGETS = {"share_of_copy": ">= {:.0%} of copy", "items_per_s": ">= {:.3g} items/s", "p50_ms": "<= {:g} ms"}


def to_markdown(content: Mapping[str, Any]) -> str:
    """Return the page of a gpu-check.json."""
    found, steps = content["environment"], content["steps"]
    lines = [f"# gpu-check: {found.get('device')}", "", f"Written {content['written_at']}.", ""]
    lines += _table(("", ""), [(name, str(found.get(name))) for name in _SHOWN])
    if found.get("missing"):
        lines += ["", f"Not installed: {', '.join(found['missing'])}."]
    lines += ["", "## Benchmarks", "", *_benchmarks([step for step in steps if step["kind"] == "bench"])]
    for kind, title in (("test", "Tests"), ("sanitizer", "compute-sanitizer")):
        rows = [
            (s["name"], s["status"], f"{s['seconds']:.0f}", _cell(s["summary"])) for s in steps if s["kind"] == kind
        ]
        lines += ["", f"## {title}", "", *_table(("step", "status", "s", "summary"), rows)]
    for step in steps:
        if "output" in step:
            lines += [
                "",
                f"### {step['name']}: {step['status']}",
                "",
                "```",
                step["output"].replace("```", "'''"),
                "```",
            ]
    return "\n".join(lines) + "\n"


def _benchmarks(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of what was timed, then a line for each case that was not."""
    rows, rest = [], []
    for step in steps:
        for name, result in step.get("results", {}).items():
            if "p50_ms" in result:
                rows.append(_row(name, result))
            else:
                rest.append(f"- {name}: {result.get('error') or result.get('missing')}")
        if not step.get("results"):
            rest.append(f"- {step['name']}: {step['status']}, {step['summary']}")
    head = (
        "case",
        "ms (p20-p80)",
        "M items/s",
        "GB/s",
        "of copy",
        "peers, ms",
        "launches, syncs",
        "peak MiB",
        "target",
    )
    copies = [r["copy_gb_per_s"] for s in steps for r in s.get("results", {}).values() if "copy_gb_per_s" in r]
    note = []
    if copies:
        note = [f"Copy bandwidth, measured in each run: {min(copies):.0f} to {max(copies):.0f} GB/s.", ""]
    return [*note, *_table(head, rows), *([""] if rest else []), *rest]


def _row(name: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    def number(key: str, form: str) -> str:
        return "-" if result.get(key) is None else form.format(result[key])

    peers = [
        f"{peer}: {value['p50_ms']:.3f}" if "p50_ms" in value else f"{peer}: {value['error'][:60]}"
        for peer, value in result.get("peers", {}).items()
    ]
    targets = [
        f"{_TARGETS[key].format(value['target'])}: {'met' if value['met'] else 'MISSED'}"
        for key, value in result.get("targets", {}).items()
    ]
    return (
        _cell(f"{name}: {result['case']}"),
        f"{result['p50_ms']:.3f} ({result['p20_ms']:.3f}-{result['p80_ms']:.3f})",
        f"{result['items_per_s'] / 1e6:,.1f}",
        number("gb_per_s", "{:.0f}"),
        number("share_of_copy", "{:.0%}"),
        _cell("; ".join(peers) or "-"),
        f"{result.get('launches', '-')}, {result.get('host_syncs', '-')}",
        number("peak_mib", "{:.0f}"),
        "; ".join(targets) or "-",
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
