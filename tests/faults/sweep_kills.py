"""Kill -9 a sweep of twelve trials at random moments; run again, it must end with each result once, the same table."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from outcome import leftovers, main

from mfext.commands.models import open_model
from mfext.store_sweep import RESULTS_NAME, Sweep

# Two ways to learn code from six seeds, each pair on a base of its own, with budgets of a second.
TRIALS = ("method=grow,full", "seed=1,2,3,4,5,6")
SHORT = (
    "model=tiny",
    "default_base.training.tokens=8192",
    "default_base.training.sequence_length=64",
    "default_base.training.batch_size=8",
    "default_base.training.commit_every_steps=4",
    "training.tokens=8192",
    "training.sequence_length=64",
    "training.batch_size=8",
    "training.commit_every_steps=2",
    "growth.gate.steps=40",
    "growth.gate.probe_sequences=16",
    "growth.gate.probe_length=64",
    "evaluation.max_bytes=4096",
    "evaluation.window=64",
    "evaluation.bootstrap_samples=100",
)
KILLS_OF_ONE_SWEEP = 10


class Place:
    """One sweep and the cache that its bases are built in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sweep, self.cache = folder, folder / "sweep", folder / "cache"
        folder.mkdir()

    def prepare(self, other: Place) -> None:
        """Take over the extracted and packed text of another cache, but not its bases."""
        for name in ("domains", "tokens"):
            shutil.copytree(other.cache / name, self.cache / name)

    def begin(self) -> subprocess.Popen[bytes]:
        """The same command line every time, as a user would repeat it."""
        words = ["grow", "-m", "--domain", "code", "--out", str(self.sweep), *TRIALS, *SHORT]
        words += ["--threads", "1", "--device", "cpu", "--jobs", "2"]
        environment = {**os.environ, "MFEXT_CACHE": str(self.cache)}
        with (self.folder / "log").open("ab") as log:
            command = [sys.executable, "-m", "mfext", *words]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def last_line(self) -> str:
        """What the sweep said last."""
        return (self.folder / "log").read_text().splitlines()[-1]

    def results(self) -> list[str]:
        """Ids of the trials recorded, as often as they are."""
        path = self.sweep / RESULTS_NAME
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [json.loads(line)["trial"] for line in lines]

    def outcome(self) -> dict[str, object]:
        """Everything that kills must not change."""
        sweep = Sweep.read(self.sweep)
        models = {trial.id: open_model(sweep.run_folder(trial)).sha256 for trial in sweep.plan.trials}
        table = (self.sweep / "table.csv").read_text()
        return {"table": table, "results": sorted(self.results()), "models": models, "failures": sweep.failures()}


def kill(process: subprocess.Popen[bytes], everything: bool) -> None:
    """Kill -9 the sweep alone, whose trials then leave by themselves, or its trials with it, as a power cut would."""
    victims = psutil.Process(process.pid).children(recursive=True) if everything else []
    for victim in [psutil.Process(process.pid), *victims]:
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()


def disturb(place: Place, delays_s: list[float]) -> tuple[list[int], str | None]:
    """Begin and kill the sweep after each delay, as long as it is not done, then let it end.

    How many results there were at each kill, and what went wrong, if anything.
    """
    struck: list[int] = []
    for number, delay_s in enumerate(delays_s):
        process = place.begin()
        try:
            code = process.wait(timeout=delay_s)
        except subprocess.TimeoutExpired:
            kill(process, everything=number % 2 == 1)
            struck.append(len(place.results()))
            continue
        return struck, None if code == 0 else f"after kill {len(struck)}: ended with {code}: {place.last_line()}"
    code = place.begin().wait()
    return struck, None if code == 0 else f"not continued: ended with {code}: {place.last_line()}"


def campaign(folder: Path, cases: int) -> dict[str, object]:
    """`cases` kills over as many sweeps as it takes, each killed up to ten times before it may finish."""
    chance, sweeps, struck, failures = random.Random(1), 0, list[int](), list[str]()
    whole = Place(folder / "whole")
    begun = time.monotonic()
    if whole.begin().wait() != 0:
        return {"passed": False, "failures": [whole.last_line()], "summary": "the undisturbed sweep failed"}
    duration_s, expected = time.monotonic() - begun, whole.outcome()
    while len(struck) < cases:
        place = Place(folder / f"sweep-{sweeps}")
        place.prepare(whole)
        kills = min(KILLS_OF_ONE_SWEEP, cases - len(struck))
        counts, wrong = disturb(place, [chance.uniform(0.01, 0.2) * duration_s for _ in range(kills)])
        struck += counts
        if wrong is None and place.outcome() != expected:
            wrong = "other results than the undisturbed sweep"
        failures += [] if wrong is None else [f"sweep {sweeps}: {wrong}"]
        failures += [f"sweep {sweeps}: left {name}" for name in leftovers(place.folder)]
        shutil.rmtree(place.folder)
        sweeps += 1
    equal = sweeps - len({failure.split(":")[0] for failure in failures})
    trials = len(whole.results())
    return {
        "passed": not failures,
        "kills": len(struck),
        "sweeps": sweeps,
        "trials": trials,
        "results_at_kills": struck,
        "undisturbed_wall_s": round(duration_s, 1),
        "failures": failures[:20],
        "summary": f"{len(struck)} kills, {equal} of {sweeps} sweeps of {trials} trials ended with each result once "
        "and the undisturbed sweep's table and models, bit for bit",
    }


if __name__ == "__main__":
    main("sweep_kills", campaign, 10)
