"""A report as one HTML file: style, charts and words inside, no network, no scripts."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mfext.report.charts import draw_bars, draw_curves, heat_cells, transposed
from mfext.report.quantities import percent, printable
from mfext.report.reading import number, text
from mfext.report.report import Cards, Report
from mfext.report.scatter import draw_scatter
from mfext.report.tabular import as_tables

TEMPLATES = Path(__file__).parent / "templates"


def to_html(report: Report) -> str:
    """The page. Text from data is escaped; a content policy forbids it to load anything."""
    cards = [section for section in report.sections if isinstance(section, Cards)]
    others = [section for section in report.sections if not isinstance(section, Cards)]
    seed = number(report.data, "seed")
    origin = (
        ("mfext", text(report.data, "mfext_version")),
        ("seed", "" if seed is None else str(round(seed))),
        ("config", text(report.data, "config_hash")[:12]),
    )
    return (
        _environment()
        .get_template("report.html.j2")
        .render(report=report, cards=cards, sections=others, origin=[pair for pair in origin if pair[1]])
    )


def unbroken(line: str) -> str:
    """`line` that does not break around an arrow."""
    return line.replace(" → ", "\u00a0→\u00a0")


def breakable(name: str) -> str:
    """`name` that may break after each of its underscores."""
    return name.replace("_", "_\u200b")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {"unbroken": unbroken, "breakable": breakable, "percent": percent, "printable": printable}
    environment.globals |= {
        "draw_bars": draw_bars,
        "draw_curves": draw_curves,
        "draw_scatter": draw_scatter,
        "heat_cells": heat_cells,
        "transposed": transposed,
        "as_tables": as_tables,
    }
    return environment
