"""Atomic, durable files and locks: the primitives every writer goes through. Imports no torch.

Temporary names start with `.mfext-tmp-` and lie beside their target, never in $TMPDIR, so a
rename is atomic. Their maker holds a flock on them while it lives; one that can be locked
belongs to a dead process and is removed. A system call that fails becomes one line that names
the path and what to do: MachineError (disk, permission) or InputError (wrong path).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mfext.errors import DamagedError, InputError, LockedError, MachineError, MfextError

TEMPORARY_PREFIX = ".mfext-tmp-"
LOCK_NAME = ".lock"
FREE_SPACE_RESERVE_BYTES = 1 << 20
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_INTACT = "what was committed before is intact"

_INPUT_ERRORS = {
    errno.ENOENT: ("no such file or folder", "check the path"),
    errno.ENOTDIR: ("a file stands where a folder should be", "check the path"),
    errno.EISDIR: ("a folder stands where a file should be", "check the path"),
    errno.ENAMETOOLONG: ("the path is too long", "choose a shorter one"),
    errno.ELOOP: ("a symbolic link where a plain file should be", "replace it with the file itself"),
}
_MACHINE_ERRORS = {
    errno.ENOSPC: ("no space left on the disk", f"free some space or choose another folder; {_INTACT}"),
    errno.EDQUOT: ("the disk quota is used up", f"free some space or choose another folder; {_INTACT}"),
    errno.EFBIG: (
        "the file size limit was reached",
        f"raise the limit (`ulimit -f`) or choose another file system; {_INTACT}",
    ),
    errno.EACCES: ("permission denied", f"change its permissions or choose another folder; {_INTACT}"),
    errno.EPERM: ("permission denied", f"change its permissions or choose another folder; {_INTACT}"),
    errno.EROFS: ("the file system is read-only", f"choose another folder; {_INTACT}"),
    errno.EIO: ("the disk reported an input/output error", f"check the disk or choose another folder; {_INTACT}"),
}


def refusal(error: OSError, where: Path) -> MfextError:
    """The one-line error a user gets for a failed system call on `where`."""
    code = error.errno or 0
    if code in _INPUT_ERRORS:
        what, fix = _INPUT_ERRORS[code]
        return InputError(what, where, fix)
    what, fix = _MACHINE_ERRORS.get(
        code, (f"the system refused ({error.strerror or error})", f"check the folder; {_INTACT}")
    )
    return MachineError(what, where, fix)


@contextmanager
def machine_errors(where: Path) -> Iterator[None]:
    """Turn an OSError or MemoryError of the block into an error that names `where`."""
    try:
        yield
    except OSError as error:
        raise refusal(error, where) from error
    except MemoryError as error:
        raise MachineError(
            "not enough memory", where, f"close other programs or use a smaller model; {_INTACT}"
        ) from error


def require_free_space(folder: Path, num_bytes: int) -> None:
    """Raise MachineError unless `num_bytes` and a small reserve are free where `folder` lies."""
    with machine_errors(folder):
        state = os.statvfs(folder)
    free, needed = state.f_bavail * state.f_frsize, num_bytes + num_bytes // 100 + FREE_SPACE_RESERVE_BYTES
    if free < needed:
        raise MachineError(
            f"not enough free space ({needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free)",
            folder,
            _MACHINE_ERRORS[errno.ENOSPC][1],
        )


def check_file_name(name: object, where: object) -> str:
    """Return `name` if it is a bare file name that cannot leave its folder; else DamagedError."""
    if not isinstance(name, str) or FILE_NAME.fullmatch(name) is None:
        raise DamagedError(
            f"unsafe file name {str(name)[:80]!r}",
            where,
            "file names are letters, digits, '.', '_', '-' without folders",
        )
    return name


def make_folders(folder: Path) -> None:
    """Create `folder` and its missing parents, durably."""
    missing = [step for step in (folder, *folder.parents) if not step.exists()]
    with machine_errors(folder):
        for step in reversed(missing):
            step.mkdir(exist_ok=True)
            fsync_folder(step.parent)
        if not folder.is_dir():
            raise InputError("a file stands where a folder should be", folder, "choose another folder")


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (a rename is not until its folder is)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the content of `path` durable."""
    descriptor = os.open(path, _READ_FLAGS)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`; a short write is continued."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def write_new_file(path: Path, data: bytes) -> None:
    """Write and fsync a file that does not exist yet (inside a temporary folder)."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: readers see the old or the new content, never a part; durable on return."""
    path = Path(path)
    with machine_errors(path):
        temporary = _temporary_name(path)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_all(descriptor, data)
            os.fsync(descriptor)
            os.rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        fsync_folder(path.parent)


def open_regular(path: Path, *, follow_links: bool = False) -> int:
    """Open a plain file for reading; links, pipes and devices are refused with DamagedError."""
    descriptor = os.open(path, _READ_FLAGS & ~os.O_NOFOLLOW if follow_links else _READ_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedError("not a plain file", path, "replace it with the file itself")
    return descriptor


def read_file(path: Path, max_bytes: int) -> bytes:
    """Content of a plain file of at most `max_bytes` bytes; a larger one is an InputError."""
    with machine_errors(path):
        descriptor = open_regular(path)
        try:
            parts, left = [], max_bytes + 1
            while left > 0 and (part := os.read(descriptor, min(left, 1 << 24))):
                parts.append(part)
                left -= len(part)
        finally:
            os.close(descriptor)
    if left <= 0:
        raise InputError("file is too large", path, f"at most {max_bytes} bytes are read here")
    return b"".join(parts)


def _temporary_name(target: Path) -> Path:
    return target.parent / f"{TEMPORARY_PREFIX}{target.name[:96]}-{os.getpid()}-{os.urandom(4).hex()}"


def _lock_now(path: Path) -> int | None:
    """A descriptor that holds the flock of `path`, or None if it is gone or another holds it."""
    try:
        descriptor = os.open(path, _READ_FLAGS)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A locked new folder beside `target`. Rename it away to keep it; else it is removed at exit."""
    remove_stale(target.parent)
    descriptor = None
    while descriptor is None:
        temporary = _temporary_name(target)
        os.mkdir(temporary)
        descriptor = _lock_now(temporary)
    try:
        yield temporary
    finally:
        if os.path.lexists(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def remove_stale(folder: Path) -> None:
    """Remove temporary files and folders in `folder` whose maker is dead; best effort."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith(TEMPORARY_PREFIX)]
    except OSError:
        return
    for name in names:
        path = folder / name
        try:
            descriptor = _lock_now(path)
        except OSError:
            continue
        if descriptor is None:
            continue
        try:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        except OSError:
            pass
        finally:
            os.close(descriptor)


def discard_folder(folder: Path) -> None:
    """Remove a committed folder so that a kill half-way leaves only a stale temporary folder."""
    with machine_errors(folder):
        temporary = _temporary_name(folder)
        os.rename(folder, temporary)
        fsync_folder(folder.parent)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def folder_lock(folder: Path, wait_s: float = 10.0) -> Iterator[None]:
    """Hold the flock of the folder itself (no lock file) for a short exchange of names in it."""
    with machine_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + wait_s
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LockedError(
                        "folder is locked", folder, "another process is saving here; wait for it"
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def lock_run(folder: Path) -> int:
    """A descriptor holding RUN/.lock until closed (the system frees it if we die); LockedError if taken."""
    path = folder / LOCK_NAME
    with machine_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise LockedError(
                "run is locked", folder, f"process {holder or 'unknown'} is writing it; wait for it or stop it"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor
