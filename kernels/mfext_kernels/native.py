"""Builds an op's C source with the system's compiler at first use, and keeps the result beside other caches.

Optional: where there is no compiler, or MFEXT_NATIVE=0, a Source is not available and `explain()` says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

# Nobody looks at errno or traps of floating-point numbers; without them a branch becomes a choice, and loops vectors.
QUIET = ("-fno-math-errno", "-fno-trapping-math")
FLAGS = ("-O3", "-march=native", "-fopenmp-simd", *QUIET, "-std=c99", "-shared", "-fPIC")
CONTRACTED = "-ffp-contract=fast"  # a multiplication and an addition in one rounding, where the processor has it
BUILD_WITHIN_S = 60


@dataclass(frozen=True)
class Build:
    """The loaded library, or why there is none."""

    loaded: ctypes.CDLL | None
    reason: str


@dataclass(frozen=True)
class Source:
    """An op's C file, and the flags it wants beside FLAGS."""

    path: Path
    flags: tuple[str, ...] = ()

    def available(self) -> bool:
        """Whether it can be used here."""
        return build(self.path, *self.flags).loaded is not None

    def explain(self) -> str:
        """What it was built with, or why it was not."""
        return build(self.path, *self.flags).reason

    def function(self, name: str, arguments: tuple[type, ...], result: type | None = None) -> Callable[..., int]:
        """One of its functions; ask `available()` first."""
        return _function(self, name, arguments, result)

    def operations(self, name: str, arguments: tuple[type, ...]) -> Callable[..., int]:
        """One of its functions that returns how many floating-point operations its products took."""
        return _function(self, name, arguments, ctypes.c_int64)


@functools.cache
def _function(source: Source, name: str, arguments: tuple[type, ...], result: type | None) -> Callable[..., int]:
    library = build(source.path, *source.flags).loaded
    assert library is not None, "ask available() first"
    function = library[name]
    function.argtypes, function.restype = arguments, result
    return function


@functools.cache
def build(source: Path, *flags: str) -> Build:
    """Compile (once per source, flags, compiler and processor) and load; never raises."""
    if os.environ.get("MFEXT_NATIVE") == "0":
        return Build(None, "switched off by MFEXT_NATIVE=0")
    compiler = next(
        (found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None
    )
    if compiler is None:
        return Build(None, "no C compiler (cc, gcc or clang)")
    try:
        path = _folder() / f"{source.stem}-{_identity(source, compiler, flags)}.so"
        if not path.is_file():
            _compile(source, compiler, flags, path)
        return Build(ctypes.CDLL(str(path)), f"built with {Path(compiler).name}")
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None)  # by the compiler
        reason = said.decode(errors="replace") if said else str(error)
        return Build(None, f"{Path(compiler).name} could not build it: {' '.join(reason.split())[:200]}")


def in_parts(count: int, run: Callable[[int, int], object], most: int | None = None) -> None:
    """run(first, last) over 0 .. count - 1, side by side in as many parts as torch has threads, or at most so many."""
    threads = min(torch.get_num_threads(), count if most is None else min(most, count))
    if threads <= 1:
        run(0, count)
    else:
        bounds = [count * each // threads for each in range(threads + 1)]
        list(_pool(threads).map(run, bounds[:-1], bounds[1:]))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "mfext_kernels")


def _folder() -> Path:
    """Where compiled kernels are kept: private to the user, since what lies there is loaded."""
    home = os.environ.get("MFEXT_CACHE")
    base = (
        Path(home).expanduser() if home else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mfext"
    )
    folder = base / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by others")
    return folder


def _identity(source: Path, compiler: str, flags: tuple[str, ...] = ()) -> str:
    """What the machine code depends on: source and its headers, compiler, flags, processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=BUILD_WITHIN_S).stdout
    processor = platform.machine() + platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        processor += next(
            (line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))), ""
        )
    headers = (source.parent / name for name in re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE))
    code = b"\0".join(path.read_bytes() for path in (source, *headers))
    parts = (code, version, " ".join(FLAGS + flags).encode(), processor.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _compile(source: Path, compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Into a temporary file, then renamed: processes that build at once do not meet half a library."""
    descriptor, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(descriptor)
    try:
        command = [compiler, *FLAGS, *flags, str(source), "-o", temporary, "-lm"]
        environment = {"PATH": os.defpath} | os.environ  # a compiler looks there for its linker
        subprocess.run(command, capture_output=True, check=True, timeout=BUILD_WITHIN_S, env=environment)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
