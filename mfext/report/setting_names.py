"""Short names for a sweep's settings: folders by their last part, as far as that still tells them apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mfext.report.reading import Json

Shorts = Mapping[str, Mapping[str, str]]


def short_values(overrides: Iterable[Json]) -> dict[str, dict[str, str]]:
    """Key -> a value, as text, -> its short form: '../corpora/code' is code, unless another value ends so too."""
    texts: dict[str, dict[str, None]] = {}
    for each in overrides:
        for key, value in each.items():
            texts.setdefault(key, {})[_text(value)] = None
    return {key: _short(list(values)) for key, values in texts.items()}


def short_of(shorts: Shorts, key: str, value: object) -> str:
    """The short form of one of the values that `short_values` saw."""
    return shorts[key][_text(value)]


def setting_name(overrides: Json, shorts: Shorts, without: Sequence[str] = ("seed",)) -> str:
    """'full domain=code': the method's value, then key=value of all overrides but `without`; '' where none is left."""
    named = {key: short_of(shorts, key, value) for key, value in overrides.items() if key not in without}
    method = named.pop("method", None)
    return " ".join([*([method] if method is not None else []), *(f"{key}={value}" for key, value in named.items())])


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _short(values: Sequence[str]) -> dict[str, str]:
    parts = {value: value.rstrip("/").split("/") if _is_path(value) else [value] for value in values}
    for length in range(1, max(map(len, parts.values())) + 1):
        found = {value: "/".join(each[-length:]) for value, each in parts.items()}
        if len(set(found.values())) == len(values):
            return found
    return {value: value for value in values}


def _is_path(value: str) -> bool:
    return "/" in value and not value.startswith("hf:") and "," not in value
