"""Sweep folders: the trials planned, and what became of each, exactly once. Imports no torch.

    SWEEP/.lock  sweep.json  results.jsonl  failures.jsonl  trials/ID/  logs/ID.log
          table.csv  costs.csv  report.html  report.md  metrics.json

sweep.json is sealed and only ever gains trials. results.jsonl has one sealed line per finished trial, appended durably
under the folder's lock, so that any number of processes may finish trials at once; failures.jsonl one per failed
attempt. A trial's run folder is a run like any other. All the rest can be made again from these.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mfext.conversion import to_mapping
from mfext.errors import DamagedError, InputError
from mfext.store_files import (
    LOCK_NAME,
    TEMPORARY_PREFIX,
    check_file_name,
    folder_lock,
    lock_run,
    machine_errors,
    make_folders,
    read_file,
    remove_stale,
    write_file_atomically,
)
from mfext.store_json import MAX_JSON_BYTES, append_line, read_lines, seal, unseal

SWEEP_NAME = "sweep.json"
RESULTS_NAME = "results.jsonl"
FAILURES_NAME = "failures.jsonl"
SWEEP_FORMAT_VERSION = 1
MAX_TRIALS = 1000
_FOLDERS = ("trials", "logs")
_RESERVED = (LOCK_NAME, SWEEP_NAME, RESULTS_NAME, FAILURES_NAME, *_FOLDERS)


@dataclass(frozen=True)
class Trial:
    """One run of a sweep. `id` is the beginning of `config_hash`, the SHA-256 of the resolved recipe; `overrides` are
    the keys set for it, `recipe` the resolved recipe as plain data, without its `out`."""

    id: str
    config_hash: str
    overrides: dict[str, Any]
    recipe: dict[str, Any]


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep runs. `swept` names the keys that were given several values, in the order given."""

    verb: str
    swept: tuple[str, ...]
    trials: tuple[Trial, ...]

    def joined(self, other: SweepPlan) -> SweepPlan:
        """This plan and the trials of `other` that it lacks, behind its own."""
        known = {trial.id for trial in self.trials}
        new = tuple(trial for trial in other.trials if trial.id not in known)
        swept = tuple(dict.fromkeys((*self.swept, *other.swept)))
        return SweepPlan(self.verb, swept, (*self.trials, *new))

    def axes(self) -> dict[str, list[Any]]:
        """Key -> its distinct values, for the keys that were swept and those in which trials differ."""
        keys = dict.fromkeys((*self.swept, *sorted({key for trial in self.trials for key in trial.overrides})))
        found: dict[str, list[Any]] = {}
        for key in keys:
            given = [trial.overrides[key] for trial in self.trials if key in trial.overrides]
            values = [value for index, value in enumerate(given) if value not in given[:index]]
            if key in self.swept or len(values) > 1 or len(given) < len(self.trials):
                found[key] = values
        return found


class Sweep:
    """A sweep folder: what is planned and what became of it. Reading needs no lock."""

    def __init__(self, path: Path, plan: SweepPlan) -> None:
        self.path, self.plan = path, plan

    @classmethod
    def read(cls, path: Path) -> Self:
        """The sweep at `path`; InputError where there is none, DamagedError where sweep.json was changed."""
        path = _absolute(path)
        if not is_sweep_folder(path):
            raise InputError("not a sweep folder", path, f"it has no {SWEEP_NAME}")
        return cls(path, _read_plan(path / SWEEP_NAME))

    @classmethod
    @contextmanager
    def held(cls, path: Path, plan: SweepPlan) -> Iterator[Self]:
        """The sweep at `path`, new or extended by `plan`, held by this process inside the block.

        LockedError where another process runs it; InputError where the folder holds anything else, the sweep is of
        another verb, or there are too many trials.
        """
        path = _absolute(path)
        if path.is_dir():
            _require_sweep_or_empty(path)  # before the lock file is written: a stranger's folder stays untouched
        make_folders(path)
        lock = lock_run(path)
        try:
            _require_sweep_or_empty(path)
            remove_stale(path)
            yield cls(path, _commit_plan(path, plan))
        finally:
            os.close(lock)

    def trial(self, number: int) -> Trial:
        """The trial at a place in the plan, from 0. Raises InputError."""
        last = len(self.plan.trials) - 1
        if not 0 <= number <= last:
            raise InputError(f"no trial {number}", self.path, f"this sweep has trials 0 to {last}")
        return self.plan.trials[number]

    def run_folder(self, trial: Trial) -> Path:
        """Where the trial's run is or will be."""
        return self.path / "trials" / trial.id

    def log_file(self, trial: Trial) -> Path:
        """Where what the trial says is kept; nothing in it is relied on."""
        return self.path / "logs" / f"{trial.id}.log"

    def results(self) -> dict[str, Mapping[str, object]]:
        """Trial id -> the stable JSON of its run, for the trials that are done."""
        rows = read_lines(self.path / RESULTS_NAME)
        return {str(row["trial"]): _data_of(row, self.path / RESULTS_NAME) for row in rows}

    def failures(self) -> dict[str, list[str]]:
        """Trial id -> one line for each attempt that failed, whether or not a later one succeeded."""
        found: dict[str, list[str]] = {}
        for row in read_lines(self.path / FAILURES_NAME):
            found.setdefault(str(row["trial"]), []).append(str(row["error"]))
        return found

    def record_result(self, trial: Trial, data: Mapping[str, object]) -> bool:
        """Append the trial's result durably, unless it has one: False then."""
        with folder_lock(self.path, wait_s=60.0):
            if trial.id in self.results():
                return False
            append_line(self.path / RESULTS_NAME, {"trial": trial.id, "data": dict(data)})
        return True

    def record_failure(self, trial: Trial, error: str) -> None:
        """Append one failed attempt durably."""
        with folder_lock(self.path, wait_s=60.0):
            attempt = len(self.failures().get(trial.id, ())) + 1
            append_line(self.path / FAILURES_NAME, {"trial": trial.id, "attempt": attempt, "error": error})

    def write_file(self, name: str, text: str) -> Path:
        """Write SWEEP/name (a table, a report, a job script) atomically; its path."""
        assert name not in _RESERVED, name
        path = self.path / check_file_name(name, self.path)
        write_file_atomically(path, text.encode("utf-8"))
        return path


