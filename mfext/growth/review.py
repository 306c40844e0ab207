"""Review a growth after its training: its router and gate learn once more, on new text and on probes of old text.

The experts stay as they are. What moves is only who reaches them, so that old text can be led back
to old experts. The loss of one step, in nats per token, is

    (1 - p) language(new) + p language(probes) + penalty * mass(probes)  [+ the gate's own loss]

with p = `probe_share`. On probes sampled from the frozen model the second term is, up to a constant,
the divergence from that model. mass: the gates that a probe token gives to new experts, mean over
tokens and sites. A domain gate also keeps the cross-entropy it was trained with, negatives included,
because language losses reach it only where it is neither closed nor fully open.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from mfext.config import GrowthConfig
from mfext.errors import InputError
from mfext.growth.apply import freeze, set_trainable
from mfext.growth.gate_text import GateText, draw
from mfext.growth.gate_training import GateCalibration, calibrate_gate, gate_loss, hold_out, rate_share
from mfext.growth.probes import Windows
from mfext.model.generation import deciding_names
from mfext.model.language_model import ModelOutput
from mfext.model.losses import IGNORED, language_loss
from mfext.model.moduleformer import ModuleFormer

FEWEST = 8
ROWS = 16


@dataclass(frozen=True)
class Review:
    """What a review changed: losses in nats per token on windows kept out of it, before and after.

    `gate`: the thresholds found anew, in mode gated.
    """

    new_before: float
    new_after: float
    old_before: float
    old_after: float
    gate: GateCalibration | None
    wall_s: float


def review(model: ModuleFormer, new: Windows, old: Windows, growth: GrowthConfig, seed: int) -> Review:
    """Train the newest generation's routers and gate for `growth.review.steps`; nothing else moves. In place.

    `new` holds windows of the new domain and `old` probes of what the model knew before, on the
    model's device. The windows held out, which calibrate the gate again, are those that
    `train_gate` held out where windows and seed are the ones it was given. All is frozen
    afterwards. Raises InputError where there is no generation, nothing to do, or too few windows.
    """
    _check(model, new, old, growth)
    begun = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    new_fit, new_held = hold_out(new, generator)
    old_fit, old_held = hold_out(old, generator)
    new_before, old_before = mean_loss(model, new_held), mean_loss(model, old_held)
    names = deciding_names(name for name, _ in model.named_parameters())
    set_trainable(model, names)
    _fit(model, new_fit, old_fit, growth, generator)
    freeze(model)
    gated = model.config.generations[-1].gate is not None
    gate = calibrate_gate(model, new_held, old_held, growth.gate, generator) if gated else None
    new_after, old_after = mean_loss(model, new_held), mean_loss(model, old_held)
    return Review(new_before, new_after, old_before, old_after, gate, time.monotonic() - begun)


def _check(model: ModuleFormer, new: Windows, old: Windows, growth: GrowthConfig) -> None:
    if not model.config.generations:
        raise InputError("nothing to review", "this model has no generation", "grow it first")
    if growth.review.steps < 1:
        raise InputError("growth.review.steps=0", "growth.review", "give the review at least 1 step, or leave it out")
    if min(len(new), len(old)) < FEWEST:
        raise InputError(
            f"{len(new)} windows of the new domain and {len(old)} probes",
            "growth.review",
            f"a review needs at least {FEWEST} of each",
        )


def _fit(model: ModuleFormer, new: Windows, old: Windows, growth: GrowthConfig, generator: torch.Generator) -> None:
    settings = growth.review
    gated = model.config.generations[-1].gate is not None
    num_old = min(max(1, round(settings.batch_size * settings.probe_share)), settings.batch_size - 1)
    share = num_old / settings.batch_size
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, settings.steps))
    text = GateText.of(model.config, new, old)
    for _ in range(settings.steps):
        new_loss, _ = _language(model, draw(new, settings.batch_size - num_old, generator))
        old_loss, output = _language(model, draw(old, num_old, generator))
        loss = (1 - share) * new_loss + share * old_loss
        if settings.penalty:
            loss = loss + settings.penalty * new_expert_mass(model, output)
        if gated:
            loss = loss + gate_loss(model, text, growth.gate, generator)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def new_expert_mass(model: ModuleFormer, output: ModelOutput) -> Tensor:
    """Sum of the gates given to the newest generation's experts, times its domain gate: mean a token and site."""
    newest = model.config.generations[-1]
    number = 0 if newest.joins_softmax else len(model.config.generations)
    sites = sum(count > 0 for count in newest.attention_experts + newest.feedforward_experts)
    mass = output.logits.new_zeros(())
    for routing in (each for each in output.routings if each.generation == number):
        first = routing.num_experts - newest.experts(routing.site.kind, routing.site.layer)
        new_MK = (routing.experts_MK >= first) & (routing.experts_MK < routing.num_experts)
        mass_M = (routing.gates_MK * new_MK).sum(1)
        if newest.gate is not None and output.gates is not None:
            open_N = output.gates[..., -1].flatten()
            mass_M = mass_M * (open_N if routing.tokens_M is None else open_N[routing.tokens_M])
        mass = mass + mass_M.sum()
    return mass / (sites * output.logits.shape[:2].numel())


def _language(model: ModuleFormer, windows: Windows) -> tuple[Tensor, ModelOutput]:
    """Mean cross-entropy of the next token (padding is not scored), and the output it is of."""
    targets_BT = windows.input_ids[:, 1:]
    targets_BT = torch.where(targets_BT == model.config.pad_id, IGNORED, targets_BT)
    output: ModelOutput = model(windows.input_ids[:, :-1], document_starts=windows.document_starts[:, :-1])
    return language_loss(output.logits, targets_BT), output


@torch.inference_mode()
def mean_loss(model: ModuleFormer, windows: Windows) -> float:
    """Mean loss in nats per token, rows weighing the same."""
    parts = torch.split(torch.arange(len(windows)), ROWS)
    return sum(float(_language(model, windows.take(rows))[0]) * len(rows) for rows in parts) / len(windows)
