"""Every knob, as frozen dataclasses with units and checks.

Imports nothing of ours, no torch and no hydra. A wrong value raises ValueError whose text
names the key, the value given and what is allowed; `recipe.py` turns it into an InputError.

Shape letters used across the project: B batch, T position, N = B*T tokens, D model width,
E experts, K chosen experts, R = N*K routed rows, H heads, C head width, A = H*C
attention-expert width, F feed-forward-expert width, G router width, V vocabulary, L layers,
S stages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from mfext.config_checks import require, require_at_least, require_choices
from mfext.config_evaluation import EvaluationConfig
from mfext.config_gate import DomainGateConfig
from mfext.config_machine import LoggerConfig, TrainerConfig
from mfext.config_methods import ConcentrateConfig, EwcConfig, ExpandConfig, LoraConfig, LwfConfig, ReplayConfig
from mfext.config_pruning import PruningConfig

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Architecture = Literal["moduleformer", "dense"]
RouterKind = Literal["mlp", "linear", "gmm"]
RoutingLoss = Literal["mi", "switch"]
Initialisation = Literal["published", "scaled"]
GrowthMode = Literal["gated", "side", "compete", "preserve"]
ExpertInitialisation = Literal["copy_most_used", "random", "mean"]
Probe = Literal["self", "reservoir", "both", "none"]
GateLearns = Literal["before", "after"]
Precision = Literal["fp32", "bf16"]
MethodName = Literal[
    "grow", "full", "replay", "ewc", "lwf", "lora", "expand", "concentrate", "frozen", "joint", "independent"
]


def check_name(name: str) -> str:
    """Return `name` if it may name a domain, a generation or a run folder; else ValueError."""
    if NAME.fullmatch(name) is None:
        rule = "letters, digits, '.', '_', '-', at most 64, starting with a letter or digit"
        raise ValueError(f"name={name!r}: must be {rule}")
    return name


@dataclass(frozen=True)
class GenerationConfig:
    """What one growth added. Expert counts are per layer; zero is allowed. A rank of 0 means
    the part is absent; a rank of at least min(rows, columns) is stored as one full matrix."""

    name: str
    mode: GrowthMode
    attention_experts: tuple[int, ...]
    feedforward_experts: tuple[int, ...]
    attention_experts_per_token: int
    feedforward_experts_per_token: int
    d_feedforward: int
    embedding_rank: int = 0
    head_rank: int = 0
    key_value_rank: int = 0
    norms: bool = False
    gate: DomainGateConfig | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        require_choices(self)
        layers = len(self.attention_experts)
        require(self, "feedforward_experts", len(self.feedforward_experts) == layers, f"one count a layer ({layers})")
        require(
            self, "gate", (self.gate is not None) == (self.mode == "gated"), "present in mode gated, and only there"
        )
        for key in ("attention_experts", "feedforward_experts"):
            require(self, key, all(count >= 0 for count in getattr(self, key)), "zero or more in every layer")
        for kind in ("attention", "feedforward"):
            self._check_chosen(kind)
        require_at_least(0, self, "embedding_rank", "head_rank", "key_value_rank")
        changes = self.embedding_rank or self.head_rank or self.key_value_rank or self.norms
        rule = "gated where embedding, head, keys, values or norms change (only a gate can switch a change off)"
        require(self, "mode", self.mode == "gated" or not changes, rule)

    def _check_chosen(self, kind: str) -> None:
        """A router of its own finds enough to choose from in every layer that has experts; null is a choice too."""
        fewest = min((count for count in getattr(self, f"{kind}_experts") if count), default=None)
        if fewest is not None and not self.joins_softmax:
            most = fewest + (self.mode == "side")
            rule = f"between 1 and the choices of the smallest bank ({most})"
            require(self, f"{kind}_experts_per_token", 1 <= self.experts_per_token(kind) <= most, rule)

    @property
    def joins_softmax(self) -> bool:
        """True where its experts stand behind the base's in one softmax (compete, preserve)."""
        return self.mode in ("compete", "preserve")

    def experts(self, kind: str, layer: int) -> int:
        """E of its bank of this kind ("attention", "feedforward") in this layer."""
        count: int = getattr(self, f"{kind}_experts")[layer]
        return count

    def experts_per_token(self, kind: str) -> int:
        """K of its banks of this kind; in one softmax with the base's experts the base's K counts."""
        chosen: int = getattr(self, f"{kind}_experts_per_token")
        return chosen


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a ModuleFormer (arXiv 2306.04640) and of the generations grown on it.

    `architecture` dense is a softmax transformer without experts, to judge it by: every count of experts is 1,
    `d_attention` and `d_feedforward` are the widths of its one attention and feed-forward layer, and it cannot grow.
    Expert counts are one number, or one a layer where pruning left banks of different sizes.
    """

    architecture: Architecture = "moduleformer"
    vocab_size: int = 258
    d_model: int = 160
    num_layers: int = 4
    num_heads: int = 4
    d_attention: int = 160
    attention_experts: int | tuple[int, ...] = 6
    attention_experts_per_token: int = 2
    feedforward_experts: int | tuple[int, ...] = 8
    feedforward_experts_per_token: int = 2
    d_feedforward: int = 320
    router: RouterKind = "mlp"
    d_router: int = 64
    routing_loss: RoutingLoss = "mi"
    routing_loss_weight: float = 1e-3
    init: Initialisation = "scaled"
    layer_norm_eps: float = 1e-5
    bos_id: int = 256
    eos_id: int = 256
    pad_id: int = 257
    generations: tuple[GenerationConfig, ...] = ()

    def __post_init__(self) -> None:
        require_choices(self)
        require_at_least(1, self, "vocab_size", "d_model", "num_layers", "num_heads", "d_attention")
        require_at_least(1, self, "d_feedforward", "d_router")
        require_at_least(0, self, "routing_loss_weight")
        require(self, "layer_norm_eps", self.layer_norm_eps > 0, "positive")
        rule = f"a multiple of num_heads ({self.num_heads})"
        require(self, "d_attention", self.d_attention % self.num_heads == 0, rule)
        for kind in ("attention", "feedforward"):
            self._check_experts(kind)
        for key in ("bos_id", "eos_id", "pad_id"):
            rule = f"a token id below vocab_size ({self.vocab_size})"
            require(self, key, 0 <= getattr(self, key) < self.vocab_size, rule)
        for generation in self.generations:
            counts = len(generation.attention_experts)
            rule = f"given one expert count per layer ({self.num_layers}, not {counts})"
            require(self, "generations", counts == self.num_layers, rule)
        names = {generation.name for generation in self.generations}
        require(self, "generations", len(names) == len(self.generations), "named differently")
        joined = {generation.mode for generation in self.generations if generation.joins_softmax}
        rule = "either compete or preserve where they join the base's softmax: it is normalised in one way"
        require(self, "generations", len(joined) <= 1, rule)
        if self.architecture == "dense":
            self._check_dense()

    def _check_experts(self, kind: str) -> None:
        """One count a layer becomes one number where all are equal, so that equal models have equal configs."""
        key, counts = f"{kind}_experts", getattr(self, f"{kind}_experts")
        if isinstance(counts, tuple):
            rule = f"one number, or one a layer ({self.num_layers})"
            require(self, key, len(counts) == self.num_layers, rule)
            if len(set(counts)) == 1:
                object.__setattr__(self, key, counts[0])
        fewest = min(counts) if isinstance(counts, tuple) else counts
        rule = f"between 1 and {key} ({fewest})"
        require(self, f"{key}_per_token", 1 <= self.experts_per_token(kind) <= fewest, rule)

    def _check_dense(self) -> None:
        for kind in ("attention", "feedforward"):
            require(self, f"{kind}_experts", getattr(self, f"{kind}_experts") == 1, "1 where architecture is dense")
        require(self, "routing_loss_weight", self.routing_loss_weight == 0, "0 where architecture is dense")
        require(self, "generations", not self.generations, "empty where architecture is dense")
        rule = f"an even width a head ({self.num_heads} heads): rotary positions turn pairs"
        require(self, "d_attention", self.d_head % 2 == 0, rule)

    def experts(self, kind: str, layer: int) -> int:
        """E of the base's bank of this kind ("attention", "feedforward") in this layer."""
        counts: int | tuple[int, ...] = getattr(self, f"{kind}_experts")
        return counts if isinstance(counts, int) else counts[layer]

    def experts_per_token(self, kind: str) -> int:
        """K of the base's banks of this kind."""
        chosen: int = getattr(self, f"{kind}_experts_per_token")
        return chosen

    @property
    def d_head(self) -> int:
        """C, the width of one attention head."""
        return self.d_attention // self.num_heads

    @property
    def identity_keys_values(self) -> bool:
        """True where keys and values are the layer's input itself (A == D and H == 1)."""
        return self.d_attention == self.d_model and self.num_heads == 1


