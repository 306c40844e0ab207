"""The model against what the authors' released code computed in float64 (four published-layout checkpoints).

That code rounds logits to float32 in its head and takes the cross-entropy there, so three tolerances follow:

- logits: half a float32 ulp of the stored value, on top of the float64 error;
- `cross_entropy`: a float32 number near 5, so one float32 ulp (4.8e-7). Taken in float32 from rounded logits, as
  published, ours is the same float32 number on the machine where the vectors were checked; a float64 cross-entropy
  stays within that ulp plus the rounding of the logits.
- gradients of `loss`: the published backward enters float64 through that float32 head, so ours does too. They agree to
  9e-15 where torch's float32 exponentials are those of the machine the vectors come from (AVX-512), to 6e-8 where they
  are others (AVX2), as through a float64 head: hence one float32 ulp of the largest.

`aux_loss` never was float32 and holds to 1e-10, and so does `loss` less the stored cross-entropy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mfext.config import ModelConfig
from mfext.hub.molm import config_from_published, published_name, tensors_from_published
from mfext.model.generate import Sampling, generate
from mfext.model.language_model import ModelOutput
from mfext.model.losses import language_loss, routing_loss
from mfext.model.moduleformer import ModuleFormer

CHECKPOINTS = ("molm_mlp_gate", "molm_shared_kv_identity", "molm_linear_gate", "molm_switch_loss")
CARRIED = Path(__file__).parents[1] / "golden"
FLOAT32_ULP = torch.finfo(torch.float32).eps
EXACT = 1e-10
# Two ways through the same float64 model differ by the order of sums: under 1e-14 here, with two digits to spare.
SAME = 1e-12


@dataclass(frozen=True)
class Golden:
    """One checkpoint in float64 and the vectors that belong to it."""

    config: ModelConfig
    model: ModuleFormer
    vectors: dict[str, Tensor]

    @property
    def input_ids(self) -> Tensor:
        return self.vectors["input_ids"]

    def losses(self, output: ModelOutput, logits_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        logits = output.logits[:, :-1].to(logits_dtype)
        aux = routing_loss(output.routings, None, self.config.routing_loss)
        return language_loss(logits, self.input_ids[:, 1:]), aux


@pytest.fixture(params=CHECKPOINTS)
def golden(request: pytest.FixtureRequest) -> Golden:
    """Two checkpoints travel with the tests; the other two are read from the shared folder, or skip."""
    folder = CARRIED / request.param
    if not folder.is_dir():
        folder = request.getfixturevalue("shared_folder") / "golden" / request.param
    config = config_from_published(json.loads((folder / "config.json").read_text()))
    model = ModuleFormer(config).double()
    published = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(tensors_from_published(published, config), strict=True)
    return Golden(config, model.eval(), load_file(folder / "golden.safetensors"))


def assert_logits(actual: Tensor, stored: Tensor) -> None:
    tolerance = stored.abs() * FLOAT32_ULP / 2 + EXACT
    assert (actual.double() - stored).abs().le(tolerance).all()
    assert (actual.double() - stored).abs().max() <= 1e-6


def test_logits_hidden_states_and_attentions_are_the_published_ones(golden: Golden) -> None:
    with torch.no_grad():
        output = golden.model(golden.input_ids, return_hidden=True, return_attentions=True)
    assert_logits(output.logits, golden.vectors["logits"])
    assert len(output.hidden_states) == golden.config.num_layers + 1
    assert len(output.attentions) == golden.config.num_layers
    for kind, ours in (("hidden_states", output.hidden_states), ("attentions", output.attentions)):
        for index, tensor in enumerate(ours):
            torch.testing.assert_close(tensor, golden.vectors[f"{kind}.{index}"], rtol=0, atol=EXACT)


def test_losses_are_the_published_ones(golden: Golden) -> None:
    with torch.no_grad():
        output = golden.model(golden.input_ids)
        rounded, aux = golden.losses(output, torch.float32)
        exact, _ = golden.losses(output, torch.float64)
    stored, weight = golden.vectors["cross_entropy"].item(), golden.config.routing_loss_weight
    ulp = FLOAT32_ULP * 4  # numbers in [4, 8)
    assert 4 <= stored < 8
    assert abs(aux.item() - golden.vectors["aux_loss"].item()) <= EXACT
    assert abs(rounded.item() - stored) <= ulp
    assert abs(exact.item() - stored) <= ulp + golden.vectors["logits"].abs().max().item() * FLOAT32_ULP
    assert abs(weight * aux.item() - (golden.vectors["loss"].item() - stored)) <= EXACT


def test_gradients_of_every_parameter_are_the_published_ones(golden: Golden) -> None:
    cross_entropy, aux = golden.losses(golden.model(golden.input_ids), torch.float32)
    (cross_entropy + golden.config.routing_loss_weight * aux).backward()
    seen = set()
    for name, parameter in golden.model.named_parameters():
        key = "grad." + published_name(name, golden.config)
        stored = golden.vectors[key].reshape(parameter.shape)
        assert parameter.grad is not None
        assert (parameter.grad - stored).abs().max() <= FLOAT32_ULP * stored.abs().max(), name
        seen.add(key)
    assert seen == {key for key in golden.vectors if key.startswith("grad.")}


def test_a_one_percent_change_of_one_tensor_is_noticed(golden: Golden) -> None:
    with torch.no_grad():
        golden.model.blocks[1].feedforward.experts.down.mul_(1.01)
        logits = golden.model(golden.input_ids).logits
    with pytest.raises(AssertionError):
        assert_logits(logits, golden.vectors["logits"])


@pytest.mark.parametrize("pieces", [(29,), (1,) * 29, (7, 1, 13, 8), (28, 1), (2, 27)], ids=str)
def test_a_cache_gives_the_published_logits_in_any_pieces(golden: Golden, pieces: tuple[int, ...]) -> None:
    cache, logits, begin = golden.model.new_cache(3, 29), [], 0
    with torch.no_grad():
        for length in pieces:
            logits.append(golden.model(golden.input_ids[:, begin : begin + length], cache=cache).logits)
            begin += length
    assert_logits(torch.cat(logits, dim=1), golden.vectors["logits"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
def test_padding_changes_neither_logits_nor_losses(golden: Golden, side: str, cached: bool) -> None:
    lengths = (29, 17, 5)
    ids = torch.full((3, 31), golden.config.pad_id)
    mask = torch.zeros(3, 31, dtype=torch.long)
    for row, length in enumerate(lengths):
        where = slice(31 - length, 31) if side == "left" else slice(0, length)
        ids[row, where], mask[row, where] = golden.input_ids[row, :length], 1
    cache = golden.model.new_cache(3, 31) if cached else None
    with torch.no_grad():
        logits = golden.model(ids, attention_mask=mask, cache=cache).logits
    for row, length in enumerate(lengths):
        assert_logits(logits[row][mask[row].bool()], golden.vectors["logits"][row, :length])


def test_padding_tokens_do_not_count_in_the_routing_loss(golden: Golden) -> None:
    with torch.no_grad():
        ids = torch.cat([golden.input_ids, torch.full((3, 4), golden.config.pad_id)], dim=1)
        mask = torch.ones_like(ids)
        mask[:, 29:] = 0
        padded = golden.model(ids, attention_mask=mask)
        aux = routing_loss(padded.routings, mask.bool(), golden.config.routing_loss)
    assert abs(aux.item() - golden.vectors["aux_loss"].item()) <= EXACT


def test_cached_greedy_decoding_continues_as_published(golden: Golden) -> None:
    stored = golden.vectors["greedy"]
    rows = generate(golden.model, stored[:, :7], None, Sampling(max_new_tokens=20, stop_at_eos=False)).rows
    assert rows[0].tokens == tuple(stored[0, 7:].tolist())


def test_greedy_decoding_without_a_cache_continues_as_published(golden: Golden) -> None:
    stored = golden.vectors["greedy"]
    ids = stored[:, :7]
    with torch.no_grad():
        for _ in range(20):
            ids = torch.cat([ids, golden.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, stored)


def test_padded_greedy_decoding_continues_as_published(golden: Golden) -> None:
    stored = golden.vectors["greedy"]
    pads = torch.full((1, 6), golden.config.pad_id)
    other = golden.input_ids[1:2, :13]
    ids = torch.cat([torch.cat([pads, stored[:, :7]], dim=1), other])
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    rows = generate(golden.model, ids, mask, Sampling(max_new_tokens=20, stop_at_eos=False)).rows
    assert rows[0].tokens == tuple(stored[0, 7:].tolist())


def test_left_padding_read_in_pieces_equals_no_padding(golden: Golden) -> None:
    ids = torch.cat([torch.full((3, 9), golden.config.pad_id), golden.input_ids], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :9] = 0
    cache, parts = golden.model.new_cache(3, 38), []
    with torch.no_grad():
        plain = golden.model(golden.input_ids).logits
        for begin in range(0, 38, 5):
            piece = slice(begin, begin + 5)
            parts.append(golden.model(ids[:, piece], attention_mask=mask[:, piece], cache=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, 9:], plain, rtol=SAME, atol=SAME)
