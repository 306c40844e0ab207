"""A report's tables as files for other programs: CSV with all digits, LaTeX for a paper."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from mfext.report.quantities import MINUS, NONE, THIN, printable
from mfext.report.report import Bars, HeatMap, HeatMaps, Numbers, Report, Section, Table
from mfext.report.tabular import as_tables

SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    MINUS: "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "→": r"$\to$",
    NONE: "---",
    "–": "--",
    THIN: r"\,",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
}


def csv_files(report: Report) -> dict[str, str]:
    """File name -> CSV of every table and heat map. Full precision; an empty cell was not measured."""
    return {f"{stem}.csv": _csv(numbers_of(section)) for stem, section in _exported(report)}


def latex_files(report: Report) -> dict[str, str]:
    """File name -> a LaTeX table (booktabs) of every table and heat map, with the digits people read."""
    return {f"{stem}.tex": to_latex(as_tables(section)[0], stem) for stem, section in _exported(report)}


def _exported(report: Report) -> Iterator[tuple[str, Section]]:
    """The sections that are numbers in rows and columns, each with a file name of its own."""
    taken: set[str] = set()
    for section in report.sections:
        parts: tuple[Section, ...] = section.maps if isinstance(section, HeatMaps) else (section,)
        for part in parts:
            if isinstance(part, Table | HeatMap | Bars):
                title = f"{section.title} {part.title}" if part is not section else part.title
                stem = _stem(title, taken)
                taken.add(stem)
                yield stem, part


def _stem(title: str, taken: set[str]) -> str:
    """`title` as a file name that is not taken: lower case letters, digits and underscores."""
    plain = re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")[:80] or "table"
    names = (plain, *(f"{plain}_{number}" for number in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken)


def numbers_of(section: Section) -> Numbers:
    """What a CSV file of a section holds."""
    if isinstance(section, Table):
        if section.numbers is not None:
            return section.numbers
        return Numbers(section.columns, tuple(tuple(_plain(cell) for cell in row) for row in section.rows))
    if isinstance(section, HeatMap):
        groups = [name for name, size in section.groups for _ in range(size)]
        numbered = groups and all(column.isdigit() for column in section.columns)
        named = [f"{group} {column}" for group, column in zip(groups, section.columns, strict=True)] if numbered else ()
        rows = tuple((name, *values) for name, values in zip(section.rows, section.values, strict=True))
        return Numbers((section.unit or "row", *(named or section.columns)), rows)
    assert isinstance(section, Bars), f"{section.kind} is no table"
    bars = tuple((bar.name, bar.label, bar.value, bar.low, bar.high, bar.reason) for bar in section.bars)
    return Numbers(("name", "role", section.unit, "low", "high", "remark"), bars)


def _plain(cell: str) -> str:
    """A finished cell without typography: ASCII minus, no thin blanks inside numbers, empty for a dash."""
    if cell == NONE:
        return ""
    grouped = re.sub(rf"(?<=\d){THIN}(?=\d)", "", cell.replace(MINUS, "-"))
    return grouped.replace(THIN, " ")


def _csv(numbers: Numbers) -> str:
    """RFC 4180 with line feeds; floats in the shortest form that reads back to the same bits."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([printable(column) for column in numbers.columns])
    for row in numbers.rows:
        writer.writerow(["" if cell is None else printable(cell) if isinstance(cell, str) else cell for cell in row])
    return file.getvalue()


def to_latex(table: Table, label: str) -> str:
    """A floating table; needs the package booktabs."""
    alignment = "".join("l" if column in table.text_columns else "r" for column in table.columns)

    def row(cells: tuple[str, ...]) -> str:
        return f"    {' & '.join(escape(cell) for cell in cells)} \\\\"

    return "\n".join(
        [
            "% Needs \\usepackage{booktabs}.",
            "\\begin{table}",
            "  \\centering",
            f"  \\caption{{{escape(f'{table.title}. {table.note}'.rstrip(' '))}}}",
            f"  \\label{{tab:{label.replace('_', '-')}}}",
            f"  \\begin{{tabular}}{{{alignment}}}",
            "    \\toprule",
            row(table.columns),
            "    \\midrule",
            *(row(cells) for cells in table.rows),
            "    \\bottomrule",
            "  \\end{tabular}",
            "\\end{table}",
            "",
        ]
    )


def escape(text: str) -> str:
    """`text` so that LaTeX sets it as it is, in one pass: an escape is never escaped again."""
    return "".join(SPECIAL.get(sign, sign) for sign in printable(text))