@dataclass(frozen=True)
class GateTraining:
    """How a domain gate is trained, calibrated and protected.

    `learns` after: the gate is held open while the experts learn, and taught afterwards with samples of both sides;
    before: it is taught first, and the experts learn behind it. `new_sequences` windows of new text, `probe_sequences`
    of old text and, after, as many written by the new experts themselves. `switching_share` of the batches are
    documents that change domain; up to `noise` of the tokens it learns from are replaced at random.
    """

    probe: Probe = "self"
    learns: GateLearns = "after"
    new_sequences: int = 640
    probe_sequences: int = 640
    probe_length: int = 128
    reservoir_bytes: int = 262_144
    reservoir_share: float = 0.01
    negatives_share: float = 0.25
    switching_share: float = 0.25
    noise: float = 0.15
    steps: int = 1600
    batch_size: int = 32
    learning_rate: float = 3e-3
    max_false_open: float = 0.01
    ramp: float = 0.5

    def __post_init__(self) -> None:
        require_choices(self)
        require_at_least(1, self, "new_sequences", "probe_sequences", "probe_length", "steps", "batch_size")
        require_at_least(0, self, "reservoir_bytes", "reservoir_share")
        require(self, "max_false_open", 0 < self.max_false_open < 1, "a share between 0 and 1")
        require(self, "negatives_share", 0 <= self.negatives_share < 1, "a share from 0 to below 1")
        require(self, "switching_share", 0 <= self.switching_share <= 1, "a share from 0 to 1")
        require(self, "noise", 0 <= self.noise < 1, "a share from 0 to below 1")
        require(self, "ramp", 0 < self.ramp < 1, "between 0 and 1")
        require(self, "learning_rate", self.learning_rate > 0, "positive")


