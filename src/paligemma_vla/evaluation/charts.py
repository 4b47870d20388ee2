"""Small charts as inline SVG. Colours come from the page's style sheet, so they follow light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paligemma_vla.evaluation.page import Html, fill, join, number

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

    def place(self, values: ArrayLike) -> Array:
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
        step = nice_step((self.high - self.low) / about)
        return [n * step for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 5 x 10^n that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9)))


def line_chart(
    lines: Sequence[Line], x_label: str, *, height: int = 190, log: bool = False, zero: bool = False, unit: str = ""
) -> Html:
    """Curves over one x axis. log: of y. zero: y starts at 0. Empty when no point is finite (and positive, with log)."""
    cleaned = [clean(line, log) for line in lines]
    xs, ys = (np.concatenate([part[i] for part in cleaned]) if cleaned else np.empty(0) for i in (0, 1))
    if len(xs) == 0:
        return Html("")
    low, high = _padded(float(ys.min()), float(ys.max()), log, zero)
    x_low, x_high = float(xs.min()), float(xs.max())
    horizontal = Axis(x_low, x_high if x_high > x_low else x_low + 1, LEFT, WIDTH - RIGHT)
    vertical = Axis(low, high, height - BOTTOM, TOP, log)
    curves = [_curve(line.style, horizontal.place(x), vertical.place(y)) for line, (x, y) in zip(lines, cleaned, strict=True)]
    return fill(
        '<svg viewBox="0 0 {} {}" role="img">{}{}{}</svg>',
        WIDTH,
        height,
        _y_axis(vertical, unit),
        _x_axis(horizontal, height, x_label),
        join(curves),
    )


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


def rate_bar(rate: float, low: float, high: float, wanted_low: bool = False) -> Html:
    """A bar over [0, 1] with the interval [low, high] as a whisker."""
    style = "rate low" if wanted_low else "rate"
    whisker = "".join(
        f'<line class="whisker" x1="{100 * a:.2f}" x2="{100 * b:.2f}" y1="{c}" y2="{d}"/>'
        for a, b, c, d in [(low, high, 5, 5), (low, low, 2.5, 7.5), (high, high, 2.5, 7.5)]
    )
    return fill(
        '<svg class="{}" viewBox="0 0 100 10" preserveAspectRatio="none" role="img">'
        '<rect class="track" width="100" height="10" rx="0.6"/><rect class="bar" width="{}" height="10" rx="0.6"/>{}</svg>',
        style,
        f"{100 * rate:.2f}",
        Html(whisker),
    )


def bullet(value: float, most: float, mark: float | None = None) -> Html:
    """A bar of `value` over [0, most], with a mark to compare it with."""
    most = most or 1.0
    line = Html("")
    if mark is not None:
        line = fill('<line class="mark" x1="{0}" x2="{0}" y1="0" y2="10"/>', f"{100 * min(1, mark / most):.2f}")
    return fill(
        '<svg class="rate" viewBox="0 0 100 10" preserveAspectRatio="none" role="img"><rect class="track" width="100" '
        'height="10" rx="0.6"/><rect class="bar" width="{}" height="10" rx="0.6"/>{}</svg>',
        f"{100 * min(1, value / most):.2f}",
        line,
    )


def columns(values: Sequence[float], x_label: str, mark: float | None = None, height: int = 190) -> Html:
    """One column per value, numbered from 0, and a level line to compare with."""
    vertical = Axis(0, 1.08 * max([*values, mark or 0]) or 1, height - BOTTOM, TOP)
    slot = (WIDTH - LEFT - RIGHT) / len(values)
    bars = [
        fill(
            '<rect class="column" x="{}" y="{}" width="{}" height="{}" rx="1.5"><title>{}: {}</title></rect>',
            f"{LEFT + (n + 0.14) * slot:.1f}",
            f"{top:.1f}",
            f"{0.72 * slot:.1f}",
            f"{height - BOTTOM - top:.1f}",
            n,
            number(value),
        )
        for n, (value, top) in enumerate(zip(values, vertical.place(values), strict=True))
    ]
    every = max(1, math.ceil(len(values) / 10))
    names = [
        fill('<text x="{}" y="{}" text-anchor="middle">{}</text>', f"{LEFT + (n + 0.5) * slot:.1f}", height - 4, n)
        for n in range(0, len(values), every)
    ]
    level = Html("")
    if mark is not None:
        level = fill(
            '<polyline class="true" points="{}"/>', _points(np.array([LEFT, WIDTH - RIGHT]), vertical.place([mark] * 2))
        )
    return fill(
        '<svg viewBox="0 0 {} {}" role="img"><title>{}</title>{}{}{}{}</svg>',
        WIDTH,
        height,
        x_label,
        _y_axis(vertical, ""),
        level,
        join(bars),
        join(names),
    )


def chunk_chart(
    true: ArrayLike, starts: Sequence[int], predicted: ArrayLike, span: tuple[float, float], height: int = 104
) -> Html:
    """One action dimension of an episode: recorded (L,) as a broad line, predicted chunks (n, K) over it from `starts`.

    span: the least range of y, so that a dimension that hardly moves does not look wild.
    """
    recorded, chunks = np.asarray(true, np.float64), np.asarray(predicted, np.float64)
    pieces = [chunk[: len(recorded) - start] for start, chunk in zip(starts, chunks, strict=True)]
    values = np.concatenate([recorded, *pieces, span])
    low, high = _padded(float(values.min()), float(values.max()), log=False, zero=False)
    horizontal = Axis(0, max(1, len(recorded) - 1), LEFT, WIDTH - RIGHT)
    vertical = Axis(low, high, height - BOTTOM, TOP)
    drawn = [
        fill(
            '<polyline class="true" points="{}"/>',
            _points(horizontal.place(np.arange(len(recorded))), vertical.place(recorded)),
        )
    ]
    for n, (start, piece) in enumerate(zip(starts, pieces, strict=True)):
        style = "odd" if n % 2 else "even"
        x, y = horizontal.place(start + np.arange(len(piece))), vertical.place(piece)
        drawn.append(fill('<polyline class="{}" points="{}"/>', style, _points(x, y)))
        drawn.append(fill('<circle class="{}" cx="{}" cy="{}" r="2.2"/>', style, f"{x[0]:.1f}", f"{y[0]:.1f}"))
    axes = join([_y_axis(vertical, "", about=2), _x_axis(horizontal, height, "")])
    return fill('<svg viewBox="0 0 {} {}" role="img">{}{}</svg>', WIDTH, height, axes, join(drawn))


def _padded(low: float, high: float, log: bool, zero: bool) -> tuple[float, float]:
    """The range with some air, never empty."""
    if log:
        return (low / 1.15, high * 1.15)
    low = min(0.0, low) if zero else low
    air = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return (low if zero else low - air, high + air)


def _curve(style: str, x: Array, y: Array) -> Html:
    """A polyline, or a dot where there is one point, which a polyline would not show."""
    if len(x) == 1:
        return fill('<circle class="{}" cx="{}" cy="{}" r="2"/>', style, f"{x[0]:.1f}", f"{y[0]:.1f}")
    return fill('<polyline class="{}" points="{}"/>', style, _points(x, y))


def _points(x: Array, y: Array) -> Html:
    return Html(" ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)))


def _y_axis(axis: Axis, unit: str, about: int = 4) -> Html:
    rows = []
    for value, y in zip(axis.ticks(about), axis.place(axis.ticks(about)), strict=True):
        rows.append(fill('<line class="axis" x1="{}" x2="{}" y1="{y}" y2="{y}"/>', LEFT, WIDTH - RIGHT, y=f"{y:.1f}"))
        rows.append(fill('<text x="{}" y="{}" text-anchor="end">{}{}</text>', LEFT - 7, f"{y + 3.5:.1f}", _tick(value), unit))
    return join(rows)


def _x_axis(axis: Axis, height: int, label: str) -> Html:
    ticks = axis.ticks(5)
    rows = [
        fill('<text x="{}" y="{}" text-anchor="middle">{}</text>', f"{x:.1f}", height - 4, _tick(value))
        for value, x in zip(ticks, axis.place(ticks), strict=True)
        if x < WIDTH - RIGHT - 9 * len(label)
    ]
    rows.append(fill('<text x="{}" y="{}" text-anchor="end">{}</text>', WIDTH - RIGHT, height - 4, label))
    return join(rows)


def _tick(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return number(value) if 0 < abs(value) < 1e-3 else f"{value:.10g}"
