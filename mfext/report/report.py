"""What a verb returns: the command line prints it, files are rendered from it, tests assert on it.

Pure data. `Report.data` is the stable JSON in nats per byte; sections hold what people read, already in the unit
they are shown in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mfext.errors import MfextError

Tone = Literal["plain", "good", "bad"]


@dataclass(frozen=True)
class Section:
    """A titled part of a report. `note` says how to read it; `in_terminal` False keeps it for the files."""

    kind: ClassVar[str] = ""
    title: str
    note: str = field(default="", kw_only=True)
    in_terminal: bool = field(default=True, kw_only=True)


@dataclass(frozen=True)
class Text(Section):
    """Paragraphs."""

    kind: ClassVar[str] = "text"
    paragraphs: tuple[str, ...] = ()


@dataclass(frozen=True)
class KeyValues(Section):
    """Names and what they are."""

    kind: ClassVar[str] = "keyvalues"
    pairs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Card:
    """One number worth a glance: `value` large, `unit` and `detail` small."""

    label: str
    value: str
    unit: str = ""
    detail: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Cards(Section):
    """The key numbers side by side."""

    kind: ClassVar[str] = "cards"
    cards: tuple[Card, ...] = ()


@dataclass(frozen=True)
class Numbers:
    """A table for machines: full precision, the unit in the column's name, None where nothing was measured."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), "one value per column"


@dataclass(frozen=True)
class Table(Section):
    """Cells are finished text; columns named in `text_columns` are words, the others numbers (set flush right).

    `numbers`, where given, is what a CSV file holds in place of the cells.
    """

    kind: ClassVar[str] = "table"
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    text_columns: tuple[str, ...] = ()
    numbers: Numbers | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"{self.title}: one cell per column"


@dataclass(frozen=True)
class HeatMap(Section):
    """Numbers by row and column, coloured by size: from 0 up, or where `diverging` both ways from 0 (above is worse).

    `groups` names runs of columns (name, how many). `missing` is the reason where a value is None. `full` is the
    value of full colour; None takes the largest.
    """

    kind: ClassVar[str] = "heatmap"
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    values: tuple[tuple[float | None, ...], ...] = ()
    unit: str = ""
    digits: int = 3
    diverging: bool = False
    groups: tuple[tuple[str, int], ...] = ()
    full: float | None = None
    missing: str = ""

    def __post_init__(self) -> None:
        assert len(self.values) == len(self.rows), f"{self.title}: one list of values per row"
        assert all(len(row) == len(self.columns) for row in self.values), f"{self.title}: one value per column"
        assert not self.groups or sum(size for _, size in self.groups) == len(self.columns), "groups cover the columns"


@dataclass(frozen=True)
class HeatMaps(Section):
    """Small heat maps side by side, to be compared."""

    kind: ClassVar[str] = "heatmaps"
    maps: tuple[HeatMap, ...] = ()


@dataclass(frozen=True)
class Bar:
    """A value with its interval; `reason` says why the value or the interval is missing."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    label: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Bars(Section):
    """Values around zero with 95 % intervals; above zero is worse."""

    kind: ClassVar[str] = "bars"
    bars: tuple[Bar, ...] = ()
    unit: str = ""
    digits: int = 3


@dataclass(frozen=True)
class Series:
    """A line: (x, y) in order of x, and the 95 % intervals (x, low, high) of those points that have one."""

    name: str
    points: tuple[tuple[float, float], ...]
    intervals: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Curves(Section):
    """Lines over one axis; `borders` are (x, name) where a stage begins. `y_range` None fits the axis to the data."""

    kind: ClassVar[str] = "curves"
    series: tuple[Series, ...] = ()
    borders: tuple[tuple[float, str], ...] = ()
    x_label: str = ""
    y_label: str = ""
    log_y: bool = False
    digits: int = 2
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class CurvesGrid(Section):
    """Small charts side by side, to be compared: the same series in each, so that one legend serves them all."""

    kind: ClassVar[str] = "curvesgrid"
    charts: tuple[Curves, ...] = ()


@dataclass(frozen=True)
class Spread:
    """A value with its 95 % interval; low and high are None where there is no interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Point:
    """One dot of a scatter plot. `on_front`: no other is better in both directions."""

    name: str
    x: Spread
    y: Spread
    on_front: bool = False


@dataclass(frozen=True)
class Scatter(Section):
    """Dots with intervals, both ways lower is better. `linear_below`: x is logarithmic beyond this size; None: linear.

    `missing` says which names have no dot and why.
    """

    kind: ClassVar[str] = "scatter"
    points: tuple[Point, ...] = ()
    x_label: str = ""
    y_label: str = ""
    linear_below: float | None = None
    missing: str = ""


@dataclass(frozen=True)
class ShareRow:
    """Parts of a whole, each from 0 to 1, in the order of the section's `parts`; `label` and `detail` annotate."""

    name: str
    shares: tuple[float, ...]
    label: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Shares(Section):
    """How each row's whole is divided. The last part is the newest and stands out."""

    kind: ClassVar[str] = "shares"
    parts: tuple[str, ...] = ()
    rows: tuple[ShareRow, ...] = ()
    detail_name: str = ""

    def __post_init__(self) -> None:
        assert all(len(row.shares) == len(self.parts) for row in self.rows), f"{self.title}: one share per part"


@dataclass(frozen=True)
class Report:
    """A verb's answer. `verdict` says in plain words what happened, `alarms` what must not be overlooked.

    `failure`, where there is one, ends the verb with its exit code after the report was shown.
    """

    verb: str
    data: Mapping[str, object]
    title: str
    verdict: tuple[str, ...] = ()
    sections: tuple[Section, ...] = ()
    alarms: tuple[str, ...] = ()
    failure: MfextError | None = None
