"""Kill -9 a process at random moments while it commits stages, progress and ledger rows."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import torch
from outcome import CONFIG, fork, ledger_row, leftovers, main, sample_tensors, wait

from mfext.errors import InputError
from mfext.store import Run, load_model_folder

KILLS_PER_RUN = 25
STEPS_PER_STAGE = 6


def commit_until_killed(path: Path, pipe: int) -> None:
    """Resume the run and go on committing; one line to the pipe after each acknowledged commit."""

    def acknowledge(*words: object) -> None:
        os.write(pipe, (" ".join(str(word) for word in words) + "\n").encode())

    run = Run.open(path) if (path / "recipe.json").exists() else Run.create(path, {"seed": 1}, {})
    acknowledge("run")
    with run:
        while True:
            stage = len(run.stages())
            progress = run.latest_progress(stage)
            step = progress.step if progress else 0
            while step < STEPS_PER_STAGE:
                step += 1
                run.commit_progress(stage, step, sample_tensors(1000 * stage + step), {"step": step})
                acknowledge("progress", stage, step)
            run.commit_stage(stage, f"s{stage}", sample_tensors(stage), CONFIG, {"plan": {"stage": stage}}, {})
            acknowledge("stage", stage)
            run.append_ledger([ledger_row(stage, step, domain) for domain in ("prose", "code")])
            acknowledge("ledger", stage, step)


def lost(path: Path, acknowledged: list[list[str]]) -> list[str]:
    """What was acknowledged and cannot be read back, or reads back wrong."""
    if not acknowledged:
        return []
    missing: list[str] = []
    try:
        run = Run.open(path)
    except InputError as error:
        return [str(error)]
    with run:
        stages = {stage.index: stage for stage in run.stages()}
        keys = [(row["stage"], row["step"], row["domain"]) for row in run.read_ledger()]
        missing += ["ledger row twice"] if len(keys) != len(set(keys)) else []
        for index, stage in stages.items():
            tensors = load_model_folder(stage.folder).tensors
            same = all(torch.equal(tensors[name], value) for name, value in sample_tensors(index).items())
            missing += [] if same else [f"stage {index} holds other tensors"]
        for kind, *numbers in acknowledged:
            stage_number, step = ([int(number) for number in numbers] + [0, 0])[:2]
            if kind == "stage" and stage_number not in stages:
                missing.append(f"stage {stage_number}")
            if kind == "ledger" and any((stage_number, step, domain) not in keys for domain in ("prose", "code")):
                missing.append(f"ledger {stage_number} {step}")
            if kind == "progress":
                progress = run.latest_progress(stage_number)
                same = progress is not None and progress.step >= step
                missing += [] if same else [f"progress {stage_number} {step}"]
    return missing + leftovers(path)


def campaign(folder: Path, cases: int) -> dict[str, object]:
    """Kill at random moments (0 to 160 ms); nothing acknowledged may be lost, nothing left lying."""
    chance, acknowledgements = random.Random(1), 0
    failures: list[str] = []
    path = folder / "run"
    acknowledged: list[list[str]] = []
    for number in range(cases):
        if number % KILLS_PER_RUN == 0:
            shutil.rmtree(path, ignore_errors=True)
            acknowledged = []
        process, reading = fork(lambda pipe: commit_until_killed(path, pipe))
        time.sleep(chance.uniform(0, 0.16))
        os.kill(process, signal.SIGKILL)
        code, lines = wait(process, reading)
        acknowledged += [line.split() for line in lines]
        acknowledgements += len(lines)
        failures += [f"kill {number}: child ended with {code}: {lines[-1:]}"] if code != -signal.SIGKILL else []
        failures += [f"kill {number}: {name}" for name in lost(path, acknowledged)]
    return {
        "passed": not failures,
        "kills": cases,
        "acknowledged_commits": acknowledgements,
        "lost": len(failures),
        "failures": failures[:20],
        "summary": f"{cases} kills, {acknowledgements} acknowledged commits, {len(failures)} lost",
    }


if __name__ == "__main__":
    main("kill_committer", campaign, 1000)
