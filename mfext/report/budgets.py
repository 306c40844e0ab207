"""The reports of check and compare: a run against its budgets, a run against another."""

from __future__ import annotations

from collections.abc import Mapping

from mfext.report.quantities import NONE, bits, digits_for, interval, number, plural, printable, signed
from mfext.report.reading import Change, Json, as_number, change, flag, listed, mapping, objects, text
from mfext.report.reading import number as number_at
from mfext.report.report import Bar, Bars, KeyValues, Numbers, Report, Section, Table
from mfext.report.verdict import in_bits

# What a check is called in a sentence.
CHECK_NAMES = {
    "max_forgetting": "forgetting, mean of the old domains",
    "min_learned": "learned, the least of the new domains",
    "max_bystander": "rise on a domain never trained, the greatest",
    "finished": "the run is finished",
    "frozen_ok": "frozen parts are bit-identical",
    "detach_equals_base": "detaching gives the base back",
}


def check_report(data: Json) -> Report:
    """The report of check: `data["checks"]` lists {name, passed, value, limit, domain, reason}, in bits per byte."""
    failed = [str(name) for name in listed(data, "failed")]
    checks = objects(data, "checks")
    run = printable(text(data, "run"))
    if failed:
        verdict = f"{run} is over budget: {plural(len(failed), 'check')} of {len(checks)} failed ({', '.join(failed)})"
    else:
        verdict = f"{run} keeps to its budgets: {plural(len(checks), 'check')} passed"
    rows = tuple(
        (
            CHECK_NAMES.get(text(each, "name"), text(each, "name")),
            text(each, "domain"),
            number(number_at(each, "value"), 4),
            number(number_at(each, "limit"), 4),
            "passed" if flag(each, "passed") else "FAILED",
            text(each, "reason"),
        )
        for each in checks
    )
    columns = ("check", "domain", "value", "budget", "result", "remark")
    words = ("check", "domain", "result", "remark")
    used = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    edge = "the bad end of the 95 % interval" if flag(data, "strict") else "the point estimate"
    table = Table(
        "Checks",
        columns=tuple(columns[index] for index in used),
        rows=tuple(tuple(row[index] for index in used) for row in rows),
        text_columns=words,
        note=f"Bits per byte; {edge} is held to the budget.",
    )
    return Report("check", data, f"mfext check · {run}", (verdict,), (table,))


def compare_report(data: Json) -> Report:
    """The report of compare: `data["domains"]` as in cli.md, nats per byte, difference b - a."""
    entries = {name: entry for name, entry in mapping(data, "domains").items() if isinstance(entry, Mapping)}
    changed = {name: in_bits(change(entry)) for name, entry in entries.items()}
    mean = in_bits(change(mapping(data, "mean")))
    places = (("a", text(data, "run_a")), ("b", text(data, "run_b")))
    sections: tuple[Section, ...] = (
        _table(entries, changed),
        _bars(changed, mean),
        KeyValues("Compared", pairs=(*places, ("split", text(data, "split")), ("seeds", _seeds(data)))),
    )
    title = f"mfext compare · {printable(places[0][1])} · {printable(places[1][1])}"
    return Report("compare", data, title, _verdict(data, changed, mean), sections)


def _verdict(data: Json, changed: Mapping[str, Change], mean: Change) -> tuple[str, ...]:
    better = [name for name, each in changed.items() if each.high is not None and each.high < 0]
    worse = [name for name, each in changed.items() if each.low is not None and each.low > 0]
    on = plural(len(changed), "domain")
    if mean.difference == 0 and mean.low == mean.high == 0:
        lines = [f"a and b are equally good: the same loss on every document of {on}"]
    elif mean.difference is None or mean.low is None or mean.high is None or mean.low <= 0 <= mean.high:
        shown = interval(mean.difference, mean.low, mean.high)
        lines = [f"no measurable difference on average: b − a is {shown} bits per byte on {on}"]
    else:
        first, second = ("b", "a") if mean.difference < 0 else ("a", "b")
        low, high = sorted((abs(mean.low), abs(mean.high)))
        size = interval(abs(mean.difference), low, high)
        lines = [f"{first} is better than {second} by {size} bits per byte on average of {on}"]
    parts = [f"b is better on {', '.join(better)}"] if better else []
    parts += (
        [f"worse on {', '.join(worse)}"] if worse and better else [f"b is worse on {', '.join(worse)}"] * bool(worse)
    )
    lines += ["; ".join(parts)] if parts and len(changed) > 1 else []
    lines.append("one run each: this compares two models, not two methods; for that, sweep over seeds")
    return tuple(lines)


def _seeds(data: Json) -> str:
    return ", ".join(f"{side} {number(as_number(mapping(data, 'seeds').get(side)), 0)}" for side in ("a", "b"))


def _table(entries: Mapping[str, Json], changed: Mapping[str, Change]) -> Table:
    digits = min(4, digits_for(*(each.difference for each in changed.values())))
    rows, numbers = [], []
    for name, entry in entries.items():
        of = changed[name]
        a, b = bits(number_at(entry, "a")), bits(number_at(entry, "b"))
        spread = NONE if of.low is None else f"{signed(of.low, digits)} to {signed(of.high, digits)}"
        rows.append((name, number(a), number(b), signed(of.difference, digits), of.reason or spread))
        numbers.append((name, a, b, of.difference, of.low, of.high))
    units = ("a", "b", "difference", "low", "high")
    return Table(
        "Side by side",
        columns=("domain", "a", "b", "b − a", "95 % interval"),
        rows=tuple(rows),
        text_columns=("domain", "95 % interval"),
        note="Bits per byte after the last stage, lower is better. Paired bootstrap over the same documents.",
        numbers=Numbers(("domain", *(f"{unit}_bits_per_byte" for unit in units)), tuple(numbers)),
    )


def _bars(changed: Mapping[str, Change], mean: Change) -> Bars:
    bars = [Bar(name, of.difference, of.low, of.high, reason=of.reason) for name, of in changed.items()]
    if len(bars) > 1:
        bars.append(Bar("mean", mean.difference, mean.low, mean.high, reason=mean.reason))
    note = "b − a with 95 % interval; right of zero b is worse."
    digits = min(4, digits_for(*(bar.value for bar in bars)))
    return Bars("Difference", bars=tuple(bars), unit="bits per byte", digits=digits, note=note, in_terminal=False)
