"""Whether progress fits the run that wants to continue from it, and putting it back."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mfext.config_machine import TrainerConfig
from mfext.errors import DamagedError, InputError
from mfext.training.exchange import FitSettings, ProgressState
from mfext.training.module import ContinualModuleFormer

FORMAT = 1


def check_resume(settings: FitSettings, resume: ProgressState | None) -> None:
    """InputError where the progress was made by another stage, seed or budget."""
    if resume is None:
        return
    for key, value in identity(settings).items():
        if resume.state.get(key) != value:
            raise InputError(
                f"progress has {key}={resume.state.get(key)}",
                settings.label,
                f"this run has {key}={value}; resume with the recipe the run was started with",
            )
    if not 0 <= resume.step <= settings.training.steps:
        raise InputError(
            f"progress is at step {resume.step}", settings.label, f"this stage has {settings.training.steps}"
        )


def resume_differences(settings: FitSettings, resume: ProgressState | None) -> tuple[str, ...]:
    """At most one line: what differs from the machine the progress was made on, so bits may too."""
    if resume is None:
        return ()
    with threads(settings.trainer):
        here = machine(num_processes(settings.trainer))
    different = [
        f"{key} {resume.state.get(key)} -> {value}" for key, value in here.items() if resume.state.get(key) != value
    ]
    return (
        (f"resumed under other conditions ({', '.join(different)}): the result may differ in its last bits",)
        if different
        else ()
    )


def identity(settings: FitSettings) -> dict[str, object]:
    """What must be equal for progress to be a step on the way to the same result."""
    training = settings.training
    return {
        "progress_format": FORMAT,
        "seed": settings.seed,
        "stage": settings.stage,
        "total_steps": training.steps,
        "batch_size": training.batch_size,
        "sequence_length": training.sequence_length,
        "micro_batches": training.accumulation,
        "precision": training.precision,
    }


def machine(world: int) -> dict[str, object]:
    """What must be equal for the result to be equal to the last bit."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "processes": world,
        "threads": torch.get_num_threads(),
        "device": device,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def load_progress(module: ContinualModuleFormer, resume: ProgressState, frozen_sha256: str) -> None:
    """Weights, optimizer state and counters of a commit, each checked against the model."""
    if resume.state.get("frozen_sha256") != frozen_sha256:
        raise DamagedError(
            "the frozen tensors are not those the progress was made with",
            "",
            "the base model has changed since; start the run anew",
        )
    stored = {
        name.removeprefix("weight/"): value for name, value in resume.tensors.items() if name.startswith("weight/")
    }
    trainable = {name: parameter for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    odd = sorted(stored.keys() ^ trainable.keys()) or [
        name for name, value in stored.items() if value.shape != trainable[name].shape
    ]
    if odd:
        raise DamagedError(f"progress does not fit the model: {odd[0]}", "", "it was made with another model or method")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(stored[name])
    module.optimizer_state = {
        name.removeprefix("optimizer/"): value
        for name, value in resume.tensors.items()
        if name.startswith("optimizer/")
    }
    bad, skipped = resume.state["bad_in_a_row"], resume.state["skipped_windows"]
    assert isinstance(bad, int) and isinstance(skipped, int)
    module.guard.bad_in_a_row, module.guard.skipped_windows = bad, skipped


def num_processes(trainer: TrainerConfig) -> int:
    """How many processes train."""
    return trainer.devices if trainer.strategy == "ddp" else 1


@contextmanager
def threads(trainer: TrainerConfig) -> Iterator[None]:
    """Torch's threads per process: as asked; else a fair share of the cores where several processes train."""
    before, world = torch.get_num_threads(), num_processes(trainer)
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    elif world > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    try:
        yield
    finally:
        torch.set_num_threads(before)
