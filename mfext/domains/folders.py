"""A user's folder as a domain: train, validation and test as .jsonl, .txt or .parquet.

`train.jsonl` holds one JSON object a line with the document under "text"; `train.parquet` a
text column; `train.txt` is cut at blank lines into documents of about 4 KB; a folder `train/`
holds any number of .jsonl or .parquet files, or .txt files of one document each. Text is taken
as it is: nothing is altered or skipped, and the first bad record is refused with its line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from mfext.config import check_name
from mfext.domains.domain import SPLITS, Documents, Domain, check_no_overlap, duplicate_note, split_hashes
from mfext.domains.pieces import EVALUATION_SHARE, carve, cut
from mfext.errors import InputError, MachineError

SUFFIXES = (".jsonl", ".txt", ".parquet")
TXT_PIECE_BYTES = 4096
TextColumn = Callable[[Path], Iterable[object]]


def load_folder(folder: Path, source: str, read_parquet: TextColumn) -> Domain:
    """The domain in `folder`, named after it. `read_parquet` yields the text column of a file.

    Splits that are missing are taken out of train, by document, and a note says so. Raises
    InputError for a bad record (file, line, reason), a missing train, or documents shared by
    train and an evaluation split.
    """
    found = {split: _split_file(folder, split) for split in SPLITS}
    if found["train"] is None:
        given = "no files" if not any(folder.iterdir()) else "no train.jsonl, train.txt, train.parquet or train/"
        raise InputError(f"{given} in the domain's folder", folder, "put the text to learn there as train.jsonl")
    splits = {split: read_split(path, read_parquet) for split, path in found.items() if path is not None}
    return assemble(domain_name(folder.resolve().name, folder), source, splits)


def assemble(name: str, source: str, splits: dict[str, Documents]) -> Domain:
    """A domain from the splits given; missing evaluation splits are carved out of train."""
    missing = tuple(split for split in SPLITS if split not in splits)
    notes: tuple[str, ...] = ()
    rule = "as given"
    if missing:
        splits = splits | carve(splits["train"], missing, source)
        counts = ", ".join(f"{split} {len(splits[split])}" for split in SPLITS)
        share = f"{EVALUATION_SHARE:.0%} of documents each"
        rule = f"{' and '.join(missing)} taken out of train by the hash of the text, {share}"
        notes = (f"no {' and no '.join(missing)} given, so {rule}: {counts} documents",)
    train, validation, test = (splits[split] for split in SPLITS)
    notes += duplicate_note(train, "train")
    provenance = {"kind": "given", "split_rule": rule, **split_hashes(train, validation, test)}
    domain = Domain(name, source, train, validation, test, notes, provenance)
    check_no_overlap((domain,))
    return domain


def domain_name(name: str, where: object) -> str:
    """The name if a domain may have it. Raises InputError with the rule otherwise."""
    try:
        return check_name(name)
    except ValueError as error:
        raise InputError("a domain cannot have this name", where, str(error)) from error


def read_split(path: Path, read_parquet: TextColumn) -> Documents:
    """All documents of one split, from a file or a folder of files in the order of their names."""
    documents: list[str] = []
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        suffixes = {file.suffix for file in files}
        if len(suffixes) > 1 or not suffixes <= set(SUFFIXES):
            shown = ", ".join(sorted(suffix or "no suffix" for suffix in suffixes))
            fix = f"found {shown}; give only {' or only '.join(SUFFIXES)}"
            raise InputError("files of one kind are expected", path, fix)
        for file in files:
            whole = file.suffix == ".txt"
            documents.extend([_decoded(_content(file), file)] if whole else _read_file(file, read_parquet))
    else:
        documents.extend(_read_file(path, read_parquet))
    if not documents:
        raise InputError("no documents", path, "the file is empty")
    return tuple(documents)


def check_text(value: object, where: object, number: int, unit: str = "line") -> str:
    """The document if it is one. Raises InputError saying which record is bad and why."""
    if value is None:
        reason = "text is missing"
    elif not isinstance(value, str):
        reason = f"text is not a string but {type(value).__name__}"
    elif not value.strip():
        reason = "text is empty"
    elif re.search("[\ud800-\udfff]", value):
        reason = "text is not valid Unicode (a lone surrogate)"
    else:
        return value
    raise InputError("bad record", f"{where}, {unit} {number}", reason)


def _split_file(folder: Path, split: str) -> Path | None:
    candidates = [folder / f"{split}{suffix}" for suffix in SUFFIXES] + [folder / split]
    found = [path for path in candidates if path.is_file() or (path.name == split and path.is_dir())]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise InputError(f"{split} is given twice", folder, f"found {names}; keep one")
    return found[0] if found else None


def _read_file(file: Path, read_parquet: TextColumn) -> Sequence[str]:
    if file.suffix == ".jsonl":
        return list(_json_lines(_content(file), file))
    if file.suffix == ".parquet":
        return [check_text(value, file, number, "row") for number, value in enumerate(read_parquet(file), 1)]
    return cut(_decoded(_content(file), file), TXT_PIECE_BYTES)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise MachineError("cannot read a domain's file", file, error.strerror or str(error)) from error


def _decoded(content: bytes, file: Path) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _bad_encoding(file, line, error) from error
    return check_text(text, file, 1)


def _bad_encoding(file: Path, line: int, error: UnicodeDecodeError) -> InputError:
    return InputError("bad record", f"{file}, line {line}", f"invalid UTF-8 ({error.reason}); save the file as UTF-8")


def _json_lines(content: bytes, file: Path) -> Iterator[str]:
    lines = content.split(b"\n")
    if not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
        if not line.strip():
            raise InputError("bad record", where, "the line is empty")
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise _bad_encoding(file, number, error) from error
        except RecursionError as error:
            raise InputError("bad record", where, "bad JSON: nested too deeply") from error
        except ValueError as error:
            raise InputError("bad record", where, f"bad JSON: {error}") from error
        if not isinstance(record, dict):
            raise InputError("bad record", where, 'one JSON object with a "text" field is expected')
        if "text" not in record:
            shown = ", ".join(sorted(record)[:5]) or "no fields"
            raise InputError("bad record", where, f'no "text" field; found {shown}')
        yield check_text(record["text"], file, number)
