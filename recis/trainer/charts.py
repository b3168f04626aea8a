"""Small SVG charts for the report page: lines over steps, and bars. Strings in, one string out; no script, no network.

matplotlib is no dependency of the core, and a page must be one file, so the few marks that are needed are written here.
Colours come from CSS classes of the page (`s0`, `s1`, ...), so that dark mode is the page's affair.
"""

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 40
MAX_POINTS = 600  # a curve is thinned to this many points: more cannot be seen and only swell the page

Series = tuple[str, Sequence[float], Sequence[float]]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    diagonal: bool = False,
    from_zero: bool = False,
) -> str:
    """Return an SVG figure with one line per (name, x, y); points that are not finite are left out.

    A series without points keeps its colour from the others, so that one name has one colour in all charts of a page.

    Args:
        diagonal: also draw y = x, for calibration plots.
        from_zero: let the y axis begin at 0.
    """
    finite = [(index, name, *_finite(xs, ys)) for index, (name, xs, ys) in enumerate(series)]
    drawn = [line for line in finite if line[2]]
    if not drawn:
        return _figure(title, '<text x="50%" y="50%" text-anchor="middle">no values</text>', ())
    x_low, x_high = _range([x for *_, xs, _ in drawn for x in xs])
    y_low, y_high = _range([*(y for *_, ys in drawn for y in ys), *([0.0] if from_zero else [])])
    if diagonal:
        x_low = y_low = min(x_low, y_low)
        x_high = y_high = max(x_high, y_high)
    marks = [_axes(x_low, x_high, y_low, y_high, x_label, y_label)]
    if diagonal:
        (x0, y0), (x1, y1) = (_place(v, v, x_low, x_high, y_low, y_high) for v in (x_low, x_high))
        marks.append(f'<line class="diagonal" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>')
    for index, name, xs, ys in drawn:
        every = max(1, math.ceil(len(xs) / MAX_POINTS))
        points = [_place(x, y, x_low, x_high, y_low, y_high) for x, y in zip(xs[::every], ys[::every], strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        marks.append(
            f'<polyline class="line {_style(index)}" points="{path}"><title>{html.escape(name)}</title></polyline>'
        )
        if len(points) <= 40:
            marks += [f'<circle class="dot s{index % 6}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
    return _figure(title, "".join(marks), [(index, name) for index, name, *_ in drawn])


def bar_chart(title: str, labels: Sequence[str], values: Sequence[float], *, x_label: str, y_label: str) -> str:
    """Return an SVG figure with one bar per label, from 0 up."""
    if not values:
        return _figure(title, '<text x="50%" y="50%" text-anchor="middle">no values</text>', ())
    high = max(max(values), 1e-12)
    step = (WIDTH - LEFT - RIGHT) / len(values)
    bottom = HEIGHT - BOTTOM
    marks = [_frame(x_label, y_label)]
    marks += [_y_tick(value, 0.0, high) for value in _ticks(0.0, high)]
    for index, (label, value) in enumerate(zip(labels, values, strict=True)):
        tall = (HEIGHT - TOP - BOTTOM) * value / high
        x = LEFT + index * step
        marks.append(
            f'<rect class="bar" x="{x + 1:.1f}" y="{bottom - tall:.1f}" width="{max(step - 2, 1):.1f}" height="{tall:.1f}">'
            f"<title>{html.escape(label)}: {value:g}</title></rect>"
        )
        if index % max(1, len(values) // 10) == 0:
            marks.append(
                f'<text class="tick" x="{x + step / 2:.1f}" y="{bottom + 14}" text-anchor="middle">{html.escape(label)}</text>'
            )
    return _figure(title, "".join(marks), ())


def _finite(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    pairs = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return (low if low == 0 else low - pad), high + pad


def _place(x: float, y: float, x_low: float, x_high: float, y_low: float, y_high: float) -> tuple[float, float]:
    across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
    up = HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
    return across, up


def _ticks(low: float, high: float) -> list[float]:
    """Return four to eight round numbers between low and high."""
    raw = (high - low) / 7
    scale = 10 ** math.floor(math.log10(raw))
    step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= raw)
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step) + 1)]


def _axes(x_low: float, x_high: float, y_low: float, y_high: float, x_label: str, y_label: str) -> str:
    marks = [_frame(x_label, y_label)]
    marks += [_y_tick(value, y_low, y_high) for value in _ticks(y_low, y_high)]
    for value in _ticks(x_low, x_high):
        x, _ = _place(value, y_low, x_low, x_high, y_low, y_high)
        marks.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{_text(value)}</text>'
        )
    return "".join(marks)


def _y_tick(value: float, low: float, high: float) -> str:
    _, y = _place(0.0, value, 0.0, 1.0, low, high)
    return (
        f'<line class="rule" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_text(value)}</text>'
    )


def _frame(x_label: str, y_label: str) -> str:
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<line class="axis" x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text class="label" x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">'
        f"{html.escape(y_label)}</text>"
    )


def _text(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:.4g}"


def _style(index: int) -> str:
    """Return the classes of a line: six colours, then the same six dashed."""
    return f"s{index % 6}" + (f" d{index // 6}" if index >= 6 else "")


def _figure(title: str, marks: str, legend: Sequence[tuple[int, str]]) -> str:
    keys = [f'<span class="key {_style(index)}">{html.escape(name)}</span>' for index, name in legend]
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{marks}</svg>'
        f'<div class="legend">{"".join(keys) if len(keys) > 1 else ""}</div></figure>'
    )
