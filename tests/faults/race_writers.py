"""Two processes at the same folder at the same moment: exactly one wins, the other is told so in one line.

Savers of a model may both succeed, one after the other: the folder is then whole and one of the two.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from outcome import CONFIG, fork, leftovers, main, sample_tensors, wait

from mfext.store import Run, commit_folder, load_model_folder, save_model, verify_folder


def create_run(place: Path, number: int) -> None:
    """Create and hold the run long enough for the other to try."""
    with Run.create(place / "run", {"process": number}, {}):
        time.sleep(0.5)


def open_run(place: Path, number: int) -> None:
    """Open and hold a run that exists."""
    with Run.open(place / "run"):
        time.sleep(0.5)


def commit_same(place: Path, number: int) -> None:
    """Commit a folder of the same name."""
    commit_folder(
        place / "pack",
        lambda folder: (folder / "number.txt").write_text(str(number)) and None,
        kind="pack",
        metadata={},
    )


def save_same(place: Path, number: int) -> None:
    """Save another model over the same one (both may win, one after the other)."""
    save_model(sample_tensors(number), CONFIG, place / "model", {"seed": number})


def race(place: Path, act: object) -> list[int]:
    """Exit codes of two children that start on the same signal."""
    gate_reading, gate_writing = os.pipe()

    def child(number: int) -> tuple[int, int]:
        def body(pipe: int) -> None:
            os.read(gate_reading, 1)
            act(place, number)

        return fork(body)

    children = [child(number) for number in (1, 2)]
    os.write(gate_writing, b"go")
    codes = [wait(*process)[0] for process in children]
    os.close(gate_reading)
    os.close(gate_writing)
    return codes


def campaign(folder: Path, cases: int) -> dict[str, object]:
    """`cases` races of each kind."""
    failures = []
    kinds = {
        "create a run": create_run,
        "open a run": open_run,
        "commit a folder": commit_same,
        "save a model": save_same,
    }
    for name, act in kinds.items():
        for number in range(cases):
            place = folder / "race"
            place.mkdir()
            if act is open_run:
                Run.create(place / "run", {}, {}).close()
            if act is save_same:
                save_same(place, 0)
            codes = sorted(race(place, act))
            expected = [[0, 0], [0, 10]] if act is save_same else [[0, 10]]
            if codes not in expected or leftovers(place):
                failures.append(f"{name} {number}: exit codes {codes}, left {leftovers(place)}")
            elif act is commit_same:
                verify_folder(place / "pack", "pack")
            elif act is save_same:
                load_model_folder(place / "model")
            else:
                Run.open(place / "run").close()
            shutil.rmtree(place)
    single = (len(kinds) - 1) * cases
    summary = f"{single} races with one winner and {cases} savers in turn, {len(failures)} ended otherwise"
    result = {"passed": not failures, "races_with_one_winner": single, "save_races": cases}
    return {**result, "failures": failures[:20], "summary": summary}


if __name__ == "__main__":
    main("race_writers", campaign, 50)
