"""Heat maps in a terminal: one short line a row, digits for every eye and colour where there is some.

A cell is as wide as the terminal allows: per cent with a blank before it (3 or 4 signs), or one digit (1 or 2 signs),
where + is 10 or more. So 36 columns fit into 80 signs. A dot is an exact zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from mfext.report.quantities import printable
from mfext.report.report import HeatMap

WIDEST = 4
# Red, green, blue from low to high: told apart by people who see no red or green, and readable on dark and light.
SCALE = ((0, 34, 78), (124, 123, 120), (253, 231, 55))
ZERO, MORE = "·", "+"
KEY = f"{ZERO} is 0, {MORE} is 10 or more"


def heat_block(section: HeatMap, width: int) -> list[Text]:
    """The map in lines of at most `width` signs, in several parts one below the other where columns are too many."""
    labels = _labels(section)
    margin = max((len(label) for label in labels), default=0)
    room = max(1, width - margin - max(1, len(section.groups)))
    cell = max(1, min(WIDEST, room // max(1, len(section.columns))))
    lines = []
    for first in range(0, len(section.columns), room // cell):
        part = range(first, min(first + room // cell, len(section.columns)))
        gaps = _gaps(section, part)
        if section.groups:
            lines.append(Text(" " * margin + _names(section, part, cell), style="dim"))
        lines.append(Text(" " * margin + _numbers(section, part, gaps, cell), style="dim"))
        for label, values in zip(labels, section.values, strict=True):
            line = Text(f"{label:>{margin}}")
            for column in part:
                line.append(" " if column in gaps else "")
                line.append(*_cell(section, values[column], cell))
            line.rstrip()
            lines.append(line)
    return lines


def _labels(section: HeatMap) -> list[str]:
    """The rows' names, without the word that all of them begin with: 0, 1, ... for layer 0, layer 1, ..."""
    parted = [printable(name).partition(" ") for name in section.rows]
    shared = len({word for word, _, _ in parted}) == 1 and all(rest for _, _, rest in parted)
    return [f"  {rest if shared else word + blank + rest}" for word, blank, rest in parted]


def _gaps(section: HeatMap, part: range) -> frozenset[int]:
    """The columns with a blank before them: the first of all, and the first of every group."""
    starts, total = {part.start}, 0
    for _, size in section.groups:
        starts.add(total)
        total += size
    return frozenset(starts)


def _names(section: HeatMap, part: range, cell: int) -> str:
    """The groups' names over their columns, cut to fit."""
    line, first = "", 0
    for name, size in section.groups:
        shown = len(range(max(first, part.start), min(first + size, part.stop))) * cell
        line += f" {printable(name)[:shown]:<{shown}}" if shown else ""
        first += size
    return line.rstrip()


def _numbers(section: HeatMap, part: range, gaps: frozenset[int], cell: int) -> str:
    """Names of columns flush right over their cells: all of them, or every fifth or tenth where cells are narrow."""
    every = 1 if cell > 2 else 5 if cell == 2 else 10
    ends, end = {}, 0
    for column in part:
        end += cell + (column in gaps)
        ends[column] = end
    line = [" "] * end
    for column in part:
        name = printable(section.columns[column])
        begin = ends[column] - len(name)
        if (not name.isdigit() or int(name) % every == 0) and begin >= 0:
            line[begin : ends[column]] = name
    return "".join(line).rstrip()


def _cell(section: HeatMap, value: float | None, cell: int) -> tuple[str, str]:
    """Finished text and its style."""
    if value is None:
        return " " * cell, ""
    if value == 0:
        return f"{ZERO:>{cell}}", "dim"
    whole = round(value)
    shown = str(whole) if cell > 2 or whole < 10 else MORE
    strength = min(1.0, value / (section.full or _largest(section.values)))
    red, green, blue = _colour(strength)
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "white"
    return f"{shown:>{cell}}", f"{ink} on rgb({red},{green},{blue})"


def _largest(values: Sequence[Sequence[float | None]]) -> float:
    return max((value for row in values for value in row if value), default=1.0)


def _colour(strength: float) -> tuple[int, int, int]:
    place = strength * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in zip(SCALE[low], SCALE[low + 1], strict=True))
    return red, green, blue
