"""`mfext prune`: a model and a domain -> what its experts are worth there, what keeping fewer costs, the smaller model.

base committed -> fine-tuned on the domain, where a method is named -> curve -> plan -> apply, prove, commit
    -> healed, where asked for -> report
The plan removes the experts the domain needs least, or whole generations by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from mfext.commands.course import commit_base, domain_stem, measure_committed, open_base, run_folder
from mfext.commands.dropping import commit_dropped, draw_drops
from mfext.commands.footprint import footprint
from mfext.commands.learning import learn
from mfext.commands.measuring import Column, prepare_columns, prepare_within
from mfext.commands.models import OpenedModel, open_model
from mfext.commands.outcome import write_reports
from mfext.commands.preparing import Work, find_stage
from mfext.commands.pretrain import open_run
from mfext.commands.proofs import prove_frozen
from mfext.commands.prune_outcome import FOOTPRINT, prune_report
from mfext.commands.pruning import HEALED, PRUNED, Cutting, choose_cuts, commit_pruned, draw_curve, plan_by_lot
from mfext.commands.scene import Lesson, Scene, set_scene
from mfext.commands.setting import load_domains, prepare_machine
from mfext.config import ModelConfig, Recipe
from mfext.domains.domain import Domain
from mfext.growth.plan import Plan, count_parameters
from mfext.growth.removal import plan_removal, removed_names
from mfext.recipe import config_hash
from mfext.report.planning import plan_report
from mfext.report.report import Report
from mfext.report.terminal import Console
from mfext.requests import DEFAULT_INVOCATION, Invocation
from mfext.store import Run, Stage

BYTES = 4


def run(recipe: Recipe, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """Prune the recipe's base for its domain; returns the report with the curve.

    Method frozen prunes the model as it is; any other fine-tunes it on the domain first. Raises InputError where the
    model is dense, or the share asked for is below what tokens choose.
    """
    console = Console.of(invocation)
    prepare_machine(invocation, recipe)
    resume, out = invocation.resume is not None, run_folder(recipe, invocation, f"prune-{domain_stem(recipe)}")
    (target,) = load_domains([recipe.domain], console)
    if invocation.dry_run and recipe.base is None:
        return planned(recipe, recipe.default_base.model)
    base = open_base(recipe, out if resume else None, 0, console)
    plan_before(base.model.config, recipe)
    if invocation.dry_run:
        return planned(recipe, base.model.config)
    scene = set_scene(recipe, base, (target,), 0, console)
    with open_run(out, replace(recipe, out=str(out)), "prune", resume=resume) as opened:
        return specialise(recipe, scene, base, (target, opened, console))


def specialise(recipe: Recipe, scene: Scene, base: OpenedModel, where: tuple[Domain, Run, Console]) -> Report:
    """Every stage that is missing, the curve, and the report. What is committed or measured stays."""
    target, opened, console = where
    columns = prepare_columns(scene.domains, scene.tokenizer, recipe.evaluation)
    within = prepare_within(scene.domains, scene.tokenizer, recipe.evaluation)
    commit_base(scene, base, opened, recipe)
    last = _stage(opened, 0)
    measure_committed(last, 0, (columns, within), recipe, opened, console)
    work = Work(recipe, scene, scene.lessons[0], opened, console)
    if recipe.method != "frozen":
        last = learn(work, within)
        prove_frozen(work)
        measure_committed(last, recipe.training.steps, (columns, within), recipe, opened, console)
    cutting, full = Cutting(work, last, target, columns), open_model(last.folder)
    pruned = _shrink(cutting, full, last.index + 1)
    measure_committed(pruned, 0, (columns, within), recipe, opened, console)
    if recipe.pruning.heal_tokens:
        _heal(work, pruned, target, (columns, within))
    if not (opened.path / FOOTPRINT).is_file():
        sizes = {"before": footprint(last.folder), "after": footprint(pruned.folder)}
        opened.write_report_file(FOOTPRINT, json.dumps(sizes))
    return write_reports(opened, prune_report(opened, recipe), recipe.seed, config_hash(recipe))


def _shrink(cutting: Cutting, full: OpenedModel, index: int) -> Stage:
    """The curve, and the smaller model committed, as far as they are missing."""
    dropping, scores = bool(cutting.recipe.pruning.drop_generations), None
    if dropping:
        draw_drops(cutting, full)
    else:
        scores = draw_curve(cutting, full)
    pruned = find_stage(cutting.opened, index)
    if pruned is not None:
        return pruned
    if dropping:
        return commit_dropped(cutting, full, index)
    return commit_pruned(cutting, full, choose_cuts(cutting, full, scores), index)


def _heal(work: Work, pruned: Stage, target: Domain, columns: tuple[Sequence[Column], Sequence[Column]]) -> None:
    """A short fine-tuning of what is left, on the same domain."""
    recipe = replace(work.recipe, method="full")
    training = replace(recipe.training, tokens=recipe.pruning.heal_tokens)
    healing = replace(work, recipe=recipe, lesson=Lesson(pruned.index + 1, HEALED, (target,), training))
    healed = learn(healing, columns[1])
    measure_committed(healed, training.steps, columns, recipe, work.opened, work.console)


def plan_before(config: ModelConfig, recipe: Recipe) -> Plan:
    """What would leave, as far as it is known before anything is measured. Raises what the run would."""
    settings = recipe.pruning
    if settings.drop_generations:
        return plan_removal(config, settings.drop_generations)
    return plan_by_lot(config, settings, recipe.seed)


def planned(recipe: Recipe, config: ModelConfig) -> Report:
    """The dry run: how many experts and parameters would leave, and what the run would train."""
    plan = plan_before(config, recipe)
    names = removed_names(plan)
    chosen = f"nothing: {', '.join(names)} leave whole" if names else f"nothing: {recipe.pruning.criterion} decides"
    before, after = count_parameters(config), count_parameters(plan.after)
    tuned = recipe.training.steps if recipe.method != "frozen" else 0
    step = recipe.training.batch_size * recipe.training.sequence_length
    steps = tuned + recipe.pruning.heal_tokens // step
    data: dict[str, object] = {
        "dry_run": True,
        "method": recipe.method,
        "stages": [{"name": PRUNED, "trains": chosen, "trainable": 0}],
        "plan": {"operations": plan.operations_json()},
        "params": {
            "total": after.total,
            "removed": before.total - after.total,
            "trainable": before.total if tuned else after.total if steps else 0,
            "active_per_token": after.active_per_token,
        },
        "steps": steps,
        "tokens": steps * step,
        "memory_bytes": BYTES * (before.total + after.total + (3 * before.total if tuned else 0)),
        "disk_bytes": BYTES * 3 * before.total,
    }
    return plan_report("prune", data)


def _stage(opened: Run, index: int) -> Stage:
    found = find_stage(opened, index)
    assert found is not None, "it was committed just now"
    return found
