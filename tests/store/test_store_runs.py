"""Runs: one writer, stages and progress that survive, a ledger that holds each row once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfext.errors import DamagedError, InputError, LockedError
from mfext.store import Run, find_model_folder, load_model_folder, load_tensors, save_model

CONFIG: dict[str, object] = {"d_model": 4}
ROOT = Path(__file__).resolve().parents[2]


def tensors(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((8,), value)}


def row(stage: int, step: int, **more: object) -> dict[str, object]:
    return {"stage": stage, "step": step, "domain": "code", "split": "test", "nll_nats": 1.25, **more}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def steps(run: Run, stage: int) -> list[str]:
    return sorted(os.listdir(run.path / "progress" / f"{stage:03d}"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", {"domain": "code", "seed": 1}, {"config_hash": "abc"})


def test_a_run_reopens_with_its_recipe_and_stages(run: Run) -> None:
    first = run.commit_stage(0, "base", tensors(0), CONFIG, {}, {"tokens": 10})
    extra = {"optimizer": {"weight.exp_avg": torch.ones(8)}}
    second = run.commit_stage(1, "code", tensors(1), CONFIG, extra, {})
    run.close()
    with Run.open(run.path) as again:
        assert (again.recipe, again.metadata) == ({"domain": "code", "seed": 1}, {"config_hash": "abc"})
        assert again.stages() == [first, second]
    assert first.folder == run.path / "stages" / "000-base"
    assert first.manifest.metadata == {"stage": 0, "name": "base", "tokens": 10}
    assert second.manifest.parent == first.manifest.identity
    assert torch.equal(load_model_folder(second.folder).tensors["weight"], torch.ones(8))
    assert torch.equal(load_tensors(second.folder / "optimizer.safetensors")["weight.exp_avg"], torch.ones(8))


def test_a_second_writer_is_told_who_holds_the_run(run: Run) -> None:
    with pytest.raises(LockedError, match=f"process {os.getpid()}") as error:
        Run.open(run.path)
    assert error.value.exit_code == 2
    with pytest.raises(InputError, match="a run already exists here"):
        Run.create(run.path, {}, {})
    Run.open(run.path, read_only=True).stages()
    run.close()
    Run.open(run.path).close()


def test_another_process_cannot_open_a_held_run(run: Run) -> None:
    program = (
        "import sys; from pathlib import Path; from mfext.store_files import lock_run\n"
        "from mfext.errors import LockedError\n"
        "try: lock_run(Path(sys.argv[1]))\n"
        "except LockedError as error: sys.exit(str(error))\n"
    )
    command = [sys.executable, "-c", program, str(run.path)]
    held = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert held.returncode == 1
    assert "run is locked" in held.stderr
    run.close()
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_a_run_is_created_only_in_a_missing_or_empty_folder(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(InputError, match="folder is not empty"):
        Run.create(photos, {}, {})
    assert os.listdir(photos) == ["cat.jpg"]
    with pytest.raises(InputError, match="a file stands where a folder should be"):
        Run.create(photos / "cat.jpg", {}, {})
    (tmp_path / "empty").mkdir()
    Run.create(tmp_path / "empty", {}, {}).close()


def test_foreign_missing_and_damaged_runs_are_refused_in_one_line(tmp_path: Path, run: Run) -> None:
    run.close()
    flip(run.path / "recipe.json")
    (tmp_path / "foreign").mkdir()
    expected = {run.path: DamagedError, tmp_path / "foreign": InputError, tmp_path / "nowhere": InputError}
    for path, kind in expected.items():
        with pytest.raises(kind) as error:
            Run.open(path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
    assert os.listdir(tmp_path / "foreign") == []


def test_a_committed_stage_is_never_overwritten_and_a_damaged_one_is_kept_aside(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    stage = run.commit_stage(0, "base", tensors(0), CONFIG, {}, {})
    for name in ("base", "other"):
        with pytest.raises(InputError, match="already committed"):
            run.commit_stage(0, name, tensors(1), CONFIG, {}, {})
    flip(stage.folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        assert run.stages() == []
    assert "SHA-256 does not match" in caplog.text
    again = run.commit_stage(0, "base", tensors(0), CONFIG, {}, {})
    assert run.stages() == [again]
    assert sorted(os.listdir(run.path / "stages")) == ["000-base", "damaged-000-base-1"]


@pytest.mark.parametrize("name", ["../up", "/abs", "a/b", "", ".hidden"])
def test_a_stage_name_cannot_leave_the_run(run: Run, name: str) -> None:
    with pytest.raises(ValueError, match="name="):
        run.commit_stage(0, name, tensors(0), CONFIG, {}, {})


def test_a_link_is_not_a_stage(tmp_path: Path, run: Run) -> None:
    stage = run.commit_stage(0, "base", tensors(0), CONFIG, {}, {})
    (run.path / "stages" / "001-code").symlink_to(stage.folder)
    assert run.stages() == [stage]


def test_the_two_newest_verified_progress_commits_stay(run: Run) -> None:
    for step in (10, 20, 30, 40):
        run.commit_progress(1, step, tensors(step), {"step": step, "rng": [1, 2]})
    assert steps(run, 1) == ["step-00000030", "step-00000040"]
    progress = run.latest_progress(1)
    assert progress is not None
    assert (progress.step, progress.state) == (40, {"step": 40, "rng": [1, 2]})
    assert torch.equal(progress.tensors["weight"], torch.full((8,), 40.0))
    assert run.latest_progress(0) is None


def test_damaged_progress_is_passed_over_and_does_not_count_when_pruning(run: Run) -> None:
    for step in (10, 20):
        run.commit_progress(1, step, tensors(step), {})
    flip(run.path / "progress/001/step-00000020/state.json")
    progress = run.latest_progress(1)
    assert progress is not None
    assert progress.step == 10
    run.commit_progress(1, 30, tensors(30), {})
    assert steps(run, 1) == ["step-00000010", "step-00000020", "step-00000030"], "two verified ones stay"
    run.commit_progress(1, 20, tensors(20), {})
    run.commit_progress(1, 20, tensors(99), {})
    progress = run.latest_progress(1)
    assert progress is not None
    assert progress.step == 30
    assert steps(run, 1) == ["damaged-step-00000020-1", "step-00000020", "step-00000030"]


def test_non_finite_progress_is_never_committed(run: Run) -> None:
    run.commit_progress(1, 10, tensors(1), {})
    with pytest.raises(InputError, match="'weight' holds NaN"):
        run.commit_progress(1, 20, tensors(float("nan")), {})
    with pytest.raises(InputError, match="JSON"):
        run.commit_progress(1, 20, tensors(1), {"loss": float("inf")})
    assert steps(run, 1) == ["step-00000010"]


def test_progress_of_a_committed_stage_can_be_cleared(run: Run) -> None:
    run.commit_progress(0, 10, tensors(1), {})
    with pytest.raises(AssertionError):
        run.clear_progress(0)
    run.commit_stage(0, "base", tensors(1), CONFIG, {}, {})
    run.clear_progress(0)
    assert run.latest_progress(0) is None


def test_the_ledger_holds_each_key_once(run: Run) -> None:
    assert run.append_ledger([row(0, 1), row(0, 2), row(0, 1, wall_s=3.0)]) == 2
    assert run.append_ledger([row(0, 2), row(1, 2)]) == 1
    assert run.append_ledger([]) == 0
    assert run.read_ledger() == [row(0, 1), row(0, 2), row(1, 2)]
    assert run.append_ledger([row(0, 1, seed=1), row(0, 1, seed=2)], key=("stage", "step", "split", "nll_nats")) == 0


def test_a_torn_ledger_line_is_dropped_and_appended_again(run: Run) -> None:
    run.append_ledger([row(0, 1), row(0, 2)])
    path = run.path / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    assert run.read_ledger() == [row(0, 1)]
    assert run.append_ledger([row(0, 1), row(0, 2)]) == 1
    assert run.read_ledger() == [row(0, 1), row(0, 2)]


def test_opening_removes_what_a_killed_writer_left(run: Run) -> None:
    run.commit_progress(1, 10, tensors(1), {})
    for folder in (run.path, run.path / "stages", run.path / "progress" / "001"):
        (folder / ".mfext-tmp-x-1-y").mkdir()
    run.close()
    Run.open(run.path).close()
    assert not list(run.path.rglob(".mfext-tmp-*"))


def test_report_files_stay_in_the_run_and_replace_nothing_else(run: Run) -> None:
    assert run.write_report_file("report.md", "# é\n").read_text() == "# é\n"
    with pytest.raises(DamagedError, match="unsafe file name"):
        run.write_report_file("../report.md", "x")
    with pytest.raises(AssertionError):
        run.write_report_file("ledger.jsonl", "x")


def test_a_read_only_run_cannot_be_written(run: Run) -> None:
    reader = Run.open(run.path, read_only=True)
    with pytest.raises(AssertionError):
        reader.append_ledger([row(0, 1)])


def test_a_model_is_found_in_a_model_folder_or_as_a_runs_highest_verified_stage(tmp_path: Path, run: Run) -> None:
    save_model(tensors(5), CONFIG, tmp_path / "model", {})
    assert find_model_folder(tmp_path / "model") == tmp_path / "model"
    with pytest.raises(InputError, match="no committed stage"):
        find_model_folder(run.path)
    first = run.commit_stage(0, "base", tensors(0), CONFIG, {}, {})
    second = run.commit_stage(1, "code", tensors(1), CONFIG, {}, {})
    assert find_model_folder(run.path) == second.folder
    assert find_model_folder(second.folder) == second.folder
    flip(second.folder / "config.json")
    assert find_model_folder(run.path) == first.folder
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "model" / "config.json"):
        with pytest.raises(InputError) as error:
            find_model_folder(path)
        assert str(path) in str(error.value)


def test_the_fault_campaigns_pass_in_small() -> None:
    command = [sys.executable, str(ROOT / "tests" / "faults" / "campaign.py"), "--quick"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok: ") == 4
