"""How far a fit is: a live bar on a terminal, plain lines elsewhere, nothing where nobody wants it.

All three follow the protocol of training: start(total, done, label), update(done, numbers), close(), where numbers
are a row of metrics.csv (`loss_nats_per_token`, `tokens_per_s`, ...).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from mfext.report.quantities import clock, number, percent, printable, whole

PLAIN_LINE_EVERY_S = 10.0


class Progress(Protocol):
    """Shows how far a fit is."""

    def start(self, total: int, done: int, label: str) -> None:
        """`done` of `total` steps are behind us; `label` names the stage."""

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        """`done` steps are behind us; `numbers` are the latest measurements."""

    def close(self) -> None:
        """The fit is over, for whatever reason."""


class NoProgress:
    """Shows nothing."""

    def start(self, total: int, done: int, label: str) -> None: ...

    def update(self, done: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def _numbers(numbers: Mapping[str, float]) -> str:
    """Loss, speed and gate, as far as they are known."""
    parts = []
    if "loss_nats_per_token" in numbers:
        parts.append(f"loss {number(numbers['loss_nats_per_token'])}")
    if "tokens_per_s" in numbers:
        parts.append(f"{whole(numbers['tokens_per_s'])} tokens/s")
    if "gate_open_share" in numbers:
        parts.append(f"gate open {percent(numbers['gate_open_share'])}")
    return "  ".join(parts)


class LiveProgress:
    """One line that redraws itself: bar, steps, loss, tokens per second, time left."""

    def __init__(self, console: RichConsole) -> None:
        self._console = console
        self._bar: RichProgress | None = None
        self._task = TaskID(0)

    def start(self, total: int, done: int, label: str) -> None:
        """Draw the bar."""
        self.close()
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(printable(label), total=total, completed=done, numbers="")
        self._bar.start()

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, numbers=_numbers(numbers))

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class PlainProgress:
    """A line of text every `every_s` seconds and at the end; no control characters."""

    def __init__(
        self,
        write: Callable[[Text], None],
        every_s: float = PLAIN_LINE_EVERY_S,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._every_s = every_s
        self._seconds = seconds
        self._total = self._first = self._done = 0
        self._label = ""
        self._begun = self._last_line = 0.0

    def start(self, total: int, done: int, label: str) -> None:
        """Say what begins."""
        self._total, self._first, self._done, self._label = total, done, done, printable(label)
        self._begun = self._last_line = self._seconds()
        at = f", from step {done}" if done else ""
        self._write(Text(f"{self._label}: training {total} steps{at}"))

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        """Say how far it is, if the last line is old enough."""
        self._done = done
        now = self._seconds()
        if done < self._total and now - self._last_line < self._every_s:
            return
        self._last_line = now
        share = percent(done / self._total) if self._total else ""
        left = (now - self._begun) / max(1, done - self._first) * (self._total - done)
        tail = f"{clock(left)} left" if done < self._total else f"done in {clock(now - self._begun)}"
        parts = (f"{self._label}: step {done}/{self._total} ({share})", _numbers(numbers), tail)
        self._write(Text("  ".join(part for part in parts if part)))

    def close(self) -> None:
        """Nothing to tidy."""
