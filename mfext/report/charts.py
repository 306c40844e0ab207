"""Geometry of the HTML report's charts: where things lie, in per cent, so that the page can be of any width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mfext.report.quantities import NONE, brief, number, signed
from mfext.report.report import Bars, Curves, HeatMap
from mfext.report.tabular import bar_text

# Drawing units of a plot's SVG, both ways; it is stretched to the page.
UNITS = 1000.0
# Colours that the style sheet has for lines.
LINE_COLOURS = 6
# From these strengths on a cell needs the other ink: on a dark page sooner than on a light one.
MIDDLE, STRONG = 0.65, 0.75


@dataclass(frozen=True)
class Cell:
    """A heat map's cell: finished text, colour 0 to 1, which side of zero, what to say on hovering."""

    text: str
    strength: float
    side: str
    hint: str

    @property
    def depth(self) -> str:
        """How far the ink has to change."""
        return "strong" if self.strength >= STRONG else "middle" if self.strength >= MIDDLE else ""


def transposed(section: HeatMap) -> HeatMap:
    """The same numbers with rows and columns exchanged, for narrow pages."""
    values = tuple(zip(*section.values, strict=True))
    return replace(section, rows=section.columns, columns=section.rows, values=values, groups=())


def heat_cells(section: HeatMap) -> tuple[tuple[Cell, ...], ...]:
    """The cells, row by row."""
    sizes = [abs(value) for row in section.values for value in row if value is not None]
    full = section.full or max(sizes, default=0.0) or 1.0
    show = signed if section.diverging else number
    pairs = zip(section.rows, section.values, strict=True)
    return tuple(
        tuple(
            _cell(section, value, show(value, section.digits), full, f"{name}, {column}")
            for column, value in zip(section.columns, row, strict=True)
        )
        for name, row in pairs
    )


def _cell(section: HeatMap, value: float | None, shown: str, full: float, place: str) -> Cell:
    if value is None:
        return Cell(NONE, 0.0, "none", f"{place}: {section.missing or 'not measured'}")
    side = "level" if not section.diverging else "worse" if value > 0 else "better"
    return Cell(shown, round(min(1.0, abs(value) / full), 3), side, f"{place}: {shown} {section.unit}".rstrip())


@dataclass(frozen=True)
class Mark:
    """A tick or border at `at` per cent; a border's stage is `width` per cent wide."""

    at: float
    text: str
    width: float = 0.0


@dataclass(frozen=True)
class DrawnBar:
    """A bar from zero to its value, and the whisker of its interval, in per cent of the track."""

    name: str
    label: str
    text: str
    reason: str
    side: str
    left: float
    width: float
    whisker_left: float | None
    whisker_width: float


@dataclass(frozen=True)
class DrawnBars:
    """Bars on one scale."""

    bars: tuple[DrawnBar, ...]
    zero: float
    ticks: tuple[Mark, ...]


