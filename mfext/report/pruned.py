"""What a pruning shows: how small the model became and what that cost, the curve, and where its knee is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mfext.errors import DivergedError
from mfext.report.quantities import bits, count, number, percent, signed, size
from mfext.report.reading import Json, domains, flag, listed, mapping, matrix, objects, text
from mfext.report.reading import number as number_at
from mfext.report.report import Curves, CurvesGrid, Report, Section, Series, Table

# A rise of the target's loss up to this share is what the advice calls keeping it.
TOLERATED = 0.01
RANDOM = "random"


def prune_sections(report: Report, data: Json) -> Report:
    """The report of a run with a pruning's own verdict and sections before everything else."""
    dropped = dropped_of(data)
    sections: tuple[Section, ...] = (_before_after(data), *(() if dropped else _curves(data)), _table(data))
    alarms = report.alarms
    failure = None
    if not flag(data, "equals_masked"):
        masked = "these generations shut" if dropped else "masked experts"
        what = f"the pruned model differs from the full one with {masked} by {number_at(data, 'masked_difference')}"
        failure = DivergedError(what, text(data, "run"), "two experts of almost equal logits may have changed places")
        alarms = (*alarms, what)
    if flag(data, "equals_earlier") is False:
        alarms = (*alarms, f"without {joined(dropped)} this is not the model it was before: something old has changed")
    if not flag(data, "restores_exactly"):
        alarms = (*alarms, "the removed experts do not restore the model bit for bit: do not delete the whole one")
    target = text(data, "target")
    return replace(
        report,
        title=f"mfext prune · {target}",
        verdict=(*_verdict(data), *_advice(data), *_earlier(data), *_promises(data)),
        sections=(*sections, *report.sections),
        alarms=alarms,
        failure=failure,
    )


def _verdict(data: Json) -> tuple[str, ...]:
    target, experts = text(data, "target"), number_at(data, "experts")
    kept, before, after = (number_at(data, key) for key in ("kept", "params_before", "params_after"))
    share, dropped = kept / experts if kept and experts else None, dropped_of(data)
    how = f"without {joined(dropped)}" if dropped else f"by {text(data, 'criterion')}"
    lines = [
        f"Kept {count(kept)} of {count(experts)} experts ({percent(share)}) {how}: "
        f"{count(before)} parameters became {count(after)}."
    ]
    losses = [each for each in (_last_rows(data)) if each is not None]
    if len(losses) == 2 and all(target in each for each in losses):
        whole, pruned = (number_at(each, target) for each in losses)
        if whole and pruned:
            rise = f"{signed(100 * (pruned / whole - 1), 1)} %"
            lines.append(
                f"Loss on {target}: from {number(bits(whole))} to {number(bits(pruned))} bits per byte ({rise})."
            )
    return tuple(lines)


def _last_rows(data: Json) -> tuple[Json | None, Json | None]:
    """Losses by domain of the model that was pruned, and of the pruned one."""
    named = {text(stage, "name"): number for number, stage in enumerate(objects(data, "stages"))}
    at = named.get("pruned")
    table, names = matrix(data), domains(data)
    if at is None or not 1 <= at < len(table):
        return None, None
    return dict(zip(names, table[at - 1], strict=True)), dict(zip(names, table[at], strict=True))


def _advice(data: Json) -> tuple[str, ...]:
    """The knee: the smallest share that keeps the target's loss by the best criterion, and what lots do there."""
    found: dict[str, float] = {}
    for criterion in () if dropped_of(data) else _criteria(data):
        kept = [1.0]
        for point in _points(data, criterion):
            rise, keep = _rise(data, point), number_at(point, "keep")
            if rise is None or keep is None or rise > TOLERATED:
                break
            kept.append(keep)
        found[criterion] = min(kept)
    chosen = {name: keep for name, keep in found.items() if name != RANDOM}
    if not chosen:
        return ()
    best = min(chosen, key=lambda name: chosen[name])
    target, smallest = text(data, "target"), chosen[best]
    if smallest == 1.0:
        return (
            f"No share measured keeps {target} within {percent(TOLERATED)}: fine-tune on it first, or heal afterwards.",
        )
    line = f"Knee: {best} keeps {target} within {percent(TOLERATED)} down to {percent(smallest, 1)} of the experts"
    lot = [point for point in _points(data, RANDOM) if number_at(point, "keep") == smallest]
    rise = _rise(data, lot[0]) if lot else None
    return (f"{line}; drawn by lot they cost {signed(100 * rise, 1)} % there." if rise is not None else f"{line}.",)


def dropped_of(data: Json) -> tuple[str, ...]:
    """The generations that left whole, the newest first."""
    return tuple(str(name) for name in listed(data, "dropped"))


def joined(names: Sequence[str]) -> str:
    """'generation code', 'generations code and prose'."""
    listing = " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
    return f"generation{'' if len(names) == 1 else 's'} {listing}"


def _earlier(data: Json) -> tuple[str, ...]:
    """Which earlier model this is again, or why it is none."""
    dropped = dropped_of(data)
    if not dropped or flag(data, "equals_earlier") is False:
        return ()
    if flag(data, "equals_earlier"):
        sha256 = text(data, "earlier_sha256")[:12]
        return (f"Bit for bit the model that {dropped[-1]} was grown on (SHA-256 {sha256}...).",)
    return (
        "No earlier model to be equal to: something else has happened to it since that growth. "
        "Generations grown later stay as they are, though they learned beside what left.",
    )


