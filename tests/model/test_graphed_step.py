"""Decoding step recorded as a CUDA graph: the step it records gives the eager logits, and so does its replay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mfext.config import GrowthConfig, ModelConfig
from mfext.growth.apply import apply_plan
from mfext.growth.plan import plan_growth
from mfext.model.cache import Cache
from mfext.model.graphed_step import STEPS_BEFORE_RECORDING, records
from mfext.model.moduleformer import ModuleFormer

CONFIG = ModelConfig(d_model=32, num_layers=2, num_heads=2, d_attention=32, d_feedforward=32, d_router=16)


def started(model: ModuleFormer, ids_BT: Tensor, room: int, mask_BT: Tensor | None = None) -> Cache:
    cache = model.new_cache(len(ids_BT), room)
    model(ids_BT, attention_mask=mask_BT, cache=cache)
    return cache


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_step_over_the_caches_whole_room_gives_the_eager_logits(padded: bool) -> None:
    model, ids = ModuleFormer(CONFIG).double(), torch.randint(0, 256, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = int(not padded)
    eager, fixed = (started(model, ids, 20, mask) for _ in range(2))
    for token in torch.randint(0, 256, (4, 3, 1)):
        fixed.filled_1 = torch.tensor([fixed.length])
        torch.testing.assert_close(model(token, cache=fixed).logits, model(token, cache=eager).logits)


@torch.no_grad()
def test_nothing_is_recorded_on_the_cpu() -> None:
    model, ids = ModuleFormer(CONFIG), torch.randint(0, 256, (2, 9))
    cache = replace(started(model, ids, 20), steps=STEPS_BEFORE_RECORDING)
    assert not records(model, ids[:, :1], cache)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [2, 1])
@torch.no_grad()
def test_replayed_steps_give_the_eager_logits(heads: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = ModuleFormer(replace(CONFIG, d_model=320, d_attention=320, num_heads=heads)).to("cuda", torch.bfloat16)
    ids = torch.randint(0, 256, (3, 9), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    eager, graphed = (started(model, ids, 300, mask) for _ in range(2))
    for token in torch.randint(0, 256, (3 * STEPS_BEFORE_RECORDING, 3, 1), device="cuda"):
        eager.steps = 0
        one, other = (model(token, cache=cache).logits for cache in (eager, graphed))
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)
    assert graphed.graphed is not None and eager.graphed is None and graphed.length == eager.length


@pytest.mark.gpu
@torch.no_grad()
def test_a_model_with_a_gate_is_decoded_launch_by_launch() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = ModuleFormer(CONFIG)
    apply_plan(model, plan_growth(CONFIG, GrowthConfig(), "code"))
    model.cuda()
    ids = torch.randint(0, 256, (1, 9), device="cuda")
    cache = started(model, ids, 30)
    for token in ids.T:
        model(token[None], cache=cache)
    assert cache.graphed is None and cache.length == 18
