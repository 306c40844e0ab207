"""A stage's details file, read back: per domain which experts its tokens used and what the gates did.

`commands/measuring.py` writes it beside the ledger: {DOMAIN: {"usage": Usage.to_json() or null, "gates": [...]}}.
Keys that are not needed here are ignored; a key that is missing or of another type is an InputError with its path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from mfext.conversion import from_mapping
from mfext.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
Site = tuple[int, str]
FIX = "measure the stage again"


@dataclass(frozen=True)
class BankShares:
    """One router's choices: `share[e]` of them fell on expert e; `tokens` were routed. Fields as in BankUsage."""

    layer: int
    kind: str
    generation: int
    tokens: int
    share: tuple[float, ...]


@dataclass(frozen=True)
class SiteShare:
    """Share of all scored tokens that reached an expert of a growth at one site."""

    layer: int
    kind: str
    share_new: float


@dataclass(frozen=True)
class GateShares:
    """One gate on one domain: shares of tokens with g > 0 and with g < 1, mean tokens until it settled."""

    gate: int
    share_open: float
    share_not_full: float
    lag_tokens_mean: float


@dataclass(frozen=True)
class DomainDetails:
    """What the details file holds of one domain; `banks` and `sites` are empty where usage was not counted."""

    banks: tuple[BankShares, ...] = ()
    sites: tuple[SiteShare, ...] = ()
    gates: tuple[GateShares, ...] = ()


def read_details(data: Mapping[str, Any], where: str = "details") -> dict[str, DomainDetails]:
    """The details of every domain; `where` names the file in errors."""
    return {domain: _domain(entry, f"{where}: {domain}") for domain, entry in data.items()}


def _domain(entry: object, where: str) -> DomainDetails:
    plain = _mapping(entry, where)
    usage = _mapping(plain.get("usage") or {}, f"{where}.usage")
    return DomainDetails(
        _entries(BankShares, usage, "banks", f"{where}.usage"),
        _entries(SiteShare, usage, "sites", f"{where}.usage"),
        _entries(GateShares, plain, "gates", where),
    )


def _entries(cls: type[T], holder: Mapping[str, Any], key: str, where: str) -> tuple[T, ...]:
    entries = holder.get(key, ())
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise InputError("expected a list", f"{where}.{key}", FIX)
    names = {field.name for field in fields(cls)}
    paths = [f"{where}.{key}[{number}]" for number in range(len(entries))]
    kept = [_mapping(entry, path) for entry, path in zip(entries, paths, strict=True)]
    plain = [{name: value for name, value in entry.items() if name in names} for entry in kept]
    return tuple(from_mapping(cls, entry, path) for entry, path in zip(plain, paths, strict=True))


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError("expected keys and values", where, FIX)
    return value
