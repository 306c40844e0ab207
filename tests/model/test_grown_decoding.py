"""Decoding of grown models: caches, padding and documents must not change what gates and experts compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mfext.config import GenerationConfig, GrowthMode, ModelConfig
from mfext.config_gate import DomainGateConfig
from mfext.model.cache import Cache
from mfext.model.generate import Sampling, pad_left
from mfext.model.language_model import ModelOutput
from mfext.model.moduleformer import ModuleFormer
from mfext_kernels.decode_step import available, explain

# The same float64 sums in another order.
SAME = {"rtol": 1e-11, "atol": 1e-11}


def grown(name: str, mode: GrowthMode) -> GenerationConfig:
    gated = mode == "gated"
    return GenerationConfig(
        name=name,
        mode=mode,
        attention_experts=(2, 1),
        feedforward_experts=(0, 3),
        attention_experts_per_token=1,
        feedforward_experts_per_token=1,
        d_feedforward=7 if mode in ("gated", "side") else 9,
        embedding_rank=3 * gated,
        head_rank=99 * gated,
        key_value_rank=2 * gated,
        norms=gated,
        gate=DomainGateConfig(d_embedding=4, d_convolution=5, convolution_width=3, opens_at=0.3, full_at=0.7)
        if gated
        else None,
    )


LINEAGES: list[tuple[GrowthMode, ...]] = [
    ("gated",),
    ("gated", "gated"),
    ("compete",),
    ("gated", "compete"),
    ("side",),
    ("side", "gated"),
    ("preserve", "preserve"),
    ("preserve", "side", "gated"),
]


@pytest.fixture(params=LINEAGES, ids="-".join)
def model(request: pytest.FixtureRequest) -> ModuleFormer:
    """Random everywhere, gates spread so that tokens fall on both sides of the thresholds and between."""
    torch.manual_seed(3)
    names = [grown(f"domain{number}", mode) for number, mode in enumerate(request.param)]
    config = ModelConfig(
        vocab_size=23, d_model=12, num_layers=2, num_heads=2, d_attention=8, attention_experts=3,
        feedforward_experts=3, d_feedforward=9, d_router=6, bos_id=20, eos_id=20, pad_id=21, generations=tuple(names),
    )  # fmt: skip
    model = ModuleFormer(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for number in range(1, len(names) + 1):
            gate = model.generation(number).gate
            if gate is not None:
                ids = tokens(4, 70)
                logits, _ = gate(ids, torch.zeros_like(ids))
                gate.output.weight.mul_(3 / logits.std())
                gate.output.bias.sub_(logits.median()).mul_(3 / logits.std())
    return model


def tokens(rows: int, length: int) -> Tensor:
    ids = torch.randint(0, 20, (rows, length), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 20
    return ids


def assert_same(output: ModelOutput, other: ModelOutput) -> None:
    torch.testing.assert_close(output.logits, other.logits, **SAME)
    if other.gates is not None:
        assert output.gates is not None
        torch.testing.assert_close(output.gates, other.gates, **SAME)


@torch.no_grad()
def test_the_gates_of_the_fixture_are_closed_open_and_between(model: ModuleFormer) -> None:
    gates = model(tokens(4, 70)).gates
    if gates is not None:
        assert (gates == 0).any()
        assert (gates == 1).any()
        assert ((gates > 0) & (gates < 1)).any()


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(1,) * 70, (66, 1, 3), (5, 65)], ids=["single", "long first", "long last"])
def test_a_cache_changes_nothing(model: ModuleFormer, pieces: tuple[int, ...]) -> None:
    ids = tokens(4, 70)
    cache = model.new_cache(4, 70)
    parts = [model(piece, cache=cache) for piece in ids.split(pieces, dim=1)]
    whole = model(ids)
    logits = torch.cat([part.logits for part in parts], dim=1)
    gates = None if whole.gates is None else torch.cat([part.gates for part in parts if part.gates is not None], dim=1)
    assert_same(ModelOutput(logits, (), gates), whole)


of_gated_generations = pytest.mark.parametrize("model", LINEAGES[:2], ids="-".join, indirect=True)


def compiled(model: ModuleFormer) -> ModuleFormer:
    """The model in float32, as the compiled step takes it; skips where that is not built."""
    if not available():
        pytest.skip(f"no compiled decoding step here: {explain()}")
    return model.float()


@torch.no_grad()
@of_gated_generations
@pytest.mark.parametrize("identity", [False, True], ids=["projected", "keys and values are the input"])
def test_the_compiled_step_gives_what_the_whole_forward_gives(model: ModuleFormer, identity: bool) -> None:
    model, ids = compiled(model), tokens(4, 70)
    if identity:
        gates = [model.generation(number).gate for number in range(1, len(model.generations) + 1)]
        model = ModuleFormer(replace(model.config, d_attention=12, num_heads=1)).eval()
        for number, gate in enumerate(gates, 1):
            model.generation(number).gate = gate
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (parameter.dim() < 3), alpha=0.1)
    assert model.config.identity_keys_values == identity
    whole, cache = model(ids), model.new_cache(4, 70)
    parts = [model(ids[:, :3], cache=cache), *(model(ids[:, [at]], cache=cache) for at in range(3, 70))]
    assert cache.compiled is not None
    logits = torch.cat([part.logits for part in parts], dim=1)
    assert (logits - whole.logits).abs().max() <= 5e-5 * whole.logits.abs().max()
    assert torch.allclose(torch.cat([part.gates for part in parts], dim=1), whole.gates, atol=1e-4)


@torch.no_grad()
@of_gated_generations
def test_a_row_that_no_gate_is_open_on_keeps_its_bits_beside_one_that_is(
    model: ModuleFormer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = compiled(model), tokens(2, 12)
    for number in range(1, len(model.generations) + 1):
        gate = model.generation(number).gate
        assert gate is not None
        monkeypatch.setattr(gate, "openness", lambda logits: (torch.arange(len(logits)) == 1)[:, None].float())

    def decoded(rows: Tensor) -> tuple[Tensor, Cache]:
        cache = model.new_cache(len(rows), 12)
        logits = torch.cat([model(rows[:, [at]], cache=cache).logits for at in range(12)], dim=1)
        assert cache.compiled is not None
        return logits, cache

    (together, cache), (_, own_cache) = decoded(ids), decoded(ids[:1])
    assert torch.equal(torch.stack(cache.keys_values)[:, :, :1], torch.stack(own_cache.keys_values))
    assert not torch.equal(decoded(ids[[1, 1]])[0][0], together[1])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: ModuleFormer, side: str) -> None:
    ids = tokens(2, 20)
    pads = torch.full((2, 6), model.config.pad_id)
    padded = torch.cat([pads, ids] if side == "left" else [ids, pads], dim=1)
    output = model(padded, attention_mask=(padded != model.config.pad_id).long())
    real = slice(6, None) if side == "left" else slice(0, 20)
    gates = None if output.gates is None else output.gates[:, real]
    assert_same(ModelOutput(output.logits[:, real], (), gates), model(ids))


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_packed_documents_do_not_see_each_other(model: ModuleFormer, cached: bool) -> None:
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
    torch.testing.assert_close(logits, torch.cat(alone, dim=1), **SAME)


@torch.no_grad()
def test_prompts_of_different_lengths_decode_as_they_would_alone(model: ModuleFormer) -> None:
    prompts = [[20, 1, 2, 3, 4, 5, 6, 7, 8, 9], [20], [20, 9, 8]]
    greedy = Sampling(max_new_tokens=12, stop_at_eos=False)
    together = model.generate(*pad_left(prompts, model.config.pad_id), sampling=greedy)
    for prompt, row in zip(prompts, together.rows, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert row.tokens == tuple(ids[0, len(prompt) :].tolist())


@torch.no_grad()
def test_a_token_that_no_gate_opens_on_takes_the_shortest_path(model: ModuleFormer) -> None:
    """Closed and open tokens in turn on one cache, in single precision, where the compiled step serves."""
    if any(each.mode != "gated" for each in model.config.generations):
        pytest.skip("only a gate closes a generation")
    model, ids = model.float(), tokens(1, 70)
    whole, cache = model(ids), model.new_cache(1, 70)
    steps = [model(token, cache=cache) for token in ids.split(1, dim=1)]
    assert cache.compiled is not None or cache.weights is not None
    open_T = torch.cat([step.gates for step in steps if step.gates is not None], dim=1).amax(-1)[0] > 0
    assert bool(open_T.any()) and not bool(open_T.all()), "the example must hold both kinds of token"
    logits = torch.cat([step.logits for step in steps], dim=1)
    torch.testing.assert_close(logits, whole.logits, rtol=1e-4, atol=1e-4 * float(whole.logits.abs().max()))
