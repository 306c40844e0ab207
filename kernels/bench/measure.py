"""Peak memory of a child process, and what the figures were measured on."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from mfext.metrics.speed import TIMER, blas, commit_of, processor
from mfext_kernels import products

ROOT = Path(__file__).resolve().parents[2]


def child_peak_mb(arguments: list[str]) -> float:
    """Run this bench as a child with `arguments`; it prints its peak memory over its own start, in MB."""
    command = [sys.executable, str(ROOT / "kernels" / "bench" / "bench.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(json.loads(result.stdout.splitlines()[-1])["peak_mb"])


def surroundings() -> dict[str, object]:
    """Processor, BLAS, threads, torch, commit and date: without them a figure says nothing."""
    features = re.search(r"CPU capability usage: (\S+)", torch.__config__.show())
    return {
        "processor": processor(),
        "blas": blas(),
        "cpu_products": products.explain(),
        "cpu_capability": features.group(1) if features else "unknown",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit_of(ROOT) or "unknown",
        "changed_files": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "kernels", "mfext/model")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "timer": TIMER,
    }


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    return result.stdout.strip() if result.returncode == 0 else "unknown"
