"""The prunings of a sweep side by side: what is kept against what it costs on the target, over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mfext.report.quantities import MINUS, NONE, THIN, count, percent
from mfext.report.reading import Json, mapping, objects, text
from mfext.report.reading import number as number_at
from mfext.report.report import Card, Curves, CurvesGrid, Numbers, Section, Series, Table, Tone
from mfext.report.setting_names import setting_name, short_values

RANDOM, BY_LOT = "random", "drawn by lot"
# A rise of the target's loss up to this share is shown as good.
GOOD = 0.01
# What the loss after pruning is held against, the harder first: key and words.
AGAINST = (("against_full", "unpruned full fine-tuning"), ("against_whole", "the model pruned"))
# More settings of one target than this are not named in a sentence.
NAMED_AT_MOST = 3


@dataclass(frozen=True)
class Pruned:
    """One setting that pruned, by its name among all and among those of its target; `kept` is a share of experts."""

    name: str
    label: str
    data: Json

    @property
    def target(self) -> str:
        return text(self.data, "target")

    @property
    def kept(self) -> float | None:
        return number_at(self.data, "kept")

    @property
    def stage(self) -> str:
        """The last stage that was measured: pruned, or healed."""
        return list(mapping(self.data, "costs"))[-1]

    def cost(self, against: str, stage: str | None = None) -> Json:
        """How much higher the loss on the target is, as a share, with its interval."""
        return mapping(self.data, "costs", stage or self.stage, against)


def pruned_settings(data: Json) -> tuple[Pruned, ...]:
    """The settings of a sweep that pruned, in its order; none where it is of another verb."""
    groups = [each for each in objects(data, "groups") if mapping(each, "pruning", "costs")]
    shorts = short_values(mapping(each, "overrides") for each in groups)
    found = []
    for group in groups:
        label = setting_name(mapping(group, "overrides"), shorts, ("seed", "domain")) or text(group, "method")
        found.append(Pruned(text(group, "name"), label, mapping(group, "pruning")))
    return tuple(found)


def pruning_lines(settings: Sequence[Pruned]) -> list[str]:
    """Per target who loses least, what the others lose, and what experts drawn by lot would have."""
    lines = []
    for target, ranked in _ranked(settings).items():
        best, key, words = ranked[0], *_against(ranked)
        kept = f"on {target} {best.label} keeps {percent(best.kept)} of the experts"
        line = f"{kept}, loss {_share(best.cost(key))} against {words}"
        others = [f"{each.label} {_share(each.cost(key))}{_of(each, best)}" for each in ranked[1 : NAMED_AT_MOST + 1]]
        lines.append("; ".join([line, *([", ".join(others)] if others else [])]))
        if lot := _share(_by_lot(best)):
            lines.append(f"on {target} as many experts {BY_LOT} cost {lot} (before healing, {best.label})")
    return lines


def pruning_cards(settings: Sequence[Pruned]) -> list[Card]:
    """Per target the setting that loses least, what it kept, and what lots would have."""
    cards, targets = [], _ranked(settings)
    for target, ranked in list(targets.items())[:2]:
        best, key, words = ranked[0], *_against(ranked)
        cost = best.cost(key)
        tone: Tone = "good" if (number_at(cost, "estimate") or 0.0) <= GOOD else "plain"
        cards.append(Card(f"{target}: {best.label}", _percent(number_at(cost, "estimate")), "of the loss", words, tone))
        before, after = (count(number_at(best.data, key)) for key in ("params_before", "params_after"))
        cards.append(
            Card(
                "Experts kept" if len(targets) == 1 else f"{target}: kept",
                percent(best.kept),
                "",
                f"{before} → {after} parameters",
            )
        )
        lot = number_at(_by_lot(best), "estimate")
        if lot is not None:
            cards.append(Card("As many by lot", _percent(lot), "of the loss", f"on {target}, not healed", "bad"))
    return cards


def pruning_sections(settings: Sequence[Pruned]) -> tuple[Section, ...]:
    """Costs and curves of every setting that pruned; nothing for sweeps of other verbs."""
    if not settings:
        return ()
    return (_by_setting(settings), _costs(settings), *(_table(each) for each in settings), _by_criterion(settings))


def _ranked(settings: Sequence[Pruned]) -> dict[str, list[Pruned]]:
    """Target -> its settings, the least loss first."""
    found: dict[str, list[Pruned]] = {}
    for each in settings:
        found.setdefault(each.target, []).append(each)

    return {target: _least_first(own) for target, own in found.items()}


def _least_first(settings: Sequence[Pruned]) -> list[Pruned]:
    key, _ = _against(settings)

    def loss(each: Pruned) -> float:
        value = number_at(each.cost(key), "estimate")
        return math.inf if value is None else value

    return sorted(settings, key=loss)


def _against(settings: Sequence[Pruned]) -> tuple[str, str]:
    """What all of them can be held against, and its words."""
    known = [each for each in AGAINST if all(number_at(one.cost(each[0]), "estimate") is not None for one in settings)]
    return known[0] if known else AGAINST[-1]


def _of(each: Pruned, best: Pruned) -> str:
    return "" if each.kept == best.kept else f" ({percent(each.kept)} kept)"


def _by_lot(setting: Pruned) -> Json:
    """The rise where lots decide, at the share measured that leaves as many experts, but for rounding."""
    points = [each for each in objects(setting.data, "curve") if text(each, "criterion") == RANDOM]
    kept = setting.kept
    known = [(abs(keep - kept), each) for each in points if (keep := number_at(each, "keep")) and kept is not None]
    gap, point = min(known, key=lambda pair: pair[0], default=(math.inf, {}))
    return mapping(point, "rise") if gap * (number_at(setting.data, "experts") or 0.0) < 1 else {}


def _costs(settings: Sequence[Pruned]) -> Table:
    shown = [(key, words) for key, words in AGAINST if any(_share(each.cost(key)) for each in settings)]
    keys, ends = [key for key, _ in shown], ("estimate", "low", "high")
    rows, numbers = [], []
    for each in settings:
        sizes = (percent(each.kept), count(number_at(each.data, "params_after")))
        for stage in mapping(each.data, "costs"):
            costs = [each.cost(key, stage) for key in keys]
            rows.append((each.label, each.target, stage, *(_share(cost) or NONE for cost in costs), *sizes))
            edges = [number_at(cost, end) for cost in costs for end in ends]
            numbers.append((each.name, each.target, stage, *edges, each.kept, number_at(each.data, "params_after")))
    return Table(
        "What pruning cost",
        columns=("setting", "target", "stage", *(f"against {words}" for _, words in shown), "kept", "parameters"),
        rows=tuple(rows),
        text_columns=("setting", "target", "stage"),
        numbers=Numbers(
            ("setting", "target", "stage", *(f"{key}_{end}" for key in keys for end in ends), "kept", "params"),
            tuple(numbers),
        ),
        note=f"Loss on the target after the stage, relative; lower is better. {_certainty(settings)}",
    )


def _certainty(settings: Sequence[Pruned]) -> str:
    every = [each.cost("against_whole") for each in settings]
    if any(number_at(cost, "low") is not None for cost in every):
        return "In brackets 95 % intervals over seeds."
    return "One seed has no interval."


def _share(interval: Json) -> str:
    """'+0.8 % [-1.3, +2.9]', or the estimate alone."""
    middle, low, high = (number_at(interval, key) for key in ("estimate", "low", "high"))
    if middle is None:
        return ""
    spread = f" [{_signed(low)}, {_signed(high)}]" if low is not None and high is not None else ""
    return f"{_percent(middle)}{spread}"


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{_signed(share)}{THIN}%"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", MINUS)


def _table(setting: Pruned) -> Table:
    points = objects(setting.data, "curve")
    shares = sorted({keep for point in points if (keep := number_at(point, "keep")) is not None}, reverse=True)
    criteria = list(dict.fromkeys(text(point, "criterion") for point in points))
    found = {(text(point, "criterion"), number_at(point, "keep")): mapping(point, "rise") for point in points}
    rows = tuple((name, *(_share(found.get((name, keep), {})) for keep in shares)) for name in criteria)
    numbers = Numbers(
        ("criterion", "keep", "rise, share", "low", "high"),
        tuple(
            (name, keep, *(number_at(rise, key) for key in ("estimate", "low", "high")))
            for (name, keep), rise in found.items()
        ),
    )
    return Table(
        f"Rise on {setting.target} by share kept: {setting.label}",
        columns=("criterion", *(f"{percent(keep, 1)} kept" for keep in shares)),
        rows=rows if points else (),
        text_columns=("criterion",),
        numbers=numbers,
        note="Against the model that was pruned, before any healing; mean over seeds.",
    )


def _by_setting(settings: Sequence[Pruned]) -> CurvesGrid:
    """Per target every setting's curve by the criterion it was pruned by, with intervals, and lots beside them."""
    charts = []
    for target in dict.fromkeys(each.target for each in settings):
        own = [each for each in settings if each.target == target]
        series = [_line(each, each.label, text(each.data, "criterion")) for each in own]
        lot = _line(own[0], BY_LOT, RANDOM)
        drawn = [*series, Series(lot.name, lot.points)]
        charts.append(_chart(target, [each for each in drawn if each.points]))
    return CurvesGrid(
        "Share kept against loss",
        charts=tuple(each for each in charts if each.series),
        note="Rise of the loss on the target against the model that was pruned, before any healing: mean over seeds, "
        f"upright lines are 95 % intervals. Each setting by its own criterion; {BY_LOT}: that of the first setting.",
        in_terminal=False,
    )