def is_sweep_folder(path: Path) -> bool:
    """True where `path` holds a sweep."""
    return (path.expanduser() / SWEEP_NAME).is_file()


def distinct(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """The trials without those that repeat an earlier one's configuration."""
    found: dict[str, Trial] = {}
    for trial in trials:
        found.setdefault(trial.id, trial)
    return tuple(found.values())


def _absolute(path: Path) -> Path:
    return Path(path).expanduser().absolute()


def _data_of(row: Mapping[str, object], where: Path) -> Mapping[str, object]:
    data = row.get("data")
    if not isinstance(data, dict):
        raise DamagedError("a result has no data", where, "restore it from a copy")
    return data


def _read_plan(path: Path) -> SweepPlan:
    value = unseal(read_file(path, MAX_JSON_BYTES), path)
    if value.get("kind") != "sweep" or value.get("format_version") != SWEEP_FORMAT_VERSION:
        raise InputError("not a sweep this mfext reads", path, f"it reads version {SWEEP_FORMAT_VERSION}")
    listed = value.get("trials")
    trials = [_trial(each, path) for each in listed] if isinstance(listed, list) else []
    swept = value.get("swept")
    return SweepPlan(str(value.get("verb")), tuple(map(str, swept if isinstance(swept, list) else ())), tuple(trials))


def _trial(value: object, path: Path) -> Trial:
    if not isinstance(value, dict):
        raise DamagedError("a trial is not an object", path, "restore it from a copy")
    known = {"overrides": dict, "recipe": dict, "id": str, "config_hash": str}
    if value.keys() != known.keys() or not all(isinstance(value[key], kind) for key, kind in known.items()):
        raise DamagedError("a trial lacks what it needs", path, "restore it from a copy")
    check_file_name(value["id"], path)
    return Trial(value["id"], value["config_hash"], value["overrides"], value["recipe"])


def _commit_plan(path: Path, plan: SweepPlan) -> SweepPlan:
    """Write what the folder's plan gains, if anything; the whole plan."""
    before = _read_plan(path / SWEEP_NAME) if is_sweep_folder(path) else None
    if before is not None and before.verb != plan.verb:
        raise InputError("a sweep of another verb is here", path, f"it runs mfext {before.verb}; choose another --out")
    whole = plan if before is None else before.joined(plan)
    if len(whole.trials) > MAX_TRIALS:
        raise InputError(f"{len(whole.trials)} trials", path, f"at most {MAX_TRIALS} in one sweep")
    for name in _FOLDERS:
        make_folders(path / name)
    if whole != before:
        fields = {
            "kind": "sweep",
            "format_version": SWEEP_FORMAT_VERSION,
            "verb": whole.verb,
            "swept": list(whole.swept),
            "axes": whole.axes(),
            "trials": [to_mapping(trial) for trial in whole.trials],
        }
        write_file_atomically(path / SWEEP_NAME, seal(fields))
    return whole


def _require_sweep_or_empty(path: Path) -> None:
    if is_sweep_folder(path):
        return
    with machine_errors(path):
        names = {name for name in os.listdir(path) if not name.startswith(TEMPORARY_PREFIX)} - {LOCK_NAME, *_FOLDERS}
        occupied = any((path / name).exists() and os.listdir(path / name) for name in _FOLDERS)
    if names or occupied:
        raise InputError("folder is neither empty nor a sweep", path, "choose a folder that is missing or empty")
