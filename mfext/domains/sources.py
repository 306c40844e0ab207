"""From a reference a user typed to a Domain. The only door to datasets.

A reference is a known name (conf/domain/NAME.yaml), a folder, or hf:owner/name[:config].
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mfext.domains.domain import SPLITS, Documents, Domain
from mfext.domains.embedded import EmbeddedSettings, load_embedded
from mfext.domains.folders import assemble, check_text, domain_name, load_folder
from mfext.errors import InputError, MachineError

if TYPE_CHECKING:
    import datasets

HUB_REFERENCE = re.compile(r"hf:(?P<path>[\w.-]+/(?P<name>[\w.-]+))(?::(?P<config>[\w.-]+))?")
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def load_domain(reference: str, *, known: Mapping[str, EmbeddedSettings], cache_folder: Path | None = None) -> Domain:
    """The domain a reference names.

    `known` holds the parsed files of conf/domain; a known name wins over a folder of the same
    name (write ./NAME for the folder). `cache_folder` keeps extracted embedded documents.
    Raises InputError for an unknown name, a bad record, a data set that cannot be reached.
    """
    if reference.startswith("hf:"):
        return _load_hub(reference)
    if reference in known:
        return load_embedded(known[reference], cache_folder)
    path = Path(reference)
    if path.is_dir():
        try:
            return load_folder(path, reference, _parquet_texts)
        except OSError as error:
            raise MachineError("cannot read the folder", path, error.strerror or str(error)) from error
    if path.is_file():
        raise InputError("a domain is a folder, not a file", reference, f"give {path.parent}, holding train.jsonl")
    raise _unknown(reference, known)


def _unknown(reference: str, known: Mapping[str, EmbeddedSettings]) -> InputError:
    if "/" in reference or reference.startswith("."):
        return InputError("no such folder", reference, "give a folder holding train.jsonl, .txt or .parquet")
    close = difflib.get_close_matches(reference.lower(), known, n=1)
    hint = f". Did you mean '{close[0]}'?" if close else ""
    fix = f"known: {', '.join(sorted(known))}; or give a folder or hf:owner/name{hint}"
    return InputError(f"no domain '{reference}'", "", fix)


def _load_hub(reference: str) -> Domain:
    match = HUB_REFERENCE.fullmatch(reference)
    if match is None:
        raise InputError("not a Hugging Face data set", reference, "write hf:owner/name or hf:owner/name:config")
    parts = _fetch(match["path"], match["config"], reference)
    splits: dict[str, Documents] = {}
    for split in SPLITS:
        name = next((name for name in SPLIT_NAMES[split] if name in parts), None)
        if name is not None:
            splits[split] = _texts(parts[name], f"{reference} {name}")
    if "train" not in splits:
        raise InputError("the data set has no train split", reference, f"found {', '.join(sorted(map(str, parts)))}")
    chosen = f"{match['name']}-{match['config']}" if match["config"] else match["name"]
    return assemble(domain_name(chosen, reference), reference, splits)


def _fetch(path: str, config: str | None, reference: str) -> Mapping[str, datasets.Dataset]:
    import datasets

    try:
        parts = datasets.load_dataset(path, config)
    except datasets.exceptions.DatasetNotFoundError as error:
        fix = "check owner and name, or log in for a gated one"
        raise InputError("no such data set on the Hub", reference, fix) from error
    except ConnectionError as error:
        raise InputError("the Hub cannot be reached", reference, f"{error}; go online or give a folder") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError("the data set cannot be loaded", reference, str(error)) from error
    if not isinstance(parts, Mapping):
        raise InputError("the data set has no named splits", reference, "give its files as a folder")
    return parts


def _texts(part: datasets.Dataset, where: str) -> Documents:
    if "text" not in part.column_names:
        raise InputError("no text column", where, f"found {', '.join(part.column_names)}")
    documents = tuple(check_text(value, where, number, "row") for number, value in enumerate(part["text"], 1))
    if not documents:
        raise InputError("no documents", where, "the split is empty")
    return documents


def _parquet_texts(file: Path) -> Iterable[object]:
    """The text column of a parquet file, streamed, so that no copy is left in a cache."""
    import datasets

    try:
        with _silent(datasets.logging):
            rows = datasets.load_dataset("parquet", data_files=str(file.resolve()), split="train", streaming=True)
            for row in rows:
                if "text" not in row:
                    raise InputError("no text column", file, f"found {', '.join(sorted(row)[:5])}")
                yield row["text"]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError("not a readable parquet file", file, str(error)) from error


@contextmanager
def _silent(logging: ModuleType) -> Iterator[None]:
    """datasets logs what it raises; the error is told once, by us. Its own level comes back afterwards."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
