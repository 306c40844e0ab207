"""Kill -9 a process at every single system call of a commit that changes the disk, before it and half-way."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from outcome import CONFIG, fork, ledger_row, leftovers, main, sample_tensors, wait
from torch import Tensor

from mfext.store import Run, append_line, load_model_folder, read_lines, save_model, write_file_atomically

CALLS = ("open", "write", "fsync", "rename", "mkdir", "ftruncate", "unlink", "rmdir", "chmod")
real_write = os.write


def die_at(point: int) -> list[int]:
    """Make the `point`-th disk-changing call of this process its last (a write is done by half); the
    countdown, which goes on below zero."""
    left = [point]

    def wrap(call: Callable[..., object], is_write: bool) -> Callable[..., object]:
        def wrapped(*arguments: object, **options: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                if is_write:
                    descriptor, data = arguments
                    call(descriptor, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapped

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name), name == "write"))
    save_file = safetensors.torch.save_file

    def torn_save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        left[0] -= 1
        save_file(tensors, path, metadata=metadata)
        if left[0] == 0:
            with open(path, "r+b") as stream:
                stream.truncate(path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = torn_save
    return left


def replace_model(folder: Path) -> None:
    """Replace the model of seed 1 by the one of seed 2."""
    save_model(sample_tensors(2), CONFIG, folder / "model", {"seed": 2})


def model_is_whole(folder: Path, finished: bool) -> bool:
    """The folder holds one of the two models, completely; saving again works and leaves nothing lying."""
    loaded = load_model_folder(folder / "model")
    seeds = [
        seed
        for seed in (1, 2)
        if torch.equal(loaded.tensors["embedding.weight"], sample_tensors(seed)["embedding.weight"])
    ]
    fits = seeds == [loaded.manifest.metadata["seed"]] and (not finished or seeds == [2])
    replace_model(folder)
    return fits and load_model_folder(folder / "model").manifest.metadata["seed"] == 2 and not leftovers(folder)


def prepare_model(folder: Path) -> None:
    save_model(sample_tensors(1), CONFIG, folder / "model", {"seed": 1})


def replace_file(folder: Path) -> None:
    write_file_atomically(folder / "report.md", b"new" * 1000)


def file_is_whole(folder: Path, finished: bool) -> bool:
    """Old or new content, never a part of it."""
    content = (folder / "report.md").read_bytes()
    return content == b"new" * 1000 or (content == b"old" and not finished)


def prepare_file(folder: Path) -> None:
    (folder / "report.md").write_bytes(b"old")


def append_two(folder: Path) -> None:
    append_line(folder / "ledger.jsonl", ledger_row(1, 1))
    append_line(folder / "ledger.jsonl", ledger_row(1, 2))


def lines_are_whole(folder: Path, finished: bool) -> bool:
    """The old row is there, then a prefix of the new ones; appending goes on cleanly."""
    path = folder / "ledger.jsonl"
    rows = read_lines(path)
    append_line(path, ledger_row(9, 9))
    prefix = [ledger_row(0, 0), ledger_row(1, 1), ledger_row(1, 2)]
    return (
        rows == prefix[: len(rows)]
        and len(rows) >= (3 if finished else 1)
        and read_lines(path) == [*rows, ledger_row(9, 9)]
    )


def prepare_lines(folder: Path) -> None:
    append_line(folder / "ledger.jsonl", ledger_row(0, 0))


def go_on(folder: Path) -> None:
    """A small run from wherever it stands to its end."""
    path = folder / "run"
    with Run.open(path) if (path / "recipe.json").exists() else Run.create(path, {"seed": 1}, {}) as run:
        for stage in range(2):
            if stage >= len(run.stages()):
                progress = run.latest_progress(stage)
                for step in range(progress.step + 1 if progress else 1, 4):
                    run.commit_progress(stage, step, sample_tensors(step), {"step": step})
                run.commit_stage(stage, f"s{stage}", sample_tensors(stage), CONFIG, {}, {})
            run.append_ledger([ledger_row(stage, 3)])


def run_is_whole(folder: Path, finished: bool) -> bool:
    """Going on from the kill ends in the same run as never being killed."""
    go_on(folder)
    with Run.open(folder / "run") as run:
        stages = run.stages()
        tensors = [load_model_folder(stage.folder).tensors["embedding.weight"] for stage in stages]
        same = [torch.equal(found, sample_tensors(index)["embedding.weight"]) for index, found in enumerate(tensors)]
        ends = [run.latest_progress(stage) for stage in range(2)]
        rows = run.read_ledger()
    kept = [len(list((folder / "run/progress" / f"{stage:03d}").iterdir())) for stage in range(2)]
    ledger_fits = rows == [ledger_row(0, 3), ledger_row(1, 3)]
    steps_fit = [end.step if end else 0 for end in ends] == [3, 3] and kept == [2, 2]
    parents_fit = stages[1].manifest.parent == stages[0].manifest.identity
    return same == [True, True] and ledger_fits and steps_fit and parents_fit and not leftovers(folder)


SCENARIOS = {
    "replace a file": (prepare_file, replace_file, file_is_whole),
    "append ledger lines": (prepare_lines, append_two, lines_are_whole),
    "replace a model folder": (prepare_model, replace_model, model_is_whole),
    "a whole run": (lambda folder: None, go_on, run_is_whole),
}


def count_points(folder: Path, name: str) -> int:
    """Disk-changing calls of a scenario that is not killed."""
    prepare, act, _ = SCENARIOS[name]
    prepare(folder)

    def child(pipe: int) -> None:
        left = die_at(0)
        act(folder)
        real_write(pipe, f"{-left[0]}\n".encode())

    code, lines = wait(*fork(child))
    assert code == 0, lines
    return int(lines[-1])


def campaign(folder: Path, cases: int) -> dict[str, object]:
    """Die at each disk-changing call in turn (about `cases` a scenario, evenly spread), check what is left."""
    points: dict[str, int] = {}
    failures: list[str] = []
    for name, (prepare, act, is_whole) in SCENARIOS.items():
        place = folder / "case"
        place.mkdir()
        total = count_points(place, name)
        stride = max(1, (total + 1) // cases)
        chosen = range(1, total + 2, stride)
        for point in chosen:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            prepare(place)

            def child(pipe: int, place: Path = place, act: Callable[[Path], None] = act, point: int = point) -> None:
                die_at(point)
                act(place)

            code, lines = wait(*fork(child))
            if code != (0 if point > total else -signal.SIGKILL):
                failures.append(f"{name}, point {point}: ended with {code}: {lines}")
            elif not is_whole(place, code == 0):
                failures.append(f"{name}, point {point}: not whole")
            points[name] = points.get(name, 0) + (code != 0)
        shutil.rmtree(place)
    killed = sum(points.values())
    summary = f"{killed} kill points in {len(points)} operations, {len(failures)} torn"
    return {
        "passed": not failures,
        "points": points,
        "torn": len(failures),
        "failures": failures[:20],
        "summary": summary,
    }


if __name__ == "__main__":
    main("kill_points", campaign, 1000)
