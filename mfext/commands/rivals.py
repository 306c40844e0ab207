"""What a ModuleFormer's speed is held against: dense transformers of equal size, single ops dense and plain.

Shared by `mfext bench` and by the long bench of a checkout. Random data; float32 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mfext.config import GrowthConfig, ModelConfig
from mfext.growth.apply import apply_plan, hold_gate_open, set_gate_thresholds, set_trainable
from mfext.growth.plan import count_parameters, plan_growth
from mfext.metrics.speed import Run, peak_kb
from mfext.model.build import new_model
from mfext.model.generation import gate_names
from mfext.model.language_model import LanguageModel
from mfext.model.losses import language_loss, routing_loss
from mfext.model.moduleformer import ModuleFormer
from mfext.training.methods.full import Full
from mfext.training.methods.grow import Grow
from mfext_kernels.grouped_linear import expert_feedforward
from mfext_kernels.products import linear
from mfext_kernels.routing import make_dispatch
from mfext_kernels.stickbreaking import stickbreaking_attention

CONFIG_S = ModelConfig(
    vocab_size=512,
    d_model=256,
    num_layers=6,
    num_heads=4,
    d_attention=128,
    attention_experts=8,
    attention_experts_per_token=2,
    feedforward_experts=16,
    feedforward_experts_per_token=2,
    d_feedforward=256,
    d_router=64,
)
DENSE_HEAD = 32
NEW_EXPERTS = GrowthConfig(embedding_rank=0, head_rank=0)
NEW_IN_THE_SOFTMAX = replace(NEW_EXPERTS, mode="compete", key_value_rank=0, norms=False)
NEVER_OPEN = 1 - 1e-6, 1.0  # thresholds that fresh gates stay below
Size = Literal["active", "total"]


@dataclass(frozen=True)
class Runs:
    """One op's forward and backward: ours, a dense op of equal FLOPs, and ours as the plain formulation writes it."""

    ours: Run
    dense: Run
    plain: Run


def dense_rival(config: ModelConfig, size: Size) -> ModelConfig:
    """A dense transformer with as many active parameters a token as `config` (and as many attention heads as its
    experts have together), or with as many in all (twice as wide): its feed-forward width makes the count equal."""
    wide = config.attention_experts_per_token * config.d_attention
    width, attended = (config.d_model, wide) if size == "active" else (2 * config.d_model, 2 * config.d_model)
    narrow = replace(
        config,
        architecture="dense",
        d_model=width,
        d_attention=attended,
        num_heads=max(1, attended // DENSE_HEAD),
        attention_experts=1,
        attention_experts_per_token=1,
        feedforward_experts=1,
        feedforward_experts_per_token=1,
        d_feedforward=1,
        routing_loss_weight=0.0,
        generations=(),
    )
    first, second = (_count(replace(narrow, d_feedforward=inner), size) for inner in (1, 2))
    return replace(narrow, d_feedforward=max(1, 1 + round((_count(config, size) - first) / (second - first))))


def _count(config: ModelConfig, size: Size) -> int:
    counts = count_parameters(config)
    return counts.total if size == "total" else counts.active_per_token


def train_step(model: LanguageModel, ids_BT: Tensor, targets_BT: Tensor, micro_batches: int = 1) -> Run:
    """Forward and backward, a micro-batch at a time, and fused AdamW of what requires a gradient.

    On a GPU the step can be recorded as a CUDA graph: its optimizer's count of steps lies on the card.
    """
    weight, kind = model.config.routing_loss_weight, model.config.routing_loss
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True, capturable=ids_BT.is_cuda)

    def step() -> None:
        optimizer.zero_grad()
        for ids, targets in zip(ids_BT.chunk(micro_batches), targets_BT.chunk(micro_batches), strict=True):
            output = model(ids)
            loss = language_loss(output.logits, targets)
            if weight:
                loss = loss + weight * routing_loss(output.routings, None, kind)
            torch.autograd.backward(loss / micro_batches)
        optimizer.step()

    return step


def decode(model: LanguageModel, prompt_BT: Tensor, count: int) -> Run:
    """`count` greedy tokens after a prompt that is already in the cache."""
    with torch.no_grad():
        cache = model.new_cache(len(prompt_BT), prompt_BT.shape[1] + 2 * count)
        first = model(prompt_BT, cache=cache).logits[:, -1]
    filled = cache.length

    @torch.no_grad()
    def run() -> None:
        cache.length = filled
        logits = first
        for _ in range(count):
            logits = model(logits.argmax(-1, keepdim=True), cache=cache).logits[:, -1]

    return run


