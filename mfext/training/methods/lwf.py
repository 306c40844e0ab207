"""Learning without forgetting: on the new text, stay near what the previous model would have said.

Li and Hoiem 2016 (arXiv 1606.09282), with the squared temperature of Hinton et al. 2015 (arXiv 1503.02531).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfext.model.language_model import LanguageModel, ModelOutput
from mfext.model.losses import IGNORED
from mfext.training.batch import Batch


@dataclass(frozen=True, eq=False)
class Lwf:
    """Trains every parameter; the penalty is strength * T^2 * KL(teacher || student), both softened by the
    `temperature` T, the mean over scored positions, in nats per token.

    The divergence is the paper's cross-entropy less the teacher's entropy: the same gradient, and zero for a student
    that says what the teacher says. T^2 keeps the gradient's size when T changes, since softening divides it by T^2.
    Both models see the same batch, so a step costs one forward of the teacher more.

    Holds a frozen copy of the `teacher` it is given, in evaluation mode, outside the module tree: it is in no
    `named_parameters()`, no optimizer and no checkpoint.
    """

    trains: ClassVar[str] = "every parameter, near what the previous model says about the new text"
    teacher: LanguageModel
    strength: float
    temperature: float
    name: str = "lwf"
    starts_from: ClassVar[Literal["previous", "base"]] = "previous"
    balances: ClassVar[bool] = True

    def __post_init__(self) -> None:
        copy = deepcopy(self.teacher).eval().requires_grad_(False)
        copy.set_gradient_checkpointing(False)
        object.__setattr__(self, "teacher", copy)

    def trainable(self, model: nn.Module) -> set[str]:
        return {name for name, _ in model.named_parameters()}

    def penalty(self, model: nn.Module, output: ModelOutput, batch: Batch) -> Tensor:
        scored_BT = batch.targets_BT != IGNORED
        teacher_MV = self._teacher_logits(batch)[scored_BT].float() / self.temperature
        student_MV = output.logits[scored_BT].float() / self.temperature
        divergence = F.kl_div(
            F.log_softmax(student_MV, dim=-1),
            F.log_softmax(teacher_MV, dim=-1),
            reduction="batchmean",
            log_target=True,
        )
        return self.strength * self.temperature**2 * divergence

    def describe(self) -> str:
        return f"{self.trains}, strength {self.strength:g}, temperature {self.temperature:g}"

    @torch.no_grad()
    def _teacher_logits(self, batch: Batch) -> Tensor:
        if self.teacher.device != batch.input_ids_BT.device:
            self.teacher.to(batch.input_ids_BT.device)
        output: ModelOutput = self.teacher(
            batch.input_ids_BT, attention_mask=batch.attention_mask_BT, document_starts=batch.document_starts_BT
        )
        return output.logits
