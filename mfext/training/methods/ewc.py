"""Elastic weight consolidation: weights that mattered for old text are held near where they were.

Kirkpatrick et al. 2017 (arXiv 1612.00796): loss + strength / 2 * sum_i F_i (theta_i - anchor_i)^2. One anchor, the
previous stage's weights, and one decayed sum of Fisher estimates serve any number of stages: Schwarz et al. 2018
(arXiv 1805.06370), section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mfext.errors import InputError
from mfext.model.language_model import LanguageModel, ModelOutput
from mfext.model.losses import IGNORED, language_loss
from mfext.training.batch import Batch, read_batch
from mfext_kernels.autograd import applied


@dataclass(frozen=True, eq=False)
class Ewc:
    """Trains every parameter, each pulled to its `anchor` with `strength` times its `importance` (one tensor each a
    parameter, by name, of its shape).

    Holds two tensors of the model's size, moved to the model's device at the first step; a step needs two more for
    as long as it lasts. `anchor` must be a copy: the model's own tensors would move along with it.
    """

    trains: ClassVar[str] = "every parameter, each held near its old value as far as old text depends on it"
    anchor: Mapping[str, Tensor]
    importance: Mapping[str, Tensor]
    strength: float
    name: str = "ewc"
    starts_from: ClassVar[Literal["previous", "base"]] = "previous"
    balances: ClassVar[bool] = True
    _placed: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = field(default_factory=dict, init=False, repr=False)

    def trainable(self, model: nn.Module) -> set[str]:
        """Raises InputError where anchor and importance are not of this model's parameters."""
        parameters = dict(model.named_parameters())
        for tensors in (self.anchor, self.importance):
            odd = sorted(parameters.keys() ^ tensors.keys())
            odd += [name for name, value in tensors.items() if not odd and value.shape != parameters[name].shape]
            if odd:
                fix = "estimate the Fisher information of the model this stage starts from"
                raise InputError(f"anchor or importance does not fit the model: {odd[0]}", "method=ewc", fix)
        return set(parameters)

    def penalty(self, model: nn.Module, output: ModelOutput, batch: Batch) -> Tensor:
        names, parameters = zip(*model.named_parameters(), strict=True)
        device = parameters[0].device
        if device not in self._placed:
            self._placed[device] = (
                [self.anchor[name].to(device) for name in names],
                [self.importance[name].to(device) for name in names],
            )
        value = applied(_Pull, self.strength, *self._placed[device], *parameters)
        return value

    def describe(self) -> str:
        return f"{self.trains}, strength {self.strength:g}"

    def __getstate__(self) -> dict[str, Any]:
        """Without the placed copies: they are the same tensors again."""
        return {**self.__dict__, "_placed": {}}


class _Pull(torch.autograd.Function):
    """strength / 2 * sum importance * (parameter - anchor)^2, its gradient kept from the forward pass.

    Autograd's own graph of the same sum would keep three tensors of the model's size instead of one.
    """

    @staticmethod
    def forward(
        ctx: Any, strength: float, anchors: list[Tensor], importances: list[Tensor], *parameters: Tensor
    ) -> Tensor:
        away = torch._foreach_sub(list(parameters), anchors)
        pulls = torch._foreach_mul(importances, away)
        ctx.strength, ctx.pulls = strength, pulls
        sums = [(pull * distance).sum() for pull, distance in zip(pulls, away, strict=True)]
        return 0.5 * strength * torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        pulls, ctx.pulls = ctx.pulls, None  # scaled in place: a second pass backward must fail, not scale again
        torch._foreach_mul_(pulls, gradient * ctx.strength)
        return None, None, None, *pulls


def fisher(model: LanguageModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Diagonal empirical Fisher information of every parameter, by name, in float32.

    The mean over windows (rows of the batches) of the squared gradient of the window's mean loss in nats per token:
    one window is one sample, because the tokens of a window share their context and one gradient a token would cost
    T times as much. Were a window's T token gradients independent, this would be 1 / T of the mean over tokens: a
    constant that `strength` absorbs. Empirical: the labels are the text's own, not drawn from the model. The routers'
    balance loss takes no part. The model is left as it was. Windows in which nothing is scored are passed over;
    raises InputError where no other is left.
    """
    named = dict(model.named_parameters())
    needed = {name: parameter.requires_grad for name, parameter in named.items()}
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in named.items()}
    was_training, count = model.training, 0
    model.eval()
    try:
        for parameter in named.values():
            parameter.requires_grad_(True)
        for row in _windows(batches):
            gradients = _gradients(model, row, list(named.values()))
            torch._foreach_addcmul_(list(sums.values()), gradients, gradients)
            count += 1
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(needed[name])
        model.train(was_training)
    if not count:
        raise InputError("no window to estimate importance from", "ewc", "give text of the domains learned before")
    torch._foreach_div_(list(sums.values()), float(count))
    return sums


def accumulate(earlier: Mapping[str, Tensor] | None, new: Mapping[str, Tensor], decay: float) -> dict[str, Tensor]:
    """`decay` times the importance of earlier stages plus the new one's; None where nothing came before."""
    if earlier is None:
        return dict(new)
    assert earlier.keys() == new.keys(), "importances of two models"
    return {name: decay * earlier[name] + value for name, value in new.items()}


def _windows(batches: Iterable[Mapping[str, Tensor]]) -> Iterable[Batch]:
    for batch in batches:
        for index in range(batch["input_ids"].shape[0]):
            row = read_batch({name: value[index : index + 1] for name, value in batch.items()})
            if bool((row.targets_BT != IGNORED).any()):
                yield row


def _gradients(model: LanguageModel, row: Batch, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Of the window's mean loss; zero for experts that no token of it chose."""
    with torch.enable_grad():
        output: ModelOutput = model(
            row.input_ids_BT, attention_mask=row.attention_mask_BT, document_starts=row.document_starts_BT
        )
        loss = language_loss(output.logits, row.targets_BT)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return [gradient.float() for gradient in gradients]
