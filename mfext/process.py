"""What a process of our own asks of the libraries under it: of glibc for its memory, of OpenMP for its threads."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, MutableMapping

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # of glibc's mallopt
OWN_HEAP_UP_TO = 32 << 20  # bytes of one allocation; glibc allows no more
GROW_BY = 64 << 20
SPINS = "10000"
SPINS_CHOSEN_BY_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
MEMORY_CHOSEN_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Ask glibc not to give freed memory back to the system; whether it was asked and does so.

    Left alone, it gives back what a step has used and takes as many fresh pages in the next: 20 000 page faults, 30 of
    530 ms a growth step (config S, batch 8 x 256, one thread, 2026-11). The peak is the same. For a process of our own,
    not for one that uses mfext as a library. Elsewhere than with glibc, and where the user has chosen, nothing changes.
    """
    if "CS_GNU_LIBC_VERSION" not in os.confstr_names or any(name in environment for name in MEMORY_CHOSEN_BY_USER):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((MMAP_THRESHOLD, OWN_HEAP_UP_TO), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, GROW_BY))
    return all(mallopt(name, value) == 1 for name, value in settings)


def wait_without_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's idle threads sleep soon, where they spin for milliseconds; to be called before torch is imported.

    Compiled kernels have threads of their own, and a spinning thread takes a core from one of them: with two threads on
    two cores a train step takes 375 ms in place of 490 (config S, batch 8 x 256, 2026-11). A user's choice stays.
    """
    if not any(name in environment for name in SPINS_CHOSEN_BY_USER):
        environment["GOMP_SPINCOUNT"] = SPINS
