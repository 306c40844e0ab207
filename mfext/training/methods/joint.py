"""Joint training: every domain at once, from the base: the reference that no order of domains can disturb."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mfext.training.methods.full import Full


@dataclass(frozen=True)
class Joint(Full):
    """Trains every parameter in one stage on the text of all domains together, the base's included."""

    trains: ClassVar[str] = "every parameter, from the base, on the text of all domains at once"
    name: str = "joint"
    starts_from: ClassVar[Literal["previous", "base"]] = "base"