def draw_bars(section: Bars) -> DrawnBars:
    """Places bars on a scale that holds zero and all intervals."""
    known = [edge for bar in section.bars for edge in (bar.value, bar.low, bar.high) if edge is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    room = 0.04 * (high - low) or 0.01
    low, high = low - room, high + room

    def at(value: float) -> float:
        return round(100 * (value - low) / (high - low), 3)

    bars = []
    for index, bar in enumerate(section.bars):
        value = bar.value or 0.0
        left, right = sorted((at(0.0), at(value)))
        whisker = None if bar.low is None or bar.high is None else (at(bar.low), at(bar.high))
        bars.append(
            DrawnBar(
                bar.name,
                bar.label,
                bar_text(section, index),
                bar.reason,
                "worse" if value > 0 else "better",
                left,
                round(right - left, 3),
                whisker[0] if whisker else None,
                round(whisker[1] - whisker[0], 3) if whisker else 0.0,
            )
        )
    ticks = tuple(Mark(at(tick), signed(tick, _places(section.digits, tick))) for tick in nice_ticks(low, high, 4))
    return DrawnBars(tuple(bars), at(0.0), ticks)


def _places(digits: int, tick: float) -> int:
    """Decimal places a tick needs, at most those of the values."""
    return next((places for places in range(digits) if round(tick, places) == round(tick, digits + 2)), digits)


@dataclass(frozen=True)
class Line:
    """A series as an SVG path, its colour's number, and its last value. `dashed`: the colour is another line's too.

    `whiskers` are its intervals: (left, bottom, height).
    """

    name: str
    path: str
    colour: int
    dashed: bool
    first: str
    last: str
    whiskers: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Plot:
    """Lines, ticks of both axes and stage borders. Vertical positions count from the bottom."""

    lines: tuple[Line, ...]
    x_ticks: tuple[Mark, ...]
    y_ticks: tuple[Mark, ...]
    borders: tuple[Mark, ...]


def draw_curves(section: Curves) -> Plot:
    """Places the series of a chart; on a log scale values at or below zero are left out. x counts: ticks are whole."""
    scale = math.log10 if section.log_y else float
    kept = {
        series.name: [(x, scale(y)) for x, y in series.points if not section.log_y or y > 0]
        for series in section.series
    }
    xs = [x for points in kept.values() for x, _ in points] + [x for x, _ in section.borders]
    ys = [y for points in kept.values() for _, y in points]
    left, right = min(xs, default=0.0), max(xs, default=1.0)
    bottom, top = min(ys, default=0.0), max(ys, default=1.0)
    right = right if right > left else left + 1
    room = 0.06 * (top - bottom) or 0.5
    floor = 0.0 if not section.log_y and bottom >= 0 and bottom < 0.35 * top else bottom - room
    bottom, top = section.y_range or (floor, top + room)

    def at_x(x: float) -> float:
        return round(100 * (x - left) / (right - left), 3)

    def at_y(y: float) -> float:
        return round(100 * (y - bottom) / (top - bottom), 3)

    lines = tuple(
        Line(
            series.name,
            _path([(at_x(x), at_y(y)) for x, y in kept[series.name]]),
            index % LINE_COLOURS,
            index >= LINE_COLOURS,
            number(series.points[0][1], section.digits) if series.points else NONE,
            number(series.points[-1][1], section.digits) if series.points else NONE,
            tuple(_whisker(at_x(x), *(at_y(scale(edge)) for edge in ends)) for x, *ends in series.intervals),
        )
        for index, series in enumerate(section.series)
    )
    y_ticks = _log_ticks(bottom, top) if section.log_y else nice_ticks(bottom, top, 5)
    step = min((b - a for a, b in pairwise(y_ticks)), default=1.0)
    places = 0 if section.log_y else max(0, min(4, math.ceil(-math.log10(step) - 1e-9)))
    shown = [(tick, f"{10**tick:.3g}" if section.log_y else number(tick, places)) for tick in y_ticks]
    return Plot(
        lines,
        tuple(Mark(at_x(tick), brief(tick)) for tick in nice_ticks(left, right, 4) if tick == round(tick)),
        tuple(Mark(at_y(tick), text) for tick, text in shown),
        tuple(
            Mark(at_x(x), name, round(at_x(end) - at_x(x), 3))
            for (x, name), end in zip(section.borders, [x for x, _ in section.borders[1:]] + [right], strict=False)
        ),
    )


def _whisker(left: float, low: float, high: float) -> tuple[float, float, float]:
    """An interval as far as it lies inside the plot."""
    bottom, top = max(0.0, low), min(100.0, high)
    return left, bottom, round(max(0.0, top - bottom), 3)


def _path(points: Sequence[tuple[float, float]]) -> str:
    """Per cent from bottom left to SVG units from top left."""
    pairs = [f"{x * UNITS / 100:.1f} {(100 - y) * UNITS / 100:.1f}" for x, y in points]
    if len(pairs) == 1:
        pairs.append(pairs[0])
    return f"M{' L'.join(pairs)}" if pairs else ""


def nice_ticks(low: float, high: float, wanted: int) -> tuple[float, ...]:
    """About `wanted` round numbers (1, 2 or 5 times a power of ten apart) between low and high."""
    span = high - low
    if not span > 0:
        return (low,)
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return tuple(round(index * step, 12) + 0.0 for index in range(first, math.floor(high / step + 1e-9) + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """1, 2 and 5 times powers of ten whose logarithm lies between low and high."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    marks = [power + math.log10(factor) for power in powers for factor in (1, 2, 5)]
    inside = tuple(mark for mark in marks if low <= mark <= high)
    return inside if len(inside) <= 7 else tuple(mark for mark in inside if mark == round(mark))
