"""One model per domain, each from the base: what a domain could teach if nothing had to be remembered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mfext.training.methods.full import Full


@dataclass(frozen=True)
class Independent(Full):
    """Trains every parameter of a copy of the base on one domain; no stage sees another's model."""

    trains: ClassVar[str] = "every parameter of a fresh copy of the base, one model per domain"
    name: str = "independent"
    starts_from: ClassVar[Literal["previous", "base"]] = "base"
