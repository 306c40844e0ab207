"""One token of one sequence takes a path of its own: the numbers of the general one, in few calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mfext.config import ModelConfig
from mfext.model.cache import Cache
from mfext.model.language_model import ModelOutput
from mfext.model.moduleformer import ModuleFormer

LENGTH = 24
MOST_CALLS_PER_LAYER = 64  # 63 on 2026-11-24; it was 110 before there was a path of its own


@pytest.fixture(autouse=True)
def _torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled step (tests/kernels/test_decode_step.py) would take float32 over."""
    monkeypatch.setattr("mfext.model.compiled_step.available", lambda: False)


def tiny(layers: int = 2, dtype: torch.dtype = torch.float64) -> ModuleFormer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50,
        bos_id=0,
        eos_id=0,
        pad_id=0,
        d_model=32,
        num_layers=layers,
        num_heads=2,
        d_attention=16,
        attention_experts=4,
        attention_experts_per_token=2,
        feedforward_experts=6,
        feedforward_experts_per_token=3,
        d_feedforward=24,
        d_router=8,
    )
    model = ModuleFormer(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a fresh model's biases are zeros, which would hide their absence
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def one_by_one(model: ModuleFormer, ids_BT: Tensor, cache: Cache) -> list[ModelOutput]:
    return [model(ids_BT[:, [position]], cache=cache) for position in range(ids_BT.shape[1])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decoding_step_gives_the_logits_and_routings_of_the_whole_forward(dtype: torch.dtype) -> None:
    model, ids = tiny(dtype=dtype), torch.randint(0, 50, (1, LENGTH))
    with torch.no_grad():
        whole = model(ids)
        cache = model.new_cache(1, LENGTH)
        steps = one_by_one(model, ids, cache)
    assert cache.weights is not None
    assert cache.length == LENGTH
    close = {"atol": 200 * torch.finfo(dtype).eps, "rtol": 200 * torch.finfo(dtype).eps}
    torch.testing.assert_close(torch.cat([step.logits for step in steps], dim=1), whole.logits, **close)
    for number, routing in enumerate(whole.routings):
        mine = [step.routings[number] for step in steps]
        assert all(each.site == routing.site for each in mine)
        assert torch.equal(torch.cat([each.experts_MK for each in mine]), routing.experts_MK)
        torch.testing.assert_close(torch.cat([each.log_probs_ME for each in mine]), routing.log_probs_ME, **close)


def test_steps_and_longer_pieces_take_turns_on_one_cache() -> None:
    model, ids = tiny(), torch.randint(0, 50, (1, LENGTH))
    with torch.no_grad():
        cache = model.new_cache(1, LENGTH)
        pieces = [model(piece, cache=cache).logits for piece in ids.split([5, 1, 1, 7, 1, 9], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, atol=1e-13, rtol=1e-13)


def test_the_general_path_serves_gradients_two_rows_and_what_only_it_returns() -> None:
    model, ids = tiny(), torch.randint(0, 50, (2, 1))
    for rows, flags in ((1, {"return_hidden": True}), (1, {"return_attentions": True}), (2, {})):
        cache = model.new_cache(rows, 4)
        with torch.no_grad():
            model(ids[:rows], cache=cache, **flags)
        assert cache.weights is None
    cache = model.new_cache(1, 4)
    assert model(ids[:1], cache=cache).logits.requires_grad
    assert cache.weights is None


class CallCount(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def calls_of_a_step(layers: int) -> int:
    model, ids = tiny(layers, torch.float32), torch.randint(0, 50, (1, 9))
    cache = model.new_cache(1, 12)
    for piece in ids.split([8, 1], dim=1):
        model(piece, cache=cache)
    with CallCount() as count:
        model(ids[:, :1], cache=cache)
    return count.calls


def test_a_decoding_step_makes_few_calls_a_layer() -> None:
    # K 3 in place of 2 at the feed-forward costs 4 - 1 calls more than config S: product, product and sum.
    assert calls_of_a_step(3) - calls_of_a_step(2) <= MOST_CALLS_PER_LAYER + 3
