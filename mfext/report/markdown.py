"""A report as Markdown: the same content, pictures as tables."""

from __future__ import annotations

import re

from mfext.report.quantities import NONE, printable
from mfext.report.report import HeatMaps, Report, Section, Table, Text
from mfext.report.tabular import as_tables

SPECIAL = re.compile(r"([\\`*<>|\[\]#~&])|(?<!\w)_|_(?!\w)")


def to_markdown(report: Report) -> str:
    """GitHub-flavoured Markdown, ending in a line break. Text from data is escaped."""
    lines = [f"# {escape(report.title)}", ""]
    for alarm in report.alarms:
        lines += [f"> **{escape(alarm)}**", ""]
    lines += [f"- {escape(line)}" for line in report.verdict]
    lines += [""] if report.verdict else []
    for section in report.sections:
        lines += _section(section)
    return "\n".join(lines).rstrip("\n") + "\n"


def escape(text: str) -> str:
    """`text` so that Markdown shows it as it is."""
    return SPECIAL.sub(lambda found: "\\" + found.group(0), printable(text))


def _section(section: Section) -> list[str]:
    lines = [f"## {escape(section.title)}", ""] if section.title else []
    if isinstance(section, Text):
        return lines + [line for paragraph in section.paragraphs for line in (escape(paragraph), "")]
    if isinstance(section, HeatMaps) and section.note:
        lines += [escape(section.note), ""]
    for table in as_tables(section):
        lines += _table(table)
    return lines


def _table(table: Table) -> list[str]:
    def row(cells: tuple[str, ...]) -> str:
        return f"| {' | '.join(escape(cell) or ' ' for cell in cells)} |"

    if not table.rows:
        return [NONE, ""]
    rule = "|".join(":---" if column in table.text_columns else "---:" for column in table.columns)
    lines = [escape(table.note), ""] if table.note else []
    return [*lines, row(table.columns), f"|{rule}|", *(row(cells) for cells in table.rows), ""]
