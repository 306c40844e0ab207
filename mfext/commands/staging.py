"""One stage of training inside a run: fit with progress committed to the run, resumable to the bit."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from mfext.config import Recipe, TrainingConfig
from mfext.model.language_model import LanguageModel
from mfext.report.terminal import Console
from mfext.store import Run
from mfext.training.exchange import FitResult, FitSettings, ProgressState, Stream
from mfext.training.fit import fit
from mfext.training.module import ContinualModuleFormer

SPENT = "spent_wall_s"


@dataclass(frozen=True)
class StageWork:
    """What a stage trains on and under which number.

    `carried` tensors and facts go into every progress commit beside what trains, so that a resumed process can
    rebuild the model first. `evaluate` measures the model after a number of steps, between two fits; after a kill it is
    called again for a step it may have measured already, with the same weights.
    """

    index: int
    name: str
    training: TrainingConfig
    carried: Mapping[str, Tensor]
    facts: Mapping[str, object]
    evaluate: Callable[[LanguageModel, int], None] | None = None


def train_stage(
    module: ContinualModuleFormer, stream: Stream, work: StageWork, recipe: Recipe, run: Run, console: Console
) -> FitResult:
    """Fit one stage, continuing from the run's latest progress where there is any.

    With `evaluation.within_every_steps` the stage is fitted in pieces, each ended by a commit and `work.evaluate`.
    `wall_s` of the result counts the training of every process that took part, as far as it was committed.
    """
    every, total = recipe.evaluation.within_every_steps, work.training.steps
    latest = run.latest_progress(work.index)
    done, frozen_ok = 0, True
    if latest is not None:
        done = latest.step
        console.say(f"{work.name}: continuing from step {done} of {total}")
    if work.evaluate is not None and every is not None:
        for border in range(every, total, every):
            if border >= done:
                piece = _fit_until(border, module, stream, work, (recipe, run, console))
                frozen_ok &= piece.frozen_ok
                with _as_in_use(module.model):
                    work.evaluate(module.model, border)
    result = _fit_until(None, module, stream, work, (recipe, run, console))
    if result.skipped_windows:
        console.warn(f"{work.name}: {result.skipped_windows} windows with non-finite losses or gradients were dropped")
    return replace(result, frozen_ok=result.frozen_ok and frozen_ok)


def _fit_until(
    until: int | None,
    module: ContinualModuleFormer,
    stream: Stream,
    work: StageWork,
    where: tuple[Recipe, Run, Console],
) -> FitResult:
    """One piece of the stage, from the run's latest progress to step `until` (None: the stage's end)."""
    recipe, run, console = where
    latest = run.latest_progress(work.index)
    resume, spent_s, begun = None, 0.0, time.monotonic()
    if latest is not None:
        resume = ProgressState(latest.step, latest.tensors, latest.state)
        before = latest.state.get(SPENT)
        spent_s = before if isinstance(before, float) else 0.0

    def commit(step: int, tensors: Mapping[str, Tensor], state: Mapping[str, object], /) -> None:
        spent = {SPENT: spent_s + time.monotonic() - begun}
        run.commit_progress(work.index, step, {**tensors, **work.carried}, {**state, **work.facts, **spent})

    settings = FitSettings(
        training=work.training,
        log_folder=run.log_folder / f"{work.index:03d}-{work.name}",
        seed=recipe.seed,
        stage=work.index,
        trainer=recipe.trainer,
        logger=recipe.logger,
        label=work.name,
        until=until,
    )
    result = fit(module, stream, settings, commit=commit, resume=resume, progress=console.progress())
    for note in result.notes:
        console.warn(note)
    return replace(result, wall_s=result.wall_s + spent_s)


@contextmanager
def _as_in_use(model: LanguageModel) -> Iterator[None]:
    """The model in eval mode, and back as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def peak_memory_bytes() -> int:
    """The most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
