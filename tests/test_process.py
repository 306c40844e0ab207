"""What a verb has freed is not given back to the system and taken anew, and idle threads sleep."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mfext.process import keep_freed_memory, wait_without_spinning

PAGES = 2048  # of one block: 8 MiB where a page has 4 KiB
USE = f"""
import resource, sys
from mfext.process import keep_freed_memory

def use():
    blocks = [bytearray({PAGES} * resource.getpagesize()) for _ in range(8)]
    for block in blocks:
        block[:: resource.getpagesize()] = bytes({PAGES})

if "keep" in sys.argv:
    assert keep_freed_memory()
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[3:]))
"""


def faults(*words: str) -> int:
    done = subprocess.run([sys.executable, "-c", USE, *words], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="glibc alone is asked")
def test_what_was_freed_is_used_again_without_page_faults() -> None:
    assert faults("keep") < PAGES < faults()


def test_what_the_user_has_chosen_stays() -> None:
    assert not keep_freed_memory({"MALLOC_TRIM_THRESHOLD_": "1000"})
    assert not keep_freed_memory({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000"})


def test_idle_threads_sleep_unless_the_user_has_chosen() -> None:
    environment: dict[str, str] = {}
    wait_without_spinning(environment)
    assert int(environment["GOMP_SPINCOUNT"]) <= 10_000
    for chosen in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}):
        environment = dict(chosen)
        wait_without_spinning(environment)
        assert environment == chosen
