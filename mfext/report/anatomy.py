"""The report of inspect: a model's parts, generations and lineage."""

from __future__ import annotations

import dataclasses

from mfext.report.provenance import lineage_table
from mfext.report.quantities import NONE, count, number, plural, printable, size, whole
from mfext.report.reading import Json, listed, mapping, objects, text
from mfext.report.reading import number as number_at
from mfext.report.report import KeyValues, Report, Section, Table
from mfext.report.usage import usage_sections, usage_verdict

_SHAPE = (
    ("d_model", "width"),
    ("num_layers", "layers"),
    ("num_heads", "heads"),
    ("vocab_size", "vocabulary"),
    ("d_attention", "attention expert width"),
    ("d_feedforward", "feed-forward expert width"),
    ("router", "router"),
)


def inspection_report(data: Json) -> Report:
    """The report of inspect; `data` as commands/inspect.py builds it (stable JSON).

    Where usage was measured a terminal shows that, and the rest is for the page.
    """
    total, active = number_at(data, "params", "total"), number_at(data, "params", "active_per_token")
    generations = objects(data, "generations")
    grown = f", {plural(len(generations), 'generation')} beyond its base" if generations else ", a base"
    model = printable(text(data, "run") or text(data, "model"))
    verdict = f"{model}: {count(total)} parameters, {count(active)} active per token{grown}"
    sections: tuple[Section | None, ...] = (
        _overview(data),
        _generations(generations),
        _sites(data),
        _parts(data),
        dataclasses.replace(lineage_table(objects(data, "lineage")), in_terminal=True),
    )
    kept = tuple(each for each in sections if each is not None and (not isinstance(each, Table) or each.rows))
    used = usage_sections(data)
    if used:
        kept = (*used, *(dataclasses.replace(each, in_terminal=False) for each in kept))
    return Report("inspect", data, f"mfext inspect · {model}", (verdict, *usage_verdict(data)), kept)


def _overview(data: Json) -> KeyValues:
    shape = mapping(data, "config")
    known = ", ".join(text(each, "name") for each in objects(data, "domains"))
    pairs = [
        ("folder", text(data, "model")),
        ("layout", text(data, "source")),
        ("SHA-256 of the weights", text(data, "model_sha256")),
        ("size on disk", size(number_at(data, "size_bytes"))),
        ("number format", text(data, "dtype")),
        ("stored as", text(data, "weights")),
        ("tokenizer", text(data, "tokenizer")),
        ("domains it learned", known or "not recorded"),
        *((shown, str(shape[key])) for key, shown in _SHAPE if key in shape),
    ]
    return KeyValues("Model", pairs=tuple(pairs))


def _generations(generations: tuple[Json, ...]) -> Table:
    rows = []
    for each in generations:
        gate = mapping(each, "gate")
        opens = f"{number(number_at(gate, 'opens_at'))} to {number(number_at(gate, 'full_at'))}" if gate else NONE
        counts = [_per_layer(listed(each, f"{kind}_experts")) for kind in ("attention", "feedforward")]
        sizes = (count(number_at(each, "params")), count(number_at(each, "active_per_token")))
        rows.append((text(each, "name"), text(each, "mode"), *counts, opens, *sizes))
    columns = ("generation", "mode", "attention experts", "feed-forward experts", "gate opens", "parameters", "active")
    words = ("generation", "mode", "gate opens", "attention experts", "feed-forward experts")
    note = "Experts per layer. The gate is shut below the first probability and fully open above the second."
    return Table("Generations", columns=columns, rows=tuple(rows), text_columns=words, note=note)


def _per_layer(counts: object) -> str:
    """'4' where every layer has as many, else one count per layer."""
    values = list(counts) if isinstance(counts, list | tuple) else []
    return str(values[0]) if len(set(values)) == 1 else " ".join(str(value) for value in values)


def _sites(data: Json) -> Table:
    names = ["base", *(text(each, "name") for each in objects(data, "generations"))]
    rows = tuple(
        (
            whole(number_at(each, "layer")),
            text(each, "kind"),
            *(str(experts) for experts in listed(each, "experts")),
            whole(number_at(each, "per_token")),
        )
        for each in objects(data, "sites")
    )
    columns = ("layer", "kind", *names, "chosen per token")
    return Table("Experts per site", columns=columns, rows=rows, text_columns=("kind",))


def _parts(data: Json) -> Table:
    owners = objects(data, "params", "by_generation")
    parts = list(dict.fromkeys(part for owner in owners for part in mapping(owner, "parts")))
    rows = [(part, *(count(number_at(owner, "parts", part)) for owner in owners)) for part in parts]
    rows.append(("total", *(count(number_at(owner, "total")) for owner in owners)))
    columns = ("part", *(text(owner, "name") for owner in owners))
    return Table("Parameters by part", columns=columns, rows=tuple(rows), text_columns=("part",))
