from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mfext.config import ModelConfig
from mfext.errors import InputError
from mfext.hub.molm import (
    config_from_published,
    is_published_config,
    published_config,
    published_name,
    published_tensors,
    tensors_from_published,
)
from mfext.model.moduleformer import ModuleFormer

CARRIED = Path(__file__).parents[1] / "golden"
SMALL: dict[str, object] = {
    "model_type": "moduleformer",
    "vocab_size": 11,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "att_hidden": 6,
    "ffd_hidden": 5,
    "n_att_experts": 3,
    "k_att": 2,
    "n_mlp_experts": 4,
    "k_mlp": 1,
    "gating_size": 7,
    "bos_token_id": 10,
    "eos_token_id": 10,
}
VARIANTS: tuple[dict[str, object], ...] = (
    {},
    {"gate_type": "linear"},
    {"gate_type": "gmm"},
    {"n_head": 1, "att_hidden": 8},
    {"aux_loss_type": "switch", "aux_loss_weight": 0.01},
)


def published(variant: dict[str, object]) -> tuple[dict[str, object], ModelConfig, dict[str, Tensor]]:
    mapping = {**SMALL, **variant}
    config = config_from_published(mapping)
    return mapping, config, published_tensors(ModuleFormer(config).state_dict(), config)


@pytest.fixture(params=sorted(folder.name for folder in CARRIED.iterdir()))
def golden_folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    yield CARRIED / request.param


def test_a_published_config_is_known_by_its_model_type() -> None:
    assert is_published_config({"model_type": "moduleformer"})
    assert not is_published_config({"model_type": "mfext_moduleformer"})
    assert not is_published_config({})


def test_every_golden_tensor_gets_exactly_the_names_and_shapes_of_the_model(golden_folder: Path) -> None:
    config = config_from_published(json.loads((golden_folder / "config.json").read_text()))
    theirs = load_file(golden_folder / "model.safetensors")
    ours = tensors_from_published(theirs, config)
    expected = ModuleFormer(config).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in expected.items()}
    back = published_tensors(ours, config)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_out_and_in_again_is_the_same_model(variant: dict[str, object]) -> None:
    _, config, theirs = published(variant)
    assert config_from_published(published_config(config)) == config
    model = ModuleFormer(config)
    model.load_state_dict(tensors_from_published(theirs, config), strict=True)
    assert all(
        torch.equal(tensor, theirs[published_name(name, config)].reshape(tensor.shape))
        for name, tensor in model.state_dict().items()
    )


def test_the_sizes_of_the_released_models_are_read() -> None:
    released = {
        **SMALL,
        "vocab_size": 50295,
        "n_embd": 1024,
        "n_layer": 24,
        "n_head": 1,
        "att_hidden": 1024,
        "k_mlp": 2,
    }
    released |= {
        "ffd_hidden": 2048,
        "n_att_experts": 16,
        "n_mlp_experts": 32,
        "gating_size": 256,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    }
    released |= {"torch_dtype": "bfloat16", "auto_map": {}, "pad_token_id": None, "use_cache": True}
    config = config_from_published(released)
    assert config.identity_keys_values
    assert (config.d_model, config.d_router, config.feedforward_experts_per_token) == (1024, 256, 2)
    assert (config.router, config.routing_loss, config.pad_id, config.init) == ("mlp", "mi", 50256, "published")


def test_gmm_routers_keep_the_published_names_and_the_shape_of_the_temperature() -> None:
    _, config, theirs = published({"gate_type": "gmm"})
    gate = "transformer.h.1.attn.q_proj.gate"
    assert theirs[f"{gate}.w_gate.weight"].shape == (7, 8)
    assert theirs[f"{gate}.expert_centroids"].shape == (3, 7)
    assert theirs[f"{gate}.temperature"].shape == (1,)
    assert tensors_from_published(theirs, config)["blocks.1.attention.router.temperature"].shape == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    _, config, theirs = published({})
    ours = tensors_from_published({name: tensor.to(dtype) for name, tensor in theirs.items()}, config)
    assert {tensor.dtype for tensor in ours.values()} == {dtype}


