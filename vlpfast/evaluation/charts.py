"""Line and stacked charts as inline SVG: axes, ticks, bands, values under the pointer. No script, no font, no other file.

Colours are the CSS classes s0, s1, ... and the custom properties of style.py, so one drawing serves light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 22, 12, 34
POINTS = 240  # a longer series is drawn as so many means with a band from minimum to maximum
_STOPS = 60  # places that tell their values under the pointer
COLOURS = 7  # classes s0 .. s6


@dataclass
class Series:
    name: str
    x: Sequence[float]
    y: Sequence[float | None]  # None and values that are not finite are left out


@dataclass
class _Point:
    x: float
    mean: float
    low: float
    high: float


def number(value: float, digits: int = 3) -> str:
    """Short and readable, with so many significant digits: 12,345  12.3  0.00123  4.6e-5."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(value: float, digits: int = 3) -> str:
    """A fraction as a percentage with digits - 2 decimals, its parts kept on one line: 0.1 %, 59 %, 59.3 %."""
    return f"{100 * value:.{digits - 2}f}".rstrip("0").rstrip(".") + "\u00a0%"


def _tick_labels(ticks: Sequence[float], show: Callable[..., str]) -> list[str]:
    """With as many digits as it takes to tell them apart."""
    for digits in range(3, 16):
        labels = [show(tick, digits) for tick in ticks]
        if len(set(labels)) == len(labels):
            break
    return labels


def spans_decades(series: Sequence[Series], factor: float = 50) -> bool:
    """Whether a logarithmic axis helps: all values are above 0 and the largest is more than `factor` times the smallest."""
    values = [y for one in series for _, y in _finite(one)]
    return bool(values) and min(values) > 0 and max(values) > factor * min(values)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    show: Callable[..., str] = number,
    log: bool = False,
    y_range: tuple[float, float] | None = None,
    references: Sequence[tuple[str, float]] = (),
    x_name: str = "step",
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """A <figure> with one line for each series over a common x axis; `references` are dashed horizontal lines with a name,
    `marks` (x, name) vertical ones: what begins there.

    show(value, digits=3): how a y value is written. y_range: the y axis; None: from the data. Raises ValueError when no series
    has a finite value, for more series than there are colours, and for log=True with values that are not above 0."""
    if len(series) > COLOURS:
        raise ValueError(f"series: expected at most {COLOURS}, got {len(series)}")
    points = [_thin(_finite(one)) for one in series]
    shown = [point for one in points for point in one]
    if not shown:
        raise ValueError(f"chart {title!r}: no series has a finite value")
    values = [bound for point in shown for bound in (point.low, point.high)] + [y for _, y in references]
    if log and min(values) <= 0:
        raise ValueError(f"chart {title!r}: a logarithmic axis needs values above 0, got {min(values)}")
    y_ticks, (low, high) = _log_axis(min(values), max(values)) if log else _linear_axis(*(y_range or (min(values), max(values))))
    axes = _Axes(min(point.x for point in shown), max(point.x for point in shown), low, high, log)
    px, py = axes.px, axes.py
    parts = axes.drawn(y_ticks, show, x_name)
    right = WIDTH - _RIGHT
    parts += [f'<line class="reference" x1="{_LEFT}" x2="{right}" y1="{py(y)}" y2="{py(y)}"/>' for _, y in references]
    for i, one in enumerate(points):
        if any(point.low < point.high for point in one):
            edge = [f"{px(p.x)},{py(p.high)}" for p in one] + [f"{px(p.x)},{py(p.low)}" for p in reversed(one)]
            parts.append(f'<polygon class="band s{i}" points="{" ".join(edge)}"/>')
        if len(one) == 1:
            parts.append(f'<circle class="dot s{i}" cx="{px(one[0].x)}" cy="{py(one[0].mean)}" r="3.5"/>')
        elif one:
            parts.append(f'<polyline class="line s{i}" points="{" ".join(f"{px(p.x)},{py(p.mean)}" for p in one)}"/>')
    parts += axes.marked(marks)
    parts += _stops(series, points, points, axes, show, x_name)
    return _figure(title, _legend(series, references), _summary(title, series, points, show, x_name), parts)


