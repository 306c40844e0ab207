"""Block expansion: identity at start, old layers keep their bits under new numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mfext.config import ModelConfig
from mfext.errors import InputError
from mfext.growth.apply import apply_plan
from mfext.growth.plan import new_blocks, old_names, plan_expansion, plan_growth
from mfext.model.moduleformer import ModuleFormer
from mfext.training.methods.expand import Expand
from tests.training.tiny_training import CONFIG, GROWTH


def model(config: ModelConfig = CONFIG) -> ModuleFormer:
    torch.manual_seed(3)
    return ModuleFormer(config).eval()


@pytest.mark.parametrize(
    ("layers", "blocks", "expected"), [(2, 1, (2,)), (2, 2, (1, 3)), (4, 2, (2, 5)), (5, 3, (1, 4, 7))]
)
def test_new_layers_are_spread_evenly(layers: int, blocks: int, expected: tuple[int, ...]) -> None:
    plan = plan_expansion(replace(CONFIG, num_layers=layers), blocks)
    assert new_blocks(plan) == expected
    assert plan.after.num_layers == layers + blocks


def test_an_expanded_model_computes_the_same_bits(blocks: int = 2) -> None:
    before, after = model(), model()
    apply_plan(after, plan_expansion(after.config, blocks))
    ids = torch.randint(2, CONFIG.vocab_size, (3, 11), generator=torch.Generator().manual_seed(0))
    assert torch.equal(before(ids).logits, after(ids).logits)


def test_old_tensors_keep_their_bits_under_their_new_names() -> None:
    before, after = model(), model()
    plan = plan_expansion(after.config, 2)
    apply_plan(after, plan)
    old, new = before.state_dict(), after.state_dict()
    names = old_names(plan)
    assert names.keys() == old.keys() and set(names.values()) <= new.keys()
    assert all(torch.equal(old[name], new[names[name]]) for name in old)


def test_only_the_new_layers_train() -> None:
    grown = model()
    plan = plan_expansion(grown.config, 1)
    apply_plan(grown, plan)
    names = Expand(new_blocks(plan)).trainable(grown)
    assert names and all(name.startswith("blocks.2.") for name in names)
    assert not any(parameter.requires_grad for parameter in grown.parameters())


def test_a_grown_model_and_too_many_blocks_are_refused() -> None:
    with pytest.raises(InputError, match="expanded"):
        plan_expansion(plan_growth(CONFIG, GROWTH, "code").after, 1)
    with pytest.raises(InputError, match="at most one a layer"):
        plan_expansion(CONFIG, 3)
