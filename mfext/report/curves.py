"""Training curves over tokens, with a border where a stage begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mfext.report.extras import StageCurve
from mfext.report.quantities import bits
from mfext.report.reading import Json, as_number, domains, listed, stages
from mfext.report.report import Curves, Series

POINTS_PER_CURVE = 240


def training_curves(curves: Sequence[StageCurve]) -> list[Curves]:
    """Training loss, and what the new generation sees of the training text, over tokens with stage borders."""
    loss = (("", "loss_nats_per_token", True),)
    shares = (("gate open", "gate_open_share", False), ("reaching new experts", "new_expert_share", False))
    drawn = (
        _chart(curves, Curves("Training loss", y_label="bits per token", in_terminal=False), loss),
        _chart(
            curves,
            Curves("New experts while training", y_label="share of training tokens", in_terminal=False, y_range=(0, 1)),
            shares,
        ),
    )
    return [section for section in drawn if section.series]


def within_curves(data: Json) -> Curves | None:
    """The loss on every domain at evaluations within the stages, over the steps of the whole run.

    `data["within"]`: domain -> [[step, nats per byte], ...], `data["borders"]`: the steps where stages begin. None
    where nothing was measured within a stage.
    """
    series = []
    for name in domains(data):
        pairs = [each for each in listed(data, "within", name) if isinstance(each, list | tuple) and len(each) == 2]
        known = [(as_number(step), bits(as_number(loss))) for step, loss in pairs]
        points = tuple((step, loss) for step, loss in known if step is not None and loss is not None)
        if points:
            series.append(Series(name, points))
    if not series:
        return None
    return Curves(
        "Loss within the stages",
        series=tuple(series),
        borders=stage_borders(data),
        x_label="steps",
        y_label="bits per byte",
        note="Measured on a part of the validation text while a stage trains; a line that rises is being forgotten.",
        in_terminal=False,
    )


def stage_borders(data: Json) -> tuple[tuple[float, str], ...]:
    """(step, stage) where each stage after row 0 begins; stages that took no step are left out."""
    begins = [as_number(step) for step in listed(data, "borders")]
    known = [(step, name) for step, name in zip(begins, stages(data)[1:], strict=False) if step is not None]
    ends = [step for step, _ in known[1:]]
    return tuple(pair for pair, end in zip(known, [*ends, None], strict=False) if end is None or end > pair[0])


def _chart(curves: Sequence[StageCurve], section: Curves, columns: Sequence[tuple[str, str, bool]]) -> Curves:
    """`section` with one series per stage and column (name, column, whether in nats), stage after stage."""
    shown = [stage for stage in curves if any(column in row for row in stage.rows for _, column, _ in columns)]
    in_tokens = all(stage.tokens_per_step is not None for stage in shown)
    series, borders, offset = [], [], 0.0
    for stage in shown:
        borders.append((offset, stage.name))
        for what, column, in_nats in columns:
            points = _points(stage, column, offset, in_nats)
            if points:
                series.append(Series(f"{stage.name}: {what}" if what else stage.name, points))
        steps = max((row["step"] for row in stage.rows if "step" in row), default=0.0)
        offset += steps * (stage.tokens_per_step or 1.0)
    x_label = "tokens" if in_tokens else "steps"
    return dataclasses.replace(section, series=tuple(series), borders=tuple(borders), x_label=x_label)


def _points(stage: StageCurve, column: str, offset: float, in_nats: bool) -> tuple[tuple[float, float], ...]:
    """(tokens, value), neighbours averaged so that a curve stays small."""
    raw = []
    for row in stage.rows:
        step, value = as_number(row.get("step")), as_number(row.get(column))
        if step is not None and value is not None:
            raw.append((offset + step * (stage.tokens_per_step or 1.0), (bits(value) or 0.0) if in_nats else value))
    bucket = -(-len(raw) // POINTS_PER_CURVE) or 1
    parts = [raw[start : start + bucket] for start in range(0, len(raw), bucket)]
    return tuple((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts)
