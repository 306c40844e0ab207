"""A disk that is full, read-only, forbidden or failing: exit 4 in one line, committed stages intact.

Three ways: a 1 MiB tmpfs (where this process may mount one), a file size limit, and system calls
that fail with the real error numbers at every point of a commit.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from outcome import CONFIG, fork, ledger_row, leftovers, main, sample_tensors, wait

from mfext import store_folders, store_runs
from mfext.store import Run, load_model_folder

FAULTS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT)
CALLS = ("open", "write", "fsync", "rename", "mkdir")


def start_run(folder: Path) -> Path:
    """A run with one committed stage and one ledger row."""
    with Run.create(folder / "run", {}, {}) as run:
        run.commit_stage(0, "base", sample_tensors(0), CONFIG, {}, {})
        run.append_ledger([ledger_row(0, 0)])
    return folder / "run"


def go_on(path: Path, num_floats: int) -> None:
    """One stage more."""
    with Run.open(path) as run:
        run.commit_stage(1, "code", sample_tensors(1, num_floats), CONFIG, {}, {})
        run.append_ledger([ledger_row(1, 1)])


def fail_from(call_name: str, skip: int, code: int) -> None:
    """Every `call_name` of this process that could change the disk fails after `skip` more."""
    call, left = getattr(os, call_name), [skip]

    def failing(*arguments: object, **options: object) -> object:
        is_reading = call_name == "open" and not (isinstance(arguments[1], int) and arguments[1] & os.O_ACCMODE)
        if not is_reading:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(code, os.strerror(code))
        return call(*arguments, **options)

    setattr(os, call_name, failing)


NO_FAULT = "no fault"


def check(path: Path, child: Callable[[int], None]) -> str | None:
    """Run the child; what is wrong with its end or with what it left, or None. NO_FAULT if it just worked."""
    code, lines = wait(*fork(child))
    if code == 0:
        return NO_FAULT
    if code != 10 or len(lines) != 1 or not lines[0].startswith("MachineError: ") or str(path) not in lines[0]:
        return f"ended with {code}: {lines}"
    with Run.open(path) as run:
        names = [stage.name for stage in run.stages()]
        if names[:1] != ["base"] or run.read_ledger()[:1] != [ledger_row(0, 0)]:
            return f"stages {names} after the fault"
        load_model_folder(run.stages()[0].folder)
    return f"left {leftovers(path)}" if leftovers(path) else None


def full_disk_cases(folder: Path, cases: int) -> tuple[int, list[str]]:
    """A real small file system, or a file size limit where mounting is not allowed; sizes vary.
    The number on a real one, and the failures."""
    num_mounted, failures = 0, []
    for number in range(cases):
        place = folder / "full"
        place.mkdir()
        is_mounted = (
            number % 2 == 0
            and subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, check=False
            ).returncode
            == 0
        )
        try:
            path = start_run(place)
            if is_mounted:  # fill up to what the free space check lets through, less what the commit needs
                free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
                (place / "filler").write_bytes(b"x" * max(0, free - (1 << 20) - 40_000 - 4096 * (number % 7)))

            def child(pipe: int, path: Path = path, number: int = number, is_mounted: bool = is_mounted) -> None:
                if not is_mounted:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (4096 + 256 * number, resource.RLIM_INFINITY))
                elif number % 4 == 0:  # as if another process took the space after the check
                    store_runs.require_free_space = store_folders.require_free_space = lambda folder, size: None
                go_on(path, 300_000)

            failure = check(path, child)
            num_mounted += is_mounted
            failures += [f"full disk {number}: {failure}"] if failure else []
        finally:
            if is_mounted:
                subprocess.run(["umount", str(place)], check=True)
            shutil.rmtree(place, ignore_errors=True)
    return num_mounted, failures


def failing_call_cases(folder: Path) -> tuple[int, list[str]]:
    """Each error number at each kind of call, after 0, 1, 3 and 7 calls that work; those that struck."""
    failures, cases = [], 0
    for code in FAULTS:
        for call in CALLS:
            for skip in (0, 1, 3, 7):
                place = folder / "failing"
                place.mkdir()
                path = start_run(place)

                def child(pipe: int, path: Path = path, call: str = call, skip: int = skip, code: int = code) -> None:
                    write = os.write
                    fail_from(call, skip, code)
                    try:
                        go_on(path, 4096)
                    finally:
                        os.write = write  # the child still has to report

                failure = check(path, child)
                if failure != NO_FAULT:  # else the commit needs fewer calls of this kind
                    failures += [f"{errno.errorcode[code]} in {call} after {skip}: {failure}"] if failure else []
                    cases += 1
                shutil.rmtree(place)
    return cases, failures


def campaign(folder: Path, cases: int) -> dict[str, object]:
    """Full disks (`cases`), then failing calls."""
    num_mounted, full = full_disk_cases(folder, cases)
    num_failing, failing = failing_call_cases(folder)
    failures = full + failing
    return {
        "passed": not failures,
        "full_disk_cases": cases,
        "on_a_small_file_system": num_mounted,
        "failing_call_cases": num_failing,
        "failures": failures[:20],
        "summary": f"{cases} full disks and {num_failing} failing calls, {len(failures)} handled wrongly",
    }


if __name__ == "__main__":
    main("refuse_disk", campaign, 50)
