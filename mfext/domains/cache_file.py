"""Writing a derived file that can be rebuilt at any time: whole or not at all.

Nothing here is a run's or a model's state; those go through mfext/store.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from mfext.errors import MachineError

STALE_S = 3600.0


def publish(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file through a temporary one in the same folder: fsync, rename, fsync the folder.

    Leftovers of killed writers older than an hour are removed. Raises MachineError where the
    folder cannot be written or the disk is full; the file is then as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        try:
            with open(temporary, "w+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise MachineError("cannot write a cache file", path, f"{reason}; free space or name another folder") from error


def _remove_stale(path: Path) -> None:
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        try:
            if time.time() - leftover.stat().st_mtime > STALE_S:
                leftover.unlink()
        except FileNotFoundError:
            continue


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # other systems cannot open a folder for fsync
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
