"""Low-rank adapters: identity at start, exact merging, frozen originals, and peft's numbers on a dense layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mfext.config_methods import LoraConfig
from mfext.model.language_model import LanguageModel
from mfext.model.moduleformer import ModuleFormer
from mfext.training.fit import fit
from mfext.training.methods.lora import AdaptedLinear, Adapter, Lora, add_adapters, merge_adapters
from mfext.training.module import ContinualModuleFormer
from tests.training.tiny_training import (
    CONFIG,
    Commits,
    TinyStream,
    same_bits,
    tiny_dense_model,
    tiny_model,
    tiny_settings,
    tiny_training,
    weights,
)

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "peft_linear" / "numbers.json"
SMALL = LoraConfig(rank=2, alpha=6.0)
ALL = replace(SMALL, routers=True, embedding_and_head=True)
EPS = torch.finfo(torch.float32).eps


def ids() -> Tensor:
    return torch.randint(2, CONFIG.vocab_size, (3, 11), generator=torch.Generator().manual_seed(4))


def wake(model: nn.Module) -> None:
    """Adapters that change something, as training would."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Adapter):
                for factor in (module.left, module.right):
                    factor.copy_(0.2 * torch.randn(factor.shape, generator=generator))


def test_a_dense_layer_gives_what_peft_gives_forward_backward_and_merged() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    numbers = {name: torch.tensor(value) for name, value in golden.items() if isinstance(value, list)}
    linear = nn.Linear(5, 7)
    linear.load_state_dict({"weight": numbers["weight"], "bias": numbers["bias"]})
    layer = AdaptedLinear(linear, LoraConfig(rank=golden["rank"], alpha=golden["alpha"]), "left")
    adapter = layer.adapters["weight"]
    assert isinstance(adapter, Adapter)
    with torch.no_grad():
        adapter.left.copy_(numbers["left"])
        adapter.right.copy_(numbers["right"])
    y = layer(numbers["x"])
    y.square().sum().backward()
    # Sums of at most 7 * 4 products of numbers below 40, ordered differently.
    close = {"rtol": 32 * EPS, "atol": 64 * 40 * EPS}
    torch.testing.assert_close(y, numbers["y"], **close)
    torch.testing.assert_close(adapter.left.grad, numbers["left_gradient"], **close)
    torch.testing.assert_close(adapter.right.grad, numbers["right_gradient"], **close)
    merged = layer.merge()
    assert merged is linear
    torch.testing.assert_close(linear.weight, numbers["merged"], **close)


def test_every_expert_has_a_change_of_its_own_of_the_rank_asked_for() -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    add_adapters(model, SMALL, seed=1)
    wake(model)
    factors = {name: value.clone() for name, value in model.named_parameters() if ".adapters." in name}
    merge_adapters(model)
    for name in ("query", "output"):
        site = "blocks.1.attention.experts"
        change = model.state_dict()[f"{site}.{name}"] - before[f"{site}.{name}"]
        left, right = (factors[f"{site}.adapters.{name}.{side}"] for side in ("left", "right"))
        for expert in range(CONFIG.attention_experts):
            expected = 3.0 * left[expert] @ right[expert]  # alpha / rank
            torch.testing.assert_close(change[expert], expected, rtol=1e-5, atol=1e-6)
            assert torch.linalg.matrix_rank(expected) == 2


@pytest.mark.parametrize("settings", [SMALL, ALL], ids=["experts", "everything"])
@pytest.mark.parametrize("made", [tiny_model, tiny_dense_model])
def test_new_adapters_change_no_bit_of_what_the_model_computes(
    made: Callable[[], LanguageModel], settings: LoraConfig
) -> None:
    model = made()
    before = model(ids()).logits
    add_adapters(model, settings, seed=1)
    assert torch.equal(model(ids()).logits, before)


@pytest.mark.parametrize("settings", [SMALL, ALL], ids=["experts", "everything"])
@pytest.mark.parametrize("made", [tiny_model, tiny_dense_model])
def test_merging_keeps_what_the_adapted_model_computes_and_gives_the_old_names_back(
    made: Callable[[], LanguageModel], settings: LoraConfig
) -> None:
    model = made()
    plain, names = model(ids()).logits, list(model.state_dict())
    add_adapters(model, settings, seed=1)
    wake(model)
    adapted = model(ids()).logits
    assert (adapted - plain).abs().max() > 0.01
    merge_adapters(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model(ids()).logits, adapted)
    assert not any(isinstance(module, Adapter) for module in model.modules())


def test_merging_untrained_adapters_changes_no_bit_of_any_weight() -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    add_adapters(model, ALL, seed=1)
    merge_adapters(model)
    assert same_bits(model.state_dict(), before)


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        model = tiny_model()
        add_adapters(model, ALL, seed)
        return {name: value for name, value in model.state_dict().items() if ".adapters." in name}

    first = drawn(5)
    torch.rand(7)
    assert same_bits(drawn(5), first) and not same_bits(drawn(6), first)
    zero = {name for name, value in first.items() if not value.any()}
    assert len(zero) * 2 == len(first), "one factor of each is zero"
    assert all(
        value.abs().max() <= value.shape[-2] ** -0.5 for name, value in first.items() if name.endswith("up.left")
    )


def test_adapters_reach_attention_and_experts_and_more_only_where_asked() -> None:
    model, wide = tiny_model(), tiny_model()
    add_adapters(model, SMALL, 1)
    add_adapters(wide, ALL, 1)
    method = Lora()
    few = {name.split(".adapters.")[0].split(".", 2)[-1] for name in method.trainable(model)}
    assert few == {"attention.experts", "attention.key", "attention.value", "feedforward.experts"}
    more = method.trainable(wide) - method.trainable(model)
    parts = {name.split(".adapters.")[0].split(".", 2)[-1] for name in more if name.startswith("blocks.")}
    assert parts == {
        f"{kind}.router.{layer}" for kind in ("attention", "feedforward") for layer in ("hidden", "output")
    }
    assert {name.split(".")[0] for name in more} == {"blocks", "embedding", "lm_head"}


def test_training_and_merging_twice_moves_only_adapters_while_it_trains(tmp_path: Path) -> None:
    model = tiny_model()
    for stage in (1, 2):
        start = {name: value.clone() for name, value in model.state_dict().items()}
        add_adapters(model, SMALL, seed=stage)
        module = ContinualModuleFormer(model, method=Lora())
        settings = tiny_settings(tmp_path / str(stage), tiny_training(weight_decay=1.0), stage=stage)
        result = fit(module, TinyStream(), settings, commit=Commits())
        held = {
            name.replace("original.", ""): value for name, value in weights(module).items() if ".adapters." not in name
        }
        assert result.frozen_ok and same_bits(held, start)
        assert all(name.rpartition("/")[0] in Lora().trainable(model) for name in result.optimizer)
        merge_adapters(model)
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
        assert {name.split(".", 2)[-1] for name in moved} == {
            "attention.experts.query",
            "attention.experts.output",
            "attention.key.weight",
            "attention.value.weight",
            "feedforward.experts.up",
            "feedforward.experts.down",
        }


def test_counting_adapters_needs_no_memory_for_the_model() -> None:
    with torch.device("meta"):
        model = ModuleFormer(CONFIG)
        add_adapters(model, SMALL, seed=1)
    assert all(each.is_meta for each in model.parameters())
