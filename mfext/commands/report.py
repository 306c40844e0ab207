"""`mfext report`: rebuild report.html, report.md and metrics.json of a run from its raw ledger and commits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mfext.commands.outcome import run_report, verb_of, write_reports
from mfext.recipe import config_hash, recipe_of_run
from mfext.report.report import Report
from mfext.requests import DEFAULT_INVOCATION, Invocation, ReportRequest
from mfext.store import Run


def run(request: ReportRequest, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """The report of a pretrain or grow run, finished or not, also while another process goes on with it.

    Raises InputError where `request.run` is no run folder, or none of its stages is measured yet.
    """
    path = Path(request.run).expanduser()
    opened = Run.open(path, read_only=True)
    recipe = recipe_of_run(path, {})
    report = run_report(opened, verb_of(opened), recipe)
    if not report.data["finished"]:
        unfinished = f"THIS RUN IS NOT FINISHED: mfext {verb_of(opened)} --resume {path} continues it"
        report = replace(report, alarms=(*report.alarms, unfinished))
    return write_reports(opened, report, recipe.seed, config_hash(recipe))
