"""JSON with limits, and sealed lines that survive a torn end."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfext.errors import DamagedError, InputError, MachineError
from mfext.store_json import append_line, append_lines, parse_json, read_json, read_lines, seal, unseal

ROWS = [{"step": step, "nll_nats": 0.1 * step, "domain": "prose"} for step in range(3)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text().filter(lambda key: key != "sha256"), JSON, max_size=4), st.randoms())
def test_a_sealed_object_reads_back_and_any_changed_bit_is_seen(value: dict[str, object], chance: object) -> None:
    for indent in (1, None):
        data = seal(value, indent=indent)
        assert unseal(data, "here", indent=indent) == value
        place, bit = chance.randrange(len(data)), chance.randrange(8)
        with pytest.raises(DamagedError):
            unseal(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :], "here", indent=indent)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 40 + b"]" * 40,
        b"[" * 200_000,
        b'{"a": 1, "a": 2}',
        b"NaN",
        b"[1e999]",
        b"-Infinity",
        b"\xff\xfe",
        b"{",
        b"1" * 5000,
        b"",
    ],
)
def test_hostile_json_is_refused_in_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(InputError) as error:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "x.json") in str(error.value)


def test_json_within_the_limits_is_read_and_a_larger_file_is_not(tmp_path: Path) -> None:
    text = b"[" * 32 + b"]" * 32
    parse_json(text, "here")
    (tmp_path / "x.json").write_bytes(text)
    read_json(tmp_path / "x.json", max_bytes=64)
    with pytest.raises(InputError, match="too large"):
        read_json(tmp_path / "x.json", max_bytes=63)


def test_lines_read_back_in_order_and_none_where_there_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert read_lines(path) == []
    append_line(path, ROWS[0])
    append_lines(path, ROWS[1:])
    assert read_lines(path) == ROWS


def test_a_line_torn_at_any_byte_is_left_out_and_appending_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append_lines(path, ROWS)
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole) + 1):
        path.write_bytes(whole[:end])
        kept = ROWS if end >= len(whole) - 1 else ROWS[:2]  # only the newline missing: the row is there
        assert read_lines(path) == kept
        append_line(path, {"step": 9})
        assert read_lines(path) == [*kept, {"step": 9}]


def test_damage_that_no_torn_write_leaves_is_refused_with_the_line_number(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append_lines(path, ROWS)
    clean = path.read_bytes()
    for place in [*range(0, len(clean), 3), len(clean) - 1]:
        path.write_bytes(clean[:place] + bytes([clean[place] ^ 4]) + clean[place + 1 :])
        with pytest.raises(DamagedError) as error:
            read_lines(path)
        assert f"{path}:" in str(error.value)


def test_a_full_disk_leaves_the_lines_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    append_line(path, ROWS[0])
    before, write = path.read_bytes(), os.write

    def half(descriptor: int, data: memoryview) -> int:
        write(descriptor, data[:5])
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(MachineError, match="no space left"):
            append_line(path, ROWS[1])
    assert path.read_bytes() == before
