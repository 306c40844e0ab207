"""What a report shows beside the stable JSON: raw measurements as the commands have them at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mfext.report.experts import DomainDetails, Newcomers
from mfext.report.reading import Json, as_number, listed, mapping, objects, text
from mfext.report.reading import number as number_at


@dataclass(frozen=True)
class StageCurve:
    """One stage's metrics.csv: rows by column name, empty cells left out. `tokens_per_step` None is unknown."""

    name: str
    tokens_per_step: float | None
    rows: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class StageCost:
    """What one stage took; None where it was not measured. Memory is the process's peak in bytes."""

    name: str
    total: float | None = None
    trainable: float | None = None
    active_per_token: float | None = None
    tokens: float | None = None
    wall_s: float | None = None
    tokens_per_s: float | None = None
    peak_bytes: float | None = None


@dataclass(frozen=True)
class DomainFacts:
    """The text a column of the matrix was measured on."""

    split: str
    documents: int
    bytes: int
    tokens: int
    split_sha256: str
    source: str = ""


@dataclass(frozen=True)
class Extras:
    """What a report shows beside the stable JSON; whatever is empty leaves its section out.

    `details`: domain -> {"usage": Usage.to_json() | None, "gates": [{gate, share_open, share_not_full, ...}]} of the
    last stage. `newcomers`: the generations, in order.
    `lineage`: one object per stage {stage, name, domains, sha256, method, tokens}.
    """

    curves: tuple[StageCurve, ...] = ()
    costs: tuple[StageCost, ...] = ()
    facts: Mapping[str, DomainFacts] = field(default_factory=dict)
    details: Mapping[str, DomainDetails] = field(default_factory=dict)
    newcomers: tuple[Newcomers, ...] = ()
    lineage: tuple[Json, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def extras_of(data: Json, raw: Json) -> Extras:
    """Extras from plain JSON, as a run folder yields it; keys that are absent leave their part empty.

    `raw`: {"curves": {stage: rows of metrics.csv}, "details": {stage: {domain: {usage, gates}}}, "lineage": [...],
    "generations": [GenerationConfig as JSON of the last stage's model], "environment": {...},
    "facts": {domain: {split, documents, bytes, tokens, split_sha256, source}}}. Entries of `data["stages"]` hold tokens
    and wall_s.
    """
    stages = objects(data, "stages")
    lineage = objects(raw, "lineage")
    details = [each for each in mapping(raw, "details").values() if isinstance(each, Mapping) and each]
    return Extras(
        curves=tuple(_curve(stage, listed(raw, "curves", text(stage, "name"))) for stage in stages),
        costs=tuple(_cost(data, stage, stage is stages[-1]) for stage in stages if number_at(stage, "tokens")),
        facts={name: _facts(entry) for name, entry in mapping(raw, "facts").items() if isinstance(entry, Mapping)},
        details=details[-1] if details else {},
        newcomers=newcomers_of(objects(raw, "generations")),
        lineage=lineage,
        environment={str(name): str(value) for name, value in mapping(raw, "environment").items()},
    )


def newcomers_of(generations: Sequence[Json]) -> tuple[Newcomers, ...]:
    """Generations of a model config (plain JSON) as far as a report needs them."""
    return tuple(
        Newcomers(
            text(each, "name"),
            text(each, "mode"),
            tuple(int(as_number(count) or 0) for count in listed(each, "attention_experts")),
            tuple(int(as_number(count) or 0) for count in listed(each, "feedforward_experts")),
        )
        for each in generations
    )


def _curve(stage: Json, rows: Sequence[object]) -> StageCurve:
    numbers = [
        {str(name): value for name, cell in row.items() if (value := as_number(cell)) is not None}
        for row in rows
        if isinstance(row, Mapping)
    ]
    steps = max((row["step"] for row in numbers if "step" in row), default=0.0)
    tokens = number_at(stage, "tokens")
    return StageCurve(text(stage, "name"), tokens / steps if tokens and steps else None, numbers)


def _cost(data: Json, stage: Json, is_last: bool) -> StageCost:
    tokens, wall_s = number_at(stage, "tokens"), number_at(stage, "wall_s")
    rate = number_at(stage, "tokens_per_s") or (tokens / wall_s if tokens and wall_s else None)

    def at(key: str, last: str) -> float | None:
        return number_at(stage, key) or (number_at(data, "params", last) if is_last else None)

    return StageCost(
        name=text(stage, "name"),
        total=at("params", "total"),
        trainable=at("trainable", "trainable"),
        active_per_token=at("active_per_token", "active_per_token"),
        tokens=tokens,
        wall_s=wall_s,
        tokens_per_s=rate,
        peak_bytes=number_at(stage, "peak_bytes"),
    )


def _facts(entry: Json) -> DomainFacts:
    counts = (int(number_at(entry, key) or 0) for key in ("documents", "bytes", "tokens"))
    documents, num_bytes, tokens = counts
    return DomainFacts(
        text(entry, "split"), documents, num_bytes, tokens, text(entry, "split_sha256"), text(entry, "source")
    )
