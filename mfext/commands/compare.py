"""`mfext compare A B`: the last stages of two runs on the same documents, paired, with 95 % intervals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mfext import __version__
from mfext.commands.measuring import WITHIN
from mfext.commands.outcome import measured_stages
from mfext.config import Recipe
from mfext.errors import InputError
from mfext.metrics.bootstrap import Interval, PairedDocuments, mean_interval, pair_rows, paired_interval
from mfext.metrics.ledger import Ledger, LedgerRow
from mfext.recipe import recipe_of_run
from mfext.report.budgets import compare_report
from mfext.report.html import to_html
from mfext.report.report import Report
from mfext.requests import DEFAULT_INVOCATION, CompareRequest, Invocation
from mfext.store import Run, write_file_atomically

Key = tuple[str, str]


@dataclass(frozen=True)
class Side:
    """A run's last measured stage: its rows by (split, domain), in the order they were measured."""

    path: Path
    recipe: Recipe
    stage: str
    rows: dict[Key, LedgerRow]


def run(request: CompareRequest, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """Run b minus run a, domain by domain and in the mean.

    `data["domains"]` holds the split that run a was evaluated on, `data["splits"]` every split both were. Raises
    InputError where a path is no run, nothing is measured, no domain is in both, or the documents differ.
    """
    a, b = (_side(Path(path).expanduser()) for path in (request.run_a, request.run_b))
    common = [key for key in a.rows if key in b.rows]
    if not common:
        where = f"{_named(a)} against {_named(b)}"
        raise InputError("the runs have no domain and split in common", where, "evaluate both on a common domain")
    pairs = {key: pair_rows(a.rows[key], b.rows[key]) for key in common}
    preferred = a.recipe.evaluation.split
    split = preferred if any(key[0] == preferred for key in common) else common[0][0]
    samples = a.recipe.evaluation.bootstrap_samples
    entries = {key: _entry((a.rows[key], b.rows[key]), pair, samples, request.seed) for key, pair in pairs.items()}
    splits: dict[str, dict[str, object]] = {}
    for (of, domain), entry in entries.items():
        splits.setdefault(of, {})[domain] = entry
    measured = [pair for (of, _), pair in pairs.items() if of == split]
    data: dict[str, object] = {
        "mfext_version": __version__,
        "run_a": str(a.path),
        "run_b": str(b.path),
        "stages": {"a": a.stage, "b": b.stage},
        "seeds": {"a": a.recipe.seed, "b": b.recipe.seed},
        "split": split,
        "domains": splits[split],
        "mean": _interval_entry(mean_interval(measured, samples=samples, seed=request.seed)),
        "splits": splits,
    }
    report = compare_report(data)
    if request.out is not None:
        write_file_atomically(Path(request.out).expanduser(), to_html(report).encode("utf-8"))
    return report


def _side(path: Path) -> Side:
    opened = Run.open(path, read_only=True)
    last = measured_stages(opened)[-1]
    ledger = Ledger.from_json(opened.read_ledger())
    measured = [row for row in ledger if row.stage == last.index and row.split != WITHIN]
    rows = {(row.split, row.domain): row for row in sorted(measured, key=lambda row: row.step)}
    return Side(path, recipe_of_run(path, {}), last.name, rows)


def _named(side: Side) -> str:
    return f"{side.path} ({', '.join(sorted({domain for _, domain in side.rows}))})"


def _entry(rows: tuple[LedgerRow, LedgerRow], pair: PairedDocuments, samples: int, seed: int) -> dict[str, object]:
    found = paired_interval(pair.nats_a, pair.nats_b, pair.bytes, samples=samples, seed=seed)
    return {"a": rows[0].nats_per_byte, "b": rows[1].nats_per_byte, **_interval_entry(found)}


def _interval_entry(found: Interval) -> dict[str, object]:
    entry: dict[str, object] = {"difference": found.difference, "low": found.low, "high": found.high}
    return entry if found.reason is None else {**entry, "reason": found.reason}
