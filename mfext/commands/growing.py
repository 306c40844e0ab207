"""Grow a model for a domain: plan applied, identity checked, gate taught; and the same from a commit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from mfext.config import GenerationConfig, Recipe
from mfext.conversion import from_mapping, to_mapping
from mfext.domains.domain import Domain, reservoir
from mfext.domains.stream import TokenStream
from mfext.domains.tokenizer import load_tokenizer
from mfext.errors import DamagedError, InputError
from mfext.growth.apply import apply_plan, set_gate_thresholds
from mfext.growth.gate_training import GateCalibration, train_gate
from mfext.growth.growing import WATCHED, grow
from mfext.growth.plan import Plan
from mfext.growth.probes import Windows, document_starts, own_samples, self_probes
from mfext.growth.review import review
from mfext.model.moduleformer import ModuleFormer
from mfext.report.terminal import Console

CARRIED = "generation/"
Texts = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Grown:
    """What a growth leaves beside the trained weights: its gate's tensors, and facts for the lineage."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, object]


def grow_model(
    model: ModuleFormer, plan: Plan, recipe: Recipe, stream: TokenStream, kept: Texts, console: Console
) -> Grown:
    """Apply `plan`, check that it changed nothing, and train the new generation's gate if it learns before. In place.

    `kept` is the reservoir of old text the gate may see; empty where probes come from the model itself.
    """
    settings, gated = recipe.growth.gate, recipe.growth.mode == "gated"
    probes = None
    if settings.probe != "none" and not (gated and settings.learns == "after"):
        probes = _probes(model, recipe, kept, console)
    new = new_windows(stream, settings.new_sequences)
    if gated and probes is not None:
        console.say("growing; training the domain gate")
    growth = grow(model, plan, recipe.growth, new, probes, recipe.seed)
    facts: dict[str, object] = {"identity_at_growth": growth.identity_at_growth}
    if growth.gate is not None:
        facts["gate"] = asdict(growth.gate)
        _say_gate(growth.gate, console)
    elif gated and settings.probe == "none":
        console.warn("gate.probe=none: the gate is always open, so old domains are not protected")
    facts["generation"] = to_mapping(model.config.generations[-1])
    return Grown(_gate_tensors(model), facts)


def teach_gate(
    model: ModuleFormer, recipe: Recipe, stream: TokenStream, kept: Texts, console: Console
) -> dict[str, object]:
    """Teach the gate of a generation whose experts have learned, with samples of both sides. In place.

    The facts for the lineage; none where the gate learned before, there is none, or it is to stay open.
    """
    settings = recipe.growth.gate
    if recipe.growth.mode != "gated" or settings.learns == "before" or settings.probe == "none":
        return {}
    probes = _probes(model, recipe, kept, console, len(model.generations) - 1)
    console.say("taking samples of what the new experts learned; training the domain gate")
    own = own_samples(model, settings.probe_sequences, settings.probe_length, recipe.seed)
    new = new_windows(stream, settings.new_sequences)
    gate = train_gate(model, new, probes, settings, recipe.seed, own)
    _say_gate(gate, console)
    return {"gate": asdict(gate), "generation": to_mapping(model.config.generations[-1])}


def _say_gate(gate: GateCalibration, console: Console) -> None:
    shares = f"{gate.false_open:.1%} of held-out probes, {gate.open_set_open:.1%} of open-set text"
    console.say(f"gate: opens on {shares}; not fully open on {gate.false_close:.1%} of new text")


def review_model(
    model: ModuleFormer, before: ModuleFormer, recipe: Recipe, stream: TokenStream, kept: Texts, console: Console
) -> dict[str, object]:
    """Let the newest generation's routers and gate learn once more, against probes of the model `before`. In place.

    The facts for the lineage. Raises InputError where `gate.probe` is none: there is nothing to hold on to.
    """
    settings = recipe.growth.gate
    if settings.probe == "none":
        raise InputError("a review needs probes of old text", "growth.review", "use gate.probe=self, or review.steps=0")
    new = new_windows(stream, settings.new_sequences)
    probes = _probes(before, recipe, kept, console)
    reviewed = review(model, new, probes, recipe.growth, recipe.seed)
    facts: dict[str, object] = {"review": asdict(reviewed), "generation": to_mapping(model.config.generations[-1])}
    return facts if reviewed.gate is None else {**facts, "gate": asdict(reviewed.gate)}


