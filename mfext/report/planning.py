"""What a verb would do, for --dry-run: parameters by part, steps and tokens, memory and disk."""

from __future__ import annotations

from mfext.report.quantities import count, percent, plural, size, whole
from mfext.report.reading import Json, listed, mapping, objects, text
from mfext.report.reading import number as number_at
from mfext.report.report import KeyValues, Report, Section, Table

# What one CPU core of 2024 trains per second, in tokens times active parameters: sizes the guess, promises nothing.
ACTIVE_TOKENS_PER_S = 6e9
# Bytes of one parameter.
FLOAT32 = 4


def plan_report(verb: str, data: Json) -> Report:
    """The report of a dry run; nothing was built or written."""
    trainable, steps = number_at(data, "params", "trainable"), number_at(data, "steps")
    removed = number_at(data, "params", "removed")
    would = [] if removed is None else [f"remove {_removed(data, removed)}"]
    would += [f"train {count(trainable)} parameters for {whole(steps)} steps"] if steps or not would else []
    verdict = f"would {' and '.join(would)}; nothing was written"
    sections: list[Section] = []
    stages = tuple(
        (text(each, "name"), whole(number_at(each, "trainable")), text(each, "trains"))
        for each in objects(data, "stages")
    )
    if stages:
        columns = ("stage", "trainable", "what trains")
        sections.append(Table("Stages", columns=columns, rows=stages, text_columns=("stage", "what trains")))
    operations = objects(data, "plan", "operations")
    if operations:
        rows = tuple((text(each, "operation"), _details(each)) for each in operations)
        sections.append(Table("Plan", columns=("operation", "what"), rows=rows, text_columns=("operation", "what")))
    parts = tuple((name.replace("_", " "), whole(number_at(data, "params", name))) for name in mapping(data, "params"))
    sections.append(KeyValues("Parameters", pairs=parts))
    sections.append(KeyValues("Cost", pairs=tuple(_cost(data))))
    return Report(verb, data, f"mfext {verb} (dry run)", (verdict,), tuple(sections))


def _removed(data: Json, removed: float) -> str:
    """How much would leave, of how much."""
    total = removed + (number_at(data, "params", "total") or 0)
    return f"{count(removed)} of {count(total)} parameters ({percent(removed / total)}, {size(FLOAT32 * removed)})"


def _details(operation: Json) -> str:
    generation = mapping(operation, "generation")
    if generation:
        counts = ", ".join(f"{kind} {generation.get(kind)}" for kind in ("attention_experts", "feedforward_experts"))
        return f"{text(generation, 'name')} ({text(generation, 'mode')}): {counts} per layer"
    cuts = objects(operation, "cuts")
    if cuts:
        experts = sum(int(number_at(cut, "of") or 0) for cut in cuts)
        kept = sum(len(listed(cut, "kept")) for cut in cuts)
        return f"{whole(experts - kept)} of {whole(experts)} experts leave {plural(len(cuts), 'bank')}"
    if text(operation, "generation"):
        return f"{text(operation, 'generation')}, whole"
    names = operation.get("generations")
    return ", ".join(str(name) for name in names) if isinstance(names, list | tuple) else ""


def _cost(data: Json) -> list[tuple[str, str]]:
    tokens, active = number_at(data, "tokens"), number_at(data, "params", "active_per_token")
    pairs = [("tokens", whole(tokens))]
    if tokens and active:
        minutes = tokens * active / ACTIVE_TOKENS_PER_S / 60
        pairs.append(("time on one CPU core", f"about {max(1, round(minutes))} minutes (a guess from the size)"))
    pairs += [("memory for weights and optimizer", size(number_at(data, "memory_bytes")))]
    return [*pairs, ("disk", size(number_at(data, "disk_bytes")))]
