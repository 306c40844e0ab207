"""Words on a terminal: a verb's report on stdout, the story of a run on stderr.

On a stream that is no terminal nothing but plain text is written. NO_COLOR is respected. A stream whose encoding
lacks a sign gets the closest ASCII.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from typing import TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.table import Table as RichTable
from rich.text import Text as RichText

from mfext.report.blocks import KEY, heat_block
from mfext.report.progress import LiveProgress, NoProgress, PlainProgress, Progress
from mfext.report.quantities import printable
from mfext.report.report import HeatMaps, KeyValues, Report, Section, Table, Text
from mfext.report.tabular import as_tables
from mfext.requests import Invocation

PLAIN_WIDTH = 400
ASCII = str.maketrans(
    {"→": "->", "−": "-", "±": "+-", "—": "-", "·": "-", "\u202f": " ", "×": "x", "≤": "<=", "≥": ">=", "…": "..."}
)


def render(report: Report, stream: TextIO) -> None:
    """Write the report: alarms, verdict, then the sections meant for terminals."""
    console = _rich(stream)
    for alarm in report.alarms:
        _line(console, stream, RichText(f"!!! {printable(alarm)}", style="bold white on red"))
    for index, line in enumerate(report.verdict):
        _line(console, stream, RichText(printable(line), style="bold" if index == 0 else ""))
    for section in report.sections:
        if section.in_terminal:
            _section(console, stream, section)
    stream.flush()


def _is_terminal(stream: TextIO) -> bool:
    return not stream.closed and stream.isatty()


def _rich(stream: TextIO) -> RichConsole:
    terminal = _is_terminal(stream)
    return RichConsole(
        file=stream,
        force_terminal=terminal,
        force_jupyter=False,
        no_color="NO_COLOR" in os.environ,
        color_system="auto" if terminal else None,
        width=None if terminal else max(PLAIN_WIDTH, shutil.get_terminal_size((PLAIN_WIDTH, 25)).columns),
        legacy_windows=False,
        highlight=False,
        markup=False,
        emoji=False,
    )


def _writable(text: str, stream: TextIO) -> str:
    """`text` in signs that the stream's encoding has."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(ASCII).encode(encoding, "replace").decode(encoding)
    return text


def _line(console: RichConsole, stream: TextIO, text: RichText) -> None:
    text.plain = _writable(text.plain, stream)
    console.print(text, soft_wrap=not console.is_terminal)


def _section(console: RichConsole, stream: TextIO, section: Section) -> None:
    console.print()
    if isinstance(section, Text):
        if section.title:
            _line(console, stream, RichText(printable(section.title), style="bold"))
        for paragraph in section.paragraphs:
            for line in paragraph.split("\n"):
                _line(console, stream, RichText(printable(line.expandtabs(4))))
        return
    if isinstance(section, KeyValues):
        width = max((len(printable(name)) for name, _ in section.pairs), default=0)
        if section.title:
            _line(console, stream, RichText(printable(section.title), style="bold"))
        for name, value in section.pairs:
            shown = RichText.assemble((f"  {printable(name):<{width}}  ", "dim"), printable(value))
            _line(console, stream, shown)
        return
    _line(console, stream, RichText(printable(section.title), style="bold"))
    if isinstance(section, HeatMaps) and not any(each.digits or each.diverging for each in section.maps):
        _blocks(console, stream, section)
    else:
        for table in as_tables(section):
            _table(console, stream, table)
    if section.note:
        _line(console, stream, RichText(f"  {printable(section.note)}", style="dim"))


def _blocks(console: RichConsole, stream: TextIO, section: HeatMaps) -> None:
    for each in section.maps:
        unit = f" ({each.unit})" if each.unit else ""
        _line(console, stream, RichText(f"\n  {printable(each.title)}{unit}"))
        for line in heat_block(each, console.width):
            _line(console, stream, line)
    _line(console, stream, RichText(f"\n  {KEY}", style="dim"))


def _table(console: RichConsole, stream: TextIO, table: Table) -> None:
    shown = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=True, header_style="dim")
    for column in table.columns:
        words = column in table.text_columns
        header = RichText(_writable(printable(column), stream))
        shown.add_column(
            header,
            justify="left" if words else "right",
            no_wrap=not words or column == table.columns[0],
            overflow="fold",
        )
    for row in table.rows:
        shown.add_row(*(RichText(_writable(printable(cell), stream)) for cell in row))
    if console.is_terminal:
        console.print(shown)
        return
    with console.capture() as captured:
        console.print(shown)
    # Cells are padded to the column's width; nobody needs blanks at the end of a line.
    stream.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


class Console:
    """A run's voice: what it does, warnings, progress. Goes to stderr, so stdout holds the result alone."""

    def __init__(self, stream: TextIO, quiet: bool = False, verbosity: int = 0) -> None:
        self._stream = stream
        self._rich = _rich(stream)
        self._quiet = quiet
        self._verbosity = verbosity

    @classmethod
    def of(cls, invocation: Invocation) -> Console:
        """The voice a verb was asked to use."""
        return cls(sys.stderr, invocation.quiet, invocation.verbosity)

    @classmethod
    def silent(cls) -> Console:
        """Says nothing: for use from Python and in tests."""
        return cls(io.StringIO(), quiet=True)

    def say(self, text: str) -> None:
        """What happens now; silent with -q."""
        if not self._quiet:
            _line(self._rich, self._stream, RichText(printable(text)))

    def note(self, text: str) -> None:
        """A detail; only with -v."""
        if self._verbosity > 0 and not self._quiet:
            _line(self._rich, self._stream, RichText(printable(text), style="dim"))

    def warn(self, text: str) -> None:
        """What a user should know; also with -q."""
        _line(self._rich, self._stream, RichText.assemble(("warning: ", "bold yellow"), printable(text)))

    def progress(self) -> Progress:
        """A display for one fit."""
        if self._quiet:
            return NoProgress()
        if _is_terminal(self._stream) and os.environ.get("TERM") != "dumb":
            return LiveProgress(self._rich)
        return PlainProgress(lambda line: _line(self._rich, self._stream, line))
