"""A tiny model, the four ways to grow it, and what tests of growth do with it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mfext.config import GrowthConfig, ModelConfig
from mfext.growth.apply import apply_plan, set_trainable
from mfext.growth.plan import plan_growth
from mfext.growth.probes import Windows
from mfext.model.losses import language_loss
from mfext.model.moduleformer import ModuleFormer

TINY = ModelConfig(
    d_model=32,
    num_layers=2,
    num_heads=2,
    d_attention=16,
    attention_experts=3,
    feedforward_experts=4,
    d_feedforward=24,
    d_router=8,
)
GROWTH = GrowthConfig(attention_experts=2, feedforward_experts=3, key_value_rank=4, norms=True)
COMPETE = GrowthConfig(mode="compete", attention_experts=2, feedforward_experts=3)
PRESERVE = replace(COMPETE, mode="preserve")
SIDE = replace(COMPETE, mode="side", d_feedforward=20)
MODES = {each.mode: each for each in (GROWTH, COMPETE, PRESERVE, SIDE)}


def tiny_model(seed: int = 0) -> ModuleFormer:
    torch.manual_seed(seed)
    return ModuleFormer(TINY).eval()


def tokens(seed: int = 1, batch: int = 3, length: int = 40) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def grow(model: ModuleFormer, name: str, growth: GrowthConfig = GROWTH) -> None:
    apply_plan(model, plan_growth(model.config, growth, name))


def force_gate(model: ModuleFormer, number: int, bias: float) -> None:
    """Hold a gate open (large bias) or closed (very negative bias)."""
    gate = model.generation(number).gate
    assert gate is not None
    with torch.no_grad():
        gate.output.weight.zero_()
        gate.output.bias.fill_(bias)


def wake(model: ModuleFormer, number: int) -> None:
    """Give a generation weights that matter, as training would."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for name, parameter in model.generation(number).named_parameters():
            if not name.startswith("gate."):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def train_new(model: ModuleFormer, steps: int = 20) -> None:
    """Steps of AdamW with strong weight decay on the newest generation."""
    prefix = f"generations.{len(model.generations) - 1}."
    set_trainable(
        model, {name for name, _ in model.named_parameters() if name.startswith(prefix) and ".gate." not in name}
    )
    optimizer = torch.optim.AdamW(
        [each for each in model.parameters() if each.requires_grad], lr=1e-2, weight_decay=0.5
    )
    ids = tokens(5)
    for _ in range(steps):
        optimizer.zero_grad()
        language_loss(model(ids[:, :-1]).logits, ids[:, 1:]).backward()
        optimizer.step()


def bits(model: ModuleFormer) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}


def ascii_windows(low: int, high: int, count: int, seed: int) -> Windows:
    ids = torch.randint(low, high, (count, 64), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = TINY.bos_id
    return Windows(ids, torch.zeros_like(ids))
