"""The report of a sweep: methods side by side on one stream, every number a mean over seeds with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mfext.report.comparison_charts import change_maps, loss_maps, stream_curves, trade_off
from mfext.report.comparison_verdict import focal_group, sweep_verdict
from mfext.report.definitions import DEFINITIONS
from mfext.report.groups import (
    LN2,
    Estimate,
    Group,
    as_fraction,
    groups_of,
    ratio_headline,
    ratio_text,
    references_of,
    signed_percent,
)
from mfext.report.pruned_sweep import pruned_settings, pruning_cards, pruning_sections
from mfext.report.quantities import (
    NONE,
    count,
    digits_for,
    duration,
    number,
    percent,
    plural,
    printable,
    signed,
    whole,
)
from mfext.report.reading import Json, listed, mapping, objects, text
from mfext.report.reading import number as number_at
from mfext.report.report import Card, Cards, KeyValues, Numbers, Report, Section, Table
from mfext.report.setting_names import Shorts, short_of, short_values

BITS = "bits per byte"


def sweep_report(data: Json) -> Report:
    """The report of a sweep: `data` as cli.md's, with the `groups` and `references` of commands/sweep_summary.py.

    Trials are `{id, overrides, state: done|failed|waiting, run, data, error}`; a failed one becomes a row, no hole.
    """
    groups = groups_of(data)
    verdict = sweep_verdict(data, groups)
    measured = tuple(group for group in groups if group.num_done)
    pruned = pruned_settings(data)
    compared = (trade_off(measured), _side_by_side(data, measured), _learning(data, measured))
    sections: tuple[Section, ...] = (
        _cards(data, measured),
        *pruning_sections(pruned),
        *(replace(each, in_terminal=each.in_terminal and not pruned) for each in compared),
        stream_curves(measured),
        change_maps(measured),
        loss_maps(measured),
        _cost(measured),
        _trials(data),
        _unfinished(data),
        _definitions(),
        _places(data),
    )
    title = f"mfext {text(data, 'verb')} sweep · {printable(', '.join(group.name for group in groups[:4]))}"
    title = f"{title} and {len(groups) - 4} more" if len(groups) > 4 else title
    kept = tuple(each for each in sections if _has_content(each))
    return Report(text(data, "verb"), data, title, verdict.lines, kept, verdict.alarms)


def _has_content(section: Section) -> bool:
    return any(getattr(section, name, None) for name in ("rows", "pairs", "cards", "points", "charts", "maps"))


def _cards(data: Json, groups: Sequence[Group]) -> Cards:
    cards = pruning_cards(pruned_settings(data)) or _change_cards(groups)
    if not cards:
        return Cards("Key numbers")
    states = [text(trial, "state") for trial in objects(data, "trials")]
    cards.append(Card("Trials", f"{states.count('done')} of {len(states)}", "done", plural(len(groups), "setting")))
    return Cards("Key numbers", cards=tuple(cards), in_terminal=False)


def _change_cards(groups: Sequence[Group]) -> list[Card]:
    """What the focal setting forgot and learned."""
    focal = focal_group(groups)
    if focal is None:
        return []
    cards: list[Card] = []
    forgotten = focal.forgetting.in_bits
    if forgotten.value is not None:
        digits = digits_for(forgotten.value)
        half = "" if forgotten.half is None else f"± {number(forgotten.half, digits)}"
        cards.append(Card(f"Forgotten by {focal.name}", signed(forgotten.value, digits), BITS, half, "good"))
    for name, ratio in focal.forgetting_to.items():
        if name != focal.name and ratio.value is not None:
            cards.append(Card(f"Against {name}", ratio_headline(ratio), "of its forgetting", _spread(ratio)))
    gaps = {domain: gap.value for domain, gap in focal.learning_to.get("full", {}).items() if gap.value is not None}
    if gaps and focal.name != "full":
        worst = max(gaps, key=lambda domain: gaps[domain])
        cards.append(Card("Learning against full", signed_percent(gaps[worst]), "of the loss, at worst", worst))
    return cards


def _spread(ratio: Estimate) -> str:
    """The interval in words, where there is one that stays above 0."""
    if ratio.low is None or ratio.low <= 0 or ratio.half == 0:
        return ""
    return f"95 %: {as_fraction(ratio.low)} to {as_fraction(ratio.high)}"


def _side_by_side(data: Json, groups: Sequence[Group]) -> Table:
    """One row per setting: what it forgot, against the references, what it learned, what it took."""
    references = references_of(data)
    halves = [group.forgetting.in_bits.half for group in groups]
    digits = min(4, digits_for(*(half for half in halves if half), *(g.forgetting.in_bits.value for g in groups)))
    rows = tuple(
        (
            group.name,
            group.seeds,
            group.forgetting.in_bits.shown(digits),
            *(NONE if name == group.name else _ratio(group, name) for name in references),
            group.learned_mean.in_bits.shown(3),
            signed(group.bystanders.in_bits.value, 3),
            count(number_at(group.data, "params", "total")),
        )
        for group in groups
    )
    against = tuple(f"to {name}" for name in references)
    columns = ("setting", "seeds", "forgotten", *against, "learned", "bystanders", "parameters")
    note = (
        "Forgotten: mean rise of the loss on all domains learned before the last stage. Learned: mean loss on each "
        "new domain right after its stage. Bystanders: mean rise on domains never trained. All in bits per byte, lower "
        "is better, ± half the 95 % interval over seeds (Student's t)."
    )
    unknown = [group for group in groups if group.forgetting.value is None]
    reasons = sorted({f"{group.name}: {group.forgetting.reason}" for group in unknown if group.forgetting.reason})
    note = f"{note} {'; '.join(reasons)}." if reasons else note
    return Table(
        "Side by side", columns=columns, rows=rows, text_columns=("setting",), note=note, numbers=_numbers(data, groups)
    )


def _ratio(group: Group, reference: str) -> str:
    of = group.forgetting_to.get(reference, Estimate())
    return ratio_text(of) if of.value is not None else NONE


def _numbers(data: Json, groups: Sequence[Group]) -> Numbers:
    references = references_of(data)
    measures = ("forgetting", "learned_mean", "bystanders")
    ends = ("", "_low", "_high")
    columns = (
        *("setting", "num_seeds"),
        *(f"{name}{end}_bits_per_byte" for name in measures for end in ends),
        *(f"forgetting_to_{name}{end}" for name in references for end in ends),
        *("params_total", "params_trainable", "params_active_per_token", "tokens", "tokens_per_s", "wall_s"),
    )
    rows = []
    for group in groups:
        estimates = [each.in_bits for each in (group.forgetting, group.learned_mean, group.bystanders)]
        estimates += [group.forgetting_to.get(name, Estimate()) for name in references]
        params = [number_at(group.data, "params", key) for key in ("total", "trainable", "active_per_token")]
        cost = [number_at(group.data, key) for key in ("tokens", "tokens_per_s", "wall_s")]
        ranges = [edge for each in estimates for edge in (each.value, each.low, each.high)]
        rows.append((group.name, group.num_done, *ranges, *params, *cost))
    return Numbers(columns, tuple(rows))


def _learning(data: Json, groups: Sequence[Group]) -> Table:
    """Per setting and domain the loss right after its stage, and how far that is from full fine-tuning."""
    domains = list(dict.fromkeys(domain for group in groups for domain in group.learned))
    relative = "full" in references_of(data)
    rows = tuple((group.name, *(_learned_cell(group, domain) for domain in domains)) for group in groups)
    numbers = tuple(
        (group.name, domain, each.in_bits.value, each.in_bits.low, each.in_bits.high, _gap(group, domain).value)
        for group in groups
        for domain, each in group.learned.items()
    )
    columns = ("setting", "domain", *(f"{end}_bits_per_byte" for end in ("loss", "low", "high")), "to_full_share")
    note = "Bits per byte on each new domain right after the stage that learned it, mean over seeds ± half the interval"
    note += "; in brackets how much higher (+) or lower that loss is than full's." if relative else "."
    return Table(
        "Learned, domain by domain",
        columns=("setting", *domains),
        rows=rows if domains else (),
        text_columns=("setting",),
        note=note,
        numbers=Numbers(columns, numbers),
    )


def _gap(group: Group, domain: str) -> Estimate:
    return group.learning_to.get("full", {}).get(domain, Estimate())


def _learned_cell(group: Group, domain: str) -> str:
    loss, gap = group.learned.get(domain, Estimate()), _gap(group, domain)
    relative = "" if gap.value is None or group.name == "full" else f" ({signed_percent(gap.value)})"
    return f"{loss.in_bits.shown(3)}{relative}"


def _cost(groups: Sequence[Group]) -> Table:
    columns = ("setting", "parameters", "trained", "added", "active a token", "tokens", "time", "tokens/s")
    sizes = ("total", "trainable", "added", "active_per_token")
    rows = tuple(
        (
            group.name,
            *(count(number_at(group.data, "params", key)) for key in sizes),
            count(number_at(group.data, "tokens")),
            duration(number_at(group.data, "wall_s")),
            whole(number_at(group.data, "tokens_per_s")),
        )
        for group in groups
    )
    note = "Parameters of the last stage; tokens and time of the whole stream, mean over seeds."
    return Table("Cost", columns=columns, rows=rows, text_columns=("setting",), note=note, in_terminal=False)


def _shorts(data: Json) -> Shorts:
    return short_values(mapping(trial, "overrides") for trial in objects(data, "trials"))


def _setting_of(trial: Json, shorts: Shorts) -> str:
    return ", ".join(f"{key}={short_of(shorts, key, value)}" for key, value in mapping(trial, "overrides").items())


def _trials(data: Json) -> Table:
    """Every finished trial, so that a mean can be taken apart."""
    rows, numbers, shorts = [], [], _shorts(data)
    for trial in objects(data, "trials"):
        if text(trial, "state") != "done":
            continue
        settings = _setting_of(trial, shorts)
        forgotten = number_at(trial, "data", "forgetting", "mean", "difference")
        shown = None if forgotten is None else forgotten / LN2
        wall_s = number_at(trial, "data", "wall_s")
        rows.append((text(trial, "id")[:12], settings, signed(shown, 4), duration(wall_s), text(trial, "run")))
        numbers.append((text(trial, "id"), settings, shown, wall_s, text(trial, "run")))
    columns = ("trial", "setting", "forgotten", "time", "run")
    return Table(
        "Trials",
        columns=columns,
        rows=tuple(rows),
        text_columns=("trial", "setting", "run"),
        note="Mean forgetting in bits per byte.",
        numbers=Numbers(("trial", "setting", "forgetting_bits_per_byte", "wall_s", "run"), tuple(numbers)),
        in_terminal=False,
    )


def _unfinished(data: Json) -> Table:
    shorts = _shorts(data)
    rows = tuple(
        (
            text(trial, "id")[:12],
            _setting_of(trial, shorts),
            text(trial, "state"),
            text(trial, "error")
            or ("not started or cut off" if text(trial, "state") != "failed" else "no reason kept"),
        )
        for trial in objects(data, "trials")
        if text(trial, "state") != "done"
    )
    columns = ("trial", "setting", "state", "reason")
    return Table(
        "Trials without a result",
        columns=columns,
        rows=rows,
        text_columns=columns,
        note="Running the same sweep again retries what failed and finishes what waits.",
    )


def _definitions() -> KeyValues:
    words = ("bits per byte", "95 % interval over seeds", "ratio of forgetting", "Pareto front", "bystander")
    return KeyValues("Definitions", pairs=tuple((word, DEFINITIONS[word]) for word in words), in_terminal=False)


def _places(data: Json) -> KeyValues:
    pairs = [("sweep", text(data, "sweep")), ("report", text(data, "report"))]
    axes = mapping(data, "axes")
    pairs += [(key, ", ".join(str(value) for value in listed(axes, key))) for key in axes]
    failed = sum(text(trial, "state") == "failed" for trial in objects(data, "trials"))
    if failed:
        pairs.append(("failed", f"{plural(failed, 'trial')}, {percent(failed / len(objects(data, 'trials')))}"))
    return KeyValues("Where things are", pairs=tuple(pair for pair in pairs if pair[1]))
