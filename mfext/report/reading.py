"""Typed looks into the stable JSON of a result: what is absent or of another type reads as None."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Json = Mapping[str, object]


def mapping(data: Json, *keys: str) -> Json:
    """The object at a path of keys; empty where there is none."""
    here: object = data
    for key in keys:
        here = here.get(key) if isinstance(here, Mapping) else None
    return here if isinstance(here, Mapping) else {}


def number(data: Json, *keys: str) -> float | None:
    """The finite number at a path of keys."""
    value = mapping(data, *keys[:-1]).get(keys[-1])
    return as_number(value)


def as_number(value: object) -> float | None:
    """A finite number, or None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else None


def text(data: Json, *keys: str) -> str:
    """The string at a path of keys; empty where there is none."""
    value = mapping(data, *keys[:-1]).get(keys[-1])
    return value if isinstance(value, str) else ""


def flag(data: Json, key: str) -> bool | None:
    """True, False, or None where nothing says."""
    value = data.get(key)
    return value if isinstance(value, bool) else None


def listed(data: Json, *keys: str) -> Sequence[object]:
    """The list at a path of keys; empty where there is none."""
    value = mapping(data, *keys[:-1]).get(keys[-1])
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()


def objects(data: Json, *keys: str) -> tuple[Json, ...]:
    """The objects of the list at a path of keys."""
    return tuple(each for each in listed(data, *keys) if isinstance(each, Mapping))


@dataclass(frozen=True)
class Change:
    """A change in nats per byte with its 95 % interval; `reason` says why one of them is missing."""

    difference: float | None
    low: float | None
    high: float | None
    reason: str = ""


def change(data: Json) -> Change:
    """The interval that an object {difference, low, high, reason} describes."""
    return Change(number(data, "difference"), number(data, "low"), number(data, "high"), text(data, "reason"))


def changes(data: Json, key: str) -> dict[str, Change]:
    """Per domain, from `data[key]["domains"]`."""
    entries = mapping(data, key, "domains")
    return {name: change(entry) for name, entry in entries.items() if isinstance(entry, Mapping)}


@dataclass(frozen=True)
class Learned:
    """A domain's loss in nats per byte before and after the stage that learned it."""

    domain: str
    before: float | None
    after: float | None


def learned(data: Json) -> tuple[Learned, ...]:
    """What was learned, in order: `data["learned"]` maps a domain to {before, after}."""
    entries = mapping(data, "learned")
    return tuple(
        Learned(name, number(entry, "before"), number(entry, "after"))
        for name, entry in entries.items()
        if isinstance(entry, Mapping)
    )


def domains(data: Json) -> tuple[str, ...]:
    """The matrix's columns."""
    return tuple(str(name) for name in listed(data, "domains"))


def stages(data: Json) -> tuple[str, ...]:
    """The matrix's rows: `data["stages"]` holds names or objects with a name."""
    return tuple(text(each, "name") if isinstance(each, Mapping) else str(each) for each in listed(data, "stages"))


def matrix(data: Json) -> tuple[tuple[float | None, ...], ...]:
    """Nats per byte by stage and domain."""
    rows = listed(data, "matrix", "nll_per_byte")
    return tuple(tuple(as_number(value) for value in row) for row in rows if isinstance(row, Sequence))


def role(data: Json, domain: str) -> str:
    """What a column of the matrix is: learned, old or bystander."""
    if domain in mapping(data, "learned"):
        return "learned"
    return "old" if domain in changes(data, "forgetting") else "bystander"
