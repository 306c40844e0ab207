"""The dense baseline: rotary positions, causality, packing, padding and caches, and a folder and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfext.commands.models import load_model, save_model
from mfext.config import GrowthConfig, ModelConfig
from mfext.conversion import from_mapping, to_mapping
from mfext.errors import InputError
from mfext.growth.growable import growable
from mfext.growth.plan import count_parameters, plan_growth
from mfext.model.build import new_model
from mfext.model.dense import DenseTransformer, rotate, rotations_of
from mfext.model.generate import Sampling, pad_left
from mfext.model.language_model import LanguageModel
from mfext.model.losses import language_loss
from mfext.model.moduleformer import ModuleFormer
from mfext.recipe import load_recipe

CONFIG = ModelConfig(
    architecture="dense", vocab_size=23, d_model=16, num_layers=2, num_heads=2, d_attention=12, attention_experts=1,
    attention_experts_per_token=1, feedforward_experts=1, feedforward_experts_per_token=1, d_feedforward=10,
    routing_loss_weight=0.0, bos_id=20, eos_id=20, pad_id=21,
)  # fmt: skip
# The same float64 sums in another order; where a document stands elsewhere its angles are rounded differently too.
SAME = {"rtol": 1e-11, "atol": 1e-11}
ELSEWHERE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def model() -> LanguageModel:
    """Random everywhere, so that attention is far from uniform and no two logits come near a tie."""
    torch.manual_seed(0)
    model = new_model(CONFIG).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def tokens(rows: int, length: int) -> Tensor:
    ids = torch.randint(0, 20, (rows, length), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 20
    return ids


def test_rotated_products_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    q_C, k_C = (torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(2))
    rotations = rotations_of(0, 900, 8, q_C)

    def product(query: int, key: int) -> float:
        turned = [rotate(x.view(1, 1, 1, 8), rotations[:, at : at + 1]) for x, at in ((q_C, query), (k_C, key))]
        return float((turned[0] * turned[1]).sum())

    near = product(7, 3)
    assert product(807, 803) == pytest.approx(near, abs=1e-11)
    assert abs(product(9, 3) - near) > 1e-3
    assert product(5, 5) == pytest.approx(float(q_C @ k_C), abs=1e-12)


def test_rotations_are_those_of_the_paper() -> None:
    """arXiv 2104.09864: at position p, the pair c of width C turns by p * 10000^(-2c / C)."""
    x_C = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    turned = rotate(x_C.view(1, 1, 1, 4), rotations_of(3, 1, 4, x_C))
    angle = torch.tensor([3.0, 3.0 / 100], dtype=torch.float64)
    torch.testing.assert_close(turned.flatten(), torch.cat((angle.cos(), angle.sin())), **SAME)


@torch.no_grad()
def test_no_logit_depends_on_a_later_token(model: LanguageModel) -> None:
    ids = tokens(2, 30)
    changed = ids.clone()
    changed[:, 17:] = (changed[:, 17:] + 1) % 20
    torch.testing.assert_close(model(changed).logits[:, :17], model(ids).logits[:, :17], rtol=0, atol=0)
    assert not torch.allclose(model(changed).logits[:, 17:], model(ids).logits[:, 17:])


@torch.no_grad()
def test_order_matters(model: LanguageModel) -> None:
    first, second = torch.tensor([[20, 1, 2, 3]]), torch.tensor([[20, 2, 1, 3]])
    assert not torch.allclose(model(first).logits[:, -1], model(second).logits[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(1,) * 40, (36, 1, 3), (5, 35)], ids=["single", "long first", "long last"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_cache_changes_nothing(model: LanguageModel, pieces: tuple[int, ...], rows: int) -> None:
    ids = tokens(rows, 40)
    cache = model.new_cache(rows, 40)
    parts = [model(piece, cache=cache).logits for piece in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, **SAME)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_makes_nothing_infinite(model: LanguageModel, side: str) -> None:
    ids = tokens(2, 20)
    pads = torch.full((2, 6), CONFIG.pad_id)
    padded = torch.cat([pads, ids] if side == "left" else [ids, pads], dim=1)
    logits = model(padded, attention_mask=(padded != CONFIG.pad_id).long()).logits
    real = slice(6, None) if side == "left" else slice(0, 20)
    torch.testing.assert_close(logits[:, real], model(ids).logits, **ELSEWHERE)
    assert torch.isfinite(logits).all()


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_packed_documents_do_not_see_each_other(model: LanguageModel, cached: bool) -> None:
    ids = tokens(2, 30)
    ids[:, 11], ids[:, 25] = 20, 20
    starts = torch.tensor([0] * 11 + [11] * 14 + [25] * 5).expand(2, 30)
    if cached:
        cache = model.new_cache(2, 30)
        pieces = zip(ids.split(4, dim=1), starts.split(4, dim=1), strict=True)
        logits = torch.cat([model(piece, document_starts=begin, cache=cache).logits for piece, begin in pieces], dim=1)
    else:
        logits = model(ids, document_starts=starts).logits
    alone = [model(part).logits for part in ids.split((11, 14, 5), dim=1)]
    torch.testing.assert_close(logits, torch.cat(alone, dim=1), **ELSEWHERE)


@torch.no_grad()
def test_prompts_of_different_lengths_decode_as_they_would_alone(model: LanguageModel) -> None:
    prompts = [[20, 1, 2, 3, 4, 5, 6, 7, 8, 9], [20], [20, 9, 8]]
    greedy = Sampling(max_new_tokens=12, stop_at_eos=False)
    together = model.generate(*pad_left(prompts, CONFIG.pad_id), sampling=greedy)
    for prompt, row in zip(prompts, together.rows, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert row.tokens == tuple(ids[0, len(prompt) :].tolist())


@torch.no_grad()
def test_attention_weights_are_causal_distributions_within_a_document(model: LanguageModel) -> None:
    starts = torch.tensor([[0] * 4 + [4] * 3])
    for document_starts in (None, starts):
        output = model(tokens(1, 7), document_starts=document_starts, return_hidden=True, return_attentions=True)
        assert len(output.hidden_states) == 3
        for weights in output.attentions:
            assert weights.shape == (1, 1, 2, 7, 7)
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **SAME)
            assert not weights.triu(1).any()
            assert document_starts is None or not weights[..., 4:, :4].any()


def test_checkpointed_gradients_are_the_stored_ones(model: LanguageModel) -> None:
    ids, starts = tokens(2, 12), torch.tensor([0] * 5 + [5] * 7).expand(2, 12)
    gradients = []
    for on in (False, True):
        model.set_gradient_checkpointing(on)
        model.zero_grad()
        language_loss(model(ids, document_starts=starts).logits[:, :-1], ids[:, 1:]).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for stored, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, stored, **SAME)


def test_what_is_added_to_the_residual_starts_smaller_the_deeper_the_model() -> None:
    torch.manual_seed(0)
    model = new_model(replace(CONFIG, d_model=64, d_attention=64, d_feedforward=64, num_layers=8))
    scales = {
        name: float(weight.detach().std()) for name, weight in model.named_parameters() if name.startswith("blocks.3.")
    }
    inner, added = scales["blocks.3.feedforward.up.weight"], scales["blocks.3.feedforward.down.weight"]
    assert inner / added == pytest.approx(4, rel=0.1)
    assert scales["blocks.3.attention.output.weight"] == pytest.approx(added, rel=0.1)


@pytest.mark.parametrize(("init", "std"), [("scaled", 1.0), ("published", 0.02)])
def test_a_scaled_start_gives_a_token_the_size_of_what_is_added_to_it(init: str, std: float) -> None:
    torch.manual_seed(0)
    model = new_model(replace(CONFIG, init=init, d_model=64, d_attention=64, vocab_size=300))
    assert float(model.embedding.weight.detach().std()) == pytest.approx(std, rel=0.05)


def test_a_model_folder_gives_back_the_same_dense_model(model: LanguageModel, tmp_path: Path) -> None:
    model = model.float()
    save_model(model, tmp_path / "dense")
    again = load_model(tmp_path / "dense")
    assert isinstance(again, DenseTransformer)
    assert again.config == CONFIG
    assert torch.equal(again(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


def test_a_config_from_before_there_were_architectures_is_a_moduleformer(tmp_path: Path) -> None:
    old = to_mapping(ModelConfig(d_model=16, d_attention=16, num_layers=1, d_feedforward=8, d_router=4))
    del old["architecture"]
    config = from_mapping(ModelConfig, json.loads(json.dumps(old)), "config.json")
    assert isinstance(new_model(config), ModuleFormer)


def test_a_dense_model_cannot_grow() -> None:
    for attempt in (lambda: plan_growth(CONFIG, GrowthConfig(), "code"), lambda: growable(new_model(CONFIG))):
        with pytest.raises(InputError, match="a dense model has no experts to add to") as refused:
            attempt()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"), [("attention_experts", 2), ("routing_loss_weight", 1e-3), ("d_attention", 6)]
)
def test_a_dense_config_says_what_does_not_fit_it(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{key}="):
        replace(CONFIG, **{key: value})


@pytest.mark.parametrize(
    ("name", "reference", "what"),
    [
        ("dense_active", "mini", "active_per_token"),
        ("dense_total", "mini", "total"),
        ("dense_demo_active", "demo", "active_per_token"),
        ("dense_demo_total", "demo", "total"),
    ],
)
def test_the_baselines_are_of_the_size_their_names_say(name: str, reference: str, what: str) -> None:
    own, other = (
        count_parameters(load_recipe("pretrain", None, [f"model={each}"]).default_base.model)
        for each in (name, reference)
    )
    assert getattr(own, what) == pytest.approx(getattr(other, what), rel=0.005)
    header = (Path(__file__).parents[2] / "conf" / "model" / f"{name}.yaml").read_text().split("architecture:")[0]
    for count in (own.total, own.active_per_token, other.total, other.active_per_token):
        assert f"{count:_}" in header
