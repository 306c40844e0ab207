"""Committed folders: written whole or not at all, with a manifest that proves their content. Imports no torch.

Protocol: temporary folder beside the target -> files fsynced -> MANIFEST.json -> fsync -> rename ->
fsync of the parent -> verify. A committed folder is flat; only files its manifest lists are ever read.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata as distributions
from pathlib import Path

from mfext.errors import DamagedError, InputError
from mfext.store_files import (
    TEMPORARY_PREFIX,
    check_file_name,
    discard_folder,
    folder_lock,
    fsync_file,
    fsync_folder,
    machine_errors,
    make_folders,
    open_regular,
    read_file,
    require_free_space,
    temporary_folder,
    write_new_file,
)
from mfext.store_json import MAX_JSON_BYTES, seal, unseal

MANIFEST_NAME = "MANIFEST.json"
FORMAT_VERSION = 1
MAX_FILES = 4096
_ASIDE_PREFIX = ".mfext-old-"
_HASH = re.compile(r"[0-9a-f]{64}")
_RECORDED = ("mfext", "torch", "safetensors", "numpy", "lightning")


@dataclass(frozen=True)
class FileEntry:
    """What one file of a committed folder must be."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a committed folder holds. `identity` (SHA-256 of the manifest file) names this exact content;
    `parent` is the identity of what it was made from."""

    kind: str
    files: Mapping[str, FileEntry]
    metadata: Mapping[str, object]
    parent: str | None
    config_hash: str | None
    environment: Mapping[str, str]
    created: str
    identity: str

    @property
    def size_bytes(self) -> int:
        """Bytes of all listed files."""
        return sum(entry.size_bytes for entry in self.files.values())


@cache  # 20 ms of metadata parsing, as long as the rest of a small commit
def describe_environment() -> Mapping[str, str]:
    """Versions and platform, without importing anything and without naming the machine."""
    found = {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
    for name in _RECORDED:
        try:
            found[name] = distributions.version(name)
        except distributions.PackageNotFoundError:
            found[name] = "not installed"
    return found


def file_sha256(path: Path, *, follow_links: bool = False) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a plain file."""
    with machine_errors(path):
        descriptor = open_regular(path, follow_links=follow_links)
        with os.fdopen(descriptor, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
            return stream.tell(), digest.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a committed folder, itself checked; InputError if there is none."""
    path = Path(folder) / MANIFEST_NAME
    if not os.path.isdir(folder):
        raise InputError("no such folder", folder, "check the path")
    if not os.path.lexists(path):
        raise InputError("not a folder mfext committed", folder, f"it has no {MANIFEST_NAME}")
    data = read_file(path, MAX_JSON_BYTES)
    value = unseal(data, path)
    if value.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"format version {str(value.get('format_version'))[:20]} is not known",
            path,
            f"this mfext reads version {FORMAT_VERSION}; use a matching mfext",
        )
    return _parse_manifest(value, path, hashlib.sha256(data).hexdigest())


def _parse_manifest(value: Mapping[str, object], path: Path, identity: str) -> Manifest:
    damaged = DamagedError("manifest is malformed", path, "restore the folder from a copy")
    files, metadata, environment = value.get("files"), value.get("metadata"), value.get("environment")
    kind, created, parent, config_hash = (value.get(key) for key in ("kind", "created", "parent", "config_hash"))
    if (
        not isinstance(files, dict)
        or not isinstance(metadata, dict)
        or not isinstance(environment, dict)
        or len(files) > MAX_FILES
    ):
        raise damaged
    if (
        not isinstance(kind, str)
        or not isinstance(created, str)
        or not isinstance(parent, str | None)
        or not isinstance(config_hash, str | None)
    ):
        raise damaged
    entries = {}
    for name, entry in files.items():
        if check_file_name(name, path) == MANIFEST_NAME or not isinstance(entry, dict):
            raise damaged
        size, digest = entry.get("size_bytes"), entry.get("sha256")
        if type(size) is not int or size < 0 or not isinstance(digest, str) or _HASH.fullmatch(digest) is None:
            raise damaged
        entries[name] = FileEntry(size, digest)
    return Manifest(kind, entries, metadata, parent, config_hash, environment, created, identity)


def verify_file(path: Path, entry: FileEntry) -> None:
    """Raise DamagedError unless `path` is a plain file of exactly this size and SHA-256."""
    if not os.path.lexists(path):
        raise DamagedError("a file is missing", path, "restore it from a copy")
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise DamagedError("not a plain file", path, "links, folders and devices are refused; restore it from a copy")
    if status.st_size != entry.size_bytes:
        raise DamagedError(
            "content is damaged", path, f"{status.st_size} bytes instead of {entry.size_bytes}; restore it from a copy"
        )
    if file_sha256(path)[1] != entry.sha256:
        raise DamagedError("content is damaged", path, "its SHA-256 does not match; restore it from a copy")


def verify_folder(folder: Path, kind: str | None = None) -> Manifest:
    """Check every listed file's size and SHA-256 and return the manifest. InputError for a foreign or
    missing folder or another kind, DamagedError for content that is not what was committed."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    if kind is not None and manifest.kind != kind:
        raise InputError(f"this folder holds a {manifest.kind}, not a {kind}", folder, "give another folder")
    for name, entry in manifest.files.items():
        verify_file(folder / name, entry)
    return manifest


def commit_folder(
    target: Path,
    write: Callable[[Path], None],
    *,
    kind: str,
    metadata: Mapping[str, object],
    parent: str | None = None,
    config_hash: str | None = None,
) -> Manifest:
    """Commit a new folder: `write` fills a temporary one with flat files; it appears at `target` whole,
    durable and verified, or not at all. The target must be missing or empty (InputError);
    MachineError if disk or permissions refuse."""
    target = absolute(target)
    make_folders(target.parent)
    _require_vacant(target)
    require_free_space(target.parent, 0)
    with machine_errors(target), temporary_folder(target) as temporary:
        _fill(
            temporary, write, {"kind": kind, "metadata": dict(metadata), "parent": parent, "config_hash": config_hash}
        )
        with folder_lock(target.parent):
            _require_vacant(target)
            os.rename(temporary, target)
        fsync_folder(target.parent)
    return verify_folder(target, kind)


def replace_folder(
    target: Path,
    write: Callable[[Path], None],
    *,
    kind: str,
    metadata: Mapping[str, object],
    parent: str | None = None,
    config_hash: str | None = None,
) -> Manifest:
    """Like `commit_folder`, but a verified folder of the same kind, holding nothing else, is replaced:
    the new one is written beside it, the old one renamed aside, the names swapped, the old one removed.
    A kill between the renames is mended by `recover_folder`."""
    target = absolute(target)
    make_folders(target.parent)
    require_free_space(target.parent, 0)
    recover_folder(target)
    require_replaceable(target, kind)
    aside = _aside(target)
    with machine_errors(target), temporary_folder(target) as temporary:
        _fill(
            temporary, write, {"kind": kind, "metadata": dict(metadata), "parent": parent, "config_hash": config_hash}
        )
        with folder_lock(target.parent):
            _recover(target)
            require_replaceable(target, kind)
            if _is_vacant(target):
                os.rename(temporary, target)
            else:
                if os.path.lexists(aside):
                    discard_folder(aside)
                os.rename(target, aside)
                try:
                    os.rename(temporary, target)
                except OSError:
                    os.rename(aside, target)
                    raise
            fsync_folder(target.parent)
            manifest = verify_folder(target, kind)
            if os.path.lexists(aside):
                discard_folder(aside)
    return manifest


def recover_folder(target: Path) -> None:
    """Bring back the old folder where a kill between the two renames of `replace_folder` left none."""
    target = absolute(target)
    if not os.path.lexists(target) and os.path.lexists(_aside(target)):
        with folder_lock(target.parent):
            _recover(target)


def absolute(path: Path) -> Path:
    """`path` made absolute, `..` resolved, so that its parent and name are what they say."""
    return Path(os.path.abspath(Path(path).expanduser()))


def _aside(target: Path) -> Path:
    return target.parent / f"{_ASIDE_PREFIX}{target.name}"


def _recover(target: Path) -> None:
    aside = _aside(target)
    if not os.path.lexists(target) and os.path.lexists(aside):
        with machine_errors(target):
            os.rename(aside, target)
            fsync_folder(target.parent)


def _is_vacant(target: Path) -> bool:
    if not os.path.lexists(target):
        return True
    with machine_errors(target):
        return not os.path.islink(target) and os.path.isdir(target) and not os.listdir(target)


def _require_vacant(target: Path) -> None:
    if not _is_vacant(target):
        raise InputError("already exists", target, "choose a folder that is missing or empty")


def require_replaceable(target: Path, kind: str) -> None:
    """Raise InputError where `replace_folder` would not write: asked before long work, it loses none."""
    if _is_vacant(target):
        return
    what, fix = (
        "exists and is not a folder mfext may replace",
        f"only a whole {kind} folder of mfext's is replaced; choose another folder",
    )
    if os.path.islink(target) or not os.path.isdir(target):
        raise InputError(what, target, fix)
    try:
        manifest = verify_folder(target, kind)
    except InputError as error:
        raise InputError(what, target, f"{error.what}; {fix}") from error
    strangers = sorted(set(os.listdir(target)) - set(manifest.files) - {MANIFEST_NAME})
    if strangers:
        raise InputError(what, target, f"it also holds {strangers[0]!r}; {fix}")


def _fill(temporary: Path, write: Callable[[Path], None], fields: Mapping[str, object]) -> None:
    """Let `write` fill the folder, make its files durable and add the manifest."""
    write(temporary)
    files = {}
    for name in sorted(os.listdir(temporary)):
        path = temporary / name
        assert name != MANIFEST_NAME and not name.startswith(TEMPORARY_PREFIX), name
        check_file_name(name, temporary)
        fsync_file(path)
        size, digest = file_sha256(path)
        files[name] = {"size_bytes": size, "sha256": digest}
    assert files, "a committed folder holds at least one file"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = {
        **fields,
        "format_version": FORMAT_VERSION,
        "files": files,
        "environment": dict(describe_environment()),
        "created": created,
    }
    write_new_file(temporary / MANIFEST_NAME, seal(manifest))
    fsync_folder(temporary)


def move_aside(folder: Path) -> Path:
    """Rename a damaged folder to `damaged-NAME-N` beside it, kept for inspection; its new path."""
    number = 1
    while os.path.lexists(aside := folder.parent / f"damaged-{folder.name}-{number}"):
        number += 1
    with machine_errors(folder):
        os.rename(folder, aside)
        fsync_folder(folder.parent)
    return aside


def require_manifest_entry(path: Path) -> FileEntry | None:
    """The entry of `path` in the manifest beside it; None where there is no manifest at all."""
    if not os.path.lexists(path.parent / MANIFEST_NAME):
        return None
    entry = read_manifest(path.parent).files.get(path.name)
    if entry is None:
        raise DamagedError("a file the manifest does not list", path, "it was not committed by mfext; remove it")
    return entry


def remove_tree(folder: Path) -> None:
    """Remove a folder of commits no longer needed (a finished stage's progress); best effort."""
    shutil.rmtree(folder, ignore_errors=True)