def stacked_chart(
    title: str,
    series: Sequence[Series],
    *,
    show: Callable[..., str] = number,
    x_name: str = "step",
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """A <figure> with the series as bands on one another, the first at the bottom: their sum is the upper edge.

    All series have the same x; a value that is missing, not finite or below 0 is 0. For show and marks see line_chart. Raises
    ValueError as line_chart does, when nothing is above 0, and for series with different x."""
    if len(series) > COLOURS:
        raise ValueError(f"series: expected at most {COLOURS}, got {len(series)}")
    if any(list(one.x) != list(series[0].x) for one in series):
        raise ValueError(f"chart {title!r}: expected series with the same x")
    zeros = [
        Series(one.name, one.x, [y if y is not None and math.isfinite(y) and y > 0 else 0.0 for y in one.y]) for one in series
    ]
    points = [_thin(_finite(one)) for one in zeros]
    sums = [0.0] * len(points[0]) if points else []
    edges: list[list[_Point]] = []
    for one in points:
        sums = [below + point.mean for below, point in zip(sums, one, strict=True)]
        edges.append([_Point(point.x, total, total, total) for point, total in zip(one, sums, strict=True)])
    if not any(sums):
        raise ValueError(f"chart {title!r}: no series has a value above 0")
    y_ticks, (low, high) = _linear_axis(0.0, max(sums))
    axes = _Axes(points[0][0].x, points[0][-1].x, low, high, False)
    parts = axes.drawn(y_ticks, show, x_name)
    floor = [(point.x, 0.0) for point in points[0]]
    for i, edge in enumerate(edges):
        ceiling = [(point.x, point.mean) for point in edge]
        if len(edge) == 1:  # a single x: a bar in the middle
            (x, bottom), (_, top) = floor[0], ceiling[0]
            corners = [(x - 0.5, top), (x + 0.5, top), (x + 0.5, bottom), (x - 0.5, bottom)]
        else:
            corners = [*ceiling, *reversed(floor)]
        text = " ".join(f"{axes.px(x)},{axes.py(y)}" for x, y in corners)
        parts.append(f'<polygon class="layer s{i}" points="{text}"/>')
        floor = ceiling
    parts += axes.marked(marks)
    parts += _stops(zeros, points, edges, axes, show, x_name)
    return _figure(title, _legend(zeros, ()), _summary(title, zeros, points, show, x_name), parts)


def _figure(title: str, legend: str, summary: str, parts: Sequence[str]) -> str:
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">{"".join(parts)}</svg></figure>'
    )


class _Axes:
    """Where values lie in the drawing. x has room for one at least."""

    def __init__(self, x_low: float, x_high: float, low: float, high: float, log: bool) -> None:
        self.x_low, self.x_high = (x_low, x_high) if x_low < x_high else (x_low - 1, x_high + 1)
        self.low, self.high, self.log = low, high, log

    def px(self, x: float) -> float:
        return round(_LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - _LEFT - _RIGHT), 1)

    def py(self, y: float) -> float:
        low, high = self.low, self.high
        share = math.log(y / low) / math.log(high / low) if self.log else (y - low) / (high - low)
        return round(HEIGHT - _BOTTOM - min(max(share, 0), 1) * (HEIGHT - _TOP - _BOTTOM), 1)

    def drawn(self, y_ticks: Sequence[float], show: Callable[..., str], x_name: str) -> list[str]:
        px, py, right, bottom = self.px, self.py, WIDTH - _RIGHT, HEIGHT - _BOTTOM
        parts = []
        for tick, label in zip(y_ticks, _tick_labels(y_ticks, show), strict=True):
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{py(tick)}" y2="{py(tick)}"/>')
            parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{py(tick) + 4}" text-anchor="end">{escape(label)}</text>')
        for tick in _linear_axis(self.x_low, self.x_high, 5)[0]:
            if self.x_low <= tick <= self.x_high and tick == round(tick):
                parts.append(f'<line class="axis" x1="{px(tick)}" x2="{px(tick)}" y1="{bottom}" y2="{bottom + 4}"/>')
                parts.append(f'<text class="tick" x="{px(tick)}" y="{bottom + 17}" text-anchor="middle">{number(tick)}</text>')
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        parts.append(f'<text class="tick name" x="{right}" y="{HEIGHT - 3}" text-anchor="end">{escape(x_name)}</text>')
        return parts

    def marked(self, marks: Sequence[tuple[float, str]]) -> list[str]:
        """Drawn over what is there."""
        parts, bottom = [], HEIGHT - _BOTTOM
        for x, name in marks:
            if self.x_low <= x <= self.x_high:
                parts.append(f'<line class="mark" x1="{self.px(x)}" x2="{self.px(x)}" y1="{_TOP}" y2="{bottom}"/>')
                parts.append(f'<text class="tick mark-name" x="{self.px(x) + 3}" y="{_TOP + 9}">{escape(name)}</text>')
        return parts


