"""`mfext check RUN`: hold a run to budgets. What is over budget ends in exit code 5, after the report was shown.

A budget is held against the point estimate; with `strict` against the bad end of the 95 % interval, so that a run
passes only where its documents leave no room for doubt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mfext.commands.outcome import run_data, verb_of
from mfext.errors import BudgetError
from mfext.recipe import recipe_of_run
from mfext.report.budgets import check_report
from mfext.report.reading import Change, Json, change, changes, mapping
from mfext.report.report import Report
from mfext.requests import DEFAULT_INVOCATION, CheckRequest, Invocation
from mfext.store import Run

PROMISES = ("finished", "frozen_ok", "detach_equals_base")


@dataclass(frozen=True)
class Check:
    """One budget or promise. `value` and `limit` in bits per byte, None where the check has no number."""

    name: str
    passed: bool
    value: float | None = None
    limit: float | None = None
    domain: str = ""
    reason: str = ""


def run(request: CheckRequest, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """Check a run's budgets and promises from its raw ledger; `failure` of the report says what failed.

    Raises InputError where `request.run` is no run or nothing of it is measured.
    """
    path = Path(request.run).expanduser()
    opened = Run.open(path, read_only=True)
    checks = check_all(run_data(opened, recipe_of_run(path, {}), verb_of(opened)), request)
    failed = [each.name for each in checks if not each.passed]
    data: dict[str, object] = {
        "run": str(path),
        "passed": not failed,
        "failed": failed,
        "strict": request.strict,
        "checks": [asdict(each) for each in checks],
    }
    report = check_report(data)
    if not failed:
        return report
    worst = next(each for each in checks if not each.passed)
    return replace(report, failure=BudgetError("over budget", path, f"failed: {', '.join(failed)}; {_said(worst)}"))


def check_all(data: Json, request: CheckRequest) -> list[Check]:
    """Every budget that was given, then the promises: finished, frozen parts identical, detach exact."""
    checks = []
    if request.max_forgetting is not None:
        mean = change(mapping(data, "forgetting", "mean"))
        checks.append(_at_most("max_forgetting", {"": mean}, request.max_forgetting, request.strict))
    if request.min_learned is not None:
        gains = {name: _gain(entry) for name, entry in mapping(data, "learned").items() if isinstance(entry, Mapping)}
        checks.append(_at_least("min_learned", gains, request.min_learned, request.strict))
    if request.max_bystander is not None:
        moved = changes(data, "bystanders")
        checks.append(_at_most("max_bystander", moved, request.max_bystander, request.strict))
    # None: the method freezes or detaches nothing, so that there is nothing to promise.
    return checks + [Check(name, data.get(name) is not False) for name in PROMISES if data.get(name) is not None]


def _gain(entry: Json) -> Change:
    """What was learned, above 0 is good: the loss before minus after."""
    fall = change(entry)
    flipped = [None if edge is None else -edge for edge in (fall.difference, fall.high, fall.low)]
    return Change(flipped[0], flipped[1], flipped[2], fall.reason)


def _at_most(name: str, values: Mapping[str, Change], limit: float, strict: bool) -> Check:
    """The largest value against an upper limit; one that is not known fails."""
    edges = {domain: each.high if strict else each.difference for domain, each in values.items()}
    return _against(name, values, edges, limit, 1)


def _at_least(name: str, values: Mapping[str, Change], limit: float, strict: bool) -> Check:
    """The smallest value against a lower limit; one that is not known fails."""
    edges = {domain: each.low if strict else each.difference for domain, each in values.items()}
    return _against(name, values, edges, limit, -1)


def _against(
    name: str, values: Mapping[str, Change], edges: Mapping[str, float | None], limit: float, sign: int
) -> Check:
    known = {domain: edge / math.log(2) for domain, edge in edges.items() if edge is not None}
    unknown = [domain for domain in edges if domain not in known]
    if unknown or not known:
        domain = unknown[0] if unknown else ""
        reason = values[domain].reason if unknown else "no such domain was measured"
        return Check(name, False, None, limit, domain, reason or "not measured")
    worst = max(known, key=lambda domain: sign * known[domain])
    return Check(name, sign * known[worst] <= sign * limit, known[worst], limit, worst)


def _said(check: Check) -> str:
    """A failed check in a few words."""
    if check.limit is None:
        return f"{check.name} is false"
    of = f" ({check.domain})" if check.domain else ""
    value = check.reason if check.value is None else f"{check.value:.4f}"
    return f"{check.name}{of} is {value} where {check.limit:g} bits per byte is the budget"
