"""What a sweep found: its state as data, table.csv and costs.csv, and the reports made of them.

table.csv holds only what a rerun repeats to the bit (no times, no paths); costs.csv holds the times.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence

from mfext import __version__
from mfext.commands.sweep_summary import with_groups
from mfext.report.as_json import to_json
from mfext.report.comparison import sweep_report
from mfext.report.html import to_html
from mfext.report.markdown import to_markdown
from mfext.report.reading import Json, domains, listed, mapping, number, objects, text
from mfext.report.report import Report
from mfext.store_sweep import Sweep

DONE, FAILED, WAITING = "done", "failed", "waiting"
Rows = list[list[object]]
Results = Mapping[str, Mapping[str, object]]


def write_results(sweep: Sweep, results: Results | None = None) -> Report:
    """Write the sweep's tables and reports as far as its trials are done; the report.

    `results` (trial id -> stable JSON of its run) stands in for what results.jsonl holds, where runs were read anew.
    """
    data = with_groups(sweep_data(sweep, sweep.results() if results is None else results))
    sweep.write_file("table.csv", _csv(table_rows(data)))
    sweep.write_file("costs.csv", _csv(cost_rows(data)))
    report = sweep_report(data)
    sweep.write_file("report.html", to_html(report))
    sweep.write_file("report.md", to_markdown(report))
    sweep.write_file("metrics.json", to_json(report) + "\n")
    return report


def sweep_data(sweep: Sweep, results: Results) -> dict[str, object]:
    """The stable JSON of a sweep (cli contract). `seed` is null where trials differ in it."""
    axes, failures = sweep.plan.axes(), sweep.failures()
    trials: list[dict[str, object]] = []
    for trial in sweep.plan.trials:
        data, errors = results.get(trial.id), failures.get(trial.id, [])
        state = DONE if data is not None else FAILED if errors else WAITING
        trials.append(
            {
                "id": trial.id,
                "overrides": {key: trial.overrides[key] for key in axes if key in trial.overrides},
                "state": state,
                "run": str(sweep.run_folder(trial).relative_to(sweep.path)),
                "data": data,
                "error": errors[-1] if state == FAILED else None,
                "attempts": len(errors) + (state == DONE),
            }
        )
    seeds = {trial.recipe.get("seed") for trial in sweep.plan.trials}
    identity = json.dumps([trial.config_hash for trial in sweep.plan.trials])
    return {
        "mfext_version": __version__,
        "seed": seeds.pop() if len(seeds) == 1 else None,
        "config_hash": hashlib.sha256(identity.encode()).hexdigest(),
        "sweep": str(sweep.path),
        "report": str(sweep.path / "report.html"),
        "verb": sweep.plan.verb,
        "axes": axes,
        "trials": trials,
    }


def table_rows(data: Json) -> Rows:
    """Header and one row a trial, in the sweep's order: state, axes, losses after the last stage and changes.

    Losses are in nats per byte; what was not measured is empty. `learned.D` is the change that learning D made, the
    mean of `forgetting` that of the domains known before.
    """
    axes, trials = mapping(data, "axes"), objects(data, "trials")
    columns = _domains(trials)
    # In the order of the columns: a result read back from its file has its keys sorted.
    learned = [name for name in columns if any(name in mapping(trial, "data", "learned") for trial in trials)]
    sizes = ("total", "trainable", "active_per_token", "added")
    header = [
        *("trial", "state", *axes),
        *(f"nll_per_byte.{name}" for name in columns),
        "forgetting.mean",
        *(f"learned.{name}" for name in learned),
        "frozen_ok",
        *(f"params.{name}" for name in sizes),
    ]
    rows: Rows = [list(header)]
    for trial in trials:
        losses, overrides = _last_losses(mapping(trial, "data")), mapping(trial, "overrides")
        row: list[object] = [text(trial, "id"), text(trial, "state"), *(overrides.get(key) for key in axes)]
        row += [losses.get(name) for name in columns]
        row.append(number(trial, "data", "forgetting", "mean", "difference"))
        row += [number(trial, "data", "learned", name, "difference") for name in learned]
        row.append(mapping(trial, "data").get("frozen_ok"))
        row += [mapping(trial, "data", "params").get(name) for name in sizes]
        rows.append(row)
    return rows


def cost_rows(data: Json) -> Rows:
    """Header and one row a trial: what it took, where it was run."""
    rows: Rows = [["trial", "attempts", "tokens", "wall_s", "tokens_per_s", "peak_bytes"]]
    for trial in objects(data, "trials"):
        run = mapping(trial, "data")
        stages = objects(run, "stages")
        last = stages[-1] if stages else {}
        spent = [number({**last, **run}, key) for key in ("tokens", "wall_s", "tokens_per_s")]
        rows.append([text(trial, "id"), trial.get("attempts"), *spent, number(last, "peak_bytes")])
    return rows


def _domains(trials: Sequence[Json]) -> list[str]:
    """Every domain that some trial measured, in order of appearance."""
    return list(dict.fromkeys(name for trial in trials for name in domains(mapping(trial, "data"))))


def _last_losses(run: Json) -> dict[str, object]:
    """Domain -> loss in nats per byte after the last stage."""
    rows = listed(run, "matrix", "nll_per_byte")
    last = rows[-1] if rows else ()
    return dict(zip(domains(run), last if isinstance(last, Sequence) else (), strict=True))


def _csv(rows: Rows) -> str:
    """Rows as CSV; floats in full, so that equal text means equal bits."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([[_cell(value) for value in row] for row in rows])
    return file.getvalue()


def _cell(value: object) -> str:
    if value is None:
        return ""
    return json.dumps(value, sort_keys=True) if isinstance(value, bool | float | list | dict) else str(value)