def _finite(series: Series) -> list[tuple[float, float]]:
    pairs = zip(series.x, series.y, strict=True)
    return sorted((float(x), float(y)) for x, y in pairs if y is not None and math.isfinite(y))


def _thin(pairs: list[tuple[float, float]]) -> list[_Point]:
    """At most POINTS points: each the mean of a run of neighbours, with its extremes, so that no spike is lost."""
    runs = min(len(pairs), POINTS)
    points = []
    for i in range(runs):
        run = pairs[i * len(pairs) // runs : (i + 1) * len(pairs) // runs]
        ys = [y for _, y in run]
        points.append(_Point(run[-1][0], sum(ys) / len(ys), min(ys), max(ys)))
    return points


def _linear_axis(low: float, high: float, count: int = 5) -> tuple[list[float], tuple[float, float]]:
    """Round ticks that enclose low .. high, and the range from the first to the last."""
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return ticks, (ticks[0], ticks[-1])


def _log_axis(low: float, high: float) -> tuple[list[float], tuple[float, float]]:
    """Ticks at powers of ten, thinned when there are many; at 1, 2, 5 times them when there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    stride = max(1, math.ceil((last - first) / 6))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**i for i in range(first, last + 1, stride) for factor in factors]
    below = max((tick for tick in ticks if tick <= low), default=low)
    above = min((tick for tick in ticks if tick >= high), default=high)
    return [tick for tick in ticks if below <= tick <= above], (below, above if above > below else 10 * below)


def _stops(
    series: Sequence[Series],
    points: list[list[_Point]],
    edges: list[list[_Point]],
    axes: _Axes,
    show: Callable[..., str],
    x_name: str,
) -> list[str]:
    """Invisible strips; the one under the pointer shows its dots, on the edges, and, as a tooltip, the values of the points."""
    px, py = axes.px, axes.py
    places = sorted({point.x for one in points for point in one})
    if len(places) > _STOPS:
        places = [places[round(i * (len(places) - 1) / (_STOPS - 1))] for i in range(_STOPS)]
    borders = [_LEFT, *((px(a) + px(b)) / 2 for a, b in pairwise(places)), WIDTH - _RIGHT]
    out = []
    for x, (start, end) in zip(places, pairwise(borders), strict=True):
        lines, dots = [f"{x_name} {number(x)}"], []
        for i, (one, drawn, edge) in enumerate(zip(series, points, edges, strict=True)):
            if not drawn:
                continue
            near, on = min(zip(drawn, edge, strict=True), key=lambda pair: abs(pair[0].x - x))
            spread = f" ({show(near.low)} … {show(near.high)})" if near.low < near.high else ""
            lines.append(f"{one.name} {show(near.mean)}{spread}")
            dots.append(f'<circle class="dot s{i}" cx="{px(on.x)}" cy="{py(on.mean)}" r="3.5"/>')
        strip = f'<rect x="{start:.1f}" y="{_TOP}" width="{end - start:.1f}" height="{HEIGHT - _TOP - _BOTTOM}"/>'
        rule = f'<line x1="{px(x)}" x2="{px(x)}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
        out.append(f'<g class="stop"><title>{escape(chr(10).join(lines))}</title>{strip}{rule}{"".join(dots)}</g>')
    return out


def _legend(series: Sequence[Series], references: Sequence[tuple[str, float]]) -> str:
    items = [f'<span class="key s{i}">{escape(one.name)}</span>' for i, one in enumerate(series) if len(series) > 1]
    items += [f'<span class="key dashed">{escape(name)}</span>' for name, _ in references]
    return f'<span class="legend">{"".join(items)}</span>' if items else ""


def _summary(title: str, series: Sequence[Series], points: list[list[_Point]], show: Callable[..., str], x_name: str) -> str:
    parts = []
    for one, drawn in zip(series, points, strict=True):
        if drawn:
            first, last = (f"{show(point.mean)} at {x_name} {number(point.x)}" for point in (drawn[0], drawn[-1]))
            parts.append(f"{one.name} from {first} to {last}")
    return f"{title}: {'; '.join(parts)}"
