"""A sweep's trials on this machine: so many processes at a time, stopped together, their ends recorded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from mfext.errors import InterruptedRun
from mfext.report.quantities import clock
from mfext.report.setting_names import short_of, short_values
from mfext.report.terminal import Console
from mfext.requests import Invocation
from mfext.store_sweep import Sweep, Trial
from mfext.training.signals import stop_flag

POLL_S = 0.05
KILLED_EXIT_CODE = 4
GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass
class _Running:
    number: int
    process: subprocess.Popen[bytes]
    failures_before: int
    told_to_stop: bool = False
    begun_s: float = field(default_factory=time.monotonic)


class TrialProcesses:
    """Runs trials of one sweep, each in a process of its own: its memory, threads and death are its own affair."""

    def __init__(self, sweep: Sweep, invocation: Invocation, console: Console) -> None:
        self.sweep, self.invocation, self.console = sweep, invocation, console
        self.exit_codes: dict[int, int] = {}
        self._total = 0

    def run(self, numbers: Sequence[int]) -> None:
        """Run the trials of these numbers; `exit_codes` has that of each that ended.

        SIGTERM and SIGINT are passed on; once all trials have committed and left, InterruptedRun is raised.
        """
        waiting, running = deque(numbers), dict[int, _Running]()
        self._total = len(waiting)
        with stop_flag() as stop:
            try:
                while running or (waiting and stop.received is None):
                    free = [slot for slot in range(self.invocation.jobs) if slot not in running]
                    while free and waiting and stop.received is None:
                        slot = free.pop(0)
                        running[slot] = self._start(waiting.popleft(), slot)
                    for slot, each in list(running.items()):
                        if each.process.poll() is not None:
                            del running[slot]
                            self._settle(each, stopping=stop.received is not None)
                        elif stop.received is not None and not each.told_to_stop:
                            each.process.terminate()
                            each.told_to_stop = True
                    time.sleep(POLL_S)
            finally:
                _end(list(running.values()))
            if stop.received is not None:
                stop.answered = True
                where, name = self.sweep.path, signal.Signals(stop.received).name
                fix = f"the same command with --out {where} continues it"
                raise InterruptedRun(stop.received, f"sweep stopped by {name}", where, fix)

    def _start(self, number: int, slot: int) -> _Running:
        trial, invocation = self.sweep.trial(number), self.invocation
        words = [sys.executable, "-m", "mfext", "trial", str(self.sweep.path)]
        words += ["--number", str(number), "--follow", str(os.getpid())]
        words += ["--quiet"] * invocation.quiet + ["--verbose"] * invocation.verbosity + ["--debug"] * invocation.debug
        if invocation.jobs > 1:
            words += ["--threads", str(share_of_cores(trial, invocation.jobs))]
        failures = len(self.sweep.failures().get(trial.id, ()))
        with self.sweep.log_file(trial).open("ab") as log:
            # A group of its own: Ctrl-C reaches this process alone, which passes it on once.
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log if invocation.jobs > 1 else None,
                env=_environment(slot, invocation.jobs),
                process_group=0,
            )
        return _Running(number, process, failures)

    def _settle(self, ended: _Running, stopping: bool) -> None:
        trial, code = self.sweep.trial(ended.number), ended.process.returncode
        took = clock(time.monotonic() - ended.begun_s)
        if stopping and code != 0:
            self._say(trial, f"stopped after {took}, to be continued")
            return
        self.exit_codes[ended.number] = exit_code_of(code)
        if code == 0:
            self._say(trial, f"done in {took}")
            return
        errors = self.sweep.failures().get(trial.id, [])
        if len(errors) == ended.failures_before:
            errors = [how_it_ended(code)]
            self.sweep.record_failure(trial, errors[-1])
        self._say(trial, f"failed after {took}: {errors[-1]}")

    def _say(self, trial: Trial, what: str) -> None:
        """One line a trial: how many have ended in this process, which it is, what became of it."""
        self.console.say(f"[{len(self.exit_codes)}/{self._total}] {describe(self.sweep, trial)}: {what}")


def describe(sweep: Sweep, trial: Trial) -> str:
    """A trial by its id and what sets it apart: '0f3c... method=grow seed=1'."""
    shorts = short_values(each.overrides for each in sweep.plan.trials)
    named = [key for key in sweep.plan.axes() if key in trial.overrides]
    values = (f"{key}={short_of(shorts, key, trial.overrides[key])}" for key in named)
    return " ".join((trial.id, *values))


def share_of_cores(trial: Trial, jobs: int) -> int:
    """Threads for each process of a trial where `jobs` trials share this machine's cores; at least 1."""
    trainer = trial.recipe.get("trainer")
    devices = trainer.get("devices", 1) if isinstance(trainer, dict) else 1
    return max(1, (os.cpu_count() or 1) // (jobs * devices))


def exit_code_of(returncode: int) -> int:
    """A process's end as an exit code of cli.md's: 4 where the system killed it, 128 + signal for other signals."""
    if returncode == -signal.SIGKILL:
        return KILLED_EXIT_CODE
    return returncode if returncode >= 0 else 128 - returncode


def how_it_ended(returncode: int) -> str:
    """Words for a process that left without a reason of its own."""
    if returncode == -signal.SIGKILL:
        return "killed by SIGKILL: memory may have run out; use fewer --jobs or a smaller model"
    return f"ended by signal {-returncode}" if returncode < 0 else f"ended with exit code {returncode}; see its log"


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """This process's environment; the GPUs it names are dealt out where there are enough for every slot."""
    devices = [name for name in os.environ.get(GPUS, "").split(",") if name]
    if jobs == 1 or len(devices) < jobs:
        return dict(os.environ)
    return {**os.environ, GPUS: ",".join(devices[slot::jobs])}


def _end(running: Sequence[_Running]) -> None:
    """Stop and wait for what still runs; nothing does unless this process failed."""
    for each in running:
        each.process.terminate()
    for each in running:
        each.process.wait()
