"""Sections that let a reader check a report: cost, data, metric variants, lineage, definitions, places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mfext.report.definitions import DEFINITIONS, DIRECTIONS
from mfext.report.extras import DomainFacts, StageCost
from mfext.report.quantities import NONE, bits, count, digits_for, duration, number, signed, size, whole
from mfext.report.reading import Json, mapping, matrix, role, text
from mfext.report.reading import number as number_at
from mfext.report.report import KeyValues, Table


def cost_table(costs: Sequence[StageCost]) -> Table:
    """What every stage took."""
    columns = ("stage", "parameters", "trained", "active a token", "tokens", "time", "tokens/s", "peak memory")
    rows = tuple(
        (
            cost.name,
            count(cost.total),
            count(cost.trainable),
            count(cost.active_per_token),
            count(cost.tokens),
            duration(cost.wall_s),
            whole(cost.tokens_per_s),
            size(cost.peak_bytes),
        )
        for cost in costs
    )
    known = [index for index in range(len(columns)) if any(row[index] != NONE for row in rows)]
    return Table(
        "Cost",
        columns=tuple(columns[index] for index in known),
        rows=tuple(tuple(row[index] for index in known) for row in rows),
        text_columns=("stage",),
        in_terminal=False,
    )


def measured_on(data: Json, facts: Mapping[str, DomainFacts]) -> Table:
    columns = ("domain", "role", "split", "documents", "text", "tokens", "SHA-256 of the split", "source")
    rows = tuple(
        (
            name,
            role(data, name),
            each.split,
            whole(each.documents),
            size(each.bytes),
            count(each.tokens),
            each.split_sha256[:12],
            each.source,
        )
        for name, each in facts.items()
    )
    words = ("domain", "role", "split", "SHA-256 of the split", "source")
    note = "Every token of every document is scored once, from its document's start."
    return Table("Measured on", columns=columns, rows=rows, text_columns=words, note=note, in_terminal=False)


CHANGES = (
    "forgetting.base",
    "forgetting.first_last",
    "forgetting.max",
    "forgetting.max_incl_last",
    "bwt.gem",
    "bwt.pairs",
    "fwt.gem",
    "fwt.vs_independent",
    "intransigence.joint",
    "intransigence.independent",
    "learned",
    "bystander",
)
"""Metrics that are differences and carry their sign; the others are levels and shares."""


def named_metrics(data: Json) -> Table:
    """Every named variant in `data["metrics"]`, so that numbers can be compared with other toolkits'."""
    rows = []
    for name, metric in mapping(data, "metrics").items():
        if not isinstance(metric, Mapping):
            continue
        value = number_at(metric, "value")
        shown = bits(value) if text(metric, "unit") == "nats per byte" else value
        unit = "bits per byte" if text(metric, "unit") == "nats per byte" else text(metric, "unit")
        better = DIRECTIONS.get(text(metric, "direction"), NONE)
        what = DEFINITIONS.get(name, "") if value is not None else f"undefined: {text(metric, 'reason')}"
        digits = min(4, digits_for(shown))
        value_text = signed(shown, digits) if name in CHANGES else number(shown, digits)
        rows.append((name, value_text, unit, better, what))
    return Table(
        "Every variant by name",
        columns=("metric", "value", "unit", "better", "definition"),
        rows=tuple(rows),
        text_columns=("metric", "unit", "better", "definition"),
        note="Toolkits mean different numbers by the same word; these are the names used here.",
        in_terminal=False,
    )


def lineage_table(lineage: Sequence[Json]) -> Table:
    rows = []
    for index, entry in enumerate(lineage):
        names = entry.get("domains")
        listed = ", ".join(str(name) for name in names) if isinstance(names, list | tuple) else ""
        gone = entry.get("dropped")
        listed = f"without {', '.join(map(str, gone))}" if isinstance(gone, list | tuple) else listed
        at = number_at(entry, "stage")
        tokens = number_at(entry, "tokens")
        rows.append(
            (
                str(index if at is None else round(at)),
                text(entry, "name") or NONE,
                text(entry, "method") or NONE,
                listed or NONE,
                count(tokens),
                text(entry, "sha256")[:12] or NONE,
            )
        )
    columns = ("stage", "name", "method", "learned", "tokens", "SHA-256 of the model")
    words = ("name", "method", "learned", "SHA-256 of the model")
    return Table("Lineage", columns=columns, rows=tuple(rows), text_columns=words, in_terminal=False)


def definitions(data: Json) -> KeyValues:
    words = ["bits per byte"]
    if len(matrix(data)) > 1:
        words += ["row 0", "L[i, j]", "95 % interval", "gate open"]
    return KeyValues("Definitions", pairs=tuple((word, DEFINITIONS[word]) for word in words), in_terminal=False)


def places(data: Json) -> KeyValues:
    names = (("run", "run"), ("model", "model"), ("report", "report"))
    pairs = [(shown, text(data, key)) for shown, key in names if text(data, key)]
    tokens, wall_s = number_at(data, "tokens"), number_at(data, "wall_s")
    if tokens and wall_s:
        rate = number_at(data, "tokens_per_s") or tokens / wall_s
        pairs.append(("training", f"{count(tokens)} tokens in {duration(wall_s)}, {whole(rate)} tokens/s"))
    added, total = number_at(data, "params", "added"), number_at(data, "params", "total")
    if total:
        pairs.append(("parameters", f"{count(total)}" + (f", {count(added)} of them added" if added else "")))
    return KeyValues("Where things are", pairs=tuple(pairs))