@dataclass(frozen=True)
class ReviewConfig:
    """A stage after a growth's training in which its router and gate alone train; 0 `steps` is none.

    The loss is language modelling on new text and, for `probe_share` of every batch, on probes of
    old text, plus `penalty` times the gates that probe tokens give to new experts (mean a site).
    """

    steps: int = 0
    batch_size: int = 16
    learning_rate: float = 1e-3
    probe_share: float = 0.5
    penalty: float = 0.0

    def __post_init__(self) -> None:
        require_at_least(0, self, "steps", "penalty")
        require_at_least(2, self, "batch_size")
        require(self, "learning_rate", self.learning_rate > 0, "positive")
        require(self, "probe_share", 0 < self.probe_share < 1, "a share between 0 and 1")


@dataclass(frozen=True)
class GrowthConfig:
    """What one growth adds. `layers` is "all", "top_half" or a tuple of layer numbers."""

    mode: GrowthMode = "gated"
    attention_experts: int = 4
    feedforward_experts: int = 4
    attention_experts_per_token: int = 2
    feedforward_experts_per_token: int = 2
    d_feedforward: int | None = None
    layers: str | tuple[int, ...] = "all"
    initial: ExpertInitialisation = "copy_most_used"
    embedding_rank: int = 256
    head_rank: int = 256
    key_value_rank: int = 0
    norms: bool = False
    new_router_bias: float = -4.0
    gate: GateTraining = field(default_factory=GateTraining)
    review: ReviewConfig = field(default_factory=ReviewConfig)

    def __post_init__(self) -> None:
        require_choices(self)
        require_at_least(0, self, "attention_experts", "feedforward_experts")
        require_at_least(0, self, "embedding_rank", "head_rank", "key_value_rank")
        some = self.attention_experts + self.feedforward_experts > 0
        require(self, "feedforward_experts", some, "at least 1 where attention_experts is 0")
        for kind in ("attention", "feedforward"):
            chosen, experts = getattr(self, f"{kind}_experts_per_token"), getattr(self, f"{kind}_experts")
            rule = f"between 1 and {kind}_experts ({experts})"
            require(self, f"{kind}_experts_per_token", experts == 0 or 1 <= chosen <= experts, rule)
        known = isinstance(self.layers, tuple) or self.layers in ("all", "top_half")
        require(self, "layers", known, "all, top_half or a list of layer numbers")
        wide = self.d_feedforward is None or self.d_feedforward >= 1
        require(self, "d_feedforward", wide, "at least 1, or null for the base's width")


