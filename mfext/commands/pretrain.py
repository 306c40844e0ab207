"""`mfext pretrain`: random weights -> base model on one domain or a mix.

recipe -> domains -> model/build (random weights) -> training/fit -> metrics -> store (commit) -> report
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mfext import __version__
from mfext.commands.measuring import Column, Moment, measure_stage, measure_within, prepare_columns, prepare_within
from mfext.commands.models import model_tensors, open_model
from mfext.commands.outcome import run_report, verb_of, write_reports
from mfext.commands.setting import (
    check_domains,
    load_domains,
    pack_train,
    prepare_machine,
    record_of,
    tokenizer_reference,
)
from mfext.commands.staging import StageWork, peak_memory_bytes, train_stage
from mfext.config import Recipe
from mfext.config_machine import TrainerConfig
from mfext.conversion import to_mapping
from mfext.domains.domain import Domain
from mfext.domains.stream import TokenStream
from mfext.domains.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from mfext.errors import InputError, LockedError
from mfext.growth.plan import count_parameters
from mfext.model.build import new_model
from mfext.model.language_model import LanguageModel
from mfext.paths import cache_folder
from mfext.recipe import config_hash, recipe_from_mapping, recipe_to_mapping
from mfext.report.planning import plan_report
from mfext.report.report import Report
from mfext.report.terminal import Console
from mfext.requests import DEFAULT_INVOCATION, Invocation
from mfext.store import Run, is_run_folder, model_hash
from mfext.training.methods.full import Full
from mfext.training.module import ContinualModuleFormer

STAGE, STAGE_NAME = 0, "base"
BASE_POLL_S = 0.2


def run(recipe: Recipe, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """Pretrain the base a recipe's `default_base` describes; returns its report."""
    console = Console.of(invocation)
    prepare_machine(invocation, recipe)
    tokenizer = load_tokenizer(recipe.tokenizer)
    domains = load_domains(recipe.default_base.domains, console)
    if invocation.dry_run:
        return planned(recipe, domains, tokenizer)
    out = Path(
        invocation.resume or recipe.out or Path("runs") / f"pretrain-{'-'.join(each.name for each in domains)[:40]}"
    )
    with open_run(out, recipe, "pretrain", resume=invocation.resume is not None) as opened:
        within = prepare_within(domains, tokenizer, recipe.evaluation)
        pretrain(recipe, domains, tokenizer, opened, console, within)
        _measure(recipe, (prepare_columns(domains, tokenizer, recipe.evaluation), within), opened, console)
        return write_reports(opened, run_report(opened, "pretrain", recipe), recipe.seed, config_hash(recipe))


def planned(recipe: Recipe, domains: Sequence[Domain], tokenizer: Tokenizer) -> Report:
    """What `run` would do, without doing it."""
    config, training = recipe.default_base.model, recipe.default_base.training
    check_tokenizer(tokenizer, config.vocab_size)
    counts = count_parameters(config)
    bytes_ = {each.name: sum(len(text.encode()) for text in each.train) for each in domains}
    data: dict[str, object] = {
        "dry_run": True,
        "params": {
            "total": counts.total,
            "trainable": counts.total,
            "active_per_token": counts.active_per_token,
        },
        "steps": training.steps,
        "tokens": training.steps * training.batch_size * training.sequence_length,
        "train_bytes": bytes_,
        "disk_bytes": counts.total * 4 * 4,
        "memory_bytes": counts.total * 4 * 4,
    }
    return plan_report("pretrain", data)


def open_run(path: Path, recipe: Recipe, verb: str, *, resume: bool) -> Run:
    """A new run folder, or the interrupted one to continue. Raises InputError where they are confused."""
    path = path.expanduser()
    if not resume:
        if is_run_folder(path):
            raise InputError("this run exists", path, f"continue it with --resume {path}, or choose another --out")
        return Run.create(path, recipe_to_mapping(recipe), {"mfext_version": __version__, "verb": verb})
    begun = Run.open(path, read_only=True)
    if verb_of(begun) != verb:
        raise InputError("another verb began this run", path, f"continue it with mfext {verb_of(begun)} --resume")
    if _numbers(recipe_from_mapping(begun.recipe)) != _numbers(recipe):
        raise InputError("another recipe began this run", path, "continue it with its own: mfext.recipe.recipe_of_run")
    return Run.open(path)


def _numbers(recipe: Recipe) -> str:
    """What decides a recipe's numbers: not the number of threads or processes, nor where it is written."""
    return config_hash(replace(recipe, trainer=TrainerConfig()))


