"""Typed looks into a sweep's groups: trials that differ only in their seed, summed up by commands/sweep_summary.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from mfext.report.quantities import NONE, THIN, interval, number, signed
from mfext.report.reading import Json, listed, mapping, objects, text
from mfext.report.reading import number as number_at

LN2 = math.log(2)
ONE_SEED, NOT_TESTABLE = "1 seed", "not testable"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval; `reason` says why the value or the interval is missing."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""

    @property
    def in_bits(self) -> Estimate:
        """Nats turned to bits."""
        value, low, high = (None if each is None else each / LN2 for each in (self.value, self.low, self.high))
        return Estimate(value, low, high, self.reason)

    @property
    def half(self) -> float | None:
        """Half the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def shown(self, digits: int = 3) -> str:
        """'0.006 ± 0.003', or the value alone where there is no interval."""
        if self.value is not None and self.half == 0:
            return number(self.value, digits)
        return interval(self.value, self.low, self.high, digits)


@dataclass(frozen=True)
class Group:
    """What the seeds of one setting have in common. Losses in nats per byte.

    `forgetting_to`: this group's mean forgetting divided by a reference's. `learning_to`: reference -> domain -> how
    much higher the loss after learning is, as a share (0.02 is 2 % worse). `within`: domain -> (step, loss).
    """

    name: str
    data: Json
    forgetting: Estimate
    learned_mean: Estimate
    bystanders: Estimate
    learned: Mapping[str, Estimate] = field(default_factory=dict)
    forgetting_to: Mapping[str, Estimate] = field(default_factory=dict)
    learning_to: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The training method."""
        return text(self.data, "method")

    @property
    def num_done(self) -> int:
        """Trials that finished."""
        return round(number_at(self.data, "num_done") or 0)

    @property
    def num_trials(self) -> int:
        """Trials asked for."""
        return round(number_at(self.data, "num_trials") or 0)

    @property
    def seeds(self) -> str:
        """Finished trials of all, as '3' or '2 of 3'."""
        return str(self.num_done) if self.num_done == self.num_trials else f"{self.num_done} of {self.num_trials}"


def groups_of(data: Json) -> tuple[Group, ...]:
    """The groups of `data["groups"]`, in the sweep's order."""
    return tuple(_group(each) for each in objects(data, "groups"))


def references_of(data: Json) -> tuple[str, ...]:
    """Names of the groups that others are compared with: as far as they exist, replay and full."""
    return tuple(str(name) for name in listed(data, "references"))


def estimate(data: Json, *keys: str) -> Estimate:
    """The object {estimate, low, high, reason} at a path of keys."""
    at = mapping(data, *keys)
    return Estimate(number_at(at, "estimate"), number_at(at, "low"), number_at(at, "high"), text(at, "reason"))


def _group(data: Json) -> Group:
    return Group(
        text(data, "name"),
        data,
        estimate(data, "forgetting"),
        estimate(data, "learned_mean"),
        estimate(data, "bystanders"),
        {name: estimate(data, "learned", name) for name in mapping(data, "learned")},
        {name: estimate(data, "forgetting_to", name) for name in mapping(data, "forgetting_to")},
        {
            name: {domain: estimate(data, "learning_to", name, domain) for domain in mapping(data, "learning_to", name)}
            for name in mapping(data, "learning_to")
        },
    )


def as_fraction(share: float | None) -> str:
    """A ratio as people say it: '1/52', '3.2 ×', '0' at or below zero."""
    return _ratio_words(share, is_small(share))


def is_small(share: float | None) -> bool:
    """Whether a ratio is said as a fraction."""
    return share is not None and 0 < share <= 1 / 1.5


def _ratio_words(share: float | None, as_part: bool) -> str:
    if share is None:
        return NONE
    if share <= 0:
        return "0"
    if as_part and share <= 1:
        return f"1/{number(1 / share, 0 if 1 / share >= 9.5 else 1)}"
    return f"{number(share, 2 if share < 9.95 else 0)}{THIN}×"


def ratio_headline(of: Estimate) -> str:
    """A ratio in one word, never finer than it is known: 'under 1/2533' where its interval reaches 0.

    'not testable' where there are seeds enough and still no interval: the reference's own forgetting may be 0.
    """
    if of.value is None:
        return NONE
    if of.low is None or of.high is None:
        return as_fraction(of.value) if ONE_SEED in of.reason and of.value >= 0 else NOT_TESTABLE
    if of.low == of.high or of.low > 0:
        return as_fraction(of.value)
    return f"under {as_fraction(of.high)}" if of.high > 0 else "0"


def ratio_text(of: Estimate) -> str:
    """The same with its interval in one notation: '1/52 (1/110–1/30)', '3.69 × (2.25 ×–4.76 ×)'."""
    if of.low is None or of.high is None or of.low == of.high or of.low <= 0:
        return ratio_headline(of)
    as_part = is_small(of.value)
    low, high = (_ratio_words(edge, as_part) for edge in (of.low, of.high))
    return f"{_ratio_words(of.value, as_part)} ({low}–{high})"


def signed_percent(share: float | None) -> str:
    """'+2.1 %'; a dash where there is none."""
    if share is None:
        return NONE
    return f"{signed(100 * share, 1)}{THIN}%"
