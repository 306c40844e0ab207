"""One growth from plan to calibrated gate: applied, checked to be the identity, taught where to open."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mfext.config import GrowthConfig
from mfext.growth.apply import apply_plan, hold_gate_open, measure_usage
from mfext.growth.gate_training import GateCalibration, train_gate
from mfext.growth.plan import Plan
from mfext.growth.probes import Windows
from mfext.model.moduleformer import ModuleFormer

WATCHED = 32


@dataclass(frozen=True)
class Growth:
    """What one growth did before any expert trained.

    `identity_at_growth` is the largest change of any logit on text the model knew. It is exactly 0
    in modes gated and side, where new experts, their output matrices at zero, are only added. In
    modes compete and preserve they take places among the K chosen, and a displaced old expert's
    contribution is missing; compete also divides the old gates anew. In mode preserve it is thus 0
    where no token of the text chose a new expert, and otherwise what the displaced ones gave.
    """

    identity_at_growth: float
    gate: GateCalibration | None


def grow(model: ModuleFormer, plan: Plan, growth: GrowthConfig, new: Windows, old: Windows | None, seed: int) -> Growth:
    """Carry out `plan` on `model` in place and, in mode gated with `old`, train the new generation's gate.

    `new` holds windows of the new domain, `old` probes of what the model knows (growth.probes);
    without `old` the gate is held open everywhere, until `train_gate` teaches it. Fresh weights depend on
    `seed` alone. Raises InputError where the plan does not fit or there are too few windows.
    """
    usage = measure_usage(model, new.input_ids[:WATCHED], new.document_starts[:WATCHED])
    watched = (old or new).take(torch.arange(min(WATCHED, len(old or new))))
    before = _logits(model, watched)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        apply_plan(model, plan, usage)
    moved = float((_logits(model, watched) - before).abs().max())
    if growth.mode != "gated":
        return Growth(moved, None)
    if old is None:
        hold_gate_open(model)
        return Growth(moved, None)
    calibration = train_gate(model, new, old, growth.gate, seed)
    return Growth(max(moved, float((_logits(model, watched) - before).abs().max())), calibration)


@torch.inference_mode()
def _logits(model: ModuleFormer, windows: Windows) -> Tensor:
    logits: Tensor = model(windows.input_ids, document_starts=windows.document_starts).logits
    return logits
