"""The verdict on a run in plain words: what was learned, what was forgotten, whether the promises held."""

from __future__ import annotations

from dataclasses import dataclass

from mfext.report.quantities import bits, change_percent, digits_for, interval, number, plural
from mfext.report.reading import (
    Change,
    Json,
    Learned,
    change,
    changes,
    domains,
    flag,
    learned,
    mapping,
    matrix,
    text,
)
from mfext.report.reading import number as number_at

# More domains than this are summed up.
NAMED_AT_MOST = 4


@dataclass(frozen=True)
class Verdict:
    """Plain sentences, and alarms: broken promises that nobody may overlook."""

    lines: tuple[str, ...]
    alarms: tuple[str, ...] = ()


def run_verdict(data: Json) -> Verdict:
    """The verdict on the result of grow, continual or pretrain."""
    lines, alarms = _learned(data)
    if len(matrix(data)) > 1:
        lines += [_forgotten(data), *_bystanders(data)]
    promises, broken = _promises(data)
    return Verdict((*lines, *promises), (*broken, *alarms))


def in_bits(of: Change) -> Change:
    """The same change in bits per byte."""
    return Change(bits(of.difference), bits(of.low), bits(of.high), of.reason)


def includes_zero(of: Change) -> bool:
    """Whether the interval leaves room for no change."""
    return of.low is not None and of.high is not None and of.low <= 0 <= of.high


def _learned(data: Json) -> tuple[list[str], list[str]]:
    gains = learned(data)
    lines, alarms = [], []
    if not gains:
        last = matrix(data)[-1:]
        known = [(name, bits(value)) for name, value in zip(domains(data), last[0] if last else (), strict=False)]
        named = ", ".join(f"{name} {number(value, 2)}" for name, value in known[:NAMED_AT_MOST] if value is not None)
        return ([f"measured: {named} bits per byte"] if named else []), []
    for gain in gains:
        before, after = bits(gain.before), bits(gain.after)
        if after is None:
            lines.append(f"{gain.domain}: the loss after learning was not measured")
        elif before is None:
            lines.append(f"learned {gain.domain}: {number(after, 2)} bits per byte")
        else:
            sentence = f"{gain.domain}: {_from_to(before, after)} bits per byte ({change_percent(before, after)})"
            lines.append(f"{'learned' if after < before else 'did not learn'} {sentence}")
            if after >= before:
                alarms.append(f"NOTHING WAS LEARNED: the loss on {gain.domain} did not fall")
    if len(lines) > NAMED_AT_MOST:
        lines = [_learned_in_sum(gains)]
    elif len(lines) > 2 and not alarms and all(line.startswith("learned ") for line in lines):
        each = [line.removeprefix("learned ").replace(" bits per byte", "").replace(":", "") for line in lines]
        lines = [_learned_in_sum(gains), f"one by one: {', '.join(each)}"]
    return lines, alarms


def _from_to(before: float, after: float) -> str:
    digits = 2 if abs(after - before) >= 0.05 else digits_for(after - before)
    return f"{number(before, digits)} → {number(after, digits)}"


def _learned_in_sum(gains: tuple[Learned, ...]) -> str:
    pairs = [(each.before, each.after) for each in gains]
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    before, after = (sum(values) / len(known) for values in zip(*known, strict=True)) if known else (None, None)
    mean = f": {number(bits(before), 2)} → {number(bits(after), 2)} bits per byte on average" if known else ""
    return f"learned {plural(len(gains), 'domain')}{mean}"


def _forgotten(data: Json) -> str:
    """One sentence; a domain is compared with the stage that learned it, never with random weights."""
    old = changes(data, "forgetting")
    mean = in_bits(change(mapping(data, "forgetting", "mean")))
    on = f"bits per byte on {plural(len(old), 'old domain')}"
    if mean.difference is None:
        reason = mean.reason or ("no old domain was measured" if not old else "a measurement is missing")
        return f"forgetting is not known: {reason}"
    if mean.difference == 0 and mean.low in (0, None) and mean.high in (0, None):
        return f"forgot nothing: not a bit of the loss changed on {plural(len(old), 'old domain')}"
    if mean.low is None or mean.high is None:
        tail = mean.reason or "no interval"
        return f"{_verb(mean.difference)} {interval(abs(mean.difference), None, None)} {on} ({tail})"
    if includes_zero(mean):
        amount = interval(mean.difference, mean.low, mean.high)
        return f"no measurable forgetting: {amount} {on} (the 95 % interval includes 0)"
    amount = interval(mean.difference, mean.low, mean.high)
    if mean.difference < 0:
        amount = interval(-mean.difference, -mean.high, -mean.low)
    return f"{_verb(mean.difference)} {amount} {on}"


def _verb(difference: float) -> str:
    return "forgot" if difference >= 0 else "even improved by"


def _bystanders(data: Json) -> list[str]:
    moved = {name: bits(each.difference) for name, each in changes(data, "bystanders").items()}
    known = {name: value for name, value in moved.items() if value is not None}
    if not known:
        return []
    worst = max(known, key=lambda name: abs(known[name]))
    never = f"{plural(len(known), 'domain')} never trained"
    if known[worst] == 0:
        return [f"{never}: unchanged to the last bit"]
    digits = digits_for(known[worst])
    return [f"{never}: changed by at most {number(abs(known[worst]), digits)} bits per byte ({worst})"]


def _promises(data: Json) -> tuple[list[str], list[str]]:
    """Kept promises as one sentence; broken ones as alarms."""
    kept, broken = [], []
    frozen, detach, identity = (
        flag(data, "frozen_ok"),
        flag(data, "detach_equals_base"),
        number_at(data, "identity_at_growth"),
    )
    if frozen is True:
        kept.append("frozen parts bit-identical")
    elif frozen is False:
        broken.append("FROZEN PARTS CHANGED: tensors that must never move have other bytes; do not use this model")
    if text(data, "method") == "full":
        kept.append("nothing was frozen (method full)")
    if detach is True:
        kept.append("detaching gives the base back")
    elif detach is False:
        broken.append("DETACHING DOES NOT GIVE THE BASE BACK: the grown model holds other base weights")
    if identity == 0:
        kept.append("growth started as the identity")
    elif identity is not None and text(data, "mode") in ("gated", "side"):
        broken.append(f"GROWTH WAS NOT THE IDENTITY: it moved the logits by up to {identity:.2g} before any training")
    elif identity is not None:
        kept.append(f"growth itself moved the logits by up to {identity:.2g}, before any training")
    return (["; ".join(kept)] if kept else []), broken
