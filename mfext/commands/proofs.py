"""What every run proves about frozen tensors: their SHA-256 after each stage, and what detaching gives back.

Compared as stored, stage by stage. Equality is both promises at once: nothing frozen moved, and taking the newest
generation off gives the model before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from mfext.commands.models import OpenedModel, model_tensors, open_model
from mfext.commands.preparing import Work, find_stage
from mfext.growth.plan import old_names, plan_expansion
from mfext.store import Run, read_json_object, tensor_hashes

PROOF = "frozen.json"


def prove_frozen(work: Work) -> None:
    """Add a stage's proof to the run's frozen.json. Methods that freeze nothing old prove nothing."""
    if work.recipe.method not in ("grow", "frozen", "expand"):
        entry: dict[str, object] = {"frozen_tensors": 0, "changed": [], "frozen_ok": None, "detach_equals_base": None}
    else:
        after = find_stage(work.opened, work.lesson.stage)
        assert after is not None, "a stage is committed before it is proven"
        entry = _compare(work, open_model(work.origin.folder), open_model(after.folder))
    path = work.opened.path / PROOF
    stages = read_json_object(path).get("stages") if path.is_file() else {}
    stages = {**(stages if isinstance(stages, dict) else {}), str(work.lesson.stage): entry}
    work.opened.write_report_file(PROOF, json.dumps({**_together(stages), "stages": stages}, indent=1))


def read_proof(opened: Run) -> dict[str, object]:
    """The run's frozen.json; empty where nothing was proven yet."""
    path = opened.path / PROOF
    return read_json_object(path) if path.is_file() else {}


def _compare(work: Work, before: OpenedModel, after: OpenedModel) -> dict[str, object]:
    old, new = tensor_hashes(model_tensors(before.model)), tensor_hashes(model_tensors(after.model))
    names = {name: name for name in old}
    if work.recipe.method == "expand":
        names = old_names(plan_expansion(before.model.config, work.recipe.expand.blocks))
    changed = sorted(name for name, value in old.items() if new.get(names[name]) != value)
    grown = work.recipe.method == "grow"
    same_shape = replace(after.model.config, generations=before.model.config.generations) == before.model.config
    return {
        "frozen_tensors": len(old),
        "changed": changed,
        "frozen_ok": not changed,
        "hashes": old,
        "detach_equals_base": not changed and same_shape if grown else None,
    }


def _together(stages: Mapping[str, object]) -> dict[str, object]:
    """All stages' proofs as one: every one must hold; None where no stage promises anything."""
    entries = [entry for entry in stages.values() if isinstance(entry, dict)]

    def all_of(key: str) -> bool | None:
        known = [entry[key] for entry in entries if entry.get(key) is not None]
        return all(known) if known else None

    last = entries[-1] if entries else {}
    changed = sorted({name for entry in entries for name in entry["changed"]})
    return {
        "frozen_tensors": last.get("frozen_tensors", 0),
        "changed": changed,
        "frozen_ok": all_of("frozen_ok"),
        "detach_equals_base": all_of("detach_equals_base"),
    }
