"""`mfext grow`: base + new domain -> grown model + forgetting report.

cli -> recipe -> here -> store (base, lineage) -> growth/plan (--dry-run stops here) -> growth/apply
    -> training/fit -> metrics -> Report -> store (commit) -> report
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from mfext import __version__
from mfext.commands.growing import Grown, grow_model, reservoir_of, restore_growth
from mfext.commands.measuring import Moment, measure_stage, prepare_columns
from mfext.commands.models import OpenedModel, model_tensors, open_model
from mfext.commands.outcome import growth_plan, run_report, write_reports
from mfext.commands.pretrain import default_base, open_run
from mfext.commands.setting import (
    DomainRecord,
    check_domains,
    load_domains,
    pack_train,
    prepare_machine,
    record_of,
    records_of,
    tokenizer_of,
    tokenizer_reference,
)
from mfext.commands.staging import StageWork, peak_memory_bytes, train_stage
from mfext.config import Recipe
from mfext.conversion import to_mapping
from mfext.domains.domain import Domain
from mfext.domains.stream import TokenStream
from mfext.domains.tokenizer import Tokenizer
from mfext.errors import InputError
from mfext.growth.plan import plan_growth
from mfext.recipe import config_hash
from mfext.report.report import Report
from mfext.report.terminal import Console
from mfext.requests import DEFAULT_INVOCATION, Invocation
from mfext.store import Run, Stage, is_run_folder, model_hash, tensor_hashes
from mfext.training.methods.method import method_named
from mfext.training.module import ContinualModuleFormer

BASE_STAGE, BASE_NAME = 0, "base"
NEW_STAGE = 1


@dataclass(frozen=True)
class Scene:
    """The data of one growth: tokenizer, the domain to learn, the ones already known, the watched ones."""

    tokenizer: Tokenizer
    new: Domain
    old: tuple[Domain, ...]
    bystanders: tuple[Domain, ...]

    @property
    def domains(self) -> tuple[Domain, ...]:
        return (*self.old, self.new, *self.bystanders)


def run(recipe: Recipe, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """Grow the recipe's base by its domain; returns the forgetting report."""
    console = Console.of(invocation)
    prepare_machine(invocation, recipe)
    if invocation.resume is not None:
        out, resume = Path(invocation.resume), True
    else:
        out, resume = _out_folder(recipe), False
        if is_run_folder(out):
            raise InputError("this run exists", out, f"continue it with --resume {out}, or choose another --out")
    (new,) = load_domains([recipe.domain], console)
    if invocation.dry_run and recipe.base is None:
        return growth_plan(recipe, plan_growth(recipe.default_base.model, recipe.growth, new.name))
    base = _open_base(recipe, out, resume, console)
    if invocation.dry_run:
        return growth_plan(recipe, plan_growth(base.model.config, recipe.growth, new.name))
    scene = _set_scene(recipe, base, new, console)
    if recipe.method == "grow":
        plan_growth(base.model.config, recipe.growth, new.name)
    with open_run(out, replace(recipe, out=str(out)), "grow", resume=resume) as opened:
        base_stage = _commit_base(opened, base, scene)
        columns = prepare_columns(scene.domains, scene.tokenizer, recipe.evaluation)
        moment = Moment(BASE_STAGE, BASE_NAME, 0, base.sha256, recipe.seed)
        measure_stage(base.model, columns, moment, recipe, opened, console)
        grown_stage = _stage(opened, NEW_STAGE) or _learn(recipe, base, scene, opened, console)
        opened.clear_progress(NEW_STAGE)
        after = open_model(grown_stage.folder)
        _prove_frozen(recipe, base_stage, grown_stage, opened)
        moment = Moment(NEW_STAGE, grown_stage.name, recipe.training.steps, after.sha256, recipe.seed)
        measure_stage(after.model, columns, moment, recipe, opened, console)
        return write_reports(opened, run_report(opened, "grow", recipe), recipe.seed, config_hash(recipe))


def _out_folder(recipe: Recipe) -> Path:
    """The folder named, or the first free runs/METHOD-DOMAIN[-2, -3, ...]."""
    if recipe.out is not None:
        return Path(recipe.out).expanduser()
    kind = recipe.method if recipe.method != "grow" or recipe.growth.mode == "gated" else recipe.growth.mode
    stem = f"{kind}-{Path(recipe.domain).name.replace(':', '-')}"[:56]
    names = [stem, *(f"{stem}-{number}" for number in range(2, 10_000))]
    return next(Path("runs") / name for name in names if not (Path("runs") / name).exists())


def _open_base(recipe: Recipe, out: Path, resume: bool, console: Console) -> OpenedModel:
    """The base named, the default one (built where missing), or the one an interrupted run holds."""
    if resume and is_run_folder(out):
        stage = _stage(Run.open(out, read_only=True), BASE_STAGE)
        if stage is not None:
            return open_model(stage.folder)
    return open_model(recipe.base if recipe.base is not None else default_base(recipe, console))


