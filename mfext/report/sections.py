"""Turns a result (the stable JSON of cli.md, nats per byte) and raw extras into a report's sections (bits per byte)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mfext.report.curves import training_curves, within_curves
from mfext.report.experts import expert_sections, gate_sections
from mfext.report.extras import Extras, newcomers_of
from mfext.report.gate_budgets import budget_line, budget_table
from mfext.report.provenance import cost_table, definitions, lineage_table, measured_on, named_metrics, places
from mfext.report.quantities import (
    NONE,
    bits,
    change_percent,
    count,
    digits_for,
    duration,
    number,
    percent,
    plural,
    printable,
    signed,
    size,
    whole,
)
from mfext.report.reading import (
    Json,
    change,
    changes,
    domains,
    flag,
    learned,
    mapping,
    matrix,
    objects,
    role,
    stages,
    text,
)
from mfext.report.reading import number as number_at
from mfext.report.report import Bar, Bars, Card, Cards, HeatMap, KeyValues, Report, Section, Table, Tone
from mfext.report.since import changes_since_learned, row_zero, starts_from_random, stream_table
from mfext.report.switching import switch_sections
from mfext.report.verdict import in_bits, includes_zero, run_verdict

# A mean forgetting above this many bits per byte is shown as bad.
NOTABLE_FORGETTING = 0.03


def run_report(verb: str, data: Json, extras: Extras) -> Report:
    """The report of grow, continual or pretrain: verdict and all sections."""
    verdict = run_verdict(data)
    subject = ", ".join(each.domain for each in learned(data)) or ", ".join(domains(data)[:3])
    title = " · ".join(part for part in (f"mfext {verb}", printable(subject)) if part)
    return Report(verb, data, title, verdict.lines, growth_sections(data, extras), verdict.alarms)


def growth_sections(data: Json, extras: Extras) -> tuple[Section, ...]:
    """Everything a run's report shows below the verdict, in order; parts without data are left out."""
    sections: list[Section | None] = [
        _cards(data),
        stream_table(data) if len(matrix(data)) > 2 else _outcome(data),
        _loss_matrix(data),
        _change_matrix(data),
        _since_learned(data),
        _forgetting(data),
        *training_curves(extras.curves),
        within_curves(data),
        *expert_sections(extras.details, extras.newcomers),
        *gate_sections(extras.details, extras.newcomers),
        cost_table(extras.costs),
        measured_on(data, extras.facts),
        named_metrics(data),
        lineage_table(extras.lineage),
        definitions(data),
        KeyValues("Environment", pairs=tuple(extras.environment.items()), in_terminal=False),
        places(data),
    ]
    return tuple(each for each in sections if each is not None and _has_content(each))


def _has_content(section: Section) -> bool:
    parts = (
        getattr(section, name, None) for name in ("rows", "pairs", "cards", "bars", "series", "maps", "paragraphs")
    )
    return any(parts)


def _cards(data: Json) -> Cards:
    cards: list[Card] = []
    gains = learned(data)
    if len(gains) > 2:
        cards.append(
            Card("Learned", str(len(gains)), "domains", ", ".join(gain.domain for gain in gains[:2]) + ", ...")
        )
    for gain in gains if len(gains) <= 2 else ():
        before, after = bits(gain.before), bits(gain.after)
        if after is not None:
            moved = change_percent(before, after) if before is not None else ""
            detail = f"from {number(before, 2)}, {moved}" if before is not None else ""
            tone: Tone = "plain" if before is None else "good" if after < before else "bad"
            cards.append(Card(f"Learned {gain.domain}", number(after, 2), "bits per byte", detail, tone))
    mean = in_bits(change(mapping(data, "forgetting", "mean")))
    if mean.difference is not None:
        digits = digits_for(mean.difference)
        spread = _range(mean.low, mean.high, digits)
        detail = f"95 %: {spread}" if spread else mean.reason
        tone = "bad" if mean.difference > NOTABLE_FORGETTING and not includes_zero(mean) else "good"
        cards.append(Card("Forgotten, mean", signed(mean.difference, digits), "bits per byte", detail, tone))
    frozen, identity = flag(data, "frozen_ok"), number_at(data, "identity_at_growth")
    if frozen is not None:
        start = "" if identity is None else "identity at growth" if identity == 0 else f"growth moved {identity:.1g}"
        word, tone = ("identical", "good") if frozen else ("CHANGED", "bad")
        cards.append(Card("Frozen parts", word, "bit for bit" if frozen else "do not use", start, tone))
    added, total = number_at(data, "params", "added"), number_at(data, "params", "total")
    if added:
        share = f"{percent(added / total)} of {count(total)}" if total else ""
        cards.append(Card("Added", count(added), "parameters", share))
    elif total:
        cards.append(Card("Model", count(total), "parameters"))
    tokens, wall_s = number_at(data, "tokens"), number_at(data, "wall_s")
    if tokens and wall_s:
        cards.append(Card("Trained on", count(tokens), "tokens", f"in {duration(wall_s)}"))
    return Cards("Key numbers", cards=tuple(cards), in_terminal=False)


