"""`mfext grow`: base + new domain -> grown model + forgetting report.

cli -> recipe -> here -> store (base, lineage) -> growth/plan (--dry-run stops here) -> growth/apply
    -> training/fit -> metrics -> Report -> store (commit) -> report
"""

from __future__ import annotations

from dataclasses import replace

from mfext.commands.course import domain_stem, follow, open_base, run_folder
from mfext.commands.planned import planned
from mfext.commands.pretrain import open_run
from mfext.commands.scene import refuse_known, set_scene
from mfext.commands.setting import load_domains, prepare_machine
from mfext.config import Recipe
from mfext.growth.plan import plan_growth
from mfext.report.report import Report
from mfext.report.terminal import Console
from mfext.requests import DEFAULT_INVOCATION, Invocation

BASE_STAGE = 0


def run(recipe: Recipe, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """Grow the recipe's base by its domain, or train it by another method; returns the forgetting report."""
    console = Console.of(invocation)
    prepare_machine(invocation, recipe)
    resume, out = invocation.resume is not None, run_folder(recipe, invocation, _stem(recipe))
    (new,) = load_domains([recipe.domain], console)
    if invocation.dry_run and recipe.base is None:
        return planned("grow", recipe, recipe.default_base.model, [new.name])
    base = open_base(recipe, out if resume else None, BASE_STAGE, console)
    refuse_known(new, base)
    if invocation.dry_run:
        return planned("grow", recipe, base.model.config, [new.name])
    scene = set_scene(recipe, base, (new,), BASE_STAGE, console)
    if recipe.method == "grow":
        plan_growth(base.model.config, recipe.growth, scene.lessons[0].name)
    with open_run(out, replace(recipe, out=str(out)), "grow", resume=resume) as opened:
        return follow(recipe, scene, base, opened, console)


def _stem(recipe: Recipe) -> str:
    """METHOD-DOMAIN, what the run's folder is called where nobody names it."""
    kind = recipe.method if recipe.method != "grow" or recipe.growth.mode == "gated" else recipe.growth.mode
    return f"{kind}-{domain_stem(recipe)}"
