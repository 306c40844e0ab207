"""Run folders: a locked recipe, its stages, its progress inside a stage, and the ledger.

    RUN/.lock  recipe.json  stages/000-base/  progress/001/step-00000200/  ledger.jsonl  logs/

Latest = the highest stage whose manifest verifies. Nothing is announced before it is durable.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, cast

from torch import Tensor

from mfext.config import check_name
from mfext.errors import InputError
from mfext.store_files import (
    LOCK_NAME,
    check_file_name,
    discard_folder,
    lock_run,
    machine_errors,
    make_folders,
    read_file,
    remove_stale,
    require_free_space,
    write_file_atomically,
    write_new_file,
)
from mfext.store_folders import (
    MANIFEST_NAME,
    Manifest,
    absolute,
    commit_folder,
    describe_environment,
    move_aside,
    recover_folder,
    remove_tree,
    verify_folder,
)
from mfext.store_json import MAX_JSON_BYTES, append_lines, dump_json, read_json_object, read_lines, seal, unseal
from mfext.store_models import Extra, config_hash, extra_size_bytes, model_writer
from mfext.store_tensors import read_tensors, require_finite, save_tensors, tensors_size_bytes

RECIPE_NAME = "recipe.json"
LEDGER_NAME = "ledger.jsonl"
LEDGER_KEY = ("stage", "step", "domain", "split")
RUN_FORMAT_VERSION = 1
KEPT_PROGRESS = 2
_FOLDERS = ("stages", "progress", "logs")
_RESERVED = (LOCK_NAME, RECIPE_NAME, LEDGER_NAME, MANIFEST_NAME)
_STAGE = re.compile(r"(\d{3})-([A-Za-z0-9][A-Za-z0-9._-]{0,63})")
_STEP = re.compile(r"step-(\d{8,})")
_TENSORS, _STATE = "progress.safetensors", "state.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One committed stage of a run; its folder is a model folder."""

    index: int
    name: str
    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class Progress:
    """A committed point inside a stage: model, optimizer (by parameter name) and RNG tensors, and the
    JSON state beside them."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, object]


class Run:
    """A run folder held by this process. Use as a context manager, or call `close`."""

    def __init__(self, path: Path, recipe: dict[str, object], metadata: dict[str, object], lock: int | None) -> None:
        self.path, self.recipe, self.metadata = path, recipe, metadata
        self._lock = lock

    @classmethod
    def create(cls, path: Path, recipe: Mapping[str, object], metadata: Mapping[str, object]) -> Self:
        """A new run in a missing or empty folder (else InputError); LockedError if another process has it."""
        path = absolute(path)
        if path.is_dir():
            _require_unused(path)  # before the lock file is written: a stranger's folder stays untouched
        make_folders(path)
        lock = lock_run(path)
        try:
            _require_unused(path)
            require_free_space(path, 0)
            for name in _FOLDERS:
                make_folders(path / name)
            fields = {
                "kind": "run",
                "format_version": RUN_FORMAT_VERSION,
                "recipe": dict(recipe),
                "metadata": dict(metadata),
                "environment": describe_environment(),
            }
            write_file_atomically(path / RECIPE_NAME, seal(fields))
            return cls(path, *_read_recipe(path), lock)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Self:
        """An existing run: locked (LockedError) and cleaned of what dead writers left, or only read."""
        path = absolute(path)
        recipe, metadata = _read_recipe(path)
        if read_only:
            return cls(path, recipe, metadata, None)
        lock = lock_run(path)
        try:
            for name in _FOLDERS:
                make_folders(path / name)
            for folder in (path, path / "stages", *_subfolders(path / "progress")):
                remove_stale(folder)
            run = cls(path, recipe, metadata, lock)
            for folder in _subfolders(path / "progress"):
                if folder.name.isdecimal():
                    run._prune_progress(int(folder.name))  # a kill may have come between commit and prune
            return run
        except BaseException:
            os.close(lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the lock; the Run can still be read."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def log_folder(self) -> Path:
        """Where loggers may write; nothing in it is relied on."""
        return self.path / "logs"

    def stages(self) -> list[Stage]:
        """Verified stages by index. A damaged one is left out, with a warning in the log."""
        found: dict[int, Stage] = {}
        for index, name, folder in _stage_folders(self.path):
            manifest = _verified(folder, "stage")
            if manifest is not None and index not in found:
                found[index] = Stage(index, name, folder, manifest)
        return list(found.values())

    def commit_stage(
        self,
        index: int,
        name: str,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, object],
        extra: Extra,
        metadata: Mapping[str, object],
    ) -> Stage:
        """Commit a stage: verified and durable on return. Its parent is the stage before it. A committed
        index is an InputError; a damaged folder in its place is renamed to `damaged-...` and kept."""
        self._require_lock()
        assert 0 <= index <= 999, index
        folder = self.path / "stages" / f"{index:03d}-{check_name(name)}"
        before = None
        for other, _, path in _stage_folders(self.path):
            manifest = _verified(path, "stage") if other in (index - 1, index) else None
            if other == index - 1 and manifest is not None:
                before = manifest.identity
            elif other == index and manifest is not None:
                raise InputError(f"stage {index} is already committed", path, "a committed stage is never overwritten")
            elif other == index:
                move_aside(path)
        require_free_space(self.path, tensors_size_bytes(tensors) + extra_size_bytes(extra))
        full = {"stage": index, "name": name, **metadata}
        manifest = commit_folder(
            folder,
            model_writer(tensors, config, extra),
            kind="stage",
            metadata=full,
            parent=before,
            config_hash=config_hash(config),
        )
        return Stage(index, name, folder, manifest)

    def append_ledger(self, rows: Iterable[Mapping[str, object]], key: Sequence[str] = LEDGER_KEY) -> int:
        """Append rows durably, each once: one whose `key` fields are already there is left out. The
        number appended."""
        self._require_lock()
        path = self.path / LEDGER_NAME
        seen = {_key_of(row, key) for row in read_lines(path)}
        fresh = []
        for row in rows:
            if (value := _key_of(row, key)) not in seen:
                seen.add(value)
                fresh.append(row)
        if fresh:
            append_lines(path, fresh)
        return len(fresh)

    def read_ledger(self) -> list[dict[str, object]]:
        """All rows in the order they were appended; a torn last line is left out, other damage is a DamagedError."""
        return read_lines(self.path / LEDGER_NAME)

    def commit_progress(
        self, stage: int, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, object]
    ) -> None:
        """Commit a point inside a stage, then remove all but the two newest verified ones. A verified
        commit of the same step is kept as it is."""
        self._require_lock()
        folder = self._progress_folder(stage) / f"step-{step:08d}"
        if os.path.lexists(folder):
            if _verified(folder, "progress") is not None:
                return
            move_aside(folder)
        require_finite(tensors, f"step {step}")
        require_free_space(self.path, tensors_size_bytes(tensors))

        def write(temporary: Path) -> None:
            save_tensors(temporary / _TENSORS, tensors)
            write_new_file(temporary / _STATE, dump_json(dict(state)))

        commit_folder(folder, write, kind="progress", metadata={"stage": stage, "step": step})
        self._prune_progress(stage)

    def latest_progress(self, stage: int) -> Progress | None:
        """The newest verified point inside a stage, or None."""
        for step, folder in self._progress_folders(stage):
            if _verified(folder, "progress") is not None:
                return Progress(step, read_tensors(folder / _TENSORS), read_json_object(folder / _STATE))
        return None

    def clear_progress(self, stage: int) -> None:
        """Remove the points inside a stage that is committed (its model supersedes them)."""
        self._require_lock()
        assert any(other.index == stage for other in self.stages()), (
            "progress is removed only after its stage is committed"
        )
        remove_tree(self._progress_folder(stage))

    def write_report_file(self, name: str, text: str) -> Path:
        """Write RUN/name (report.html, report.md, metrics.json) atomically; its path."""
        assert name not in _RESERVED and not _STAGE.fullmatch(name), name
        path = self.path / check_file_name(name, self.path)
        write_file_atomically(path, text.encode("utf-8"))
        return path

    def _require_lock(self) -> None:
        assert self._lock is not None, "this Run is read-only or closed"

    def _progress_folder(self, stage: int) -> Path:
        return self.path / "progress" / f"{stage:03d}"

    def _progress_folders(self, stage: int) -> list[tuple[int, Path]]:
        """(step, folder), newest first."""
        matches = ((_STEP.fullmatch(folder.name), folder) for folder in _subfolders(self._progress_folder(stage)))
        return sorted(((int(match.group(1)), folder) for match, folder in matches if match), reverse=True)

    def _prune_progress(self, stage: int) -> None:
        folders, verified = self._progress_folders(stage), 0
        for _, folder in folders if len(folders) > KEPT_PROGRESS else ():
            if verified >= KEPT_PROGRESS:
                discard_folder(folder)
            elif _verified(folder, "progress") is not None:
                verified += 1


def is_run_folder(path: Path) -> bool:
    """True where `path` looks like a run (it has a recipe and stages)."""
    return (path / RECIPE_NAME).is_file() and (path / "stages").is_dir()


def find_model_folder(path: Path) -> Path:
    """The model folder `path` means: itself, or a run's highest stage that verifies. InputError if neither."""
    path = absolute(path)
    recover_folder(path)
    if os.path.lexists(path / MANIFEST_NAME):
        return path
    if not is_run_folder(path):
        what = "no such folder" if not os.path.lexists(path) else "not a model or run folder of mfext's"
        raise InputError(what, path, f"a model folder has a {MANIFEST_NAME}, a run folder a {RECIPE_NAME}")
    for _, _, folder in reversed(_stage_folders(path)):
        if _verified(folder, "stage") is not None:
            return folder
    raise InputError("this run has no committed stage", path, "resume it, or give another folder")


