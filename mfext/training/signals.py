"""SIGTERM and SIGINT as a flag that the loop looks at between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Which signal asked to stop, if any, and whether the loop has answered it by stopping.

    `on_signal` is called with every signal received.
    """

    def __init__(self, on_signal: Callable[[int], None] | None = None) -> None:
        self.received: int | None = None
        self.answered = False
        self.on_signal = on_signal

    def install(self) -> None:
        """Take the two handlers; without effect outside the main thread, where Python has none."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self.on_signal is not None:
            self.on_signal(number)


@contextmanager
def stop_flag(on_signal: Callable[[int], None] | None = None) -> Iterator[StopFlag]:
    """A flag in place of the two handlers. At the end the former handlers come back, and get a signal
    that came too late for an answer."""
    former = [signal.getsignal(number) for number in SIGNALS]
    flag = StopFlag(on_signal)
    flag.install()
    try:
        yield flag
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in zip(SIGNALS, former, strict=True):
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            if flag.received is not None and not flag.answered:
                signal.raise_signal(flag.received)


def hold_signals(hold: bool) -> None:
    """Hold back the two signals (they arrive on release): Lightning's own handlers must not see them.

    They would broadcast from inside a signal handler, and leave without a commit.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK if hold else signal.SIG_UNBLOCK, SIGNALS)
