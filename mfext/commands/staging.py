"""One stage of training inside a run: fit with progress committed to the run, resumable to the bit."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from mfext.config import Recipe, TrainingConfig
from mfext.domains.stream import TokenStream
from mfext.report.terminal import Console
from mfext.store import Run
from mfext.training.exchange import FitResult, FitSettings, ProgressState
from mfext.training.fit import fit
from mfext.training.module import ContinualModuleFormer

SPENT = "spent_wall_s"


@dataclass(frozen=True)
class StageWork:
    """What a stage trains on and under which number. `carried` tensors and facts go into every
    progress commit beside what trains, so that a resumed process can rebuild the model first."""

    index: int
    name: str
    training: TrainingConfig
    carried: Mapping[str, Tensor]
    facts: Mapping[str, object]


def train_stage(
    module: ContinualModuleFormer, stream: TokenStream, work: StageWork, recipe: Recipe, run: Run, console: Console
) -> FitResult:
    """Fit one stage, continuing from the run's latest progress where there is any.

    `wall_s` of the result counts the training of every process that took part, as far as it was committed.
    """
    latest = run.latest_progress(work.index)
    resume, spent_s, begun = None, 0.0, time.monotonic()
    if latest is not None:
        console.say(f"{work.name}: continuing from step {latest.step} of {work.training.steps}")
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
    )
    result = fit(module, stream, settings, commit=commit, resume=resume, progress=console.progress())
    for note in result.notes:
        console.warn(note)
    if result.skipped_windows:
        console.warn(f"{work.name}: {result.skipped_windows} windows with non-finite losses or gradients were dropped")
    return replace(result, wall_s=result.wall_s + spent_s)


def peak_memory_bytes() -> int:
    """The most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