def test_the_masks_that_released_checkpoints_store_are_accepted_and_only_with_their_values() -> None:
    _, config, theirs = published({})
    mask = torch.ones(9, 9, dtype=torch.int8).tril()
    cumulative = torch.ones(9, 9).tril(-1)
    buffers = {"transformer.h.0.attn.mask": mask, "transformer.h.0.attn.cum_weight": cumulative}
    assert tensors_from_published({**theirs, **buffers}, config).keys() == tensors_from_published(theirs, config).keys()
    for wrong in ({"transformer.h.0.attn.mask": mask.T}, {"transformer.h.2.attn.mask": mask}):
        with pytest.raises(InputError, match="unknown tensor"):
            tensors_from_published({**theirs, **wrong}, config)


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "transformer.h.1.ln_2.bias", "transformer.h.0.mlpf.gate.w_gate.3.weight"]
)
def test_a_tensor_that_is_missing_or_wrong_is_named(name: str) -> None:
    _, config, theirs = published({})
    tensor = theirs[name]
    poisoned = tensor.clone()
    poisoned.view(-1)[-1] = math.nan
    infinite = tensor.clone()
    infinite.view(-1)[0] = -math.inf
    wrong = {
        "missing tensor": None,
        "wrong shape": tensor[..., :-1],
        "wrong dtype": tensor.long(),
        "non-finite tensor": poisoned,
    }
    for what, value in (*wrong.items(), ("non-finite tensor", infinite)):
        damaged = {key: old for key, old in theirs.items() if key != name} | ({} if value is None else {name: value})
        with pytest.raises(InputError, match=what) as caught:
            tensors_from_published(damaged, config)
        assert caught.value.where == name


def test_unknown_tensors_are_named_in_both_directions() -> None:
    _, config, theirs = published({})
    extra = torch.zeros(1)
    for name in ("transformer.h.2.ln_1.weight", "transformer.h.0.attn.k_proj.extra", "embedding.weight"):
        with pytest.raises(InputError, match="unknown tensor") as caught:
            tensors_from_published({**theirs, name: extra}, config)
        assert caught.value.where == name
    ours = tensors_from_published(theirs, config)
    with pytest.raises(InputError, match=r"unknown tensor: generations\.0\.head\.full"):
        published_tensors({**ours, "generations.0.head.full": extra}, config)
    with pytest.raises(InputError, match=r"missing tensor: lm_head\.weight"):
        published_tensors({name: tensor for name, tensor in ours.items() if name != "lm_head.weight"}, config)


def test_key_and_value_projections_are_unknown_where_they_are_the_identity() -> None:
    _, config, theirs = published({"n_head": 1, "att_hidden": 8})
    with pytest.raises(InputError, match=r"unknown tensor: transformer\.h\.0\.attn\.k_proj\.weight"):
        tensors_from_published({**theirs, "transformer.h.0.attn.k_proj.weight": torch.zeros(8, 8)}, config)


def test_an_absurd_layer_count_fails_at_the_first_missing_layer() -> None:
    _, config, theirs = published({})
    with pytest.raises(InputError, match=r"missing tensor: transformer\.h\.2\."):
        tensors_from_published(theirs, replace(config, num_layers=10**12))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gpt2"),
        ("n_embd", None),
        ("n_embd", "8"),
        ("n_embd", 8.0),
        ("n_embd", True),
        ("n_embd", -8),
        ("n_layer", 0),
        ("n_head", 4),
        ("k_att", 4),
        ("k_mlp", 0),
        ("gate_type", "tree"),
        ("gate_type", 3),
        ("aux_loss_type", "z"),
        ("aux_loss_weight", math.nan),
        ("aux_loss_weight", "much"),
        ("activation_function", "relu"),
        ("tie_word_embeddings", True),
        ("layer_norm_epsilon", 1e-6),
        ("bos_token_id", 11),
        ("pad_token_id", "none"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_in_one_line(key: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        config_from_published({**SMALL, key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["vocab_size", "n_embd", "att_hidden", "k_mlp"])
def test_a_config_without_a_size_names_the_key(key: str) -> None:
    with pytest.raises(InputError, match=f"missing key: {key}"):
        config_from_published({name: value for name, value in SMALL.items() if name != key})
