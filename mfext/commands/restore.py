"""`mfext restore`: the experts or generations that a pruning removed, back in their places.

removed/ of a pruning run + the pruned model -> growth/pruning, removal -> the model before, in a folder of its own
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mfext.commands.models import model_tensors, open_model
from mfext.commands.pruning import PRUNED, REMOVED
from mfext.commands.setting import lineage_with, records_of
from mfext.config import ModelConfig
from mfext.conversion import to_mapping
from mfext.errors import DamagedError, InputError
from mfext.growth.growable import growable
from mfext.growth.plan import count_parameters
from mfext.growth.pruning import RemovedExperts, restore_experts
from mfext.growth.removal import RemovedGenerations, restore_generations
from mfext.model.moduleformer import ModuleFormer
from mfext.report.report import KeyValues, Report
from mfext.requests import DEFAULT_INVOCATION, Invocation, RestoreRequest
from mfext.store import Run, load_model_folder, model_hash, save_model


def run(request: RestoreRequest, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """Write the whole model to `request.out`. Raises InputError where the run pruned nothing or the model is another,
    DamagedError where what comes out is not what went in."""
    path = Path(request.run).expanduser()
    if not (path / REMOVED).is_dir():
        raise InputError("no removed experts", path, "name a run of mfext prune")
    _, tensors, manifest = load_model_folder(path / REMOVED)
    facts = manifest.metadata["removed"]
    assert isinstance(facts, dict)
    opened = open_model(request.model or _pruned_stage(path))
    model, before = growable(opened.model), count_parameters(opened.model.config).total
    whole_before = _put_back(model, tensors, facts)
    whole = model_tensors(model)
    grown = len(model.config.generations) > len(whole_before.generations)
    if not grown and model_hash(whole) != manifest.metadata["from_sha256"]:
        raise DamagedError(
            "the restored model is not the one that was pruned", path, "was the pruned model trained since?"
        )
    metadata = _metadata(opened.metadata, manifest.metadata, grown, model_hash(whole))
    save_model(
        whole, to_mapping(model.config), Path(request.out).expanduser(), {**metadata, "restored_from": str(path)}
    )
    after = count_parameters(model.config).total
    data = {
        "model": request.out,
        "restored": after - before,
        "params": after,
        "equals_unpruned": None if grown else True,
    }
    verdict = "bit for bit the model that was pruned" if not grown else "with the generations grown since"
    pairs = (("model", request.out), ("parameters", f"{before} -> {after}"))
    return Report("restore", data, "mfext restore", (f"restored: {verdict}",), (KeyValues("Model", pairs=pairs),))


def _put_back(model: ModuleFormer, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> ModelConfig:
    """Restore what left, experts or generations, in place; the config it came from."""
    if "cuts" in facts:
        experts = RemovedExperts.from_parts(tensors, facts)
        restore_experts(model, experts)
        return experts.before
    generations = RemovedGenerations.from_parts(tensors, facts)
    restore_generations(model, generations)
    return generations.before


def _metadata(now: Mapping[str, object], left: Mapping[str, object], grown: bool, sha256: str) -> dict[str, object]:
    """What is known of the model: as before the pruning, and where it was grown since, of that and the way back too."""
    before = {key: left[key] for key in ("domains", "lineage") if key in left}
    if not grown:
        return {**now, **before}
    domains = {each.name: each.to_json() for each in (*records_of(before), *records_of(now))}
    entry = {"name": "restored", "method": "restore", "domains": [], "sha256": sha256}
    return {**now, "domains": list(domains.values()), "lineage": lineage_with(now, entry)}


def _pruned_stage(path: Path) -> Path:
    """The stage of a run that pruning left, not what was healed since."""
    stages = [stage for stage in Run.open(path, read_only=True).stages() if stage.name == PRUNED]
    if not stages:
        raise InputError("nothing in this run is pruned yet", path, f"continue it with mfext prune --resume {path}")
    return stages[-1].folder
