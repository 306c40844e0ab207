"""Process CPU time as medians, peak memory, a figure against its target, and what figures were measured on.

CPU time of one thread in ratios within one process: two busy threads on a shared machine can spin 65 times slower than
one, and seconds of different machines say nothing of each other.
"""

from __future__ import annotations

import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Run = Callable[[], object]
TIMER = "process CPU time, medians; ratios within one process"


@dataclass(frozen=True)
class Figure:
    """One figure against its target. `ratio` is compared with `target` in the direction of `rule`.

    `counts` is False for a figure that is reported beside the targets and decides nothing.
    """

    number: int
    what: str
    ours: float
    other: float
    unit: str
    ratio: float
    rule: str
    target: float
    counts: bool = True

    @property
    def share(self) -> float:
        """How much of the target is reached; 1 and more is a hit."""
        return self.ratio / self.target if self.rule == "at least" else self.target / self.ratio

    @property
    def hit(self) -> bool:
        return self.share >= 1


def interleaved_ms(ours: Run, other: Run, ours_times: int, other_times: int) -> tuple[float, float]:
    """Median CPU milliseconds of both, taken in turns so that a noisy moment meets both.

    Ours is run once before; the other too if it is timed more than once (a step of half a minute needs no warming).
    """
    ours()
    if other_times > 1:
        other()
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(max(ours_times, other_times)):
        for times, run, count in zip(taken, (ours, other), (ours_times, other_times), strict=True):
            if turn < count:
                start = time.process_time()
                run()
                times.append((time.process_time() - start) * 1e3)
    return statistics.median(taken[0]), statistics.median(taken[1])


def peak_kb() -> int:
    """This process's largest resident memory so far. Not ru_maxrss where /proc has it: that outlives exec."""
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if match:
        return int(match.group(1))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most // 1024 if sys.platform == "darwin" else most  # bytes there, kB elsewhere


def blas() -> str:
    """The library behind torch's matrix products."""
    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return found.group(1) if found else "unknown"


def processor() -> str:
    """The CPU's name with family and model, which virtual machines do not hide."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    fields = {
        name: re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE) for name in ("model name", "cpu family", "model")
    }
    values = {name: match.group(1) for name, match in fields.items() if match}
    if not values:
        return platform.processor() or platform.machine()
    return f"{values.get('model name', '?')} (family {values.get('cpu family', '?')}, model {values.get('model', '?')})"


def commit_of(checkout: Path) -> str | None:
    """The commit checked out in this folder; None where it is no checkout, as in an installed wheel."""
    if not (checkout / ".git").exists():
        return None
    words = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    try:
        result = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
