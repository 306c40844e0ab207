"""All fault campaigns of the store, one line each; results merge into a JSON file. Run by `make faults`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import flip_bits
import kill_committer
import kill_points
import race_writers
import refuse_disk
import torch
from outcome import run_campaign

CAMPAIGNS = {
    "kill_points": (kill_points.campaign, 1000),
    "kill_committer": (kill_committer.campaign, 1000),
    "flip_bits": (flip_bits.campaign, 1200),
    "refuse_disk": (refuse_disk.campaign, 50),
    "race_writers": (race_writers.campaign, 50),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/faults.json"))
    parser.add_argument("--only", choices=sorted(CAMPAIGNS), default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [arguments.only] if arguments.only else list(CAMPAIGNS)
    passed = [run_campaign(name, *CAMPAIGNS[name], arguments.out) for name in chosen]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
