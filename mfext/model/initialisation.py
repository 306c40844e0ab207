"""Fresh weights of a ModuleFormer and of the parts a growth adds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from mfext.config import Initialisation
from mfext.model.domain_gate import DomainGate
from mfext.model.experts import AttentionExperts, FeedForwardExperts
from mfext.model.router import Router

if TYPE_CHECKING:
    from mfext.model.moduleformer import ModuleFormer

STD = 0.02


def initialise(model: ModuleFormer) -> None:
    """Draw every weight anew from torch's global generator.

    `published`: linear and embedding N(0, 0.02), biases 0, experts U(-1/fan_in, 1/fan_in).
    `scaled`: experts and keys/values N(0, 1/sqrt(fan_in)), expert outputs also divided by
    sqrt(2 L) and multiplied by sqrt(E/K): softmax gates over E experts start near 1/E, so that
    this lets residual branches start with ordinary size.
    """
    config = model.config
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Router):
            module.reset_parameters(STD)
        elif isinstance(module, DomainGate):
            module.reset_parameters()
        elif isinstance(module, AttentionExperts | FeedForwardExperts):
            draw_experts(module, config.init, config.num_layers)


def draw_experts(experts: AttentionExperts | FeedForwardExperts, init: Initialisation, num_layers: int) -> None:
    """Fresh expert matrices (E, fan_in, fan_out)."""
    first, second = experts.parameters()
    for position, weight in enumerate((first, second)):
        num_experts, fan_in, _ = weight.shape
        if init == "published":
            nn.init.uniform_(weight, -1 / fan_in, 1 / fan_in)
        else:
            scale = math.sqrt(num_experts / (2 * num_layers)) if position == 1 else 1.0
            nn.init.normal_(weight, std=scale / math.sqrt(fan_in))
