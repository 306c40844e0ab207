"""Terminal output: plain where nobody looks at colours, and never an escape from a name."""

from __future__ import annotations

import io
from typing import Any

import pytest

from mfext.report.extras import extras_of
from mfext.report.progress import LiveProgress, NoProgress, PlainProgress
from mfext.report.report import Curves, KeyValues, Report, Series, Text
from mfext.report.sections import run_report
from mfext.report.terminal import Console, render
from mfext.requests import Invocation


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def rendered(report: Report, stream: io.StringIO) -> str:
    render(report, stream)
    return stream.getvalue()


@pytest.fixture
def report(build_result: Any) -> Report:
    result = build_result(learned=2)
    return run_report("grow", result.data, extras_of(result.data, result.raw))


@pytest.fixture
def colourful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_a_stream_that_is_no_terminal_gets_plain_text(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = rendered(report, io.StringIO())
    assert "\x1b" not in text
    assert text.startswith("learned python_code")
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert "english_prose" in text and "Expert usage" not in text


@pytest.mark.usefixtures("colourful")
def test_a_terminal_gets_colours_unless_no_color_is_set(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    alarmed = Report("grow", {}, "t", ("fine",), (), ("BROKEN",))
    assert "\x1b[1;37;41m" in rendered(alarmed, Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert ";37;41m" not in rendered(alarmed, Terminal())
    assert "learned python_code" in rendered(report, Terminal())


@pytest.mark.usefixtures("colourful")
def test_names_neither_steer_the_terminal_nor_mark_up() -> None:
    evil = "[red]x[/red]\x1b]0;t\x07\u202eabc"
    for stream in (io.StringIO(), Terminal()):
        text = rendered(Report("x", {}, evil, (evil,), (KeyValues(evil, pairs=((evil, evil),)),), (evil,)), stream)
        assert "[red]x[/red]" in text and "\x1b]" not in text and "\x07" not in text and "\u202e" not in text


def test_an_ascii_stream_gets_ascii(report: Report) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    render(report, stream)
    text = raw.getvalue().decode("ascii")
    assert "3.10 -> 1.55 bits per byte (-50 %)" in text and "?" not in text


def test_text_keeps_its_lines() -> None:
    shown = rendered(
        Report("generate", {}, "g", sections=(Text("", paragraphs=("def f():\n\treturn 1",)),)), io.StringIO()
    )
    assert "def f():\n    return 1\n" in shown


def test_every_kind_of_section_has_a_plain_form() -> None:
    curve = Curves("C", series=(Series("a", ((0.0, 1.0), (10.0, 2.0))),), x_label="tokens", y_label="bits")
    assert "a (bits)" in rendered(Report("x", {}, "x", sections=(curve,)), io.StringIO())


def test_quiet_silences_the_story_but_not_warnings() -> None:
    stream = io.StringIO()
    console = Console(stream, quiet=True)
    console.say("hello")
    console.note("detail")
    console.warn("mind the [gap]")
    assert stream.getvalue() == "warning: mind the [gap]\n"
    assert isinstance(console.progress(), NoProgress)


def test_details_are_said_only_on_request() -> None:
    stream = io.StringIO()
    Console(stream).note("detail")
    Console(stream, verbosity=1).note("more")
    assert stream.getvalue() == "more\n"


def test_a_verb_speaks_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Console.of(Invocation(json=True)).say("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_plain_progress_writes_a_line_now_and_then_and_at_the_end() -> None:
    lines: list[str] = []
    now = [0.0]
    progress = PlainProgress(lambda line: lines.append(line.plain), every_s=10, seconds=lambda: now[0])
    progress.start(100, 20, "code")
    for step in range(21, 101):
        now[0] += 1.0
        progress.update(step, {"loss_nats_per_token": 1.5, "tokens_per_s": 5000.0})
    progress.close()
    assert lines[0] == "code: training 100 steps, from step 20"
    assert lines[1] == "code: step 30/100 (30\u202f%)  loss 1.500  5\u202f000 tokens/s  1:10 left"
    assert lines[-1].endswith("done in 1:20") and len(lines) == 9


def test_progress_on_a_stream_has_no_escape_codes() -> None:
    stream = io.StringIO()
    progress = Console(stream).progress()
    progress.start(2, 0, "x")
    progress.update(2, {})
    progress.close()
    assert "\x1b" not in stream.getvalue() and "step 2/2" in stream.getvalue()


@pytest.mark.usefixtures("colourful")
def test_a_terminal_gets_a_bar_and_may_close_it_twice() -> None:
    stream = Terminal()
    progress = Console(stream).progress()
    assert isinstance(progress, LiveProgress)
    progress.start(10, 0, "[code]")
    progress.update(10, {"loss_nats_per_token": 1.5, "tokens_per_s": 5000.0, "gate_open_share": 0.97})
    progress.close()
    progress.close()
    text = stream.getvalue()
    assert "[code]" in text and "loss 1.500" in text and "gate open 97" in text


@pytest.mark.usefixtures("colourful")
def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(Console(Terminal()).progress(), PlainProgress)
