"""`mfext grow`: base + new domain -> grown model + forgetting report.

cli -> recipe -> here -> store (base, lineage) -> growth/plan (--dry-run stops here) -> growth/apply
    -> training/fit -> metrics -> Report -> store (commit) -> report
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mfext.commands.course import follow, free_folder, open_base
from mfext.commands.planned import planned
from mfext.commands.pretrain import open_run
from mfext.commands.scene import refuse_known, set_scene
from mfext.commands.setting import load_domains, prepare_machine
from mfext.config import Recipe
from mfext.errors import InputError
from mfext.growth.plan import plan_growth
from mfext.report.report import Report
from mfext.report.terminal import Console
from mfext.requests import DEFAULT_INVOCATION, Invocation
from mfext.store import is_run_folder

BASE_STAGE = 0


def run(recipe: Recipe, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """Grow the recipe's base by its domain, or train it by another method; returns the forgetting report."""
    console = Console.of(invocation)
    prepare_machine(invocation, recipe)
    resume = invocation.resume is not None
    out = Path(invocation.resume) if invocation.resume is not None else _out_folder(recipe)
    if not resume and is_run_folder(out):
        raise InputError("this run exists", out, f"continue it with --resume {out}, or choose another --out")
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


def _out_folder(recipe: Recipe) -> Path:
    """The folder named, or the first free runs/METHOD-DOMAIN[-2, -3, ...]."""
    if recipe.out is not None:
        return Path(recipe.out).expanduser()
    kind = recipe.method if recipe.method != "grow" or recipe.growth.mode == "gated" else recipe.growth.mode
    return free_folder(f"{kind}-{Path(recipe.domain).name.replace(':', '-')}")
