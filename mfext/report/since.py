"""When each domain was learned, and how its loss moved since then."""

from __future__ import annotations

from mfext.report.quantities import NONE, bits, change_percent, digits_for, number, signed
from mfext.report.reading import Change, Json, changes, domains, listed, mapping, matrix, objects, stages, text
from mfext.report.reading import number as number_at
from mfext.report.report import Numbers, Table

RANDOM = ("random", "random weights", "untrained", "initial")


def starts_from_random(data: Json) -> bool:
    """Whether row 0 is random weights: then nothing counts as forgotten against it."""
    first = objects(data, "stages")[:1]
    return bool(first) and text(first[0], "method") in RANDOM


def row_zero(data: Json) -> str:
    """What row 0 is, in words."""
    return "the random weights training began with" if starts_from_random(data) else "the untouched base"


def learned_stages(data: Json) -> dict[str, int | None]:
    """Per column the stage that first learned it: 0 for the base's domains, None for one never trained.

    `data["learned_in"]` says it; else a learned domain's entry (`stage`), the first stage whose `domains` list it, or
    the one that has its name.
    """
    old, said_in = changes(data, "forgetting"), mapping(data, "learned_in")
    found: dict[str, int | None] = {}
    for domain in domains(data):
        if domain in said_in:
            at = number_at(data, "learned_in", domain)
            found[domain] = None if at is None else round(at)
        elif domain in mapping(data, "learned"):
            said = number_at(data, "learned", domain, "stage")
            found[domain] = round(said) if said is not None else _stage_that_learned(data, domain)
        else:
            found[domain] = 0 if domain in old and not starts_from_random(data) else None
    return found


def _stage_that_learned(data: Json, domain: str) -> int | None:
    entries = objects(data, "stages")
    listing = (i for i, each in enumerate(entries) if i > 0 and domain in listed(each, "domains"))
    naming = (i for i, name in enumerate(stages(data)) if i > 0 and name == domain)
    return next(listing, next(naming, None))


def changes_since_learned(data: Json) -> tuple[tuple[float | None, ...], ...]:
    """Rows 1.. of the matrix in bits per byte, minus the row of the stage that learned the column.

    None before that stage. Never-trained domains are compared with row 0, unless row 0 is random weights.
    """
    learned = learned_stages(data)
    rows = matrix(data)
    changed = []
    for stage, row in enumerate(rows[1:], 1):
        values: list[float | None] = []
        for column, domain in enumerate(domains(data)):
            since = learned[domain]
            if since is None:
                since = 1 if starts_from_random(data) else 0
            before = rows[since][column] if since <= stage else None
            after = row[column]
            values.append(None if before is None or after is None else bits(after - before))
        changed.append(tuple(values))
    return tuple(changed)


def stream_table(data: Json) -> Table:
    """Per domain of a stream: what its own stage brought, and how much of that is lost at the end."""
    old = {**changes(data, "bystanders"), **changes(data, "forgetting")}
    moved = [bits(each.difference) for each in old.values()]
    digits = min(4, digits_for(*moved))
    learned = learned_stages(data)
    rows, numbers = [], []
    for column, domain in enumerate(domains(data)):
        stage = learned[domain]
        before, after = _around_its_stage(data, domain, stage)
        last = bits(matrix(data)[-1][column])
        since = old.get(domain, Change(None, None, None))
        value, low, high = (bits(each) for each in (since.difference, since.low, since.high))
        known = None not in (before, after)
        cells = (
            number(before),
            number(after),
            change_percent(before or 0.0, after or 0.0) if known else NONE,
            number(last),
            signed(value, digits),
            f"{signed(low, digits)} to {signed(high, digits)}" if low is not None else since.reason or NONE,
        )
        rows.append((domain, _when(data, stage), *cells))
        numbers.append((domain, _when(data, stage), before, after, last, value, low, high))
    columns = ("domain", "learned in", "before", "after", "learned", "in the end", "forgotten", "95 % interval")
    units = ("before", "after", "last", "forgotten", "forgotten_low", "forgotten_high")
    note = (
        "Bits per byte, lower is better. Before and after the stage that learned the domain; in the end is the last "
        "stage, forgotten the rise since the domain was learned (never trained: since it was first measured)."
    )
    return Table(
        "Learned and kept",
        columns=columns,
        rows=tuple(rows),
        text_columns=("domain", "learned in", "95 % interval"),
        note=note,
        numbers=Numbers(("domain", "learned_in", *(f"{unit}_bits_per_byte" for unit in units)), tuple(numbers)),
    )


def _around_its_stage(data: Json, domain: str, stage: int | None) -> tuple[float | None, float | None]:
    if domain in mapping(data, "learned"):
        return bits(number_at(data, "learned", domain, "before")), bits(number_at(data, "learned", domain, "after"))
    first = matrix(data)[0][domains(data).index(domain)]
    return None, bits(first) if stage == 0 else None


def _when(data: Json, stage: int | None) -> str:
    return "never" if stage is None else f"stage {stage}" if stage else "the base"
