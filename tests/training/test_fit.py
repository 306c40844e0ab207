from __future__ import annotations

import csv
import math
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mfext.config_machine import LoggerConfig, TrainerConfig
from mfext.errors import DamagedError, DivergedError, InputError, InterruptedRun
from mfext.training.exchange import ProgressState
from mfext.training.fit import fit
from mfext.training.metrics_log import COLUMNS
from tests.training.tiny_training import (
    GROWTH,
    Commits,
    RandomTokens,
    TinyStream,
    open_gate,
    same_bits,
    tiny_module,
    tiny_settings,
    tiny_training,
    weights,
)

torch.set_num_threads(1)


class Steps:
    """A progress display that records, and may send a signal after a step."""

    def __init__(self, kill_after: int | None = None, number: int = signal.SIGTERM) -> None:
        self.kill_after, self.number = kill_after, number
        self.seen: list[object] = []

    def start(self, total: int, done: int, label: str) -> None:
        self.seen.append((total, done, label))

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        self.seen.append(done)
        if done == self.kill_after:
            os.kill(os.getpid(), self.number)

    def close(self) -> None:
        self.seen.append("closed")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def timeless(folder: Path) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows(folder)]


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("micro", [None, 2])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, grown: bool, micro: int | None) -> None:
    training = tiny_training(commit_every_steps=3, micro_batch_size=micro, log_every_steps=2)
    whole, commits = tiny_module(grown), Commits()
    result = fit(whole, TinyStream(), tiny_settings(tmp_path / "whole", training), commit=commits)
    assert [state.step for state in commits.states] == [3, 6]
    for state in commits.states:
        again = tiny_module(grown)
        settings = tiny_settings(tmp_path / f"resumed{state.step}", training)
        resumed = fit(again, TinyStream(), settings, commit=Commits(), resume=state)
        assert same_bits(weights(again), weights(whole))
        assert same_bits(resumed.optimizer, result.optimizer) and len(result.optimizer) > 0
        assert resumed.loss_nats_per_token == result.loss_nats_per_token and resumed.frozen_ok and not resumed.notes
        assert timeless(settings.log_folder) == [
            row for row in timeless(tmp_path / "whole") if int(row["step"]) > state.step
        ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("after", [3, 8])
def test_a_signal_commits_the_step_and_leaves_and_the_run_can_continue(tmp_path: Path, number: int, after: int) -> None:
    whole, stopped, commits = tiny_module(), tiny_module(), Commits()
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    fit(whole, TinyStream(), tiny_settings(tmp_path / "whole"), commit=Commits())
    with pytest.raises(InterruptedRun, match=f"after step {after} of 8") as caught:
        progress = Steps(after, number)
        fit(stopped, TinyStream(), tiny_settings(tmp_path / "log"), commit=commits, progress=progress)
    assert caught.value.exit_code == 128 + number and progress.seen[-1] == "closed"
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert [state.step for state in commits.states] == [after]
    again = tiny_module()
    fit(again, TinyStream(), tiny_settings(tmp_path / "log"), commit=commits, resume=commits.states[-1])
    assert same_bits(weights(again), weights(whole))
    assert timeless(tmp_path / "log") == timeless(tmp_path / "whole")


def test_metrics_csv_goes_on_after_the_resumed_step_without_duplicates_or_torn_rows(tmp_path: Path) -> None:
    training, commits = tiny_training(commit_every_steps=5, log_every_steps=1), Commits()
    settings = tiny_settings(tmp_path, training)
    fit(tiny_module(), TinyStream(), settings, commit=commits)
    with (tmp_path / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("9,3.1")  # torn by a kill
    fit(tiny_module(), TinyStream(), settings, commit=commits, resume=commits.states[0])
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(1, 9))
    assert tuple(rows(tmp_path)[0]) == COLUMNS


def test_the_log_says_loss_rate_speed_norm_and_routing(tmp_path: Path) -> None:
    progress = Steps()
    result = fit(tiny_module(grown=True), TinyStream(), tiny_settings(tmp_path), commit=Commits(), progress=progress)
    last = {name: float(value) for name, value in rows(tmp_path)[-1].items() if value}
    assert set(COLUMNS) - last.keys() == {"penalty"}, "a method without a penalty logs none"
    assert last["bits_per_token"] == pytest.approx(last["loss_nats_per_token"] / math.log(2), rel=1e-6)
    assert last["loss_nats_per_token"] == pytest.approx(result.loss_nats_per_token, rel=1e-6)
    assert 0 <= last["routing_entropy_attention"] <= math.log(2) + 1e-6 and last["gate_open_share"] == 1.0
    assert last["tokens_per_s"] > 0 and last["gradient_norm"] > 0 and last["skipped_windows"] == 0
    assert progress.seen == [(8, 0, "training"), *range(1, 9), "closed"]


def test_a_fit_prints_nothing_warns_of_nothing_and_leaves_no_other_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(tiny_module(), TinyStream(), tiny_settings(tmp_path / "log"), commit=Commits())
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["log", "metrics.csv"]


def test_weight_decay_leaves_every_frozen_tensor_unchanged_also_across_a_resume(tmp_path: Path) -> None:
    training = tiny_training(20, weight_decay=1.0, commit_every_steps=10)
    module, commits = tiny_module(grown=True), Commits()
    before = weights(module)
    result = fit(module, TinyStream(), tiny_settings(tmp_path, training), commit=commits)
    again = tiny_module(grown=True)
    resumed = fit(again, TinyStream(), tiny_settings(tmp_path, training), commit=commits, resume=commits.states[0])
    moved = {name for name, value in weights(again).items() if not torch.equal(value, before[name])}
    assert moved == again.method.trainable(again.model)
    assert result.frozen_ok and resumed.frozen_ok and result.frozen_sha256 == resumed.frozen_sha256


def test_frozen_ok_is_false_where_a_frozen_tensor_moved(tmp_path: Path) -> None:
    module = tiny_module(grown=True)

    class Meddler(Steps):
        def update(self, done: int, numbers: Mapping[str, float]) -> None:
            with torch.no_grad():
                module.model.lm_head.weight[0, 0] += 1e-6

    assert not fit(module, TinyStream(), tiny_settings(tmp_path), commit=Commits(), progress=Meddler()).frozen_ok


def test_progress_of_another_base_seed_or_budget_is_refused(tmp_path: Path) -> None:
    training, commits = tiny_training(commit_every_steps=3), Commits()
    fit(tiny_module(grown=True), TinyStream(), tiny_settings(tmp_path, training), commit=commits)
    state = commits.states[0]

    def resume(module_grown: bool = True, change_base: bool = False, **changes: object) -> None:
        module = tiny_module(module_grown)
        if change_base:
            with torch.no_grad():
                module.model.lm_head.weight[0, 0] += 1.0
        settings = replace(tiny_settings(tmp_path, training), **changes)
        fit(module, TinyStream(), settings, commit=commits, resume=state)

    with pytest.raises(DamagedError, match="frozen tensors are not those"):
        resume(change_base=True)
    with pytest.raises(InputError, match="progress has seed=1"):
        resume(seed=2)
    with pytest.raises(InputError, match="progress has total_steps=8"):
        resume(training=tiny_training(9))
    with pytest.raises(DamagedError, match="frozen tensors are not those"):
        resume(module_grown=False)


def test_progress_made_with_another_thread_count_is_named_in_one_note(tmp_path: Path) -> None:
    training, commits = tiny_training(commit_every_steps=3), Commits()
    fit(tiny_module(), TinyStream(), tiny_settings(tmp_path, training), commit=commits)
    two = tiny_settings(tmp_path, training, trainer=TrainerConfig(threads=2))
    result = fit(tiny_module(), TinyStream(), two, commit=commits, resume=commits.states[0])
    assert len(result.notes) == 1 and "threads 1 -> 2" in result.notes[0]
    assert torch.get_num_threads() == 1


class Unscored(TinyStream):
    """A stream whose steps from `bad_from` on have no target, so that their loss is NaN."""

    def dataset(
        self, start_step: int, end_step: int, accumulation: int, rank: int, world: int
    ) -> Dataset[Mapping[str, Tensor]]:
        class Some(RandomTokens):
            def __getitem__(self, index: int) -> dict[str, Tensor]:
                batch = super().__getitem__(index)
                if index // self.accumulation + self.start >= 6:
                    batch["targets"] = torch.full_like(batch["targets"], -100)
                return batch

        return Some(start_step, end_step, accumulation, rank, world)


def test_dropped_steps_are_counted_across_a_resume_and_ten_in_a_row_diverge(tmp_path: Path) -> None:
    training, commits = tiny_training(20, commit_every_steps=3, log_every_steps=1), Commits()
    with pytest.raises(DivergedError, match="10 steps in a row"):
        fit(tiny_module(), Unscored(), tiny_settings(tmp_path, training), commit=commits)
    last: ProgressState = commits.states[-1]
    assert last.step == 15 and last.state["bad_in_a_row"] == 9 and last.state["skipped_windows"] == 36
    assert all(value.isfinite().all() for value in last.tensors.values() if value.is_floating_point())
    with pytest.raises(DivergedError, match="10 steps in a row"):
        fit(tiny_module(), Unscored(), tiny_settings(tmp_path, training), commit=commits, resume=last)
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(1, 16))
    assert rows(tmp_path)[-1]["loss_nats_per_token"] == ""