def _set_scene(recipe: Recipe, base: OpenedModel, new: Domain, console: Console) -> Scene:
    references = recipe.old_domains or tuple(record.reference for record in records_of(base.metadata))
    if not references:
        console.warn(
            "the base's folder names no domains: forgetting is measured only on those given with old_domains=[...]"
        )
    old = load_domains(references, console)
    if new.name in {each.name for each in old}:
        raise InputError(f"the base already knows '{new.name}'", "domain", "choose a domain it has not learned")
    bystanders = load_domains([each for each in recipe.bystanders if each not in references], console)
    tokenizer = tokenizer_of(base, recipe.tokenizer)
    taken = {new.name, *(each.name for each in old)}
    scene = Scene(tokenizer, new, old, tuple(each for each in bystanders if each.name not in taken))
    check_domains(scene.domains)
    return scene


def _stage(opened: Run, index: int) -> Stage | None:
    return next((stage for stage in opened.stages() if stage.index == index), None)


def _commit_base(opened: Run, base: OpenedModel, scene: Scene) -> Stage:
    """Stage 0 of the run: the untouched base, so that the run stands on its own."""
    stage = _stage(opened, BASE_STAGE)
    if stage is not None:
        return stage
    records = records_of(base.metadata) or tuple(record_of(each) for each in scene.old)
    metadata = {
        **base.metadata,
        "domains": [each.to_json() for each in records],
        "base": str(base.folder),
        "sha256": base.sha256,
    }
    return opened.commit_stage(
        BASE_STAGE, BASE_NAME, model_tensors(base.model), to_mapping(base.model.config), {}, metadata
    )


def _learn(recipe: Recipe, base: OpenedModel, scene: Scene, opened: Run, console: Console) -> Stage:
    """Grow (or not, as the method says), train, and commit stage 1."""
    begun = time.monotonic()
    stream = TokenStream(
        [pack_train(scene.new, scene.tokenizer)],
        sequence_length=recipe.training.sequence_length,
        batch_size=recipe.training.batch_size,
        seed=recipe.seed,
        stage=NEW_STAGE,
    )
    model = open_model(_required(opened, BASE_STAGE).folder).model
    grown, kept = Grown({}, {}), reservoir_of(recipe, scene.old)
    if recipe.method == "grow":
        plan = plan_growth(model.config, recipe.growth, scene.new.name)
        latest = opened.latest_progress(NEW_STAGE)
        if latest is None:
            grown = grow_model(model, plan, recipe, stream, kept, console)
        else:
            grown = restore_growth(model, plan, latest.tensors, latest.state)
    module = ContinualModuleFormer(model, recipe.training, method_named(recipe.method))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    work = StageWork(NEW_STAGE, scene.new.name, recipe.training, grown.tensors, grown.facts)
    result = train_stage(module, stream, work, recipe, opened, console)
    tensors = model_tensors(model)
    extra = {"reservoir": {name: list(texts) for name, texts in kept.items()}} if kept else {}
    facts = {
        "method": recipe.method,
        "trainable": trainable,
        "frozen_during_training": result.frozen_ok,
        "tokens": result.tokens,
        "wall_s": result.wall_s,
        "tokens_per_s": result.tokens / max(result.wall_s, 1e-9),
        "skipped_windows": result.skipped_windows,
        "peak_bytes": peak_memory_bytes(),
        "stage_wall_s": time.monotonic() - begun,
        **grown.facts,
    }
    metadata = _metadata(base, scene, facts, tensors, recipe)
    return opened.commit_stage(NEW_STAGE, scene.new.name, tensors, to_mapping(model.config), extra, metadata)


def _required(opened: Run, index: int) -> Stage:
    stage = _stage(opened, index)
    assert stage is not None, f"stage {index} was committed before"
    return stage


def _metadata(
    base: OpenedModel, scene: Scene, facts: Mapping[str, object], tensors: Mapping[str, Tensor], recipe: Recipe
) -> dict[str, object]:
    known = records_of(base.metadata) or tuple(record_of(each) for each in scene.old)
    records: tuple[DomainRecord, ...] = (*known, record_of(scene.new))
    earlier = base.metadata.get("lineage", [])
    lineage = [*(earlier if isinstance(earlier, list) else [])]
    entry = {
        "stage": len(lineage),
        "name": scene.new.name,
        "domains": [scene.new.name],
        "sha256": model_hash(tensors),
        **facts,
    }
    return {
        "domains": [each.to_json() for each in records],
        "lineage": [*lineage, entry],
        "tokenizer": tokenizer_reference(recipe.tokenizer),
        "seed": recipe.seed,
        "mfext_version": __version__,
        "facts": dict(facts),
    }


def _prove_frozen(recipe: Recipe, before: Stage, after: Stage, opened: Run) -> None:
    """Compare SHA-256 of every tensor of the base with the same tensor in the grown model, as stored.

    Equality is both promises at once: nothing frozen moved, and detaching the generation gives
    the base back. Written beside the ledger as frozen.json.
    """
    old, new = open_model(before.folder), open_model(after.folder)
    old_hashes, new_hashes = tensor_hashes(model_tensors(old.model)), tensor_hashes(model_tensors(new.model))
    changed = sorted(name for name, value in old_hashes.items() if new_hashes.get(name) != value)
    grown = recipe.method == "grow"
    proof = {
        "frozen_tensors": len(old_hashes) if grown else 0,
        "changed": changed if grown else [],
        "frozen_ok": not changed if grown else None,
        "hashes": old_hashes if grown else {},
        "detach_equals_base": not changed
        and replace(new.model.config, generations=old.model.config.generations) == old.model.config
        if grown
        else None,
    }
    opened.write_report_file("frozen.json", json.dumps(proof, indent=1))
