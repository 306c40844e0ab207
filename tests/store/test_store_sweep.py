"""Sweep folders: a plan that only grows, one holder, and each result exactly once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mfext.errors import DamagedError, InputError, LockedError
from mfext.store_sweep import MAX_TRIALS, Sweep, SweepPlan, Trial, distinct, is_sweep_folder

ROOT = Path(__file__).resolve().parents[2]


def trial(number: int, **overrides: object) -> Trial:
    digest = f"{number:064x}"[::-1]
    recipe = {"seed": number, "training": {"betas": [0.9, 0.5]}}
    return Trial(digest[:16], digest, overrides or {"seed": number}, recipe)


def plan(*numbers: int, verb: str = "grow") -> SweepPlan:
    return SweepPlan(verb, ("seed",), tuple(trial(number) for number in numbers))


def new_sweep(path: Path, *numbers: int) -> Sweep:
    with Sweep.held(path, plan(*numbers)) as sweep:
        return sweep


def test_a_sweep_reads_back_as_it_was_planned(tmp_path: Path) -> None:
    assert not is_sweep_folder(tmp_path)
    sweep = new_sweep(tmp_path / "sweep", 1, 2)
    assert is_sweep_folder(sweep.path)
    assert Sweep.read(sweep.path).plan == plan(1, 2)
    assert sweep.run_folder(sweep.trial(1)) == sweep.path / "trials" / trial(2).id
    for number in (-1, 2):
        with pytest.raises(InputError, match="trials 0 to 1"):
            sweep.trial(number)


def test_new_trials_go_behind_the_known_ones_which_keep_their_numbers(tmp_path: Path) -> None:
    new_sweep(tmp_path, 1, 2)
    assert new_sweep(tmp_path, 3, 2, 4).plan.trials == tuple(map(trial, (1, 2, 3, 4)))
    assert new_sweep(tmp_path, 2).plan.trials == tuple(map(trial, (1, 2, 3, 4)))


def test_a_sweep_planned_again_is_not_written_again(tmp_path: Path) -> None:
    new_sweep(tmp_path, 1, 2)
    before = (tmp_path / "sweep.json").stat()
    new_sweep(tmp_path, 1, 2)
    after = (tmp_path / "sweep.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_axes_are_what_was_swept_and_what_differs() -> None:
    first, second = trial(1, method="grow", seed=1, width=4), trial(2, method="full", seed=1, width=4)
    third = trial(3, method="full", seed=1, width=4, depth=2)
    swept = SweepPlan("grow", ("seed", "method"), (first, second, third))
    assert list(swept.axes().items()) == [("seed", [1]), ("method", ["grow", "full"]), ("depth", [2])]


def test_equal_configurations_are_one_trial() -> None:
    again = Trial(trial(1).id, trial(1).config_hash, {"seed": "another spelling"}, {})
    assert distinct([trial(1), trial(2), again]) == (trial(1), trial(2))


def test_a_second_holder_is_refused_and_readers_are_not(tmp_path: Path) -> None:
    with Sweep.held(tmp_path, plan(1)) as sweep:
        with pytest.raises(LockedError), Sweep.held(tmp_path, plan(1)):
            pass
        assert Sweep.read(tmp_path).record_result(sweep.trial(0), {})
    new_sweep(tmp_path, 1)


def test_another_verb_another_folder_and_too_many_trials_are_refused(tmp_path: Path) -> None:
    new_sweep(tmp_path / "sweep", 1)
    with pytest.raises(InputError, match="runs mfext grow"), Sweep.held(tmp_path / "sweep", plan(1, verb="pretrain")):
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="neither empty nor a sweep"), Sweep.held(tmp_path / "mine", plan(1)):
        pass
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match=f"at most {MAX_TRIALS}"), Sweep.held(tmp_path / "big", plan(*range(1001))):
        pass
    with pytest.raises(InputError, match="not a sweep folder"):
        Sweep.read(tmp_path / "mine")


def test_every_changed_byte_of_the_plan_is_seen(tmp_path: Path) -> None:
    new_sweep(tmp_path, 1)
    path = tmp_path / "sweep.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedError):
            Sweep.read(tmp_path)


def test_a_result_lands_once_and_outlives_a_torn_line(tmp_path: Path) -> None:
    sweep = new_sweep(tmp_path, 1, 2)
    first, second = sweep.plan.trials
    assert sweep.record_result(first, {"loss": 0.1})
    assert not sweep.record_result(first, {"loss": 0.2})
    whole = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(whole + whole[: len(whole) // 2])
    assert sweep.record_result(second, {"loss": 0.3})
    assert sweep.results() == {first.id: {"loss": 0.1}, second.id: {"loss": 0.3}}


def test_failed_attempts_are_kept_apart_from_results(tmp_path: Path) -> None:
    sweep = new_sweep(tmp_path, 1)
    (only,) = sweep.plan.trials
    sweep.record_failure(only, "first")
    sweep.record_failure(only, "second")
    assert sweep.record_result(only, {})
    assert sweep.failures() == {only.id: ["first", "second"]}
    assert sweep.results() == {only.id: {}}


def test_processes_that_finish_the_same_trials_leave_each_result_once(tmp_path: Path) -> None:
    sweep = new_sweep(tmp_path, *range(12))
    program = (
        "import sys; from pathlib import Path; from mfext.store_sweep import Sweep\n"
        "sweep = Sweep.read(Path(sys.argv[1]))\n"
        "for number in map(int, sys.argv[2:]): sweep.record_result(sweep.trial(number), {'number': number})\n"
    )
    orders = [list(range(12)), list(range(11, -1, -1)), [*range(6, 12), *range(6)]]
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), *map(str, order)], cwd=ROOT) for order in orders
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 12
    assert {str(row["number"]) for row in sweep.results().values()} == {str(number) for number in range(12)}