def _promises(data: Json) -> tuple[str, ...]:
    difference = number_at(data, "masked_difference")
    if not (flag(data, "equals_masked") and flag(data, "restores_exactly")) or difference is None:
        return ()
    masked = f"{joined(dropped)} shut" if (dropped := dropped_of(data)) else "the removed experts masked"
    return (
        f"Proven on a probe: the pruned model is the full one with {masked} (largest difference of a "
        f"logit {difference:.1g}), and putting back what left gives the same bits.",
    )


def _criteria(data: Json) -> list[str]:
    return list(dict.fromkeys(name for point in objects(data, "curve") if (name := text(point, "criterion"))))


def _points(data: Json, criterion: str) -> list[Json]:
    """A criterion's points that could be measured, the largest share first."""
    own = [point for point in objects(data, "curve") if text(point, "criterion") == criterion and "reason" not in point]
    return sorted(own, key=lambda point: -(number_at(point, "keep") or 0.0))


def _rise(data: Json, point: Json, domain: str | None = None) -> float | None:
    return number_at(point, "increase", domain or text(data, "target"), "share")


def _before_after(data: Json) -> Table:
    names = (
        ("parameters", "params", count),
        ("on disk", "disk_bytes", size),
        ("peak memory, reading", "peak_bytes", size),
        ("reading, tokens/s", "read_tokens_per_s", count),
        ("decoding, tokens/s", "decode_tokens_per_s", count),
        ("decoding 16 side by side, tokens/s", "decode_16_tokens_per_s", count),
    )
    rows = []
    for label, key, shown in names:
        before, after = (number_at(data, which, key) for which in ("before", "after"))
        share = percent(after / before) if before and after else ""
        rows.append((label, shown(before), shown(after), share))
    return Table(
        "Size and speed",
        columns=("", "before", "after", "of before"),
        rows=tuple(rows),
        text_columns=("",),
        note="The model that was pruned, and the pruned one; one sequence, if not said. Peak over a tiny model's.",
    )


def _curves(data: Json) -> tuple[Section, ...]:
    """Loss on the target by criterion; and how much the chosen criterion costs every domain."""
    target = text(data, "target")
    series = tuple(
        Series(name, tuple(_line(data, [_whole(data), *_points(data, name)], target))) for name in _criteria(data)
    )
    own = Curves(
        f"What is kept, and the loss on {target}",
        series=tuple(each for each in series if each.points),
        x_label="% of experts kept",
        y_label="bits per byte",
        digits=3,
        in_terminal=False,
        note="Every dot is a model made smaller and measured. `random` is the control that must lose.",
    )
    every = list(mapping(_whole(data), "nll_per_byte"))
    charts = tuple(
        Curves(
            name,
            series=tuple(
                Series(each, tuple(_line(data, [_whole(data), *_points(data, each)], name))) for each in _criteria(data)
            ),
            x_label="% of experts kept",
            y_label="bits per byte",
        )
        for name in every
        if name != target
    )
    grid = CurvesGrid("The same on every other domain", charts=charts, in_terminal=False)
    return (own, grid) if charts else (own,)


def _whole(data: Json) -> Json:
    return next(iter(objects(data, "curve")), {})


def _line(data: Json, points: Sequence[Json], domain: str) -> list[tuple[float, float]]:
    pairs = [(number_at(point, "keep"), bits(number_at(point, "nll_per_byte", domain))) for point in points]
    return sorted((100 * keep, loss) for keep, loss in pairs if keep is not None and loss is not None)


def _table(data: Json) -> Table:
    target = text(data, "target")
    others = [name for name in mapping(_whole(data), "nll_per_byte") if name != target]
    rows = []
    for point in objects(data, "curve"):
        keep = percent(number_at(point, "keep"), 1)
        left = ", ".join(dropped_of(point))
        name = f"without {left}" if left else text(point, "criterion") or "whole model"
        if "reason" in point:
            rows.append((name, keep, *("",) * 4, "below what a token chooses"))
            continue
        rise = mapping(point, "increase", target)
        low, high = (bits(number_at(rise, key)) for key in ("low", "high"))
        between = f"{signed(low)} .. {signed(high)}" if low is not None and high is not None else ""
        mean = [share for other in others if (share := _rise(data, point, other)) is not None]
        elsewhere = f"{signed(100 * sum(mean) / len(mean), 1)} %" if mean else ""
        share = number_at(rise, "share")
        moved = f"{signed(100 * share, 1)} %" if share is not None else ""
        loss = number(bits(number_at(point, "nll_per_byte", target)))
        rows.append((name, keep, count(number_at(point, "params")), loss, moved, between, elsewhere))
    what, chosen = "criterion", "Experts are chosen on train text, measured on the evaluation split. "
    if dropped_of(data):
        what, chosen = "model", ""
    return Table(
        "Curve",
        columns=(what, "kept", "parameters", target, "rise", "95 %, bits per byte", "others, mean rise"),
        rows=tuple(rows),
        text_columns=(what,),
        note=f"{chosen}Rises are against the whole model.",
    )
