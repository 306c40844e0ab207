"""`mfext report`: rebuild report.html, report.md and metrics.json of a run from its raw ledger and commits, or of a
sweep and its finished runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mfext.commands.outcome import run_report, verb_of, write_reports
from mfext.commands.prune_outcome import prune_report
from mfext.commands.sweep_results import write_results
from mfext.recipe import config_hash, recipe_of_run
from mfext.report.export import csv_files, latex_files
from mfext.report.report import Report
from mfext.requests import DEFAULT_INVOCATION, Invocation, ReportRequest
from mfext.store import Run, is_run_folder, write_file_atomically
from mfext.store_files import make_folders
from mfext.store_sweep import Sweep, is_sweep_folder

TABLES_NAME = "tables"


def run(request: ReportRequest, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """The report of a run or a sweep, finished or not, also while other processes go on with it.

    With `format` every table goes to tables/ as well: `data["tables"]` lists the files. Raises InputError where
    `request.run` is neither, or no stage of the run is measured yet.
    """
    path = Path(request.run).expanduser()
    report = _sweep_report(path) if is_sweep_folder(path) else _run_report(path)
    if request.format is None:
        return report
    files = csv_files(report) if request.format == "csv" else latex_files(report)
    return replace(report, data={**report.data, "tables": _write_tables(path, files)})


def _write_tables(path: Path, files: Mapping[str, str]) -> list[str]:
    """Write `files` (name -> text) into the folder's tables/; their paths."""
    folder = path / TABLES_NAME
    make_folders(folder)
    for name, text in files.items():
        write_file_atomically(folder / name, text.encode("utf-8"))
    return [str(folder / name) for name in files]


def _sweep_report(path: Path) -> Report:
    """A sweep's tables and report; its finished runs are read anew, as far as their folders are still there."""
    sweep = Sweep.read(path)
    results = dict(sweep.results())
    for trial in sweep.plan.trials:
        if trial.id in results and is_run_folder(sweep.run_folder(trial)):
            results[trial.id] = _run_report(sweep.run_folder(trial)).data
    return write_results(sweep, results)


def _run_report(path: Path) -> Report:
    opened = Run.open(path, read_only=True)
    recipe = recipe_of_run(path, {})
    verb = verb_of(opened)
    report = prune_report(opened, recipe) if verb == "prune" else run_report(opened, verb, recipe)
    if not report.data["finished"]:
        unfinished = f"THIS RUN IS NOT FINISHED: mfext {verb_of(opened)} --resume {path} continues it"
        report = replace(report, alarms=(*report.alarms, unfinished))
    return write_reports(opened, report, recipe.seed, config_hash(recipe))
