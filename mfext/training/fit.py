"""The one door to training a stage: Lightning underneath, exact resume and signals on top."""

from __future__ import annotations

from mfext.training.exchange import Commit, FitResult, FitSettings, NoProgress, Place, Progress, ProgressState, Stream
from mfext.training.loop import Hooks
from mfext.training.module import ContinualModuleFormer
from mfext.training.processes import train_in_processes
from mfext.training.resume import check_resume, num_processes
from mfext.training.run import train_here
from mfext.training.signals import stop_flag


def fit(
    module: ContinualModuleFormer,
    stream: Stream,
    settings: FitSettings,
    *,
    commit: Commit,
    resume: ProgressState | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Train one stage of `settings.training.steps` optimizer steps, in place.

    `commit` stores progress durably every `commit_every_s` seconds or `commit_every_steps`, and
    on SIGTERM or SIGINT; `resume` is what it stored last. Interrupted and resumed equals
    uninterrupted, bit for bit, on the same machine kind and thread count. With
    `trainer.strategy=ddp` several processes train; `commit` and `progress` are still called here,
    in the caller's process. Moments start fresh: a stage's optimizer state is its own.

    Raises InterruptedRun after a signal (progress is committed), DivergedError after too many
    non-finite steps, InputError where settings and progress or processes do not fit together.
    """
    check_resume(settings, resume)
    progress = progress or NoProgress()
    progress.start(settings.training.steps, resume.step if resume else 0, settings.label)
    try:
        if num_processes(settings.trainer) > 1:
            return train_in_processes(module, stream, settings, commit, progress, resume)
        with stop_flag() as stop:
            return train_here(module, stream, settings, Hooks(commit, progress, stop), resume, Place())
    finally:
        progress.close()
