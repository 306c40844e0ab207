"""Teach a new generation's gate its domain, then calibrate it to a forgetting budget.

Binary cross-entropy per position: new text against probes of everything before and open-set
negatives. Thresholds come from probes held out of that training.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mfext.config import GateTraining
from mfext.errors import InputError
from mfext.growth.apply import set_gate_thresholds
from mfext.growth.gate_text import GateText
from mfext.growth.probes import Windows
from mfext.model.domain_gate import DomainGate
from mfext.model.moduleformer import ModuleFormer

HELD_OUT = 0.25
STRICTEST, LOOSEST = 0.98, 0.2
# Of the budget of false opens, what calibration spends on the model's own samples: old text itself opens a gate 3 to 4
# times as often as samples do, text of a reservoir as often as promised (docs/results/self_probes.md).
SPENT_ON_SAMPLES = 0.4


@dataclass(frozen=True)
class GateCalibration:
    """Where the gate opens and what that cost on held-out text (shares of tokens); `max_false_open` was the budget."""

    max_false_open: float
    opens_at: float
    full_at: float
    false_open: float
    false_close: float
    open_set_open: float
    wall_s: float


def train_gate(
    model: ModuleFormer, new: Windows, old: Windows, settings: GateTraining, seed: int, own: Windows | None = None
) -> GateCalibration:
    """Train and calibrate the newest generation's gate from fresh weights; nothing else in the model changes.

    `new` and `old` are windows of the new domain and of probes; `own` are samples of the new experts, told to the gate
    as new text. Probes are samples as a rule, and a gate that sees samples on one side only learns what sets samples
    apart from text. The thresholds rest on real new text alone. Raises InputError with fewer than 8 of either, and
    where the newest generation has no gate.
    """
    gate = require_gate(model)
    if min(len(new), len(old)) < 8:
        raise InputError(
            f"{len(new)} windows of the new domain and {len(old)} probes",
            "growth.gate",
            "the gate needs at least 8 of each",
        )
    begun = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    new_fit, new_held = hold_out(new, generator)
    old_fit, old_held = hold_out(old, generator)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gate.reset_parameters()
    text = GateText.of(model.config, new_fit if own is None else new_fit.joined(own), old_fit)
    _fit(model, text, settings, generator)
    return replace(calibrate_gate(model, new_held, old_held, settings, generator), wall_s=time.monotonic() - begun)


def require_gate(model: ModuleFormer) -> DomainGate:
    """The newest generation's gate. Raises InputError where it has none, or there is no generation."""
    gate = model.generation(len(model.generations)).gate if len(model.generations) else None
    if gate is None:
        raise InputError("no domain gate to train", "growth", "grow with mode gated first")
    return gate


def calibrate_gate(
    model: ModuleFormer, new_held: Windows, old_held: Windows, settings: GateTraining, generator: torch.Generator
) -> GateCalibration:
    """Set the newest gate's thresholds so that `max_false_open` of the probes' tokens open it; SPENT_ON_SAMPLES of
    that where the probes are the model's own samples.

    The windows must be ones the gate did not learn from. `opens_at` stays between LOOSEST and STRICTEST.
    """
    begun = time.monotonic()
    gate = model.generation(len(model.generations)).gate
    assert gate is not None, "only generations of mode gated have one"
    negatives = GateText.of(model.config, new_held, old_held).negatives(new_held, generator)
    old_p, new_p, negative_p = (_probabilities(gate, windows) for windows in (old_held, new_held, negatives))
    allowed = settings.max_false_open * (SPENT_ON_SAMPLES if settings.probe == "self" else 1)
    opens_at = float(torch.quantile(old_p[:1_000_000].double(), 1 - allowed, interpolation="higher"))
    opens_at = min(max(opens_at, LOOSEST), STRICTEST)
    full_at = opens_at + settings.ramp * (1 - opens_at)
    set_gate_thresholds(model, opens_at, full_at)
    return GateCalibration(
        settings.max_false_open,
        opens_at,
        full_at,
        float((old_p > opens_at).double().mean()),
        float((new_p < full_at).double().mean()),
        float((negative_p > opens_at).double().mean()),
        time.monotonic() - begun,
    )


def hold_out(windows: Windows, generator: torch.Generator) -> tuple[Windows, Windows]:
    """The windows to learn from and the quarter (at least 2) kept back, drawn by `generator`."""
    order = torch.randperm(len(windows), generator=generator)
    held = max(2, int(len(windows) * HELD_OUT))
    return windows.take(order[held:]), windows.take(order[:held])


def gate_loss(model: ModuleFormer, text: GateText, settings: GateTraining, generator: torch.Generator) -> Tensor:
    """The newest gate's cross-entropy (nats a position) on one batch of `text`."""
    gate = model.generation(len(model.generations)).gate
    assert gate is not None, "only generations of mode gated have one"
    batch = text.batch(settings, generator)
    logits_BT, _ = gate(batch.input_ids, batch.document_starts)
    return F.binary_cross_entropy_with_logits(logits_BT, batch.labels_BT.to(logits_BT))


def _fit(model: ModuleFormer, text: GateText, settings: GateTraining, generator: torch.Generator) -> None:
    gate = model.generation(len(model.generations)).gate
    assert gate is not None, "only generations of mode gated have one"
    parameters = list(gate.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, settings.steps))
    for _ in range(settings.steps):
        loss = gate_loss(model, text, settings, generator)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


def rate_share(step: int, steps: int) -> float:
    """Share of the learning rate: warm-up over the first twentieth, then a cosine to zero."""
    warm = max(1, steps // 20)
    return (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


@torch.inference_mode()
def _probabilities(gate: DomainGate, windows: Windows) -> Tensor:
    rows = torch.split(torch.arange(len(windows)), 64)
    parts = [windows.take(each) for each in rows]
    return torch.cat([gate(each.input_ids, each.document_starts)[0].sigmoid().flatten() for each in parts])
