"""Kill -9 whole growth runs at random moments; continued, they must end with the bits of the undisturbed run."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import torch
from outcome import fork, leftovers, main, wait

from mfext.cli import main as command_line
from mfext.commands.models import open_model
from mfext.store import Run, is_run_folder, read_json_object

# The demo with its own model and domains, and budgets of seconds.
SHORT = (
    "default_base.training.tokens=16384",
    "default_base.training.sequence_length=64",
    "default_base.training.batch_size=8",
    "default_base.training.commit_every_steps=4",
    "training.tokens=16384",
    "training.sequence_length=64",
    "training.batch_size=8",
    "training.commit_every_steps=4",
    "growth.gate.steps=60",
    "growth.gate.probe_sequences=32",
    "growth.gate.probe_length=64",
    "evaluation.max_bytes=8192",
    "evaluation.window=128",
    "evaluation.bootstrap_samples=200",
)
MEASURED = ("stage", "step", "domain", "split", "nll_nats", "document_nats", "tokens", "model_sha256", "split_sha256")


class Place:
    """One run and the cache that its base is built in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self.cache = folder, folder / "run", folder / "cache"
        folder.mkdir()

    def prepare(self, other: Place) -> None:
        """Take over the extracted and packed text of another cache, but not its base."""
        for name in ("domains", "tokens"):
            shutil.copytree(other.cache / name, self.cache / name)

    def begin(self) -> tuple[int, int]:
        """Start or continue the run in a child, as a user would after a crash."""

        def child(pipe: int) -> None:
            with (self.folder / "log").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.environ["MFEXT_CACHE"] = str(self.cache)
            torch.set_num_threads(1)
            begun = is_run_folder(self.run)
            words = ["--resume", str(self.run)] if begun else ["--domain", "code", "--out", str(self.run), *SHORT]
            code = command_line(["grow", *words, "--threads", "1", "--device", "cpu", "-q"])
            if code:
                raise RuntimeError(f"exit {code}: {(self.folder / 'log').read_text().splitlines()[-1:]}")

        return fork(child)

    def phase(self) -> str:
        """What the run was doing, as far as its folders tell."""
        if (self.run / "stages").is_dir() and list((self.run / "stages").glob("001-*")):
            return "measuring the grown model"
        if (self.run / "progress" / "001").is_dir():
            return "training the new experts"
        if is_run_folder(self.run):
            return "measuring the base or growing"
        begun = list((self.cache / "bases").glob("*/progress/000")) if self.cache.is_dir() else []
        return "pretraining the base" if begun else "preparing"

    def outcome(self) -> dict[str, object]:
        """Everything that kills must not change."""
        run = Run.open(self.run, read_only=True)
        stages = {stage.name: open_model(stage.folder).sha256 for stage in run.stages()}
        bases = [open_model(folder).sha256 for folder in sorted((self.cache / "bases").iterdir())]
        ledger = [[json.dumps(row[key]) for key in MEASURED] for row in run.read_ledger()]
        matrix = read_json_object(self.run / "metrics.json")["matrix"]
        proof = read_json_object(self.run / "frozen.json")
        return {"bases": bases, "stages": stages, "ledger": ledger, "matrix": matrix, "proof": proof}


def two_undisturbed(folder: Path) -> tuple[Place, float, bool]:
    """A run from nothing; how long a second one takes from prepared text; and whether they are equal."""
    whole, again = Place(folder / "whole"), Place(folder / "again")
    code, lines = wait(*whole.begin())
    assert code == 0, lines
    again.prepare(whole)
    begun = time.monotonic()
    code, _ = wait(*again.begin())
    return whole, time.monotonic() - begun, code == 0 and again.outcome() == whole.outcome()


def disturb(place: Place, delays_s: list[float]) -> tuple[list[str], str | None]:
    """Begin and kill the run after each delay, as long as it is not done, then let it end.

    The phases in which kills struck, and what went wrong, if anything.
    """
    phases: list[str] = []
    for delay_s in delays_s:
        process, reading = place.begin()
        time.sleep(delay_s)
        os.kill(process, signal.SIGKILL)
        code, lines = wait(process, reading)
        if code == 0:
            return phases, None
        if code != -signal.SIGKILL:
            return phases, f"after kill {len(phases)}: ended with {code}: {lines[-1:]}"
        phases.append(place.phase())
    code, lines = wait(*place.begin())
    return phases, None if code == 0 else f"not continued: ended with {code}: {lines[-1:]}"


def campaign(folder: Path, cases: int) -> dict[str, object]:
    """`cases` kills over as many runs as it takes; each run is killed up to four times before it may finish."""
    importlib.import_module("mfext.commands.grow")  # so that no child has to import it again
    chance, runs = random.Random(1), 0
    whole, duration_s, equal = two_undisturbed(folder)
    failures = [] if equal else ["two undisturbed runs differ"]
    expected, struck = whole.outcome(), Counter[str]()
    while struck.total() < cases:
        place = Place(folder / f"run-{runs}")
        place.prepare(whole)
        kills = min(4, cases - struck.total())
        phases, wrong = disturb(place, [chance.uniform(0.02, 0.45) * duration_s for _ in range(kills)])
        struck.update(phases)
        if wrong is None and place.outcome() != expected:
            wrong = "other bits than the undisturbed run"
        failures += [] if wrong is None else [f"run {runs}: {wrong}"]
        failures += [f"run {runs}: left {name}" for name in leftovers(place.folder)]
        shutil.rmtree(place.folder)
        runs += 1
    equal_runs = runs - len({failure.split(":")[0] for failure in failures if failure.startswith("run")})
    return {
        "passed": not failures,
        "kills": struck.total(),
        "runs": runs,
        "killed_while": dict(struck),
        "undisturbed_wall_s": round(duration_s, 1),
        "failures": failures[:20],
        "summary": f"{struck.total()} kills, {equal_runs} of {runs} growth runs ended with the undisturbed run's bits",
    }


if __name__ == "__main__":
    main("grow_kills", campaign, 20)