def _by_criterion(settings: Sequence[Pruned]) -> CurvesGrid:
    charts = []
    for setting in settings:
        names = dict.fromkeys(text(each, "criterion") for each in objects(setting.data, "curve"))
        series = [_line(setting, name, name) for name in names]
        charts.append(_chart(setting.name, [Series(each.name, each.points) for each in series if each.points]))
    return CurvesGrid("The same by criterion", charts=tuple(each for each in charts if each.series), in_terminal=False)


def _chart(title: str, series: Sequence[Series]) -> Curves:
    return Curves(title, series=tuple(series), x_label="% of experts kept", y_label="rise on the target, %")


def _line(setting: Pruned, name: str, criterion: str) -> Series:
    """Per cent kept against per cent risen, from the whole model on."""
    own = [each for each in objects(setting.data, "curve") if text(each, "criterion") == criterion]
    points: dict[float, float] = {}
    intervals = []
    for each in own:
        keep, rise = number_at(each, "keep"), mapping(each, "rise")
        middle, low, high = (number_at(rise, key) for key in ("estimate", "low", "high"))
        if keep is not None and middle is not None:
            points[100 * keep] = 100 * middle
            if low is not None and high is not None:
                intervals.append((100 * keep, 100 * low, 100 * high))
    return Series(name, tuple(sorted({100.0: 0.0, **points}.items())) if points else (), tuple(sorted(intervals)))
