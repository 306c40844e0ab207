"""The published formulation that tests and the bench compare with is itself held to the golden files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.published_formulation import PublishedConfig, PublishedModuleFormer, random_tensors

GOLDEN = ("molm_mlp_gate", "molm_shared_kv_identity", "molm_linear_gate", "molm_switch_loss")


@pytest.fixture(scope="module", params=GOLDEN)
def published(
    request: pytest.FixtureRequest, shared_folder: Path
) -> tuple[PublishedModuleFormer, dict[str, torch.Tensor]]:
    folder = shared_folder / "golden" / request.param
    config = PublishedConfig.from_json(json.loads((folder / "config.json").read_text()))
    tensors = {
        name: tensor.double().requires_grad_() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    return PublishedModuleFormer(config, tensors), load_file(folder / "golden.safetensors")


def test_it_computes_the_golden_logits_states_and_attention(published) -> None:
    model, golden = published
    out = model.forward(golden["input_ids"])
    torch.testing.assert_close(out.logits.float(), golden["logits"].float(), rtol=2e-6, atol=2e-6)
    for number, state in enumerate(out.hidden_states):
        torch.testing.assert_close(state, golden[f"hidden_states.{number}"].double(), rtol=1e-9, atol=1e-9)
    for number, weights in enumerate(out.attentions):
        torch.testing.assert_close(weights, golden[f"attentions.{number}"].double(), rtol=1e-9, atol=1e-9)


def test_it_computes_the_golden_losses_and_every_gradient(published) -> None:
    model, golden = published
    loss, entropy, aux = model.loss(golden["input_ids"])
    torch.testing.assert_close(entropy.float(), golden["cross_entropy"].float().reshape(()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(aux.double(), golden["aux_loss"].double().reshape(()), rtol=1e-6, atol=1e-9)
    loss.backward()
    expected = {name[5:]: tensor for name, tensor in golden.items() if name.startswith("grad.")}
    assert expected.keys() == model.tensors.keys()
    for name, tensor in model.tensors.items():
        # The published head rounds logits to float32, so gradients carry float32 noise relative to their scale.
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(
            tensor.grad, expected[name].double(), rtol=1e-5, atol=1e-5 * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_it_continues_greedily_as_the_golden_file_does(published) -> None:
    model, golden = published
    assert torch.equal(model.greedy(golden["greedy"][:, :7], 20), golden["greedy"])


def test_random_tensors_have_exactly_the_published_names(published) -> None:
    model, _ = published
    tensors = random_tensors(model.config, seed=0)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in model.tensors.items()
    }