def _range(low: float | None, high: float | None, digits: int) -> str:
    return "" if low is None or high is None else f"{signed(low, digits)} to {signed(high, digits)}"


def _outcome(data: Json) -> Table | None:
    """Before, after and change per domain: the table a terminal shows."""
    rows_of = matrix(data)
    if len(rows_of) < 2:
        return None
    known = {**changes(data, "bystanders"), **changes(data, "forgetting")}
    known |= {each.domain: change(mapping(data, "learned", each.domain)) for each in learned(data)}
    digits = min(4, digits_for(*(bits(each.difference) for each in known.values())))
    rows = []
    for column, domain in enumerate(domains(data)):
        before, after = bits(rows_of[0][column]), bits(rows_of[-1][column])
        moved = None if before is None or after is None else after - before
        of = in_bits(known[domain]) if domain in known else None
        cell = _range(of.low, of.high, digits) if of else ""
        relative = change_percent(before, after) if before is not None and after is not None else ""
        rows.append(
            (
                domain,
                role(data, domain),
                number(before),
                number(after),
                signed(moved, digits),
                relative,
                cell or (of.reason if of else "") or NONE,
            )
        )
    columns = ("domain", "role", "before", "after", "change", "relative", "95 % interval")
    note = f"Bits per byte, lower is better. Before is {row_zero(data)}, after is the last stage."
    return Table(
        "Before and after",
        columns=columns,
        rows=tuple(rows),
        text_columns=("domain", "role", "95 % interval"),
        note=note,
    )


def _column_labels(data: Json) -> tuple[tuple[str, int], ...]:
    """Runs of neighbouring columns with one role."""
    groups: list[tuple[str, int]] = []
    for domain in domains(data):
        name = role(data, domain)
        if groups and groups[-1][0] == name:
            groups[-1] = (name, groups[-1][1] + 1)
        else:
            groups.append((name, 1))
    return tuple(groups) if len(matrix(data)) > 1 else ()


def _row_names(data: Json) -> tuple[str, ...]:
    return tuple(f"{index} · {name}" for index, name in enumerate(stages(data)))


def _loss_matrix(data: Json) -> HeatMap | None:
    values = tuple(tuple(bits(value) for value in row) for row in matrix(data))
    if not values or len(values) != len(stages(data)):
        return None
    return HeatMap(
        "Loss after each stage",
        rows=_row_names(data),
        columns=domains(data),
        values=values,
        unit="bits per byte",
        groups=_column_labels(data),
        missing="not measured",
        in_terminal=len(values) != 2,
        note=f"Bits per byte, lower is better. Row 0 is {row_zero(data)}.",
    )


def _since_learned(data: Json) -> HeatMap | None:
    """In a stream: how every domain moved since the stage that learned it."""
    rows = matrix(data)
    if len(rows) < 3 or len(rows) != len(stages(data)):
        return None
    never = "the first stage" if starts_from_random(data) else "row 0"
    return HeatMap(
        "Change since it was learned",
        rows=_row_names(data)[1:],
        columns=domains(data),
        values=changes_since_learned(data),
        unit="bits per byte",
        diverging=True,
        groups=_column_labels(data),
        missing="not learned yet",
        in_terminal=False,
        note="Bits per byte against the stage that learned the domain. Above zero is forgetting. "
        f"Domains never trained: against {never}.",
    )


