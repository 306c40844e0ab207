"""Plain mappings to the frozen dataclasses of config.py and back, strictly.

Nothing is guessed: an unknown key, a missing key or a value of another type is an InputError that names the key's full
path, the value and what is allowed. Used for recipes, for requests and for a model folder's config.json.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mfext.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
# Which values a choice of a union is tried for; any other choice is a list.
_TAKEN: Mapping[Any, type | tuple[type, ...]] = {str: str, int: (int, float)}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'tokens'?" where one of `known` is close to `word`, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def from_mapping(cls: type[T], mapping: object, where: str = "") -> T:
    """Build the dataclass `cls` from a mapping, its nested dataclasses from nested mappings.

    `where` is the path printed before each key ("training" gives "training.tokens"). Raises InputError.
    """
    if not isinstance(mapping, Mapping):
        raise InputError(f"expected keys and values, got {_shown(mapping)}", where or cls.__name__)
    hints = get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise InputError(f"unknown key {_shown(str(key))}", path, f"known here: {', '.join(known)}{hint}")
        values[key] = _convert(hints[key], value, path)
    missing = [name for name, field in known.items() if name not in values and _is_required(field)]
    if missing:
        raise InputError(f"missing key {missing[0]!r}", where or cls.__name__)
    try:
        return cls(**values)
    except ValueError as error:
        raise InputError("bad value", f"{where}.{error}" if where else str(error)) from error


def to_mapping(value: Any) -> dict[str, Any]:
    """The dataclass as nested plain dicts and lists, ready for JSON; `from_mapping` takes it back."""
    plain = _plain(dataclasses.asdict(value))
    assert isinstance(plain, dict)
    return plain


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse(path: str, value: object, rule: str) -> InputError:
    return InputError("wrong type", f"{path}={_shown(value)}", f"must be {rule}")


def _convert(hint: Any, value: object, path: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(hint), value, path)
    if origin is Literal:
        if value in get_args(hint) and isinstance(value, str):
            return value
        choices = ", ".join(map(str, get_args(hint)))
        raise InputError("bad value", f"{path}={_shown(value)}", f"one of {choices}{_close(value, get_args(hint))}")
    if origin is tuple:
        return _convert_tuple(get_args(hint), value, path)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, path)
    return _convert_scalar(hint, value, path)


def _close(value: object, known: Iterable[str]) -> str:
    return did_you_mean(value, known) if isinstance(value, str) else ""


def _convert_union(choices: tuple[Any, ...], value: object, path: str) -> Any:
    if value is None and type(None) in choices:
        return None
    choices = tuple(choice for choice in choices if choice is not type(None))
    if len(choices) == 1:
        return _convert(choices[0], value, path)
    for choice in choices:
        if isinstance(value, _TAKEN.get(choice, (list, tuple))):
            return _convert(choice, value, path)
    raise _refuse(path, value, " or ".join(_name(choice) for choice in choices))


def _convert_tuple(inner: tuple[Any, ...], value: object, path: str) -> tuple[Any, ...]:
    many = len(inner) == 2 and inner[1] is Ellipsis
    if many and inner[0] is str and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise _refuse(path, value, f"a list of {_name(inner[0])}s")
    if not many and len(value) != len(inner):
        raise _refuse(path, value, f"a list of {len(inner)}")
    hints = [inner[0]] * len(value) if many else inner
    return tuple(_convert(hint, item, f"{path}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True)))


def _name(hint: Any) -> str:
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return names.get(hint, "list" if get_origin(hint) is tuple else "group of keys")


def _convert_scalar(hint: Any, value: object, path: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if hint is int and number is not None and math.isfinite(number) and number == int(number):
        return int(number)
    if hint is float and number is not None:
        if isinstance(number, int) and abs(number) > 2**1000:
            raise _refuse(path, "a number of hundreds of digits", "a finite number")
        if math.isfinite(number):
            return float(number)
        raise _refuse(path, value, "a finite number")
    article = "" if hint in (str, bool) else "a "
    raise _refuse(path, value, article + _name(hint))