@dataclass(frozen=True)
class TrainingConfig:
    """One stage of training. `tokens` is the budget: steps = tokens // (batch_size * sequence_length)."""

    tokens: int = 1_200_000
    sequence_length: int = 256
    batch_size: int = 16
    micro_batch_size: int | None = None
    learning_rate: float = 2e-3
    min_learning_rate_share: float = 0.1
    warmup_share: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    log_every_steps: int = 10
    commit_every_s: float = 30.0
    commit_every_steps: int | None = None
    max_bad_steps_in_a_row: int = 10

    def __post_init__(self) -> None:
        require_choices(self)
        require_at_least(1, self, "sequence_length", "batch_size", "log_every_steps", "max_bad_steps_in_a_row")
        step = self.batch_size * self.sequence_length
        require(
            self, "tokens", self.tokens >= step, f"at least one step of batch_size * sequence_length ({step}) tokens"
        )
        micro = self.micro_batch_size
        divides = micro is None or (micro >= 1 and self.batch_size % micro == 0)
        require(self, "micro_batch_size", divides, f"a divisor of batch_size ({self.batch_size})")
        for key in ("learning_rate", "gradient_clip", "commit_every_s"):
            require(self, key, getattr(self, key) > 0, "positive")
        for key in ("min_learning_rate_share", "warmup_share"):
            require(self, key, 0 <= getattr(self, key) <= 1, "a share from 0 to 1")
        require_at_least(0, self, "weight_decay")
        require(self, "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers from 0 to below 1")
        often = self.commit_every_steps is None or self.commit_every_steps >= 1
        require(self, "commit_every_steps", often, "at least 1, or null to commit by time")

    @property
    def steps(self) -> int:
        """Optimizer steps the budget pays for."""
        return self.tokens // (self.batch_size * self.sequence_length)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step on one process."""
        return self.batch_size // (self.micro_batch_size or self.batch_size)


@dataclass(frozen=True)
class BaseConfig:
    """How the default base is built when none is named: a ModuleFormer pretrained on `domains`."""

    domains: tuple[str, ...] = ("prose",)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(frozen=True)
class Recipe:
    """A whole run. `domain` is what to learn: a name in conf/domain, a folder, or hf:owner/name.
    `domains` is the stream of a continual run, learned one stage after another; a domain may come again.
    `old_domains` names what the base knows where its folder does not record it (empty: as recorded).
    `base` is a model or run folder; None builds (once) and reuses the base of `default_base`."""

    domain: str = "code"
    domains: tuple[str, ...] = ()
    base: str | None = None
    out: str | None = None
    old_domains: tuple[str, ...] = ()
    bystanders: tuple[str, ...] = ()
    method: MethodName = "grow"
    tokenizer: str = "bytes"
    seed: int = 1
    default_base: BaseConfig = field(default_factory=BaseConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    ewc: EwcConfig = field(default_factory=EwcConfig)
    lwf: LwfConfig = field(default_factory=LwfConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    expand: ExpandConfig = field(default_factory=ExpandConfig)
    concentrate: ConcentrateConfig = field(default_factory=ConcentrateConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def __post_init__(self) -> None:
        require_choices(self)
        require(self, "seed", 0 <= self.seed < 2**31, "from 0 to 2147483647")
        require(self, "domain", len(self.domain) > 0, "a name, a folder or hf:owner/name")
