from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mfext.config_machine import TrainerConfig
from mfext.errors import InputError, InterruptedRun
from mfext.training.fit import fit
from tests.training.test_fit import Steps, rows
from tests.training.tiny_training import (
    Commits,
    TinyStream,
    same_bits,
    tiny_module,
    tiny_settings,
    tiny_training,
    weights,
)

torch.set_num_threads(1)
TWO = TrainerConfig(strategy="ddp", accelerator="cpu", devices=2, threads=1)


@pytest.mark.slow
def test_two_processes_train_what_one_trains_with_accumulation_two_and_resume_exactly_and_stop_on_a_signal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    training = tiny_training(60, micro_batch_size=2, log_every_steps=1, commit_every_steps=3)
    one, two, again = tiny_module(True), tiny_module(True), tiny_module(True)
    before = weights(two)
    fit(one, TinyStream(), tiny_settings(tmp_path / "one", training), commit=Commits())
    commits, progress = Commits(), Steps()
    settings = tiny_settings(tmp_path / "two", training, trainer=TWO)
    result = fit(two, TinyStream(), settings, commit=commits, progress=progress)

    assert result.frozen_ok and result.steps == 60
    losses = [[float(row["loss_nats_per_token"]) for row in rows(tmp_path / name)] for name in ("one", "two")]
    assert len(losses[1]) == 60 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    moved = {name for name, value in weights(two).items() if not torch.equal(value, before[name])}
    assert moved == two.method.trainable(two.model)
    assert progress.seen == [(60, 0, "training"), *range(1, 61), "closed"]
    draws = {name for name in commits.states[0].tensors if name.startswith("random/")}
    assert [state.step for state in commits.states[:2]] == [3, 6] and draws == {"random/0/cpu", "random/1/cpu"}

    later = Commits()
    with pytest.raises(InterruptedRun, match="stopped by SIGTERM after step") as caught:
        stopping = Steps(kill_after=6)
        fit(again, TinyStream(), settings, commit=later, resume=commits.states[0], progress=stopping)
    assert caught.value.exit_code == 143
    assert later.states[0].step == 6 and same_bits(later.states[0].tensors, commits.states[1].tensors)
    assert [int(row["step"]) for row in rows(tmp_path / "two")] == list(range(1, later.states[-1].step + 1))
    assert capfd.readouterr() == ("", "")


def test_rows_that_do_not_divide_among_the_processes_are_refused(tmp_path: Path) -> None:
    three = TrainerConfig(strategy="ddp", accelerator="cpu", devices=3, threads=1)
    with pytest.raises(InputError, match=r"training\.batch_size=4 with 1 micro-batches: trainer\.devices=3"):
        fit(tiny_module(), TinyStream(), tiny_settings(tmp_path, trainer=three), commit=Commits())
