"""The optimizer, and its state keyed by parameter name instead of by index.

Matched by index (torch's own way), state loads after a growth and then fails, and two
parameters of one shape that changed places load silently. Names survive growth.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from mfext.config import TrainingConfig
from mfext.errors import InputError


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: matrices and stacked experts yes; vectors, norms, embeddings no.

    Decaying an embedding row shrinks tokens that never occur; a norm's weight has no scale to lose.
    """
    parts = name.split(".")
    return parameter.ndim >= 2 and "embedding" not in parts and not any(part.endswith("norm") for part in parts)


def make_optimizer(model: nn.Module, training: TrainingConfig) -> AdamW:
    """Fused AdamW over the parameters with requires_grad, in two groups: decayed and not."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise InputError("nothing to train", "every parameter is frozen", "choose method=full, or grow the model first")
    groups = [
        {
            "params": [parameter for name, parameter in named if decays(name, parameter)],
            "weight_decay": training.weight_decay,
        },
        {"params": [parameter for name, parameter in named if not decays(name, parameter)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=True)


def optimizer_state_by_name(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors as `PARAMETER/KEY`, e.g. `lm_head.weight/exp_avg` (references, no copies)."""
    return {
        f"{name}/{key}": value.detach()
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def load_optimizer_state_by_name(optimizer: Optimizer, model: nn.Module, state: Mapping[str, Tensor]) -> set[str]:
    """Copy state into the optimizer and return the parameter names that found theirs.

    State of parameters this optimizer does not train (frozen by a growth) is passed over, and a
    parameter without state starts fresh. Raises InputError where a shape disagrees.
    """
    optimized = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for full_name, value in state.items():
        name, _, key = full_name.rpartition("/")
        by_parameter.setdefault(name, {})[key] = value
    loaded = set()
    for name, parameter in model.named_parameters():
        if id(parameter) not in optimized or name not in by_parameter:
            continue
        on_device = bool(optimized[id(parameter)].get("fused"))
        optimizer.state[parameter] = {
            key: _own(value, key, name, parameter, on_device) for key, value in by_parameter[name].items()
        }
        loaded.add(name)
    return loaded


def _own(value: Tensor, key: str, name: str, parameter: Tensor, on_device: bool) -> Tensor:
    if key == "step":
        return value.to(parameter.device if on_device else "cpu", torch.float32, copy=True)
    if value.shape != parameter.shape:
        raise InputError(
            f"optimizer state {key} of {name} has shape {tuple(value.shape)}",
            "",
            f"the parameter has {tuple(parameter.shape)}",
        )
    return value.to(parameter.device, parameter.dtype, copy=True)
