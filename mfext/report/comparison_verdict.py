"""The verdict on a sweep in plain words: who forgets how much against whom, who learns how well, what is missing."""

from __future__ import annotations

from collections.abc import Sequence

from mfext.report.groups import Estimate, Group, ratio_headline, signed_percent
from mfext.report.pruned_sweep import pruned_settings, pruning_lines
from mfext.report.quantities import MINUS, NONE, THIN, digits_for, number, plural
from mfext.report.reading import Json, mapping, objects, text
from mfext.report.verdict import Verdict

FOCAL_METHOD = "grow"
# More settings than this are not named one by one.
NAMED_AT_MOST = 3


def sweep_verdict(data: Json, groups: Sequence[Group]) -> Verdict:
    """Sentences and alarms; numbers in bits per byte, means over seeds."""
    measured = [group for group in groups if group.num_done]
    found = pruning_lines(pruned_settings(data)) or [*_forgetting(measured), *_learning(measured)]
    lines = [*found, *_certainty(measured), *_progress(data)]
    return Verdict(tuple(lines) or ("no trial has a result yet",), _alarms(data))


def focal_group(groups: Sequence[Group]) -> Group | None:
    """The setting a verdict is about: the first that grows, else the one that forgets least."""
    known = [group for group in groups if group.num_done and group.forgetting.value is not None]
    growing = [group for group in known if group.method == FOCAL_METHOD]
    return growing[0] if growing else min(known, key=lambda group: group.forgetting.value or 0.0, default=None)


def _forgetting(groups: Sequence[Group]) -> list[str]:
    focal = focal_group(groups)
    if focal is None:
        reasons = sorted({group.forgetting.reason for group in groups if group.forgetting.reason})
        return [f"forgetting is not known: {'; '.join(reasons) or 'not measured'}"] if groups else []
    value = focal.forgetting.in_bits.value
    digits = digits_for(*(each for each in (focal.forgetting.in_bits.half,) if each)) if value else 3
    amount = focal.forgetting.in_bits.shown(min(digits, 4))
    verb = "forgets" if (value or 0) >= 0 else "even improves by"
    sentence = f"{focal.name} {verb} {amount.lstrip(MINUS)} bits per byte"
    if _reaches_zero(focal.forgetting):
        sentence = f"{focal.name} forgets nothing measurable, {amount} bits per byte"
    compared = []
    for name, ratio in focal.forgetting_to.items():
        other = next((group for group in groups if group.name == name), None)
        if other is None or other is focal or other.forgetting.in_bits.value is None:
            continue
        loss = number(other.forgetting.in_bits.value, 2)
        related = "" if ratio.value is None else f" ({ratio_headline(ratio)})"
        compared.append(f"{name} {loss}{related}")
    if not compared:
        others = [group for group in groups if group is not focal and group.forgetting.in_bits.value is not None]
        compared = [f"{group.name} {number(group.forgetting.in_bits.value, 3)}" for group in others[:NAMED_AT_MOST]]
    return [", ".join([sentence, *compared])]


def _reaches_zero(of: Estimate) -> bool:
    """Whether the interval leaves room for none; a value without a spread is as certain as it looks."""
    return of.low is not None and of.high is not None and of.low < 0 < of.high


def _learning(groups: Sequence[Group]) -> list[str]:
    focal = focal_group(groups)
    if focal is None:
        return []
    gaps = {name: gap.value for name, gap in focal.learning_to.get("full", {}).items() if gap.value is not None}
    if not gaps or focal.name == "full":
        loss = focal.learned_mean.in_bits
        return [] if loss.value is None else [f"{focal.name} learns to {loss.shown(3)} bits per byte on average"]
    each = ", ".join(f"{name} {signed_percent(value)}" for name, value in gaps.items())
    highs = [gap.high for gap in focal.learning_to["full"].values()]
    known = [high for high in highs if high is not None]
    if known and len(known) == len(highs):
        each = f"{each}; the 95 % intervals reach {signed_percent(max(known))}"
    worst = max(gaps.values())
    on = "on every stage" if len(gaps) > 1 else "on its only stage"
    if worst <= 0:
        return [f"{focal.name} learns at least as well as full {on} ({each})"]
    return [f"{focal.name} learns within {number(100 * worst, 1)}{THIN}% of full {on} ({each})"]


def _certainty(groups: Sequence[Group]) -> list[str]:
    single = [group.name for group in groups if group.num_done == 1]
    if not single:
        return []
    named = ", ".join(single[:NAMED_AT_MOST])
    more = f" and {len(single) - NAMED_AT_MOST} more" if len(single) > NAMED_AT_MOST else ""
    return [f"one seed only, so no interval: {named}{more}"]


def _progress(data: Json) -> list[str]:
    states = [text(trial, "state") for trial in objects(data, "trials")]
    missing = len(states) - states.count("done")
    if not missing:
        return []
    parts = [f"{states.count(state)} {word}" for state, word in (("failed", "failed"), ("waiting", "waiting"))]
    parts = [part for part in parts if not part.startswith("0 ")]
    return [f"{states.count('done')} of {plural(len(states), 'trial')} done: {', '.join(parts) or NONE}"]


def _alarms(data: Json) -> tuple[str, ...]:
    """Broken promises of single trials, which a mean would hide."""
    done = [trial for trial in objects(data, "trials") if text(trial, "state") == "done"]
    alarms = []
    promises = (
        ("frozen_ok", "FROZEN PARTS CHANGED"),
        ("detach_equals_base", "DETACHING DOES NOT GIVE THE BASE BACK"),
    )
    for key, shout in promises:
        broken = [text(trial, "run") or text(trial, "id") for trial in done if mapping(trial, "data").get(key) is False]
        if broken:
            named = ", ".join(broken[:NAMED_AT_MOST])
            alarms.append(f"{shout} in {plural(len(broken), 'trial')}: {named}; do not use these models")
    return tuple(alarms)
