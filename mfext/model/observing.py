"""How large the chosen experts' outputs are: measured on request, beside the fused path that adds them up.

    with observing(model):
        routings = model(input_ids).routings        # each with output_norms_MK

The logits are those of any other forward, bit for bit; a forward that is not observed pays one test a site.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from mfext.model.experts import AttentionExperts, FeedForwardExperts, attention_norms, feedforward_norms
from mfext.model.forward_pass import Pass
from mfext.model.language_model import LanguageModel
from mfext.model.router import Routing


@contextmanager
def observing(model: LanguageModel) -> Iterator[None]:
    """Inside, every forward of `model` returns routings with `output_norms_MK`; a dense model has none to return."""
    before, model.observed = model.observed, True
    try:
        yield
    finally:
        model.observed = before


def observe_attention(routing: Routing, o_MKA: Tensor, stacks: Sequence[AttentionExperts], shared: Pass) -> Routing:
    """In an observed pass `routing` with the norms of what its experts make of the attended values."""
    if not shared.observed:
        return routing
    with torch.no_grad():
        return replace(routing, output_norms_MK=attention_norms(o_MKA, stacks, routing))


def observe_feedforward(routing: Routing, x_MD: Tensor, stacks: Sequence[FeedForwardExperts], shared: Pass) -> Routing:
    """In an observed pass `routing` with the norms of what its experts make of x."""
    if not shared.observed:
        return routing
    with torch.no_grad():
        return replace(routing, output_norms_MK=feedforward_norms(x_MD, stacks, routing))


def observe_null(routing: Routing, own: Routing, shared: Pass) -> Routing:
    """In an observed pass `routing` with the norms of `own`, its choices that are experts (see `without_null`).

    0 where a choice is null, and everywhere where `own` was not observed because it has no row.
    """
    if not shared.observed:
        return routing
    with torch.no_grad():
        norms_MK = torch.zeros_like(routing.gates_MK, dtype=torch.promote_types(routing.gates_MK.dtype, torch.float32))
        if own.output_norms_MK is not None:
            norms_MK[routing.experts_MK < routing.num_experts] = own.output_norms_MK.squeeze(1).to(norms_MK.dtype)
        return replace(routing, output_norms_MK=norms_MK)
