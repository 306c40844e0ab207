"""What an operation on a model would do: immutable data that can be printed, saved and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from mfext.config import ExpertInitialisation, GenerationConfig, GrowthConfig, ModelConfig
from mfext.config_gate import DomainGateConfig
from mfext.errors import InputError
from mfext.growth.growable import require_growable
from mfext.model.build import new_model
from mfext.model.domain_gate import DomainGate
from mfext.model.shapes import shapes_alone


@dataclass(frozen=True)
class FreezeExperts:
    """Everything the model has so far stops training."""

    generations: tuple[str, ...]


@dataclass(frozen=True)
class AddExperts:
    """One new generation: experts, router, gate and gated changes, in tensors of its own."""

    generation: GenerationConfig
    initial: ExpertInitialisation
    new_router_bias: float


@dataclass(frozen=True)
class RemoveExperts:
    """A generation leaves. Where it is the newest, the model is what it was before it, bit for bit."""

    generation: str


@dataclass(frozen=True)
class AddBlocks:
    """New layers, each a copy of the one before it that starts as the identity; `layers` are their numbers afterwards.

    Source: block expansion of LLaMA Pro, Wu et al. 2024 (arXiv 2401.02415).
    """

    layers: tuple[int, ...]


@dataclass(frozen=True)
class BankCut:
    """Which of the `of` experts of one bank stay: numbers in the bank, rising. `generation` 0 is the base."""

    layer: int
    kind: str
    generation: int
    kept: tuple[int, ...]
    of: int

    @property
    def key(self) -> tuple[int, str, int]:
        """(layer, kind, generation)."""
        return self.layer, self.kind, self.generation

    @property
    def removed(self) -> tuple[int, ...]:
        """The numbers of the experts that leave."""
        return tuple(expert for expert in range(self.of) if expert not in self.kept)


@dataclass(frozen=True)
class PruneExperts:
    """Experts leave their banks; those that stay are renumbered in their order. No cut, no change."""

    cuts: tuple[BankCut, ...]


Operation = FreezeExperts | AddExperts | RemoveExperts | AddBlocks | PruneExperts


@dataclass(frozen=True)
class Plan:
    """Operations in order, checked against the model they start from, and the config they end at."""

    before: ModelConfig
    operations: tuple[Operation, ...]
    after: ModelConfig

    def to_json(self) -> dict[str, object]:
        """Plain data: operations by name, parameter counts by part."""
        return {"operations": self.operations_json(), "parameters": self.parameters()}

    def operations_json(self) -> list[dict[str, object]]:
        """The operations as plain data, in order."""
        return [{"operation": type(each).__name__, **asdict(each)} for each in self.operations]

    def parameters(self) -> dict[str, int]:
        """Parameter counts: `before`, `added`, `after`, and active per token before and after."""
        before, after = count_parameters(self.before), count_parameters(self.after)
        return {
            "before": before.total,
            "after": after.total,
            "added": after.total - before.total,
            "active_before": before.active_per_token,
            "active_after": after.active_per_token,
        }


def plan_growth(config: ModelConfig, growth: GrowthConfig, name: str) -> Plan:
    """Plan one growth named `name` (the domain's name, as a rule).

    Modes gated and side go on top of any others. Raises InputError where the name is taken, a
    layer number does not exist, compete and preserve would meet in one softmax, or the model is dense.
    """
    require_growable(config)
    taken = [generation.name for generation in config.generations]
    if name in taken:
        known = ", ".join(taken)
        raise InputError(
            f"generation '{name}' exists", "growth", f"the model already has {known}; give the new one another name"
        )
    joined = sorted({each.mode for each in config.generations if each.joins_softmax} - {growth.mode})
    if growth.mode in ("compete", "preserve") and joined:
        raise InputError(
            f"mode {growth.mode} on a model that has a generation of mode {joined[0]}",
            "growth.mode",
            f"both route in the base's softmax, normalised differently; grow with {joined[0]}, gated or side",
        )
    layers = _chosen_layers(config, growth)

    def per_layer(count: int) -> tuple[int, ...]:
        return tuple(count if layer in layers else 0 for layer in range(config.num_layers))

    gated = growth.mode == "gated"
    generation = GenerationConfig(
        name=name,
        mode=growth.mode,
        attention_experts=per_layer(growth.attention_experts),
        feedforward_experts=per_layer(growth.feedforward_experts),
        attention_experts_per_token=growth.attention_experts_per_token,
        feedforward_experts_per_token=growth.feedforward_experts_per_token,
        d_feedforward=config.d_feedforward
        if growth.mode in ("compete", "preserve")
        else growth.d_feedforward or config.d_feedforward,
        embedding_rank=growth.embedding_rank if gated else 0,
        head_rank=growth.head_rank if gated else 0,
        key_value_rank=growth.key_value_rank if gated else 0,
        norms=growth.norms and gated,
        gate=DomainGateConfig() if gated else None,
    )
    after = replace(config, generations=(*config.generations, generation))
    operations = (FreezeExperts(("base", *taken)), AddExperts(generation, growth.initial, growth.new_router_bias))
    return Plan(config, operations, after)


def plan_detach(config: ModelConfig) -> Plan:
    """Plan the removal of the newest generation. Raises InputError where there is none."""
    if not config.generations:
        raise InputError("nothing to detach", "model", "it has no generation beyond its base")
    after = replace(config, generations=config.generations[:-1])
    return Plan(config, (RemoveExperts(config.generations[-1].name),), after)


def plan_expansion(config: ModelConfig, blocks: int) -> Plan:
    """Plan the insertion of `blocks` layers, one after each of as many evenly long groups of the old ones.

    Raises InputError where there are fewer layers than that, or the model has grown: a generation counts its experts
    per layer.
    """
    require_growable(config)
    if config.generations:
        names = ", ".join(each.name for each in config.generations)
        raise InputError("a grown model cannot be expanded", f"generations {names}", "expand its base instead")
    if blocks > config.num_layers:
        raise InputError(f"expand.blocks={blocks}", "growth", f"at most one a layer ({config.num_layers})")
    after_old = [(group + 1) * config.num_layers // blocks - 1 for group in range(blocks)]
    layers = tuple(old + 1 + number for number, old in enumerate(after_old))
    sources = sorted([*range(config.num_layers), *after_old])
    attention, feedforward = (
        tuple(config.experts(kind, layer) for layer in sources) for kind in ("attention", "feedforward")
    )
    after = replace(config, num_layers=len(sources), attention_experts=attention, feedforward_experts=feedforward)
    return Plan(config, (FreezeExperts(("base",)), AddBlocks(layers)), after)


def new_blocks(plan: Plan) -> tuple[int, ...]:
    """The numbers of the layers an expansion adds."""
    return tuple(layer for each in plan.operations if isinstance(each, AddBlocks) for layer in each.layers)


def old_layers(plan: Plan) -> tuple[int, ...]:
    """Where each old layer stands after an expansion, in their order."""
    added = new_blocks(plan)
    return tuple(layer for layer in range(plan.after.num_layers) if layer not in added)


def old_names(plan: Plan) -> dict[str, str]:
    """Every parameter's name before an expansion, and its name afterwards."""
    moved = old_layers(plan)
    with shapes_alone():
        names = list(new_model(plan.before).state_dict())
    renamed = {}
    for name in names:
        first, _, rest = name.partition(".")
        number, _, tail = rest.partition(".")
        renamed[name] = f"blocks.{moved[int(number)]}.{tail}" if first == "blocks" else name
    return renamed


def _chosen_layers(config: ModelConfig, growth: GrowthConfig) -> set[int]:
    if growth.layers == "all":
        return set(range(config.num_layers))
    if growth.layers == "top_half":
        return set(range(config.num_layers // 2, config.num_layers))
    chosen = {int(layer) for layer in growth.layers}
    wrong = sorted(layer for layer in chosen if not 0 <= layer < config.num_layers)
    if wrong or not chosen:
        raise InputError(
            f"growth.layers={sorted(chosen)}", "growth", f"layers are numbered 0 to {config.num_layers - 1}"
        )
    return chosen


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, of its base, and of each generation in order."""

    total: int
    active_per_token: int
    base: int
    generations: tuple[int, ...]


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Parameters by part, counted without allocating any.

    Active means what one token's forward multiplies with: chosen experts only, one embedding row,
    every generation open, no choice null.
    """
    with shapes_alone():
        model = new_model(config)
    shapes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    grown = [0] * len(config.generations)
    for name, size in shapes.items():
        if name.startswith("generations."):
            grown[int(name.split(".")[1])] += size
    total = sum(shapes.values())
    return ParameterCounts(total, total - _idle(config, shapes), total - sum(grown), tuple(grown))


def gate_parameters(config: ModelConfig) -> int:
    """Parameters of the newest generation's domain gate: taught apart from its experts, frozen while they learn."""
    gate = config.generations[-1].gate if config.generations else None
    if gate is None:
        return 0
    with shapes_alone():
        return sum(parameter.numel() for parameter in DomainGate(gate, config.vocab_size).parameters())


def _idle(config: ModelConfig, shapes: Mapping[str, int]) -> int:
    """Parameters one token does not touch: experts not chosen, embedding rows of other tokens."""
    idle = shapes["embedding.weight"] // config.vocab_size * (config.vocab_size - 1)
    for name, size in shapes.items():
        words = name.split(".")
        owner: ModelConfig | GenerationConfig = config
        if words[0] == "blocks" and words[3] == "experts":
            layer, kind = int(words[1]), words[2]
        elif words[0] == "generations" and words[4:5] in (["attention"], ["feedforward"]):
            layer, kind, owner = int(words[3]), words[4], config.generations[int(words[1])]
        else:
            continue
        if isinstance(owner, GenerationConfig) and owner.joins_softmax:  # K of all in one softmax: as many as before
            idle += size
        else:
            experts = owner.experts(kind, layer)
            idle += size // experts * max(experts - owner.experts_per_token(kind), 0)
    return idle
