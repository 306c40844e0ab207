"""Cutting long texts into documents, sharing documents out over splits, dropping near-copies."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mfext.domains.domain import Documents, document_key
from mfext.errors import InputError

TOP_LEVEL = re.compile(r"\n(?:[ \t]*\n)+(?=\S)")
ANY_BLANK_LINE = re.compile(r"\n(?:[ \t\r]*\n)+")
EVALUATION_SHARE = 0.05
SPLIT_SALT = "mfext-split-8"  # of 59 tried, the one whose splits are nearest 5 % by bytes on Python 3.11, 3.12 and 3.13
NEAR_COPY_SHARE = 0.5
LEAK_SHARE = 0.25


@dataclass(frozen=True)
class Piece:
    """One document and the split its source belongs to."""

    name: str
    split: str
    text: str


def cut(text: str, piece_bytes: int, boundary: re.Pattern[str] = ANY_BLANK_LINE) -> list[str]:
    """Cut a text at blank lines into pieces of about `piece_bytes`; joined they are the text again.

    A stretch without a boundary stays whole, however long it is; no piece of several is blank.
    """
    pieces: list[str] = []
    begin = previous = size = 0
    ends = [match.end() for match in boundary.finditer(text)]
    for end in [*ends, len(text)]:
        block = text[previous:end]
        num_bytes = len(block.encode())
        if size + num_bytes > piece_bytes and block.strip() and text[begin:previous].strip():
            pieces.append(text[begin:previous])
            begin, size = previous, 0
        size += num_bytes
        previous = end
    if text[begin:]:
        pieces.append(text[begin:])
    return pieces


def cut_code(text: str, piece_bytes: int) -> list[str]:
    """Cut at blank lines before top-level lines; what is still twice too long, at any blank line."""
    return [
        smaller
        for piece in cut(text, piece_bytes, TOP_LEVEL)
        for smaller in (cut(piece, piece_bytes) if len(piece.encode()) > 2 * piece_bytes else [piece])
    ]


def split_of(stable_name: str) -> str:
    """The split of a source document: 90 % train, 5 % validation, 5 % test, by a hash of its name."""
    drawn = int.from_bytes(hashlib.sha256(f"{SPLIT_SALT}:{stable_name}".encode()).digest()[:8], "big") / 2**64
    if drawn < EVALUATION_SHARE:
        return "test"
    return "validation" if drawn < 2 * EVALUATION_SHARE else "train"


def order_key(stable_name: str) -> bytes:
    """Where a document stands in its split: a hash, so that the first ones are a fair sample."""
    return hashlib.sha256(f"mfext-order-1:{stable_name}".encode()).digest()


Runs = frozenset[int]


def runs_of(text: str, run_lines: int) -> Runs:
    """Hashes of every run of `run_lines` lines, indentation and blank lines aside (one at least)."""
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    last = max(len(lines) - run_lines, 0)
    return frozenset(hash(tuple(lines[start : start + run_lines])) for start in range(last + 1))


def shared_runs(runs: Runs, seen: set[int]) -> float:
    """Share of a piece's runs that earlier pieces hold, from 0 to 1."""
    return len(runs & seen) / len(runs)


def without_leaks(pieces: Sequence[Piece], run_lines: int) -> list[Piece]:
    """Drop evaluation pieces a quarter of which, or more, is in train; then test against validation."""
    seen: set[int] = set()
    kept: list[Piece] = []
    for split in ("train", "validation", "test"):
        found = [(piece, runs_of(piece.text, run_lines)) for piece in pieces if piece.split == split]
        chosen = [(piece, runs) for piece, runs in found if split == "train" or shared_runs(runs, seen) < LEAK_SHARE]
        seen.update(*(runs for _, runs in chosen))
        kept.extend(piece for piece, _ in chosen)
    return kept


def carve(documents: Documents, missing: Iterable[str], where: object) -> dict[str, Documents]:
    """Take each missing evaluation split out of the train documents: 5 % of them, at least one.

    Chosen by the hash of the text with white space normalised, so copies stay together and
    order does not matter. Returns "train" and the missing splits. Raises InputError where too
    few different documents are left to train on.
    """
    wanted = tuple(missing)
    ranked = sorted({document_key(document) for document in documents})
    count = max(1, round(EVALUATION_SHARE * len(ranked)))
    if len(ranked) < len(wanted) + 1:
        raise InputError(
            f"{len(ranked)} different documents cannot be split into train and {' and '.join(wanted)}",
            where,
            "give more documents, or the splits as files",
        )
    home = {key: name for number, name in enumerate(wanted) for key in ranked[number * count : (number + 1) * count]}
    shared: dict[str, list[str]] = {name: [] for name in ("train", *wanted)}
    for document in documents:
        shared[home.get(document_key(document), "train")].append(document)
    return {name: tuple(part) for name, part in shared.items()}
