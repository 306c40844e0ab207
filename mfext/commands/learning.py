"""One stage of a run: prepare what the method needs, train, commit. The same for `grow` and `continual`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from mfext import __version__
from mfext.commands.growing import Texts, review_model, teach_gate
from mfext.commands.measuring import Column, Moment, measure_within
from mfext.commands.models import model_tensors, open_model
from mfext.commands.preparing import Prepared, Work, find_stage, prepare, text_of
from mfext.commands.setting import lineage_with, record_of, records_of, tokenizer_reference
from mfext.commands.staging import StageWork, peak_memory_bytes, train_stage
from mfext.conversion import to_mapping
from mfext.growth.growable import growable
from mfext.model.language_model import LanguageModel
from mfext.store import Stage, model_hash
from mfext.training.exchange import FitResult
from mfext.training.methods.lora import merge_adapters
from mfext.training.module import ContinualModuleFormer


def learn(work: Work, within: Sequence[Column]) -> Stage:
    """Train and commit one stage, unless it is there. `within` is measured at steps inside it.

    Raises what training raises; progress committed before is continued by the next call.
    """
    lesson = work.lesson
    done = find_stage(work.opened, lesson.stage)
    if done is None:
        done = _copy(work) if work.recipe.method == "frozen" else _train(work, within)
    work.opened.clear_progress(lesson.stage)
    return done


def _copy(work: Work) -> Stage:
    """The stage before, once more: what a model that never learns knows."""
    model = open_model(work.origin.folder).model
    facts: dict[str, object] = {"trainable": 0, "tokens": 0, "wall_s": 0.0, "tokens_per_s": 0.0}
    return _commit(work, model, {}, facts)


def _train(work: Work, within: Sequence[Column]) -> Stage:
    recipe, lesson, begun = work.recipe, work.lesson, time.monotonic()
    prepared = prepare(work)
    module = ContinualModuleFormer(prepared.model, lesson.training, prepared.method)
    trainable = sum(each.numel() for each in prepared.model.parameters() if each.requires_grad)
    grown = prepared.grown
    evaluate = _Evaluator(work, within) if within else None
    stage_work = StageWork(lesson.stage, lesson.name, lesson.training, grown.tensors, grown.facts, evaluate)
    result = train_stage(module, prepared.stream, stage_work, recipe, work.opened, work.console)
    spent = {"stage_wall_s": time.monotonic() - begun}
    if recipe.method == "lora":
        merge_adapters(prepared.model)
    facts = {**_cost(result), **spent, "trainable": trainable, **grown.facts, **_finish(work, prepared)}
    return _commit(work, prepared.model, prepared.kept, facts)


def _finish(work: Work, prepared: Prepared) -> dict[str, object]:
    """The last parts of a growth: its gate is taught, and, where asked for, who reaches the new experts reviewed."""
    recipe, console = work.recipe, work.console
    if recipe.method != "grow":
        return {}
    model, stream = growable(prepared.model), text_of(work, work.lesson.new)
    facts = teach_gate(model.eval(), recipe, stream, prepared.kept, console)
    if not recipe.growth.review.steps:
        return facts
    console.say(f"{work.lesson.name}: reviewing routers and gate")
    before = growable(open_model(work.origin.folder).model)
    return {**facts, **review_model(model, before, recipe, stream, prepared.kept, console)}


class _Evaluator:
    """Measures a model inside the stage that trains it."""

    def __init__(self, work: Work, within: Sequence[Column]) -> None:
        self.work, self.within = work, within

    def __call__(self, model: LanguageModel, step: int) -> None:
        work = self.work
        moment = Moment(work.lesson.stage, work.lesson.name, step, model_hash(model_tensors(model)), work.recipe.seed)
        measure_within(model, self.within, moment, work.recipe, work.opened)


def _cost(result: FitResult) -> dict[str, object]:
    return {
        "frozen_during_training": result.frozen_ok,
        "tokens": result.tokens,
        "wall_s": result.wall_s,
        "tokens_per_s": result.tokens / max(result.wall_s, 1e-9),
        "skipped_windows": result.skipped_windows,
        "peak_bytes": peak_memory_bytes(),
    }


def _commit(work: Work, model: LanguageModel, kept: Texts, facts: Mapping[str, object]) -> Stage:
    lesson, tensors = work.lesson, model_tensors(model)
    extra = {"reservoir": {name: list(texts) for name, texts in kept.items()}} if kept else {}
    metadata = _metadata(work, {"method": work.recipe.method, **facts}, tensors)
    return work.opened.commit_stage(lesson.stage, lesson.name, tensors, to_mapping(model.config), extra, metadata)


def _metadata(work: Work, facts: Mapping[str, object], tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Domains known and lineage, continued from the stage this one started from."""
    before, lesson = work.origin.manifest.metadata, work.lesson
    known = records_of(before) or tuple(record_of(each) for each in work.scene.known)
    records = {each.name: each for each in (*known, *map(record_of, lesson.new))}
    entry = {
        "name": lesson.name,
        "domains": [domain.name for domain in lesson.new],
        "sha256": model_hash(tensors),
        **facts,
    }
    return {
        "domains": [each.to_json() for each in records.values()],
        "lineage": lineage_with(before, entry),
        "tokenizer": tokenizer_reference(work.recipe.tokenizer),
        "seed": work.recipe.seed,
        "mfext_version": __version__,
        "facts": dict(facts),
    }
