"""`mfext trial`: one trial of a planned sweep, by its number. A sweep starts one process of these for each trial; so do
an array job's tasks, Ray, or anything else that can run a command.

sweep.json -> recipe -> the verb's own command, new or resumed -> one line in results.jsonl or failures.jsonl
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

from mfext.config import Recipe
from mfext.errors import InterruptedRun, LockedError, MfextError
from mfext.recipe import check_recipe_verb, recipe_from_mapping
from mfext.report.report import Report
from mfext.report.terminal import Console
from mfext.requests import DEFAULT_INVOCATION, Invocation, TrialRequest
from mfext.store_files import lock_run
from mfext.store_runs import is_run_folder
from mfext.store_sweep import Sweep, Trial

LOCK_PATIENCE_S = 60.0
"""How long to wait for another process to leave the trial's run: one that lost its sweep is committing, and goes."""


def run(request: TrialRequest, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """Run one trial to its end and record what became of it; one that is done is left alone.

    Raises what the verb's command raises; all but an interruption is recorded in failures.jsonl.
    """
    if request.follow is not None:
        _leave_with(request.follow)
    console = Console.of(invocation)
    sweep = Sweep.read(Path(request.run))
    trial = sweep.trial(request.number)
    done = sweep.results().get(trial.id)
    if done is not None:
        return Report("trial", done, f"mfext trial {trial.id}", (f"trial {request.number} is done already",))
    try:
        report = _attempt(sweep, trial, invocation, console)
    except (InterruptedRun, KeyboardInterrupt):
        raise
    except BaseException as error:
        kind = "" if isinstance(error, MfextError) else f"{type(error).__name__}: "
        sweep.record_failure(trial, " ".join(f"{kind}{error}".split()))
        raise
    sweep.record_result(trial, report.data)
    return report


def _attempt(sweep: Sweep, trial: Trial, invocation: Invocation, console: Console) -> Report:
    command = importlib.import_module(f"mfext.commands.{check_recipe_verb(sweep.plan.verb)}")
    folder = sweep.run_folder(trial)
    _wait_for(folder, console)
    # A folder torn before its recipe was committed begins anew; a run that is finished has nothing left to do.
    resume = str(folder) if is_run_folder(folder) else None
    recipe = _placed(recipe_from_mapping(trial.recipe), folder, invocation.threads)
    report: Report = command.run(recipe, replace(invocation, resume=resume, threads=recipe.trainer.threads))
    return report


def _placed(recipe: Recipe, folder: Path, threads: int | None) -> Recipe:
    """The recipe with its folder, and with the threads it gets here where it does not say itself.

    Threads given on the command line of the sweep are in the recipe and part of a trial's identity; a share of the
    cores that depends on how many trials run beside it is not.
    """
    trainer = recipe.trainer
    if trainer.threads is None and threads is not None:
        trainer = replace(trainer, threads=threads)
    return replace(recipe, out=str(folder), trainer=trainer)


def _wait_for(folder: Path, console: Console) -> None:
    """Return once no other process holds the trial's run. Raises LockedError where one stays."""
    deadline, said = time.monotonic() + LOCK_PATIENCE_S, False
    while folder.is_dir():
        try:
            os.close(lock_run(folder))
            return
        except LockedError as error:
            if time.monotonic() > deadline:
                raise
            if not said:
                console.say(f"waiting: {error}")
            said = True
            time.sleep(0.2)


def _leave_with(process: int) -> None:
    """Stop as SIGTERM does (commit, exit 143) once `process`, which started this one, is gone.

    Without it a killed sweep would leave trials that train on beside those of the sweep that continues it.
    """

    def watch() -> None:
        while os.getppid() == process:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="leave-with-sweep", daemon=True).start()
