"""One process's share of a fit, on a lightning.Trainer that only trains."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from mfext.config_machine import TrainerConfig
from mfext.errors import InputError, InterruptedRun
from mfext.training.exchange import FitResult, FitSettings, Place, ProgressState, Stream
from mfext.training.frozen import frozen_hashes, one_hash
from mfext.training.loop import Hooks, StageLoop
from mfext.training.module import ContinualModuleFormer, Span
from mfext.training.quiet import quiet_lightning
from mfext.training.random_state import seeded
from mfext.training.resume import identity, load_progress, machine, resume_differences, threads
from mfext.training.signals import hold_signals


def train_here(
    module: ContinualModuleFormer,
    stream: Stream,
    settings: FitSettings,
    hooks: Hooks,
    resume: ProgressState | None,
    place: Place,
) -> FitResult:
    """Train in this process, which is `place.rank` of `place.world`."""
    begun = time.monotonic()
    module.settings = settings.training
    module.choose(module.method)
    module.forget_optimizer()
    frozen = frozen_hashes(module.model)
    frozen_before = one_hash(frozen)
    if resume is not None:
        load_progress(module, resume, frozen_before)
    start, total = resume.step if resume else 0, settings.training.steps

    def describe() -> Mapping[str, object]:
        return identity(settings) | machine(place.world) | {"frozen_sha256": frozen_before}

    notes = resume_differences(settings, resume)
    with seeded(settings.seed, settings.stage, place.rank), threads(settings.trainer):
        loop = StageLoop(settings, hooks, place, resume, describe)
        try:
            if start < settings.end:
                _run(module, stream, settings, loop, Span(start, total))
            loop.stop_if_asked(module)
            if settings.end < total and loop.committed_step < loop.step:
                loop.commit(module)
        finally:
            loop.close()
    if loop.stopped_by:
        hooks.stop.answered = True
        name = "SIGINT" if loop.stopped_by == 2 else "SIGTERM"
        raise InterruptedRun(
            loop.stopped_by,
            f"stopped by {name} after step {loop.step} of {total}",
            settings.label,
            "progress is committed; continue with --resume",
        )
    frozen_after = one_hash(frozen_hashes(module.model))
    return FitResult(
        steps=settings.end,
        tokens=settings.end * settings.training.batch_size * settings.training.sequence_length,
        wall_s=time.monotonic() - begun,
        loss_nats_per_token=loop.last_loss,
        skipped_windows=module.guard.skipped_windows,
        frozen_ok=frozen_after == frozen_before,
        frozen_sha256=frozen_after,
        optimizer=module.current_optimizer_state(),
        notes=notes,
    )


def _run(module: ContinualModuleFormer, stream: Stream, settings: FitSettings, loop: StageLoop, span: Span) -> None:
    place = loop.place
    accumulation = accumulation_of(settings, place.world)
    dataset = stream.dataset(span.start, settings.end, accumulation, place.rank, place.world)
    was_training = module.training
    module.train()
    module.span = span
    checkpointing = settings.training.gradient_checkpointing
    if checkpointing:
        module.model.set_gradient_checkpointing(True)
    try:
        with quiet_lightning():
            trainer = _trainer(settings, loop, settings.end - span.start, accumulation)
            loader: DataLoader[Any] = DataLoader(
                dataset, batch_size=None, shuffle=False, num_workers=0, generator=torch.Generator()
            )
            hold_signals(True)
            trainer.fit(module, loader)
    finally:
        hold_signals(False)
        module.span = None
        module.watch_routing = False
        module.train(was_training)
        if checkpointing:
            module.model.set_gradient_checkpointing(False)


def _trainer(settings: FitSettings, loop: StageLoop, steps: int, accumulation: int) -> lightning.Trainer:
    """A Trainer that only trains: no checkpoints, loggers, bars or summaries of its own."""
    several = loop.place.world > 1
    return lightning.Trainer(
        accelerator=_accelerator(settings.trainer),
        devices=loop.place.world,
        strategy=DDPStrategy(find_unused_parameters=True) if several else "auto",
        plugins=[LightningEnvironment()] if several else None,
        max_steps=steps,
        accumulate_grad_batches=accumulation,
        gradient_clip_val=settings.training.gradient_clip,
        precision="bf16-mixed" if settings.training.precision == "bf16" else "32-true",
        use_distributed_sampler=False,
        callbacks=[loop],
        barebones=True,
    )


def _accelerator(trainer: TrainerConfig) -> str:
    if trainer.accelerator != "auto":
        return trainer.accelerator
    return "gpu" if torch.cuda.is_available() else "cpu"


def accumulation_of(settings: FitSettings, world: int) -> int:
    """Micro-batches per optimizer step on each of `world` processes.

    The processes share out the micro-batches of one process where their number divides, so that
    the numbers are the same; else each micro-batch is split. InputError where rows do not divide.
    """
    accumulation, batch = settings.training.accumulation, settings.training.batch_size
    if accumulation % world == 0:
        return accumulation // world
    if batch % (accumulation * world):
        raise InputError(
            f"training.batch_size={batch} with {accumulation} micro-batches",
            f"trainer.devices={world}",
            "batch_size must be a multiple of devices x micro-batches",
        )
    return accumulation