def restore_growth(
    model: ModuleFormer, plan: Plan, tensors: Mapping[str, Tensor], state: Mapping[str, object]
) -> Grown:
    """The growth an interrupted stage began with, from its last commit. In place."""
    if "generation" not in state:
        raise DamagedError("the run's progress does not say what was grown", "", "start the run anew")
    generation = from_mapping(GenerationConfig, state["generation"], "generation")
    apply_plan(model, plan)
    if generation.gate is not None:
        set_gate_thresholds(model, generation.gate.opens_at, generation.gate.full_at)
    carried = {name.removeprefix(CARRIED): tensor for name, tensor in tensors.items() if name.startswith(CARRIED)}
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in carried.items():
            if name not in own or own[name].shape != tensor.shape:
                raise DamagedError(f"the run's progress does not fit the model: {name}", "", "start the run anew")
            own[name].copy_(tensor)
    facts = {key: state[key] for key in ("identity_at_growth", "gate", "generation") if key in state}
    return Grown(_gate_tensors(model), facts)


def _gate_tensors(model: ModuleFormer) -> dict[str, Tensor]:
    prefix = f"generations.{len(model.generations) - 1}.gate."
    return {
        CARRIED + name: tensor.detach().cpu() for name, tensor in model.named_parameters() if name.startswith(prefix)
    }


def new_windows(stream: TokenStream, count: int) -> Windows:
    """Windows of the new domain, the first of the stage's own order."""
    batches: list[Mapping[str, Tensor]] = []
    taken = 0
    while taken < count:
        batches.append(stream.batch(len(batches)))
        taken += batches[-1]["input_ids"].shape[0]
    return Windows(
        torch.cat([each["input_ids"] for each in batches])[:count],
        torch.cat([each["document_starts"] for each in batches])[:count],
    )


def reservoir_of(recipe: Recipe, domains: Iterable[Domain]) -> dict[str, tuple[str, ...]]:
    """The sample of old text `gate.probe` asks for, per domain; empty where it asks for none."""
    settings = recipe.growth.gate
    if recipe.method != "grow" or settings.probe not in ("reservoir", "both"):
        return {}
    return {
        each.name: reservoir(each.train, settings.reservoir_share, settings.reservoir_bytes, recipe.seed)
        for each in domains
    }


def _probes(
    model: ModuleFormer, recipe: Recipe, kept: Texts, console: Console, generations: int | None = None
) -> Windows:
    """Old text for the gate: samples of the model (its first `generations`), the reservoir, or both."""
    settings = recipe.growth.gate
    source = "the reservoir" if settings.probe == "reservoir" else "the model itself"
    console.say(f"taking probes of what the model knows from {source}")
    parts = []
    if settings.probe in ("self", "both"):
        many = recipe.growth.mode == "gated" or recipe.growth.review.steps > 0
        count = settings.probe_sequences if many else WATCHED
        parts.append(self_probes(model, count, settings.probe_length, recipe.seed, generations))
    if kept:
        parts.append(_reservoir_windows(model, recipe, kept))
    if not parts:
        raise InputError("gate.probe=reservoir, but the base names no old domain", "growth.gate", "use gate.probe=self")
    ids = torch.cat([each.input_ids for each in parts])
    return Windows(ids, torch.cat([each.document_starts for each in parts]))


def _reservoir_windows(model: ModuleFormer, recipe: Recipe, kept: Texts) -> Windows:
    tokenizer, length, bos = load_tokenizer(recipe.tokenizer), recipe.growth.gate.probe_length, model.config.bos_id
    flat = [token for texts in kept.values() for text in texts for token in (bos, *tokenizer.encode(text))]
    count = len(flat) // length
    ids = torch.tensor(flat[: count * length]).view(count, length)
    return Windows(ids, document_starts(ids, bos))
