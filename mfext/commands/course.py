"""A run's stages in order, from the base to the report: the way `grow` and `continual` share.

base committed and measured -> for every lesson: learn, commit, prove, measure -> report
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mfext import __version__
from mfext.commands.learning import learn
from mfext.commands.measuring import Column, Moment, measure_stage, measure_within, prepare_columns, prepare_within
from mfext.commands.models import OpenedModel, model_tensors, open_model
from mfext.commands.outcome import run_report, verb_of, write_reports
from mfext.commands.preparing import Work, find_stage
from mfext.commands.pretrain import default_base
from mfext.commands.proofs import prove_frozen
from mfext.commands.scene import Scene
from mfext.commands.setting import record_of, records_of, tokenizer_reference
from mfext.config import Recipe
from mfext.conversion import to_mapping
from mfext.errors import InputError
from mfext.model.build import new_model
from mfext.recipe import config_hash
from mfext.report.report import Report
from mfext.report.terminal import Console
from mfext.requests import Invocation
from mfext.store import Run, Stage, is_run_folder

RANDOM_NAME, BASE_NAME = "random", "base"


def free_folder(stem: str) -> Path:
    """The first free runs/STEM[-2, -3, ...]."""
    stem = stem[:56]
    names = [stem, *(f"{stem}-{number}" for number in range(2, 10_000))]
    return next(Path("runs") / name for name in names if not (Path("runs") / name).exists())


def domain_stem(recipe: Recipe) -> str:
    """The recipe's domain as a part of a folder's name."""
    return Path(recipe.domain).name.replace(":", "-")


def run_folder(recipe: Recipe, invocation: Invocation, stem: str) -> Path:
    """The run to continue, else the folder the recipe names, or the first free runs/STEM. InputError where that is a
    run already."""
    if invocation.resume is not None:
        return Path(invocation.resume)
    out = free_folder(stem) if recipe.out is None else Path(recipe.out).expanduser()
    if is_run_folder(out):
        raise InputError("this run exists", out, f"continue it with --resume {out}, or choose another --out")
    return out


def open_base(recipe: Recipe, resumed: Path | None, stage: int, console: Console) -> OpenedModel:
    """The base named, the default one (built where missing), or the one an interrupted run holds as `stage`."""
    if resumed is not None and is_run_folder(resumed):
        held = find_stage(Run.open(resumed, read_only=True), stage)
        if held is not None:
            return open_model(held.folder)
    return open_model(recipe.base if recipe.base is not None else default_base(recipe, console))


def follow(recipe: Recipe, scene: Scene, base: OpenedModel, opened: Run, console: Console) -> Report:
    """Every stage that is missing, its measurements and proofs, and the report. What is committed stays."""
    columns = prepare_columns(scene.domains, scene.tokenizer, recipe.evaluation)
    within = prepare_within(scene.domains, scene.tokenizer, recipe.evaluation)
    if scene.start:
        _commit_random(recipe, base, opened)
    commit_base(scene, base, opened, recipe)
    for stage in opened.stages():
        if stage.index <= scene.start:
            measure_committed(stage, 0, (columns, within), recipe, opened, console)
    for lesson in scene.lessons:
        work = Work(recipe, scene, lesson, opened, console)
        done = learn(work, within)
        prove_frozen(work)
        measure_committed(done, lesson.training.steps, (columns, within), recipe, opened, console)
    report = run_report(opened, verb_of(opened), recipe)
    return write_reports(opened, report, recipe.seed, config_hash(recipe))


def _commit_random(recipe: Recipe, base: OpenedModel, opened: Run) -> None:
    """Stage 0 where the first domain pretrains the base: the weights that pretraining started from."""
    if find_stage(opened, 0) is not None:
        return
    torch.manual_seed(recipe.seed)
    tensors = model_tensors(new_model(base.model.config))
    lineage = [{"stage": 0, "name": RANDOM_NAME, "method": "random", "domains": []}]
    metadata = {
        "domains": [],
        "lineage": lineage,
        "tokenizer": tokenizer_reference(recipe.tokenizer),
        "seed": recipe.seed,
        "mfext_version": __version__,
    }
    opened.commit_stage(0, RANDOM_NAME, tensors, to_mapping(base.model.config), {}, metadata)


def commit_base(scene: Scene, base: OpenedModel, opened: Run, recipe: Recipe) -> None:
    """The base, untouched, as a stage of the run, so that the run stands on its own."""
    if find_stage(opened, scene.start) is not None:
        return
    records = records_of(base.metadata) or tuple(record_of(each) for each in scene.known)
    metadata = {
        **base.metadata,
        "domains": [each.to_json() for each in records],
        "base": str(base.folder),
        "sha256": base.sha256,
    }
    name = scene.known[0].name if scene.start else BASE_NAME
    opened.commit_stage(scene.start, name, model_tensors(base.model), to_mapping(base.model.config), {}, metadata)


def measure_committed(
    stage: Stage,
    step: int,
    columns: tuple[Sequence[Column], Sequence[Column]],
    recipe: Recipe,
    opened: Run,
    console: Console,
) -> None:
    """The ledger's rows of one committed stage: the matrix's columns, and those measured inside stages."""
    loaded = open_model(stage.folder)
    moment = Moment(stage.index, stage.name, step, loaded.sha256, recipe.seed)
    measure_stage(loaded.model, columns[0], moment, recipe, opened, console)
    measure_within(loaded.model, columns[1], moment, recipe, opened)
