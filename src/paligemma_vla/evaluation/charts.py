"""Small charts as inline SVG. Colours come from the page's style sheet, so they follow light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

WIDTH = 440  # user units; about one per pixel where the page puts charts, so that text keeps its size
POINTS = 240
LEFT, RIGHT, TOP, BOTTOM = 42, 6, 6, 20
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """One curve: x, y of equal length (points that are not finite are left out), and its CSS classes, e.g. `c0 raw`."""

    x: ArrayLike
    y: ArrayLike
    style: str = "c0"


@dataclass(frozen=True)
class Axis:
    """Values [low, high] onto user units [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def project(self, values: ArrayLike) -> Array:
        v, low, high = np.asarray(values, np.float64), self.low, self.high
        if self.log:
            v, low, high = np.log10(v), math.log10(low), math.log10(high)
        return self.start + (v - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int = 4) -> list[float]:
        """Round values inside the range."""
        if self.log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1,), (1, 3), (1, 2, 5)):
                found = [f * 10.0**e for e in exponents for f in factors if self.low <= f * 10.0**e <= self.high]
                if len(found) >= 3:
                    return found[:: math.ceil(len(found) / (about + 1))]
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        return [n * step for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def number(value: float | None) -> str:
    """A number for people: three significant digits, thousands apart; an em dash for None."""
    if value is None or math.isnan(value):
        return "—"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.1f} M"
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 1e-3:
        return f"{value:#.3g}".rstrip(".")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def line_chart(lines: Sequence[Line], x_label: str, *, height: int = 190, log: bool = False, zero: bool = False) -> Markup:
    """Curves over one x axis. log: of y. zero: y starts at 0. Empty when no point is finite (and positive, with log)."""
    cleaned = [clean(line, log) for line in lines]
    xs, ys = (np.concatenate([part[i] for part in cleaned]) if cleaned else np.empty(0) for i in (0, 1))
    if len(xs) == 0:
        return Markup()
    x_low, x_high = float(xs.min()), float(xs.max())
    horizontal = Axis(x_low, x_high if x_high > x_low else x_low + 1, LEFT, WIDTH - RIGHT)
    vertical = Axis(*_padded(ys, log, zero), height - BOTTOM, TOP, log)
    curves = []
    for line, (x, y) in zip(lines, cleaned, strict=True):
        points = horizontal.project(x), vertical.project(y)
        curves.append(_polyline(line.style, *points) if len(x) > 1 else _circle(line.style, *points))
    return _svg(height, [_y_axis(vertical), _x_axis(horizontal, height, x_label), *curves])


def columns(values: Sequence[float], x_label: str, mark: float, height: int = 190) -> Markup:
    """One column per value, numbered from 0, and a level line at `mark` to compare with."""
    vertical = Axis(0, 1.08 * max([*values, mark]) or 1, height - BOTTOM, TOP)
    slot = (WIDTH - LEFT - RIGHT) / len(values)
    bar = Markup(
        '<rect class="column" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="1.5"><title>{}: {}</title></rect>'
    )
    bars = [
        bar.format(LEFT + (n + 0.14) * slot, top, 0.72 * slot, height - BOTTOM - top, n, number(value))
        for n, (value, top) in enumerate(zip(values, vertical.project(values), strict=True))
    ]
    names = [
        _text(LEFT + (n + 0.5) * slot, height - 4, "middle", str(n))
        for n in range(0, len(values), max(1, math.ceil(len(values) / 10)))
    ]
    level = _polyline("true", np.array([LEFT, WIDTH - RIGHT]), vertical.project([mark] * 2))
    return _svg(height, [Markup("<title>{}</title>").format(x_label), _y_axis(vertical), level, *bars, *names])


def chunk_chart(
    true: ArrayLike, starts: Sequence[int], predicted: ArrayLike, span: tuple[float, float], height: int = 104
) -> Markup:
    """One action dimension of an episode: recorded (L,) as a broad line, predicted chunks (n, K) over it from `starts`.

    span: the least range of y, so that a dimension that hardly moves does not look wild.
    """
    recorded, chunks = np.asarray(true, np.float64), np.asarray(predicted, np.float64)
    pieces = [chunk[: len(recorded) - start] for start, chunk in zip(starts, chunks, strict=True)]
    horizontal = Axis(0, max(1, len(recorded) - 1), LEFT, WIDTH - RIGHT)
    vertical = Axis(*_padded(np.concatenate([recorded, *pieces, span])), height - BOTTOM, TOP)
    drawn = [_polyline("true", horizontal.project(np.arange(len(recorded))), vertical.project(recorded))]
    for n, (start, piece) in enumerate(zip(starts, pieces, strict=True)):
        style = "odd" if n % 2 else "even"
        x, y = horizontal.project(start + np.arange(len(piece))), vertical.project(piece)
        drawn += [_polyline(style, x, y), _circle(style, x, y, 2.2)]
    return _svg(height, [_y_axis(vertical, about=2), _x_axis(horizontal, height), *drawn])


def clean(line: Line, log: bool = False) -> tuple[Array, Array]:
    """Finite points of a line, thinned to about POINTS by keeping each stretch's lowest and highest."""
    x, y = np.asarray(line.x, np.float64), np.asarray(line.y, np.float64)
    good = np.isfinite(x) & np.isfinite(y) & ((y > 0) if log else True)
    x, y = x[good], y[good]
    if len(x) <= POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), POINTS // 2)
    kept = np.unique([index for part in parts for index in (part[y[part].argmin()], part[y[part].argmax()])])
    return x[kept], y[kept]


def smooth(y: ArrayLike) -> Array:
    """Moving average of a noisy curve, weights falling off exponentially, without the start's bias."""
    values = np.asarray(y, np.float64)
    decay = 1 - min(1.0, 12 / max(12, len(values)))
    out, total, weight = np.empty_like(values), 0.0, 0.0
    for n, value in enumerate(values):
        total, weight = decay * total + value, decay * weight + 1
        out[n] = total / weight
    return out


def _padded(values: Array, log: bool = False, zero: bool = False) -> tuple[float, float]:
    """The range of some values with a margin, never empty."""
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.15, high * 1.15
    low = min(0.0, low) if zero else low
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return low if zero else low - margin, high + margin


def _svg(height: int, parts: Iterable[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img">{}</svg>').format(WIDTH, height, Markup().join(parts))


def _polyline(style: str, x: Array, y: Array) -> Markup:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return Markup('<polyline class="{}" points="{}"/>').format(style, points)


def _circle(style: str, x: Array, y: Array, radius: float = 2) -> Markup:
    """A dot at the first point; a polyline of one point would not show."""
    return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(style, x[0], y[0], radius)


def _text(x: float, y: float, anchor: str, text: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _y_axis(axis: Axis, about: int = 4) -> Markup:
    line = Markup('<line class="axis" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>')
    ticks = axis.ticks(about)
    rows = [
        line.format(LEFT, WIDTH - RIGHT, y=y) + _text(LEFT - 7, y + 3.5, "end", _tick(value))
        for value, y in zip(ticks, axis.project(ticks), strict=True)
    ]
    return Markup().join(rows)


def _x_axis(axis: Axis, height: int, label: str = "") -> Markup:
    ticks = axis.ticks(5)
    rows = [
        _text(x, height - 4, "middle", _tick(value))
        for value, x in zip(ticks, axis.project(ticks), strict=True)
        if x < WIDTH - RIGHT - 9 * len(label)
    ]
    return Markup().join([*rows, _text(WIDTH - RIGHT, height - 4, "end", label)])


def _tick(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return number(value) if 0 < abs(value) < 1e-3 else f"{value:.10g}"
