"""Learning without forgetting: its divergence, where it vanishes, and that the teacher stays out of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mfext.model.language_model import ModelOutput
from mfext.model.moduleformer import ModuleFormer
from mfext.training.batch import Batch, read_batch
from mfext.training.methods.lwf import Lwf
from mfext.training.module import ContinualModuleFormer
from tests.training.tiny_training import RandomTokens, same_bits, tiny_model

torch.set_num_threads(1)


def batch() -> Batch:
    return read_batch(RandomTokens(0, 1, 1, 0, 1)[0])


def logits(model: ModuleFormer, read: Batch) -> Tensor:
    output: ModelOutput = model(read.input_ids_BT, document_starts=read.document_starts_BT)
    return output.logits


def moved(model: ModuleFormer) -> ModuleFormer:
    """The model after some training, in a word."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for each in model.parameters():
            each += 0.05 * torch.randn(each.shape, generator=generator)
    return model


def test_a_student_that_is_the_teacher_pays_nothing_and_is_not_pulled() -> None:
    model, read = tiny_model(), batch()
    said = logits(model, read)
    penalty = Lwf(model, 3.0, 2.0).penalty(model, ModelOutput(said, ()), read)
    (gradient,) = torch.autograd.grad(penalty, said)
    assert abs(penalty.item()) < 1e-6 and gradient.abs().max() < 1e-7


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_gradient_is_that_of_the_softened_cross_entropy_times_the_squared_temperature(temperature: float) -> None:
    teacher, read = tiny_model(), batch()
    method = Lwf(teacher, 0.5, temperature)
    student = moved(tiny_model())
    said = logits(student, read)
    with torch.no_grad():
        soft = F.softmax(logits(teacher, read).double() / temperature, -1)
    cross_entropy = -(soft * F.log_softmax(said.double() / temperature, -1)).sum(-1).mean()
    entropy = -(soft * soft.log()).sum(-1).mean()
    expected = 0.5 * temperature**2 * cross_entropy
    penalty = method.penalty(student, ModelOutput(said, ()), read)
    assert penalty.item() == pytest.approx((expected - 0.5 * temperature**2 * entropy).item(), rel=1e-4, abs=1e-6)
    (found,), (wanted,) = torch.autograd.grad(penalty, said), torch.autograd.grad(expected, said)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_only_scored_positions_count() -> None:
    teacher, read, student = tiny_model(), batch(), moved(tiny_model())
    method, said = Lwf(teacher, 1.0, 2.0), logits(student, read)
    half = replace(read, targets_BT=read.targets_BT.clone())
    half.targets_BT[:, 6:] = -100
    (gradient,) = torch.autograd.grad(method.penalty(student, ModelOutput(said, ()), half), said)
    assert not gradient[:, 6:].any() and gradient[:, :6].any()


def test_the_teacher_is_a_frozen_copy_outside_of_model_optimizer_and_checkpoint() -> None:
    model = tiny_model().train()
    names = dict(model.named_parameters()).keys()
    method = Lwf(model, 1.0, 2.0)
    module = ContinualModuleFormer(model, method=method)
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    assert {f"model.{name}" for name in names} == dict(module.named_parameters()).keys() == module.state_dict().keys()
    assert model.training and all(each.requires_grad for each in model.parameters())
    assert not method.teacher.training and not any(each.requires_grad for each in method.teacher.parameters())
    module.training_step(RandomTokens(0, 1, 1, 0, 1)[0], 0).backward()
    moved(model)
    assert all(each.grad is None for each in method.teacher.parameters())
    assert same_bits(method.teacher.state_dict(), before)