def growth_steps(config: ModelConfig, growth: GrowthConfig, ids_BT: Tensor, targets_BT: Tensor) -> tuple[Run, Run]:
    """Train steps of one grown model: of the new experts and routers alone, and of every parameter.

    A gate is held open on every token, and trains in neither: the text of the new domain costs most, where the gate is
    closed new experts cost nothing.
    """
    steps = []
    for method in (Grow(), Full()):
        model = ModuleFormer(config)
        apply_plan(model, plan_growth(config, growth, "new"))
        if growth.mode == "gated":
            hold_gate_open(model)
        names = method.trainable(model)
        set_trainable(model, names - gate_names(names))
        steps.append(train_step(model, ids_BT, targets_BT))
    return steps[0], steps[1]


def with_experts(config: ModelConfig, num_experts: int) -> ModelConfig:
    """The config with so many experts at every site, and as many chosen as before."""
    return replace(config, attention_experts=num_experts, feedforward_experts=num_experts)


def grown_and_open(config: ModelConfig) -> ModuleFormer:
    """A model with one generation of the default growth, open on every token."""
    model = ModuleFormer(config)
    apply_plan(model, plan_growth(config, GrowthConfig(), "new"))
    hold_gate_open(model)
    return model


def grown_and_closed(config: ModelConfig, num_generations: int) -> ModuleFormer:
    """A model with so many generations of NEW_EXPERTS, whose gates no text opens."""
    model = ModuleFormer(config)
    for number in range(num_generations):
        apply_plan(model, plan_growth(model.config, NEW_EXPERTS, f"new_{number}"))
        set_gate_thresholds(model, *NEVER_OPEN)
    return model


def attention(batch: int, length: int, lasting: bool) -> Runs:
    """Stick-breaking attention of config S, and softmax SDPA with as many heads (K*H = 8) of the same width.

    `lasting`: logits near -3, where sticks last long and no key can be passed over.
    """
    chosen, heads, width = 2, 4, 32
    q, k, v = (torch.randn(batch, length, *shape) for shape in ((chosen, heads, width), (heads, width), (heads, width)))
    if lasting:
        q *= 0.5
        q[..., 0], k[..., 0] = 1.0, -3 * width**0.5
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    grad = torch.randn_like(q)
    soft_q, soft_k, soft_v = (torch.randn(batch, chosen * heads, length, width, requires_grad=True) for _ in range(3))
    soft_grad = torch.randn(batch, chosen * heads, length, width)

    def run(backend: Literal["reference"] | None) -> Run:
        return lambda: torch.autograd.grad(stickbreaking_attention(q, k, v, None, backend), leaves, grad)

    def run_softmax() -> None:
        o = F.scaled_dot_product_attention(soft_q, soft_k, soft_v, is_causal=True)
        torch.autograd.grad(o, (soft_q, soft_k, soft_v), soft_grad)

    return Runs(run(None), run_softmax, run("reference"))


def expert_layer(num_experts: int, tokens: int = 4096) -> Runs:
    """E experts, K 2 (sorting included), and a dense layer of equal active FLOPs."""
    width, inner, chosen = 256, 256, 2
    experts_NK = torch.rand(tokens, num_experts).topk(chosen, dim=-1).indices
    x, gates, grad = torch.randn(tokens, width), torch.rand(tokens, chosen), torch.randn(tokens, width)
    up, down = torch.randn(num_experts, width, inner), torch.randn(num_experts, inner, width)
    dense_up, dense_down = torch.randn(chosen * inner, width), torch.randn(width, chosen * inner)
    leaves = [tensor.requires_grad_() for tensor in (x, gates, up, down)]
    dense_leaves = [tensor.requires_grad_() for tensor in (x, dense_up, dense_down)]

    def run(backend: Literal["reference"] | None) -> Run:
        def ours() -> None:
            y = expert_feedforward(x, [up], [down], gates, make_dispatch(experts_NK, num_experts), backend)
            torch.autograd.grad(y, leaves, grad)

        return ours

    def run_dense() -> None:
        torch.autograd.grad(linear(F.gelu(linear(x, dense_up), approximate="tanh"), dense_down), dense_leaves, grad)

    return Runs(run(None), run_dense, run("reference"))


def peak_train_bytes(config: ModelConfig, batch: int, length: int, threads: int) -> int:
    """Peak memory of one train step over what the process held before it; run it in a process of its own."""
    torch.set_num_threads(threads)
    start = peak_kb()
    ids_BT = torch.randint(0, config.vocab_size, (batch, length))
    train_step(new_model(config), ids_BT, ids_BT)()
    return (peak_kb() - start) * 1024
