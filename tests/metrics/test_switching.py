"""Losses and gates of regions: one context a document, and a lag that counts what was predicted with the gate wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from mfext.metrics.perplexity import Scoring, evaluate
from mfext.metrics.switching import RegionText, measure_regions

BOS, PAD, VOCABULARY = 8, 9, 10
SCORING = Scoring(window=8, batch_size=2, bos_id=BOS, pad_id=PAD)


@dataclass(frozen=True)
class Output:
    logits: Tensor
    gates: Tensor | None
    routings: tuple[()] = ()


class Causal:
    """Logits depend on the whole prefix. Gate 0 is open right after a token of 5 or more, gate 1 half open always."""

    def __init__(self, gated: bool = True) -> None:
        self.gated = gated
        self.lengths: list[int] = []

    def __call__(self, input_ids: Tensor, /, *, attention_mask: Tensor | None) -> Output:
        self.lengths.append(input_ids.shape[1])
        context_BT = ((input_ids + 1.0).double() * torch.arange(1, input_ids.shape[1] + 1).sin()).cumsum(1)
        logits = torch.cos(context_BT[..., None] * torch.arange(1, VOCABULARY + 1)) * 3
        upper_BT = ((input_ids >= 5) & (input_ids < BOS)).float()
        return Output(logits, torch.stack([upper_BT, torch.full_like(upper_BT, 0.5)], -1) if self.gated else None)


def document(*regions: Sequence[int]) -> tuple[RegionText, ...]:
    return tuple(RegionText(ids, 2 * len(ids)) for ids in regions)


DOCUMENTS = [document([1, 2, 3, 4], [5, 6, 7], [1, 2]), document([4, 3], [7, 6, 5, 7, 6, 5, 7], [2, 1, 2, 1, 2])]


def test_regions_share_one_context_and_add_up_to_the_document() -> None:
    model = Causal()
    regions = measure_regions(model, DOCUMENTS, SCORING)
    assert max(model.lengths) == 14, "the longest document is seen whole, however short the window was"
    texts = [[token for region in each for token in region.ids] for each in DOCUMENTS]
    whole = evaluate(Causal(), texts, [0, 0], replace(SCORING, window=14))
    assert sum(region.nats for region in regions) == pytest.approx(whole.nats, abs=1e-12)
    assert [(region.tokens, region.bytes) for region in regions] == [(6, 12), (10, 20), (7, 14)]
    alone = measure_regions(Causal(), [each[:1] for each in DOCUMENTS], SCORING)
    assert alone[0].nats == pytest.approx(regions[0].nats, abs=1e-12)
    inside = measure_regions(Causal(), [each[1:2] for each in DOCUMENTS], SCORING)
    assert inside[0].nats != pytest.approx(regions[1].nats, abs=1e-3)


def test_a_lag_counts_the_tokens_predicted_before_the_gate_stays_on_its_side() -> None:
    before, inside, after = (region.gates[0] for region in measure_regions(Causal(), DOCUMENTS, SCORING))
    assert before.opening.lags == (None, None) and before.opening.never == 2 and before.opening.mean is None
    assert before.closing.lags == (0, 0) and before.mean_openness == 0
    # Each region's first token is predicted by a gate that has seen the region before only.
    assert inside.opening.lags == (1, 1) and inside.closing.never == 2
    assert inside.mean_openness == pytest.approx(8 / 10)
    assert after.closing.lags == (1, 1) and after.mean_openness == pytest.approx(2 / 7)


def test_a_gate_that_wavers_settles_after_the_last_change_and_one_that_ends_wrong_never() -> None:
    wavering = measure_regions(Causal(), [document([1], [5, 1, 6, 7]), document([1], [5, 6, 1, 2])], SCORING)
    assert wavering[1].gates[0].opening.lags == (3, None)
    assert wavering[1].gates[0].opening.mean == 3 and wavering[1].gates[0].opening.never == 1


def test_at_one_half_a_gate_counts_as_open_and_as_closed() -> None:
    half = measure_regions(Causal(), DOCUMENTS, SCORING)[1].gates[1]
    assert half.opening.lags == half.closing.lags == (0, 0)


def test_a_model_without_gates_gives_losses_only() -> None:
    plain, gated = (measure_regions(Causal(gated), DOCUMENTS, SCORING) for gated in (False, True))
    assert [each.gates for each in plain] == [(), (), ()]
    assert [each.nats for each in plain] == [each.nats for each in gated]
