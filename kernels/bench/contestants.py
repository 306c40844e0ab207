"""Config S in both formulations with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mfext.commands.rivals import CONFIG_S, decode, train_step
from mfext.metrics.speed import Run
from mfext.model.moduleformer import ModuleFormer
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


@dataclass(frozen=True)
class Contestant:
    """One formulation of config S: a train step on a batch, an evaluation forward, and decoding after a prompt."""

    train_step: Callable[[Tensor, Tensor], Run]
    evaluate: Callable[[Tensor], Tensor]
    prefill: Callable[[Tensor, int], Run]


def published(seed: int = 0) -> Contestant:
    """The published formulation, trained by fused AdamW."""
    tensors = {name: tensor.requires_grad_() for name, tensor in random_tensors(PUBLISHED_S, seed).items()}
    model = PublishedModuleFormer(PUBLISHED_S, tensors)
    optimizer = torch.optim.AdamW(tensors.values(), lr=1e-4, fused=True)

    def step(ids: Tensor, targets: Tensor) -> Run:
        def run() -> None:
            optimizer.zero_grad()
            model.loss(ids, targets)[0].backward()
            optimizer.step()

        return run

    @torch.no_grad()
    def evaluate(ids: Tensor) -> Tensor:
        return model.forward(ids).logits

    @torch.no_grad()
    def prefill(prompt: Tensor, count: int) -> Run:
        first = model.forward(prompt)

        @torch.no_grad()
        def decode() -> None:
            out = first
            for _ in range(count):
                out = model.forward(out.logits[:, -1].argmax(-1, keepdim=True), out.cache)

        return decode

    return Contestant(step, evaluate, prefill)


def ours(seed: int = 0) -> Contestant:
    """mfext's model with the same weights, trained by fused AdamW."""
    model = ModuleFormer(CONFIG_S)
    model.load_state_dict(_our_names(random_tensors(PUBLISHED_S, seed)))

    def step(ids: Tensor, targets: Tensor) -> Run:
        return train_step(model, ids, targets)

    @torch.no_grad()
    def evaluate(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids).logits
        return logits

    return Contestant(step, evaluate, partial(decode, model))


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
