"""All fault campaigns, one line each; results merge into a JSON file. Run by `make faults`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import flip_bits
import grow_kills
import kill_committer
import kill_points
import race_writers
import refuse_disk
import sweep_kills
import torch
from outcome import run_campaign

CAMPAIGNS = {
    "kill_points": (kill_points.campaign, 1000),
    "kill_committer": (kill_committer.campaign, 1000),
    "flip_bits": (flip_bits.campaign, 1200),
    "refuse_disk": (refuse_disk.campaign, 50),
    "race_writers": (race_writers.campaign, 50),
    "grow_kills": (grow_kills.campaign, 20),
    "sweep_kills": (sweep_kills.campaign, 10),
}

QUICK_CASES = {
    "kill_points": 5,
    "kill_committer": 4,
    "flip_bits": 20,
    "refuse_disk": 0,
    "race_writers": 1,
    "grow_kills": 0,
    "sweep_kills": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/faults.json"))
    parser.add_argument("--only", choices=sorted(CAMPAIGNS), default=None)
    parser.add_argument("--quick", action="store_true", help="a few cases of each, nothing written (for the tests)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [arguments.only] if arguments.only else list(CAMPAIGNS)
    passed = []
    for name in chosen:
        campaign, cases = CAMPAIGNS[name]
        quick_cases = QUICK_CASES.get(name, 1)
        if not arguments.quick:
            passed.append(run_campaign(name, campaign, cases, arguments.out))
        elif quick_cases:
            passed.append(run_campaign(name, campaign, quick_cases, None))
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
