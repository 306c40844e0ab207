"""JSON that detects damage: limits on reading, sealed objects, sealed append-only lines. Imports no torch.

A sealed object carries the SHA-256 of its own canonical text, and its bytes must be exactly that
text: every changed bit is seen. NaN and infinity are refused both ways.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mfext.errors import DamagedError, InputError
from mfext.store_files import fsync_folder, machine_errors, read_file, write_all

SEAL = "sha256"
MAX_JSON_BYTES = 16 << 20
MAX_LINES_BYTES = 1 << 30
MAX_JSON_DEPTH = 32


def dump_json(value: object, *, indent: int | None = 1) -> bytes:
    """Canonical JSON text of `value`: sorted keys, ASCII, a newline at the end; NaN is an InputError."""
    separators = (",", ":") if indent is None else (",", ": ")
    try:
        text = json.dumps(
            value, sort_keys=True, ensure_ascii=True, allow_nan=False, indent=indent, separators=separators
        )
    except ValueError as error:
        raise InputError("a value cannot be written as JSON", "", str(error)) from error
    return text.encode("ascii") + b"\n"


def _refuse_constant(text: str) -> object:
    raise ValueError(f"{text} is not a number JSON allows")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large a number")
    return value


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is given twice")
    return value


def _depth_within(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return True
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return False


def parse_json(data: bytes, where: object, max_depth: int = MAX_JSON_DEPTH) -> object:
    """The value `data` holds; InputError for broken, too deep, duplicate-key or non-finite JSON."""
    try:
        value: object = json.loads(
            data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_no_duplicates
        )
        deep = not _depth_within(value, max_depth)
    except ValueError as error:
        raise InputError("not valid JSON", where, str(error)) from error
    except RecursionError:
        deep = True
    if deep:
        raise InputError("JSON is nested too deep", where, f"at most {max_depth} levels are read")
    return value


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES, max_depth: int = MAX_JSON_DEPTH) -> object:
    """The value a JSON file holds, read with size and depth limits (InputError)."""
    return parse_json(read_file(Path(path), max_bytes), path, max_depth)


def read_json_object(path: Path) -> dict[str, object]:
    """Like `read_json`, for a file that must hold one object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError("not a JSON object", path, "the file must hold one {...}")
    return value


def seal(value: Mapping[str, object], *, indent: int | None = 1) -> bytes:
    """Canonical JSON of `value` plus the SHA-256 of its text under the key "sha256"."""
    assert SEAL not in value, "the key is taken by the seal"
    plain = json.loads(dump_json(dict(value)))
    plain[SEAL] = hashlib.sha256(dump_json(plain, indent=None)).hexdigest()
    return dump_json(plain, indent=indent)


def unseal(data: bytes, where: object, *, indent: int | None = 1) -> dict[str, object]:
    """The object `seal` wrote; DamagedError if any byte differs from what was written."""
    try:
        value = parse_json(data, where)
    except InputError as error:
        raise DamagedError("content is damaged", where, "its JSON no longer parses; restore it from a copy") from error
    if not isinstance(value, dict) or SEAL not in value:
        raise DamagedError("content is damaged", where, "it carries no checksum; restore it from a copy")
    found = value.pop(SEAL)
    if found != hashlib.sha256(dump_json(value, indent=None)).hexdigest() or seal(value, indent=indent) != data:
        raise DamagedError("content is damaged", where, "its SHA-256 does not match; restore it from a copy")
    return value


def append_line(path: Path, row: Mapping[str, object]) -> None:
    """Append one sealed JSON line, fsynced on return; see `append_lines`."""
    append_lines(path, [row])


def append_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Append sealed JSON lines in one write, fsynced on return. A torn last line, left by a kill
    (it was never acknowledged), is cut off first; a failed write is undone. DamagedError for other damage."""
    path, text = Path(path), b"".join(seal(row, indent=None) for row in rows)
    with machine_errors(path):
        is_new = not os.path.lexists(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = read_file(path, MAX_LINES_BYTES)
                size = _split(data, path)[1]
                os.ftruncate(descriptor, size)
                text = text if size < len(data) else b"\n" + text
            try:
                write_all(descriptor, text)
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        if is_new:
            fsync_folder(path.parent)


def read_lines(path: Path) -> list[dict[str, object]]:
    """Rows of a file of sealed lines (none if it is missing). A torn last line is left out; any
    other damage is a DamagedError with the line number."""
    path = Path(path)
    return _split(read_file(path, MAX_LINES_BYTES), path)[0] if os.path.lexists(path) else []


def _split(data: bytes, path: Path) -> tuple[list[dict[str, object]], int]:
    """Rows, and the number of bytes that hold whole lines. Only an end without a newline can be torn;
    one that lacks nothing but the newline still counts, one with another byte in its place is damage."""
    end = data.rfind(b"\n") + 1
    lines = data[:end].split(b"\n")[:-1]
    rows = [unseal(line + b"\n", f"{path}:{number}", indent=None) for number, line in enumerate(lines, start=1)]
    rest = data[end:]
    if _is_whole(rest):
        return [*rows, unseal(rest + b"\n", path, indent=None)], len(data)
    if _is_whole(rest[:-1]):
        raise DamagedError(
            "content is damaged", f"{path}:{len(lines) + 1}", "its line end was overwritten; restore it from a copy"
        )
    return rows, end


def _is_whole(line: bytes) -> bool:
    try:
        unseal(line + b"\n", "", indent=None)
    except DamagedError:
        return False
    return True
