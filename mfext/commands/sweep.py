"""`mfext VERB -m`: every combination of values as a trial of its own, in a folder that a rerun continues.

overrides -> combinations -> recipes -> trials (by the hash of their recipe) -> sweep.json
    -> a process for each trial without a result -> results.jsonl -> table.csv and the report

Nothing here needs torch: the trials' own processes load it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mfext.commands.array_job import write_array_job
from mfext.commands.sweep_results import sweep_data, write_results
from mfext.commands.trial_processes import TrialProcesses, describe
from mfext.config import Recipe
from mfext.errors import FailedTrial, InputError, InterruptedRun
from mfext.recipe import config_hash, expand_sweep, load_recipe, parse_overrides, recipe_to_mapping
from mfext.report.quantities import plural
from mfext.report.reading import objects, text
from mfext.report.report import Report, Table
from mfext.report.terminal import Console
from mfext.requests import Invocation
from mfext.store_sweep import Sweep, SweepPlan, Trial, distinct, is_sweep_folder

ID_DIGITS = 16


@dataclass(frozen=True)
class SweepOrder:
    """A sweep as it was asked for, every recipe of it checked, and the folder it goes to."""

    path: Path
    plan: SweepPlan


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep found, and the failure its exit code comes from, if any trial failed."""

    report: Report
    failure: FailedTrial | None = None


def order_sweep(
    verb: str, recipe_name: str | None, overrides: Sequence[str], flags: Mapping[str, object] | None = None
) -> SweepOrder:
    """Compose and check every combination of the overrides' values. Raises InputError before anything is written.

    Arguments as `load_recipe`'s; overrides may hold comma lists, choice(...) and range(...). Combinations that come to
    the same recipe are one trial.
    """
    trials, folders = [], set()
    given = {key: value for key, value in (flags or {}).items() if key != "out"}
    for texts in expand_sweep(overrides):
        recipe = load_recipe(verb, recipe_name, texts, flags)
        values = {item.key: item.value for item in parse_overrides(texts)}
        trials.append(_trial(recipe, {**values, **given}))
        folders.add(recipe.out)
    if len(folders) > 1:
        raise InputError("several values", "out", "a sweep has one folder; each trial gets its own inside")
    out = folders.pop()
    path = _free_folder(verb) if out is None else Path(out).expanduser()
    swept = tuple(override.partition("=")[0].lstrip("+") for override in overrides if len(expand_sweep([override])) > 1)
    return SweepOrder(path, SweepPlan(verb, tuple(dict.fromkeys(swept)), distinct(trials)))


def run(order: SweepOrder, invocation: Invocation) -> SweepOutcome:
    """Run the trials that have no result yet, `invocation.jobs` at a time; tables and reports of the whole sweep.

    A failing trial stops no other. Raises InterruptedRun once all have committed and left, LockedError where another
    process runs this sweep.
    """
    if invocation.dry_run:
        return SweepOutcome(planned(order))
    console = Console.of(invocation)
    with Sweep.held(order.path, order.plan) as sweep:
        asked = {trial.id for trial in order.plan.trials}
        results = sweep.results()
        numbers = [number for number, trial in enumerate(sweep.plan.trials) if trial.id in asked]
        missing = [number for number in numbers if sweep.trial(number).id not in results]
        if invocation.array_job is not None:
            return SweepOutcome(write_array_job(sweep, missing, invocation))
        done = len(numbers) - len(missing)
        console.say(f"sweep {sweep.path}: {plural(len(numbers), 'trial')}, {done} done before")
        processes = TrialProcesses(sweep, invocation, console)
        try:
            processes.run(missing)
        except InterruptedRun:
            write_results(sweep)
            raise
        report = write_results(sweep)
    return SweepOutcome(report, _failure(sweep, processes.exit_codes))


def planned(order: SweepOrder) -> Report:
    """Which trials `run` would run, without running or writing any."""
    sweep = Sweep(order.path.absolute(), order.plan)
    if is_sweep_folder(order.path):
        before = Sweep.read(order.path)
        sweep = Sweep(before.path, before.plan.joined(order.plan))
    data = sweep_data(sweep, sweep.results())
    states = [text(trial, "state") for trial in objects(data, "trials")]
    rows = tuple((describe(sweep, trial), state) for trial, state in zip(sweep.plan.trials, states, strict=True))
    columns = ("trial", "state")
    verdict = f"would run {plural(len(states) - states.count('done'), 'trial')} in {sweep.path}; nothing was written"
    table = Table("Trials", columns=columns, rows=rows, text_columns=columns)
    verb = order.plan.verb
    return Report(verb, {**data, "dry_run": True}, f"mfext {verb} sweep (dry run)", (verdict,), (table,))


def _trial(recipe: Recipe, overrides: Mapping[str, object]) -> Trial:
    digest = config_hash(recipe)
    return Trial(digest[:ID_DIGITS], digest, dict(overrides), recipe_to_mapping(replace(recipe, out=None)))


def _free_folder(verb: str) -> Path:
    """The first free runs/sweep-VERB[-2, -3, ...]."""
    names = (f"sweep-{verb}", *(f"sweep-{verb}-{number}" for number in range(2, 10_000)))
    return next(Path("runs") / name for name in names if not (Path("runs") / name).exists())


def _failure(sweep: Sweep, exit_codes: Mapping[int, int]) -> FailedTrial | None:
    failed = sorted(number for number, code in exit_codes.items() if code)
    if not failed:
        return None
    trial, errors = sweep.trial(failed[0]), sweep.failures()
    what = f"{len(failed)} of {plural(len(exit_codes), 'trial')} failed"
    first = f"first {describe(sweep, trial)}: {errors[trial.id][-1]}; running the sweep again retries"
    return FailedTrial(exit_codes[failed[0]], what, sweep.path, first)
