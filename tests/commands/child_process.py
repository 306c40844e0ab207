"""Command lines in child processes that may be killed. A fork server imports torch once for all of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

PATIENCE_S = 120.0


def fork_server() -> ForkServerContext:
    """A server that has imported what `grow` needs; call where the environment says PYTHONPATH."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.commands.child_process", "mfext.commands.grow"])
    return context


def _main(words: list[str], log: str) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from mfext.cli import main

    torch.set_num_threads(1)
    code = main(words)
    sys.stdout.flush()
    os._exit(code)


def start(context: ForkServerContext, words: Sequence[str], log: Path) -> ForkServerProcess:
    """Begin one command line; its output goes to `log`."""
    process = context.Process(target=_main, args=(list(words), str(log)))
    process.start()
    return process


def finish(process: ForkServerProcess) -> int:
    """Wait for the exit code; negative for the signal that ended it."""
    process.join(PATIENCE_S)
    assert process.exitcode is not None, "the command line did not end in time"
    return process.exitcode


def kill_when(process: ForkServerProcess, ripe: Callable[[], bool], number: int = signal.SIGKILL) -> bool:
    """Send a signal as soon as `ripe` says so; False where the process ended before."""
    deadline = time.monotonic() + PATIENCE_S
    while process.is_alive() and time.monotonic() < deadline:
        if ripe():
            assert process.pid is not None
            os.kill(process.pid, number)
            return True
        time.sleep(0.005)
    return False
