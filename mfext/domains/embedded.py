"""Domains that need no file and no network: read from the running Python installation.

A source (a module, a help topic, a block of characters) is in one split, chosen by a hash of
its name; the same module is in the same split of `code`, `prose` and `bytecode`. Extracted
documents are cached as JSON lines behind a checked header.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from mfext.domains.cache_file import publish
from mfext.domains.domain import SPLITS, Domain, split_hashes
from mfext.domains.pieces import (
    EVALUATION_SHARE,
    NEAR_COPY_SHARE,
    Piece,
    cut,
    cut_code,
    order_key,
    runs_of,
    shared_runs,
    split_of,
    without_leaks,
)
from mfext.domains.standard_library import (
    bare_code,
    bytecode_listing,
    character_names,
    flowing_text,
    help_topics,
    library_folder,
    library_modules,
    long_docstrings,
    read_source,
)
from mfext.errors import InputError

EXTRACTOR_VERSION = 3
FEWEST_PIECE_CHARACTERS = 64
MOST_BYTES_PER_EVALUATION_SOURCE = 40_000  # so that no single module decides a score
SPLIT_SHARES = {"train": 0.9, "validation": EVALUATION_SHARE, "test": EVALUATION_SHARE}
Sources = Mapping[str, Callable[[], str]]
SPLIT_RULE = "by hash of the source's name: 90 % train, 5 % validation, 5 % test"


@dataclass(frozen=True)
class EmbeddedSettings:
    """One file of conf/domain: which embedded domain, how much of it, how long its documents are."""

    name: str
    max_bytes: int
    piece_bytes: int
    description: str = ""

    @staticmethod
    def from_mapping(values: Mapping[str, object], where: object) -> EmbeddedSettings:
        """Check the parsed YAML of one embedded domain. Raises InputError naming the wrong key."""
        known = {"kind", *(field.name for field in fields(EmbeddedSettings))}
        for key in values:
            if key not in known:
                raise InputError(f"unknown key '{key}'", where, f"known: {', '.join(sorted(known))}")
        name, kind = values.get("name"), values.get("kind")
        if kind != "embedded":
            raise InputError(f"kind={kind!r}", where, "must be embedded")
        if not isinstance(name, str) or name not in EXTRACTORS:
            raise InputError(f"name={name!r}", where, f"must be one of {', '.join(sorted(EXTRACTORS))}")
        sizes = {}
        for key in ("max_bytes", "piece_bytes"):
            size = values.get(key)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InputError(f"{key}={size!r}", where, "must be a whole number of bytes, at least 1")
            sizes[key] = size
        return EmbeddedSettings(name, sizes["max_bytes"], sizes["piece_bytes"], str(values.get("description", "")))


@dataclass(frozen=True)
class Extractor:
    """`sources` gives a reader by stable name, `cut` makes documents of a text, and near-copies
    are judged by runs of `run_lines` lines."""

    sources: Callable[[Path], Sources]
    cut: Callable[[str, int], list[str]]
    run_lines: int


def load_embedded(settings: EmbeddedSettings, cache_folder: Path | None = None) -> Domain:
    """The embedded domain, from the cache where that holds it undamaged, else extracted anew.

    Raises InputError where this Python ships no sources, MachineError where the cache cannot
    be written.
    """
    folder = library_folder()
    path = cache_folder / _cache_name(settings, folder) if cache_folder else None
    pieces = _read_cache(path) if path else None
    if pieces is None:
        pieces = extract(settings, folder)
        if path:
            _write_cache(path, pieces)
    train, validation, test = (tuple(piece.text for piece in pieces if piece.split == split) for split in SPLITS)
    if not (train and validation and test):
        raise InputError(
            f"domain '{settings.name}' has an empty split",
            f"max_bytes={settings.max_bytes}",
            "raise max_bytes, so that validation and test get documents",
        )
    provenance = {
        "kind": "embedded",
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "unicode": unicodedata.unidata_version,
        "extractor_version": str(EXTRACTOR_VERSION),
        "max_bytes": str(settings.max_bytes),
        "split_rule": SPLIT_RULE,
        **split_hashes(train, validation, test),
    }
    return Domain(settings.name, settings.name, train, validation, test, provenance=provenance)


def extract(settings: EmbeddedSettings, folder: Path) -> list[Piece]:
    """Read, cut, cap and clear of near-copies; documents in the fixed order of their split.

    Each split has its share of `max_bytes`, filled with sources in the order of their hash.
    """
    extractor = EXTRACTORS[settings.name]
    seen: set[int] = set()
    pieces: list[Piece] = []
    room = {split: int(share * settings.max_bytes) for split, share in SPLIT_SHARES.items()}
    for name, read in sorted(extractor.sources(folder).items(), key=lambda source: order_key(source[0])):
        split = split_of(name)
        if room[split] <= 0:
            continue
        limit = room[split] if split == "train" else min(room[split], MOST_BYTES_PER_EVALUATION_SOURCE)
        taken = 0
        for number, piece in enumerate(extractor.cut(read(), settings.piece_bytes)):
            text = piece.strip("\n") + "\n"
            runs = runs_of(text, extractor.run_lines)
            if len(text) < FEWEST_PIECE_CHARACTERS or shared_runs(runs, seen) >= NEAR_COPY_SHARE:
                continue
            size = len(text.encode())
            if taken + size > limit:
                room[split] = 0 if limit == room[split] else room[split]
                break
            seen |= runs
            pieces.append(Piece(f"{name}#{number}", split, text))
            taken += size
        room[split] -= taken
    return sorted(without_leaks(pieces, extractor.run_lines), key=lambda piece: order_key(piece.name))


def _per_module(folder: Path, read: Callable[[str, str], str]) -> Sources:
    return {
        f"module:{module}": partial(lambda module, path: read(read_source(path), module), module, path)
        for module, path in library_modules(folder).items()
    }


def _code(folder: Path) -> Sources:
    return _per_module(folder, lambda source, module: bare_code(source))


def _prose(folder: Path) -> Sources:
    topics = {f"topic:{topic}": partial(flowing_text, text) for topic, text in help_topics(folder).items()}
    return {**topics, **_per_module(folder, lambda source, module: flowing_text(long_docstrings(source)))}


def _bytecode(folder: Path) -> Sources:
    return _per_module(folder, bytecode_listing)


def _unicode_names(folder: Path) -> Sources:
    return {f"block:{block}": partial(str, text) for block, text in character_names().items()}


EXTRACTORS: Mapping[str, Extractor] = {
    "code": Extractor(_code, cut_code, run_lines=3),
    "prose": Extractor(_prose, cut, run_lines=3),
    "unicode_names": Extractor(_unicode_names, lambda text, piece_bytes: [text], run_lines=1),
    "bytecode": Extractor(_bytecode, cut, run_lines=8),
}


def _cache_name(settings: EmbeddedSettings, folder: Path) -> str:
    described = json.dumps([asdict(settings), sys.version, str(folder), EXTRACTOR_VERSION], sort_keys=True)
    digest = hashlib.sha256(described.encode()).hexdigest()[:12]
    return f"{settings.name}-python{platform.python_version()}-v{EXTRACTOR_VERSION}-{digest}.jsonl"


def _write_cache(path: Path, pieces: list[Piece]) -> None:
    lines = "".join(json.dumps(asdict(piece)) + "\n" for piece in pieces).encode()
    header = {"format": "mfext-embedded-1", "documents": len(pieces), "sha256": hashlib.sha256(lines).hexdigest()}
    content = json.dumps(header).encode() + b"\n" + lines
    publish(path, lambda file: _write(file.write, content))


def _write(write: Callable[[bytes], int], content: bytes) -> None:
    write(content)


def _read_cache(path: Path) -> list[Piece] | None:
    """The cached documents; None where there is no cache or its content is not what its header says."""
    try:
        header, _, lines = path.read_bytes().partition(b"\n")
        if json.loads(header)["sha256"] != hashlib.sha256(lines).hexdigest():
            return None
        return [Piece(**json.loads(line)) for line in lines.splitlines()]
    except (OSError, ValueError, KeyError, TypeError):
        return None
