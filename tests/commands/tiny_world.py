"""Two domains of a few KB that share no letter, and recipes small enough to run whole stories in seconds."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from mfext.config import Recipe
from mfext.recipe import load_recipe
from mfext.requests import Invocation

QUIET = Invocation(quiet=True, device="cpu", threads=1)
WORDS = ("the", "small", "old", "red", "cat", "dog", "bird", "saw", "ate", "found", "house", "tree", "river", "and")
TINY = (
    "model=tiny",
    "default_base.training.tokens=20480",
    "default_base.training.sequence_length=64",
    "default_base.training.batch_size=8",
    "training.tokens=20480",
    "training.sequence_length=64",
    "training.batch_size=8",
    "training.log_every_steps=5",
    "growth.gate.steps=60",
    "growth.gate.new_sequences=128",
    "growth.gate.probe_sequences=32",
    "growth.gate.probe_length=64",
    "evaluation.window=64",
    "evaluation.bootstrap_samples=200",
    "trainer.threads=1",
    "trainer.accelerator=cpu",
)


@dataclass(frozen=True)
class World:
    """Domain folders by what they hold, and a folder for runs."""

    letters: Path
    digits: Path
    capitals: Path
    runs: Path

    def recipe(self, out: str, *overrides: str, domain: Path | None = None) -> Recipe:
        """A tiny recipe of grow, from letters to digits unless told otherwise."""
        flags = {
            "domain": str(domain or self.digits),
            "default_base.domains": [str(self.letters)],
            "out": str(self.runs / out),
        }
        return load_recipe("grow", None, [*TINY, *overrides], flags)

    def words(self, out: str, *overrides: str) -> list[str]:
        """The same as words of a command line."""
        base = f"default_base.domains=['{self.letters}']"
        return ["grow", "--domain", str(self.digits), "--out", str(self.runs / out), base, *TINY, *overrides]


def make_world(folder: Path) -> World:
    """Write the domains: lower-case sentences, sums of numbers, and upper-case lists."""
    chance = random.Random(0)

    def sentence() -> str:
        return " ".join(chance.choice(WORDS) for _ in range(14)) + "."

    def arithmetic() -> str:
        left, right = chance.randrange(1000), chance.randrange(1000)
        return f"{left} + {right} = {left + right};"

    def names() -> str:
        return ":".join("".join(chance.choice("ABCDEFGH") for _ in range(5)) for _ in range(6))

    (folder / "runs").mkdir()
    for name, line in (("letters", sentence), ("digits", arithmetic), ("capitals", names)):
        (folder / name).mkdir()
        for split, count in (("train", 60), ("validation", 12), ("test", 6)):
            documents = ["\n".join(line() for _ in range(8)) for _ in range(count)]
            lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
            (folder / name / f"{split}.jsonl").write_text(lines)
    return World(folder / "letters", folder / "digits", folder / "capitals", folder / "runs")
