"""Process CPU time as medians, peak memory of a child process, and what the figures were measured on."""

from __future__ import annotations

import datetime
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def interleaved_ms(
    ours: Callable[[], object], other: Callable[[], object], ours_times: int, other_times: int
) -> tuple[float, float]:
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


def child_peak_mb(arguments: list[str]) -> float:
    """Run this bench as a child with `arguments`; it prints its peak memory over its own start, in MB."""
    command = [sys.executable, str(ROOT / "kernels" / "bench" / "bench.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(json.loads(result.stdout.splitlines()[-1])["peak_mb"])


def peak_kb() -> int:
    """This process's largest resident memory so far. Not ru_maxrss where /proc has it: that outlives exec."""
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(match.group(1)) if match else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def surroundings() -> dict[str, object]:
    """Processor, BLAS, threads, torch, commit and date: without them a figure says nothing."""
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    features = re.search(r"CPU capability usage: (\S+)", torch.__config__.show())
    return {
        "processor": _processor(),
        "blas": blas.group(1) if blas else "unknown",
        "cpu_capability": features.group(1) if features else "unknown",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed_files": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "kernels", "mfext/model")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "timer": "process CPU time, medians; ratios within one process",
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    fields = {
        name: re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE) for name in ("model name", "cpu family", "model")
    }
    values = {name: match.group(1) for name, match in fields.items() if match}
    if not values:
        return platform.processor() or platform.machine()
    return f"{values.get('model name', '?')} (family {values.get('cpu family', '?')}, model {values.get('model', '?')})"


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    return result.stdout.strip() if result.returncode == 0 else "unknown"