def pretrain(
    recipe: Recipe,
    domains: Sequence[Domain],
    tokenizer: Tokenizer,
    opened: Run,
    console: Console,
    within: Sequence[Column] = (),
) -> None:
    """Train and commit stage 0 of `opened`, unless it is there; `within` is measured at steps inside it."""
    base = recipe.default_base
    check_tokenizer(tokenizer, base.model.vocab_size)
    check_domains(domains)
    if not opened.stages():
        _train(recipe, domains, tokenizer, opened, console, within)
    opened.clear_progress(STAGE)


def _measure(recipe: Recipe, columns: tuple[Sequence[Column], Sequence[Column]], opened: Run, console: Console) -> None:
    """Row 0 of the ledger: the columns of the matrix, and the last of those measured inside the stage."""
    loaded = open_model(opened.stages()[0].folder)
    steps = recipe.default_base.training.steps
    moment = Moment(STAGE, STAGE_NAME, steps, loaded.sha256, recipe.seed)
    measure_stage(loaded.model, columns[0], moment, recipe, opened, console)
    measure_within(loaded.model, columns[1], moment, recipe, opened)


def _train(
    recipe: Recipe,
    domains: Sequence[Domain],
    tokenizer: Tokenizer,
    opened: Run,
    console: Console,
    within: Sequence[Column],
) -> None:
    base = recipe.default_base

    def evaluate(model: LanguageModel, step: int) -> None:
        moment = Moment(STAGE, STAGE_NAME, step, model_hash(model_tensors(model)), recipe.seed)
        measure_within(model, within, moment, recipe, opened)

    torch.manual_seed(recipe.seed)
    model = new_model(base.model)
    stream = TokenStream(
        [pack_train(each, tokenizer) for each in domains],
        sequence_length=base.training.sequence_length,
        batch_size=base.training.batch_size,
        seed=recipe.seed,
        stage=STAGE,
    )
    module = ContinualModuleFormer(model, base.training, Full())
    work = StageWork(STAGE, STAGE_NAME, base.training, {}, {}, evaluate if within else None)
    result = train_stage(module, stream, work, recipe, opened, console)
    tensors = model_tensors(model)
    records = [record_of(each).to_json() for each in domains]
    lineage = {
        "stage": STAGE,
        "name": STAGE_NAME,
        "method": "pretrain",
        "domains": [each["name"] for each in records],
        "tokens": result.tokens,
        "trainable": sum(tensor.numel() for tensor in tensors.values()),
        "wall_s": result.wall_s,
        "tokens_per_s": result.tokens / max(result.wall_s, 1e-9),
        "peak_bytes": peak_memory_bytes(),
        "sha256": model_hash(tensors),
    }
    metadata = {
        "domains": records,
        "lineage": [lineage],
        "tokenizer": tokenizer_reference(recipe.tokenizer),
        "seed": recipe.seed,
        "mfext_version": __version__,
    }
    opened.commit_stage(STAGE, STAGE_NAME, tensors, to_mapping(model.config), {}, metadata)


def default_base(recipe: Recipe, console: Console) -> Path:
    """The run folder of the recipe's default base: reused where it exists, pretrained (once) where not."""
    tokenizer = load_tokenizer(recipe.tokenizer)
    domains = load_domains(recipe.default_base.domains, console)
    identity = {
        "base": to_mapping(recipe.default_base),
        "seed": recipe.seed,
        "tokenizer": tokenizer.fingerprint,
        "data": {each.name: dict(each.provenance) for each in domains},
        "torch": torch.__version__,
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / "bases" / f"{'-'.join(each.name for each in domains)[:40]}-{name}"
    if is_run_folder(folder) and Run.open(folder, read_only=True).stages():
        console.say(f"base: reusing {folder}")
        return folder
    with _hold_base(folder, recipe, console) as opened:
        if not opened.stages():
            console.say(f"base: pretraining on {', '.join(each.name for each in domains)} (kept for the next run)")
        pretrain(recipe, domains, tokenizer, opened, console)
    return folder


def _hold_base(folder: Path, recipe: Recipe, console: Console) -> Run:
    """The default base's run, new or begun, once no other process has it: a sweep's trials share their base."""
    said = False
    while True:
        begun = is_run_folder(folder)
        try:
            return Run.open(folder) if begun else open_run(folder, recipe, "pretrain", resume=False)
        except LockedError as error:
            if not said:
                console.say(f"base: waiting for it: {error}")
            said = True
            time.sleep(BASE_POLL_S)
        except InputError:
            if begun or not is_run_folder(folder):
                raise
            # Another process began it just now: go on from there.
