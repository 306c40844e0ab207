"""What every campaign shares: sample content, forked children that die, and the JSON result.

Campaigns are scripts, not tests: `make faults` runs campaign.py; each also runs alone, for example
`PYTHONPATH=. python tests/faults/kill_committer.py --cases 50`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from mfext.store import write_file_atomically

Campaign = Callable[[Path, int], dict[str, object]]
CONFIG: dict[str, object] = {"d_model": 16, "num_layers": 2}


def sample_tensors(seed: int, num_floats: int = 4096) -> dict[str, Tensor]:
    """Two tensors that depend on the seed, so that a mix-up of commits is seen."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding.weight": torch.randn(num_floats // 16, 16, generator=generator),
        "blocks.0.feedforward.up": torch.randn(64, dtype=torch.float32, generator=generator).to(torch.bfloat16),
    }


def ledger_row(stage: int, step: int, domain: str = "prose") -> dict[str, object]:
    """A raw measurement with the ledger's key fields."""
    return {"stage": stage, "step": step, "domain": domain, "split": "test", "nll_nats": 1.5 + step, "tokens": 10}


def fork(child: Callable[[int], None]) -> tuple[int, int]:
    """Run `child(pipe)` in a forked process; its id and the reading end of the pipe. Exit code 0 on
    return, 10 for an mfext error, 1 for anything else."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    os.close(reading)
    code = 1
    try:
        child(writing)
        code = 0
    except Exception as error:  # the child must never return into the campaign
        code = 10 if type(error).__module__ == "mfext.errors" else 1
        os.write(writing, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def wait(process: int, reading: int) -> tuple[int, list[str]]:
    """Exit code (negative for a signal) and the lines the child sent."""
    with os.fdopen(reading, "rb") as stream:
        lines = stream.read().decode().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), lines


def leftovers(folder: Path) -> list[str]:
    """Temporary or set-aside names anywhere below `folder`."""
    return [path.name for path in folder.rglob(".mfext-*")]


def describe_machine() -> dict[str, object]:
    """Hardware, versions, date and commit; no host name, no path."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
    }


def run_campaign(name: str, campaign: Campaign, cases: int, out: Path | None) -> bool:
    """Run one campaign, print its line and merge its result into the JSON file. True if it passed."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mfext-faults-") as folder:
        result = campaign(Path(folder), cases)
    result = {**result, "wall_s": round(time.monotonic() - start, 1), **describe_machine()}
    print(f"{name}: {'ok' if result['passed'] else 'FAILED'}: {result['summary']} ({result['wall_s']} s)", flush=True)
    if out is not None:
        before = json.loads(out.read_text()) if out.exists() else {}
        write_file_atomically(out, json.dumps({**before, name: result}, indent=2, sort_keys=True).encode() + b"\n")
    return bool(result["passed"])


def main(name: str, campaign: Campaign, cases: int) -> None:
    """Command line of one campaign script."""
    parser = argparse.ArgumentParser(description=campaign.__doc__)
    parser.add_argument("--cases", type=int, default=cases)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to merge the result into")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.exit(0 if run_campaign(name, campaign, arguments.cases, arguments.out) else 1)
