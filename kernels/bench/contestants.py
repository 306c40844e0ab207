"""Config S in both formulations with the same weights, and the dense rivals of single ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mfext.config import ModelConfig
from mfext.model.losses import language_loss, routing_loss
from mfext.model.moduleformer import ModuleFormer
from mfext_kernels.grouped_linear import expert_feedforward
from mfext_kernels.routing import make_dispatch
from mfext_kernels.stickbreaking import stickbreaking_attention
from tests.published_formulation import PublishedConfig, PublishedModuleFormer, random_tensors

PUBLISHED_S = PublishedConfig(
    vocab_size=512,
    n_embd=256,
    n_layer=6,
    n_head=4,
    att_hidden=128,
    ffd_hidden=256,
    n_att_experts=8,
    k_att=2,
    n_mlp_experts=16,
    k_mlp=2,
    gating_size=64,
    aux_loss_weight=1e-3,
)
OURS_S = ModelConfig(
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
Run = Callable[[], object]


@dataclass(frozen=True)
class Contestant:
    """One formulation of config S: a whole train step, an evaluation forward, and decoding after a prompt."""

    train_step: Callable[[Tensor, Tensor], object]
    evaluate: Callable[[Tensor], Tensor]
    prefill: Callable[[Tensor, int], Callable[[], object]]


def published(seed: int = 0) -> Contestant:
    """The published formulation, trained by fused AdamW."""
    tensors = {name: tensor.requires_grad_() for name, tensor in random_tensors(PUBLISHED_S, seed).items()}
    model = PublishedModuleFormer(PUBLISHED_S, tensors)
    optimizer = torch.optim.AdamW(tensors.values(), lr=1e-4, fused=True)

    def train_step(ids: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        model.loss(ids, targets)[0].backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate(ids: Tensor) -> Tensor:
        return model.forward(ids).logits

    @torch.no_grad()
    def prefill(prompt: Tensor, count: int) -> Callable[[], object]:
        first = model.forward(prompt)

        @torch.no_grad()
        def decode() -> None:
            out = first
            for _ in range(count):
                out = model.forward(out.logits[:, -1].argmax(-1, keepdim=True), out.cache)

        return decode

    return Contestant(train_step, evaluate, prefill)


def ours(seed: int = 0) -> Contestant:
    """mfext's model with the same weights, trained by fused AdamW."""
    model = ModuleFormer(OURS_S)
    model.load_state_dict(_our_names(random_tensors(PUBLISHED_S, seed)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def train_step(ids: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        out = model(ids)
        loss = language_loss(out.logits, targets) + PUBLISHED_S.aux_loss_weight * routing_loss(out.routings, None, "mi")
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids).logits
        return logits

    @torch.no_grad()
    def prefill(prompt: Tensor, count: int) -> Callable[[], object]:
        cache = model.new_cache(1, prompt.shape[1] + 2 * count)
        first = model(prompt, cache=cache).logits[:, -1]
        filled = cache.length

        @torch.no_grad()
        def decode() -> None:
            cache.length = filled
            logits = first
            for _ in range(count):
                logits = model(logits.argmax(-1, keepdim=True), cache=cache).logits[:, -1]

        return decode

    return Contestant(train_step, evaluate, prefill)


def attention(batch: int, length: int, lasting: bool) -> tuple[Run, Run]:
    """Forward and backward of ours and of softmax SDPA with as many heads (K*H = 8) of the same width.

    `lasting`: logits near -3, where sticks last long and no key can be passed over.
    """
    chosen, heads, width = 2, 4, 32
    q, k, v = (torch.randn(batch, length, *shape) for shape in ((chosen, heads, width), (heads, width), (heads, width)))
    if lasting:
        q *= 0.5
        q[..., 0], k[..., 0] = 1.0, -3 * width**0.5
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    grad = torch.randn_like(q)
    soft = [torch.randn(batch, chosen * heads, length, width, requires_grad=True) for _ in range(3)]
    soft_grad = torch.randn(batch, chosen * heads, length, width)

    def run_ours() -> None:
        torch.autograd.grad(stickbreaking_attention(*leaves), leaves, grad)

    def run_softmax() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(*soft, is_causal=True), soft, soft_grad)

    return run_ours, run_softmax


def expert_layer(num_experts: int, tokens: int = 4096) -> tuple[Run, Run]:
    """Forward and backward of E experts, K 2 (sorting included), and of a dense layer of equal active FLOPs."""
    width, inner, chosen = 256, 256, 2
    experts_NK = torch.rand(tokens, num_experts).topk(chosen, dim=-1).indices
    x, gates, grad = torch.randn(tokens, width), torch.rand(tokens, chosen), torch.randn(tokens, width)
    up, down = torch.randn(num_experts, width, inner), torch.randn(num_experts, inner, width)
    dense_up, dense_down = torch.randn(width, chosen * inner), torch.randn(chosen * inner, width)
    leaves = [tensor.requires_grad_() for tensor in (x, gates, up, down)]
    dense_leaves = [tensor.requires_grad_() for tensor in (x, dense_up, dense_down)]

    def run_ours() -> None:
        y = expert_feedforward(x, [up], [down], gates, make_dispatch(experts_NK, num_experts))
        torch.autograd.grad(y, leaves, grad)

    def run_dense() -> None:
        torch.autograd.grad(F.gelu(x @ dense_up, approximate="tanh") @ dense_down, dense_leaves, grad)

    return run_ours, run_dense


def _our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "transformer.wte.": "embedding.",
        "transformer.ln_f.": "final_norm.",
        "transformer.h.": "blocks.",
        ".ln_1.": ".attention_norm.",
        ".ln_2.": ".feedforward_norm.",
        ".attn.q_proj.experts.weight": ".attention.experts.query",
        ".attn.q_proj.output_experts.weight": ".attention.experts.output",
        ".attn.q_proj.gate.": ".attention.router.",
        ".attn.k_proj.": ".attention.key.",
        ".attn.v_proj.": ".attention.value.",
        ".mlpf.gate.": ".feedforward.router.",
        ".mlpf.experts.weight": ".feedforward.experts.up",
        ".mlpf.output_experts.weight": ".feedforward.experts.down",
        ".w_gate.0.": ".hidden.",
        ".w_gate.3.": ".output.",
    }
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor.clone()
    return renamed
