"""How a frozen dataclass refuses a wrong value: ValueError naming the key, the value given and what is allowed."""

from __future__ import annotations

from typing import Literal, get_args, get_origin, get_type_hints


def require(config: object, key: str, condition: bool, rule: str) -> None:
    if not condition:
        raise ValueError(f"{key}={getattr(config, key)!r}: must be {rule}")


def require_at_least(minimum: float, config: object, *keys: str) -> None:
    for key in keys:
        require(config, key, getattr(config, key) >= minimum, f"at least {minimum}")


def require_choices(config: object) -> None:
    """Every field whose type is a Literal holds one of its values."""
    for key, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            require(config, key, getattr(config, key) in get_args(hint), " or ".join(get_args(hint)))
