"""A full model with some of its experts switched off: what pruning is compared with, and what one expert is worth."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from mfext.config import ModelConfig
from mfext.errors import InputError
from mfext.growth.apply import require_fit
from mfext.growth.banks import BankKey, bank_keys, num_experts, router_name, softmax_banks
from mfext.growth.plan import Plan
from mfext.growth.probes import Windows
from mfext.growth.pruning import pruning_cuts
from mfext.growth.removal import removed_names
from mfext.growth.review import mean_loss
from mfext.model.moduleformer import ModuleFormer

# Logits of a pruned model and of the full one, masked, differ by the order of float32 sums alone.
MOST_DIFFERENCE = 1e-5


@contextmanager
def masked(model: ModuleFormer, plan: Plan) -> Iterator[None]:
    """Inside, the experts that `plan` would remove have logits of minus infinity: nobody chooses them, no gate counts
    them. The model keeps its shape, and one token decodes by the general path.

    Losses other than language modelling meet 0 times minus infinity there. Raises InputError where the plan was made
    for another model.
    """
    require_fit(model, plan)
    with _without(model, {cut.key: cut.removed for cut in pruning_cuts(plan)}):
        yield


@torch.inference_mode()
def prove_pruning(
    full: ModuleFormer, pruned: ModuleFormer, plan: Plan, input_ids: Tensor, document_starts: Tensor | None = None
) -> float:
    """The largest absolute difference of any logit between `pruned` and the `full` model masked, on ids (B, T).

    At most MOST_DIFFERENCE in float32, unless rounding orders two experts of almost equal logits another way. Raises
    InputError where either is not of the plan's config.
    """
    if pruned.config != plan.after:
        raise InputError("not the model this plan leaves", "prove_pruning", "give the one the plan was applied to")
    with masked(full, plan):
        expected_BTV = full(input_ids, document_starts=document_starts).logits
    return float((pruned(input_ids, document_starts=document_starts).logits - expected_BTV).abs().max())


@torch.inference_mode()
def prove_removal(
    full: ModuleFormer, smaller: ModuleFormer, plan: Plan, input_ids: Tensor, document_starts: Tensor | None = None
) -> float:
    """The largest absolute difference of any logit between `smaller` and the `full` model in which the generations that
    `plan` removes are shut, on ids (B, T). Gated ones leave exactly 0.

    Raises InputError where either is not of the plan's config.
    """
    if smaller.config != plan.after:
        raise InputError("not the model this plan leaves", "prove_removal", "give the one the plan was applied to")
    require_fit(full, plan)
    names = removed_names(plan)
    with _shut(full, [number for number, each in enumerate(full.config.generations, 1) if each.name in names]):
        expected_BTV = full(input_ids, document_starts=document_starts).logits
    return float((smaller(input_ids, document_starts=document_starts).logits - expected_BTV).abs().max())


def ablation_scores(
    model: ModuleFormer,
    windows: Windows,
    keys: Collection[BankKey] | None = None,
    on_expert: Callable[[int, int], None] | None = None,
) -> dict[BankKey, list[float]]:
    """What the loss on `windows` rises by (nats per token) without each single expert of the banks `keys`; None: all.

    As many passes as experts, and one: `on_expert(done, total)` follows each. An expert that is all its router can
    choose, or all of the base's, cannot be masked: it scores 0.
    """
    config = model.config
    sizes = {key: num_experts(config, key) for key in (bank_keys(config) if keys is None else keys)}
    scores: dict[BankKey, list[float]] = {key: [] for key in sizes}
    whole, done = mean_loss(model, windows), 0
    for key, size in sizes.items():
        for expert in range(size):
            alone = size == 1 and _is_first_choice(model.config, key)
            scores[key].append(0.0 if alone else _loss_without(model, windows, key, expert) - whole)
            done += 1
            if on_expert is not None:
                on_expert(done, sum(sizes.values()))
    return scores


def _is_first_choice(config: ModelConfig, key: BankKey) -> bool:
    """Whether this bank's are the first experts of a router without a null choice: one of them must be there."""
    null = key[2] > 0 and config.generations[key[2] - 1].mode == "side"
    return softmax_banks(config, key)[0] == key and not null


def _loss_without(model: ModuleFormer, windows: Windows, key: BankKey, expert: int) -> float:
    with _without(model, {key: [expert]}):
        return mean_loss(model, windows)


@contextmanager
def _without(model: ModuleFormer, removed: Mapping[BankKey, Sequence[int]]) -> Iterator[None]:
    columns: dict[str, list[int]] = {}
    for key, experts in removed.items():
        sharing = softmax_banks(model.config, key)
        first = sum(num_experts(model.config, each) for each in sharing[: sharing.index(key)])
        columns.setdefault(router_name(model.config, key), []).extend(first + expert for expert in experts)
    handles = [
        model.get_submodule(name).register_forward_hook(partial(_hide, torch.tensor(own, device=model.device)))
        for name, own in columns.items()
    ]
    before, model.masked = model.masked, True
    try:
        yield
    finally:
        model.masked = before
        for handle in handles:
            handle.remove()


@contextmanager
def _shut(model: ModuleFormer, numbers: Sequence[int]) -> Iterator[None]:
    """Gates at 0; where a generation has none, its routers never choose its experts."""
    gates = [gate for number in numbers if (gate := model.generation(number).gate) is not None]
    ungated = [number for number in numbers if model.generation(number).gate is None]
    experts = {key: range(num_experts(model.config, key)) for key in bank_keys(model.config) if key[2] in ungated}
    handles = [gate.register_forward_hook(_close) for gate in gates]
    try:
        with _without(model, experts):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _close(gate: nn.Module, inputs: tuple[object, ...], output: tuple[Tensor, object]) -> tuple[Tensor, object]:
    logits_BT, state = output
    return torch.full_like(logits_BT, -torch.inf), state


def _hide(columns: Tensor, router: nn.Module, inputs: tuple[object, ...], logits_NE: Tensor) -> Tensor:
    return logits_NE.index_fill(-1, columns, -torch.inf)
