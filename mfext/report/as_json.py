"""A report's data as one JSON object."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from mfext.report.report import Report


def to_json(report: Report) -> str:
    """Exactly one JSON object on one line; non-finite numbers, which JSON does not have, become null."""
    return json.dumps(_plain(report.data), ensure_ascii=False, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    assert value is None or isinstance(value, str | bool | int), f"{type(value).__name__} is no JSON"
    # Half a surrogate pair cannot be written as UTF-8.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
