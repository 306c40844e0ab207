"""What mfext does between Lightning's steps: log, commit, stop on a signal, show progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed
from lightning import Callback, Trainer
from torch import Tensor

from mfext.training.exchange import Commit, FitSettings, Place, Progress, ProgressState
from mfext.training.metrics_log import MetricsFile, extra_loggers
from mfext.training.module import ContinualModuleFormer
from mfext.training.random_state import load_random_state, random_state
from mfext.training.signals import StopFlag, hold_signals


@dataclass(frozen=True)
class Hooks:
    """The outside world of a fit: where progress is stored and shown, and what may stop it."""

    commit: Commit
    progress: Progress
    stop: StopFlag


class StageLoop(Callback):
    """Lightning's callback for one stage, from `start_step` to `total_steps`."""

    def __init__(
        self,
        settings: FitSettings,
        hooks: Hooks,
        place: Place,
        resume: ProgressState | None,
        describe: Callable[[], Mapping[str, object]],
    ) -> None:
        training = settings.training
        self.settings, self.hooks, self.place, self.describe = settings, hooks, place, describe
        self.step = self.committed_step = resume.step if resume else 0
        self.total_steps = training.steps
        self.tokens_per_step = training.batch_size * training.sequence_length
        state = resume.state if resume else {}
        self.loss_sum = _number(state.get("loss_sum", 0.0))
        self.loss_count = int(_number(state.get("loss_count", 0)))
        tensors = resume.tensors if resume else {}
        self.random = {name: value for name, value in tensors.items() if name.startswith("random/")}
        self.last_loss: float | None = None
        self.stopped_by: int | None = None
        self.file = MetricsFile(settings.log_folder, self.step) if place.rank == 0 else None
        self.loggers = extra_loggers(settings.logger, settings.log_folder, self.step) if place.rank == 0 else []
        self.commit_clock = self.log_clock = time.monotonic()
        self.logged_step = self.step

    # -- Lightning's hooks -------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: object) -> None:
        self.hooks.stop.install()  # Lightning has just put its own handlers in our place.
        hold_signals(False)
        self.commit_clock = self.log_clock = time.monotonic()
        load_random_state(self.random, self.place.rank)

    def on_train_batch_start(self, trainer: Trainer, pl_module: object, batch: object, batch_idx: int) -> None:
        assert isinstance(pl_module, ContinualModuleFormer)
        pl_module.watch_routing = self.file is not None and self._is_logged(self.step + 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: object, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, ContinualModuleFormer)
        if pl_module.step == self.step:
            return  # a micro-batch that only accumulates
        self.step = pl_module.step
        self._note(pl_module)
        stop, due = self._agree()
        if stop or due:
            self.commit(pl_module)
        if stop:
            self.stopped_by = stop
            trainer.should_stop = True

    def stop_if_asked(self, module: ContinualModuleFormer) -> None:
        """After the last step: a signal that came too late for the loop still commits and stops."""
        if self.stopped_by is None:
            self.stopped_by = self._agree()[0] or None
            if self.stopped_by and self.committed_step < self.step:
                self.commit(module)

    # -- committing --------------------------------------------------------------------------

    def commit(self, module: ContinualModuleFormer) -> None:
        """Store progress after the current step; every process takes part, the first one stores."""
        draws = self._all_random_states()
        if self.place.rank == 0:
            weights = {
                f"weight/{name}": parameter.detach()
                for name, parameter in module.model.named_parameters()
                if parameter.requires_grad
            }
            optimizer = {f"optimizer/{name}": value for name, value in module.current_optimizer_state().items()}
            state = {
                **self.describe(),
                "step": self.step,
                "loss_sum": self.loss_sum,
                "loss_count": self.loss_count,
                "bad_in_a_row": module.guard.bad_in_a_row,
                "skipped_windows": module.guard.skipped_windows,
            }
            self.hooks.commit(self.step, weights | optimizer | draws, state)
        self.committed_step, self.commit_clock = self.step, time.monotonic()

    def _all_random_states(self) -> dict[str, Tensor]:
        own = random_state(self.place.rank)
        if self.place.world == 1:
            return own
        everyone: list[dict[str, Tensor]] = [{} for _ in range(self.place.world)]
        torch.distributed.all_gather_object(everyone, own)
        return {name: value for one in everyone for name, value in one.items()}

    def _agree(self) -> tuple[int, bool]:
        """(signal that stops, or 0; whether a commit is due), the same on every process."""
        training = self.settings.training
        every = training.commit_every_steps
        due = time.monotonic() - self.commit_clock >= training.commit_every_s or (
            every is not None and self.step % every == 0
        )
        stop, due = self.hooks.stop.received or 0, due and self.step < self.total_steps
        if self.place.world > 1:
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            votes = torch.tensor([stop, int(due and self.place.rank == 0)], device=device)
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
            stop, due = int(votes[0]), bool(votes[1])
        return stop, due

    # -- logging -----------------------------------------------------------------------------

    def _is_logged(self, step: int) -> bool:
        return step % self.settings.training.log_every_steps == 0 or step == self.total_steps

    def _note(self, module: ContinualModuleFormer) -> None:
        record = module.record
        assert record is not None
        if not record.skipped:
            self.loss_sum += record.loss_nats_per_token
            self.loss_count += 1
        numbers: dict[str, float] = {}
        if self._is_logged(self.step):
            numbers = self._row(module)
            self.loss_sum, self.loss_count = 0.0, 0
        if self.file is not None:
            if numbers:
                self.file.write(numbers)
                for logger in self.loggers:
                    logger.log_metrics(numbers, self.step)
            self.hooks.progress.update(self.step, numbers)

    def _row(self, module: ContinualModuleFormer) -> dict[str, float]:
        record = module.record
        assert record is not None
        now = time.monotonic()
        numbers = {
            "step": float(self.step),
            "learning_rate": module.learning_rate,
            "skipped_windows": float(module.guard.skipped_windows),
        }
        if self.loss_count:
            self.last_loss = self.loss_sum / self.loss_count
            numbers |= {"loss_nats_per_token": self.last_loss, "bits_per_token": self.last_loss / math.log(2)}
        if not record.skipped:
            numbers |= {"routing_loss": record.routing_loss, "gradient_norm": record.gradient_norm}
            if record.penalty is not None:
                numbers["penalty"] = record.penalty
        numbers["tokens_per_s"] = (
            (self.step - self.logged_step) * self.tokens_per_step / max(now - self.log_clock, 1e-9)
        )
        self.log_clock, self.logged_step = now, self.step
        return numbers | module.routing_numbers

    def close(self) -> None:
        """Finish the extra loggers."""
        for logger in self.loggers:
            logger.finalize("success")


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return value
