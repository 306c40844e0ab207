"""`mfext continual`: a stream of domains, one stage after another, by any method -> forgetting report.

cli -> recipe -> here -> base (named, or pretrained on the first domain)
    -> course: learn, commit, prove, measure -> report
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mfext.commands.course import follow, open_base, run_folder
from mfext.commands.planned import planned
from mfext.commands.pretrain import open_run
from mfext.commands.scene import lesson_names, set_scene
from mfext.commands.setting import load_domains, prepare_machine
from mfext.config import ModelConfig, Recipe
from mfext.domains.domain import Domain
from mfext.errors import InputError
from mfext.report.report import Report
from mfext.report.terminal import Console
from mfext.requests import DEFAULT_INVOCATION, Invocation


def run(recipe: Recipe, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """Learn the recipe's domains one after another; returns the forgetting report.

    With a base (`--base`) every domain is a stage and row 0 of the matrix is that base. Without one the first domain
    pretrains it: row 0 is then the random weights, row 1 the base. Raises InputError where fewer domains than that are
    given, or the method cannot work on this model.
    """
    console = Console.of(invocation)
    prepare_machine(invocation, recipe)
    start = 0 if recipe.base is not None else 1
    if len(recipe.domains) <= start:
        rule = "at least one with --base" if start == 0 else "at least two: the first pretrains the base"
        raise InputError(f"{len(recipe.domains)} domains", "domains", f"give {rule}")
    resume, out = invocation.resume is not None, run_folder(recipe, invocation, f"continual-{recipe.method}")
    if start:
        recipe = replace(recipe, default_base=replace(recipe.default_base, domains=recipe.domains[:1]))
    stream = _in_order(recipe.domains[start:], load_domains(recipe.domains, console), recipe.domains)
    if invocation.dry_run and start:
        return _planned(recipe, recipe.default_base.model, stream)
    base = open_base(recipe, out if resume else None, start, console)
    if invocation.dry_run:
        return _planned(recipe, base.model.config, stream)
    scene = set_scene(recipe, base, stream, start, console)
    with open_run(out, replace(recipe, out=str(out)), "continual", resume=resume) as opened:
        return follow(recipe, scene, base, opened, console)


def _in_order(references: Sequence[str], loaded: Sequence[Domain], every: Sequence[str]) -> tuple[Domain, ...]:
    """The domain of each reference; one that comes again is loaded once."""
    domains = dict(zip(dict.fromkeys(every), loaded, strict=True))
    return tuple(domains[reference] for reference in references)


def _planned(recipe: Recipe, config: ModelConfig, stream: Sequence[Domain]) -> Report:
    taken = [generation.name for generation in config.generations]
    return planned("continual", recipe, config, lesson_names([domain.name for domain in stream], taken))