def test_commits_come_by_the_clock_too_and_never_after_the_last_step(tmp_path: Path) -> None:
    commits = Commits()
    fit(tiny_module(), TinyStream(), tiny_settings(tmp_path, tiny_training(commit_every_s=1e-9)), commit=commits)
    assert [state.step for state in commits.states] == list(range(1, 8))


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"gradient_checkpointing": True}])
def test_options_that_change_how_a_step_is_computed_change_its_loss_little(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    plain = fit(tiny_module(True), TinyStream(), tiny_settings(tmp_path), commit=Commits())
    module = tiny_module(True)
    other = fit(module, TinyStream(), tiny_settings(tmp_path, tiny_training(**changes)), commit=Commits())
    tolerance = torch.finfo(torch.bfloat16 if "precision" in changes else torch.float32).eps * 4
    assert other.loss_nats_per_token == pytest.approx(plain.loss_nats_per_token, rel=tolerance)
    assert not module.model.gradient_checkpointing


def test_a_stage_after_a_growth_starts_with_fresh_moments(tmp_path: Path) -> None:
    module = tiny_module()
    fit(module, TinyStream(), tiny_settings(tmp_path / "base"), commit=Commits())
    module.grow(GROWTH, "code")
    open_gate(module.model)
    result = fit(module, TinyStream(), tiny_settings(tmp_path / "code", stage=2), commit=Commits())
    assert {int(value) for name, value in result.optimizer.items() if name.endswith("/step")} == {8}
    assert all(name.startswith("generations.0.") for name in result.optimizer)


def test_tensorboard_is_written_and_a_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    settings = tiny_settings(tmp_path, logger=LoggerConfig(tensorboard=True))
    fit(tiny_module(), TinyStream(), settings, commit=Commits())
    assert list((tmp_path / "tensorboard").glob("events.*"))
    wandb = tiny_settings(tmp_path, logger=LoggerConfig(wandb=True))
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    with pytest.raises(InputError, match=r"wandb is not installed.*pip install 'mfext\[wandb\]'"):
        fit(tiny_module(), TinyStream(), wandb, commit=Commits())
