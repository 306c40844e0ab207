"""When each domain was learned, and how its loss moved since then."""

from __future__ import annotations

from mfext.report.quantities import bits
from mfext.report.reading import Json, changes, domains, listed, mapping, matrix, objects, stages, text
from mfext.report.reading import number as number_at

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

    A learned domain's entry may say (`stage`); else the first stage whose `domains` list it, or that has its name.
    """
    old = changes(data, "forgetting")
    found: dict[str, int | None] = {}
    for domain in domains(data):
        if domain in mapping(data, "learned"):
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
