"""Flip single bits in committed files; every flip must be refused, every clean load accepted."""

from __future__ import annotations

import random
from pathlib import Path

from outcome import CONFIG, ledger_row, main, sample_tensors

from mfext.errors import InputError
from mfext.store import Run, load_model_folder, load_tensors, save_model, verify_folder

CLEAN_LOADS = 500


def build(folder: Path) -> None:
    """A model folder and a run with two stages, progress and a ledger."""
    save_model(sample_tensors(1), CONFIG, folder / "model", {"note": "x"}, {"gate": sample_tensors(2, 64)})
    with Run.create(folder / "run", {"seed": 1}, {"note": "y"}) as run:
        run.commit_progress(1, 10, sample_tensors(3), {"step": 10})
        for stage in range(2):
            run.commit_stage(stage, f"s{stage}", sample_tensors(stage), CONFIG, {"plan": {"added": [1, 2]}}, {})
            run.append_ledger([ledger_row(stage, step) for step in range(5)])


def read_everything(folder: Path) -> None:
    """Read every committed byte; raises InputError or DamagedError if any is wrong."""
    load_model_folder(folder / "model")
    load_tensors(folder / "model" / "gate.safetensors")
    with Run.open(folder / "run") as run:
        run.read_ledger()
        for index in range(2):
            load_model_folder(run.path / "stages" / f"{index:03d}-s{index}")
    verify_folder(folder / "run/progress/001/step-00000010", "progress")


def campaign(folder: Path, cases: int) -> dict[str, object]:
    """Flip one random bit per case, in a file chosen in turn, and put it back."""
    build(folder)
    chance, missed, false_alarms = random.Random(1), [], 0
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    for number in range(cases):
        path = files[number % len(files)]
        clean = path.read_bytes()
        place, bit = chance.randrange(len(clean)), chance.randrange(8)
        path.write_bytes(clean[:place] + bytes([clean[place] ^ (1 << bit)]) + clean[place + 1 :])
        try:
            read_everything(folder)
            missed.append(f"{path.relative_to(folder)} byte {place} bit {bit}")
        except InputError:
            pass
        path.write_bytes(clean)
    clean_loads = min(CLEAN_LOADS, cases)
    for _ in range(clean_loads):
        try:
            read_everything(folder)
        except InputError:
            false_alarms += 1
    summary = f"{cases - len(missed)} of {cases} flips detected, {false_alarms} false alarms in {clean_loads} loads"
    return {
        "passed": not missed and not false_alarms,
        "flips": cases,
        "detected": cases - len(missed),
        "clean_loads": clean_loads,
        "false_alarms": false_alarms,
        "failures": missed[:20],
        "summary": summary,
    }


if __name__ == "__main__":
    main("flip_bits", campaign, 1200)