def _change_matrix(data: Json) -> HeatMap | None:
    rows = matrix(data)
    if len(rows) < 2 or len(rows) != len(stages(data)) or starts_from_random(data):
        return None
    first = rows[0]
    values = tuple(
        tuple(bits(b - a) if a is not None and b is not None else None for a, b in zip(first, row, strict=True))
        for row in rows[1:]
    )
    return HeatMap(
        "Change from row 0",
        rows=_row_names(data)[1:],
        columns=domains(data),
        values=values,
        unit="bits per byte",
        diverging=True,
        groups=_column_labels(data),
        missing="not measured",
        in_terminal=False,
        note="Bits per byte against the untouched base. Below zero is better, above zero is forgetting.",
    )


def _forgetting(data: Json) -> Bars | None:
    old, never = changes(data, "forgetting"), changes(data, "bystanders")
    bars = []
    mean = change(mapping(data, "forgetting", "mean"))
    named = [*((name, each, "old") for name, each in old.items())]
    if len(old) > 1:
        named.append(("mean of the old", mean, ""))
    named += [(name, each, "bystander") for name, each in never.items()]
    for name, each, label in named:
        of = in_bits(each)
        bars.append(Bar(name, of.difference, of.low, of.high, label, of.reason))
    if not bars:
        return None
    untaught = "the first stage" if starts_from_random(data) else "row 0"
    stream = f"the stage that learned the domain (never trained: from {untaught})"
    since = "the base" if len(matrix(data)) < 3 else stream
    note = f"Change from {since} with 95 % interval (paired bootstrap over documents). Right of zero is forgetting."
    halves = [(bar.high - bar.low) / 2 for bar in bars if bar.low is not None and bar.high is not None]
    digits = min(4, digits_for(*(bar.value for bar in bars), *halves))
    return Bars("Forgetting", bars=tuple(bars), unit="bits per byte", digits=digits, note=note, in_terminal=False)


def evaluation_report(data: Json) -> Report:
    """The report of eval: losses, expert usage and gates of one model.

    `data["domains"]` as in cli.md, each with `gates` where there are any; `data["usage"]`: domain -> Usage.to_json();
    `data["generations"]`, where present, names the generations (a model config's, as plain JSON); `data["gates"]` holds
    their budgets, `data["switch"]` and `data["short"]` what --switch measured.
    """
    entries = {name: entry for name, entry in mapping(data, "domains").items() if isinstance(entry, Mapping)}
    rows = tuple(
        (
            name,
            number(number_at(entry, "bits_per_byte")),
            number(number_at(entry, "perplexity"), 2),
            count(number_at(entry, "tokens")),
            size(number_at(entry, "bytes")),
            whole(number_at(entry, "documents")),
        )
        for name, entry in entries.items()
    )
    usage = mapping(data, "usage")
    details = {name: {"usage": usage.get(name), "gates": objects(entry, "gates")} for name, entry in entries.items()}
    newcomers = newcomers_of(objects(data, "generations"))
    columns = ("domain", "bits per byte", "perplexity", "tokens", "text", "documents")
    sections: tuple[Section | None, ...] = (
        Table("Losses", columns=columns, rows=rows, text_columns=("domain",)),
        *expert_sections(details, newcomers),
        *(dataclasses.replace(each, in_terminal=True) for each in gate_sections(details, newcomers)),
        budget_table(data),
        *switch_sections(data),
    )
    model = text(data, "model")
    best = f"measured {model} on {plural(len(rows), 'domain')}: " + ", ".join(f"{row[0]} {row[1]}" for row in rows[:4])
    verdict = f"{best}{', ...' if len(rows) > 4 else ''} bits per byte" if rows else f"{model}: nothing was measured"
    kept = tuple(each for each in sections if each is not None and _has_content(each))
    lines = tuple(filter(None, (verdict, budget_line(data))))
    return Report("eval", data, f"mfext eval · {printable(model)}", lines, kept)