def _verified(folder: Path, kind: str) -> Manifest | None:
    try:
        return verify_folder(folder, kind)
    except InputError as error:
        _log.warning("left out: %s", error)
        return None


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with machine_errors(folder):
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))


def _stage_folders(run: Path) -> list[tuple[int, str, Path]]:
    """(index, name, folder) by index; links and other names are not stages."""
    matches = ((_STAGE.fullmatch(folder.name), folder) for folder in _subfolders(run / "stages"))
    return [(int(match.group(1)), match.group(2), folder) for match, folder in matches if match]


def _require_unused(path: Path) -> None:
    with machine_errors(path):
        names = set(os.listdir(path)) - {LOCK_NAME, *_FOLDERS}
        names = {name for name in names if not name.startswith(".mfext-tmp-")}
        occupied = any(
            os.path.lexists(path / name) and (not (path / name).is_dir() or os.listdir(path / name))
            for name in _FOLDERS
        )
    if RECIPE_NAME in names:
        raise InputError("a run already exists here", path, "resume it, or choose another folder")
    if names or occupied:
        raise InputError("folder is not empty", path, "choose a folder that is missing or empty")


def _read_recipe(path: Path) -> tuple[dict[str, object], dict[str, object]]:
    if not path.is_dir():
        raise InputError("no such run folder", path, "check the path")
    if not os.path.lexists(path / RECIPE_NAME):
        raise InputError("not a run folder", path, f"it has no {RECIPE_NAME}")
    value = unseal(read_file(path / RECIPE_NAME, MAX_JSON_BYTES), path / RECIPE_NAME)
    if value.get("kind") != "run" or value.get("format_version") != RUN_FORMAT_VERSION:
        raise InputError(
            "not a run this mfext reads",
            path / RECIPE_NAME,
            f"it reads version {RUN_FORMAT_VERSION}; use a matching mfext",
        )
    return cast("dict[str, object]", value["recipe"]), cast("dict[str, object]", value["metadata"])


def _key_of(row: Mapping[str, object], key: Sequence[str]) -> tuple[object, ...]:
    missing = [name for name in key if name not in row]
    assert not missing, f"a ledger row lacks {missing}"
    return tuple(row[name] for name in key)
