"""Every token of every document is scored once, with the context the definition gives it, whatever the batches."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mfext.errors import DivergedError
from mfext.metrics.perplexity import Evaluation, Scoring, cap_documents, count_bytes, cut_windows, evaluate
from mfext.metrics.usage import UsageCounter

VOCABULARY = 7
BOS, PAD = 5, 6


@dataclass(frozen=True)
class Place:
    layer: int = 0
    kind: str = "feedforward"


@dataclass(frozen=True)
class Decision:
    experts_MK: Tensor
    gates_MK: Tensor
    site: Place = field(default_factory=Place)
    generation: int = 0
    num_experts: int = VOCABULARY
    tokens_M: Tensor | None = None
    output_norms_MK: Tensor | None = None


@dataclass(frozen=True)
class Output:
    logits: Tensor
    routings: tuple[Decision, ...] = ()
    gates: Tensor | None = None


def context_logits(ids_BT: Tensor) -> Tensor:
    """Logits that depend on every token of the window so far and on their number, in float64."""
    length_T = torch.arange(1, ids_BT.shape[1] + 1)
    weight_T = torch.sin(length_T.double())
    context_BT = ((ids_BT + 1.0).double() * weight_T).cumsum(1) + length_T
    return torch.cos(context_BT[..., None] * torch.arange(1, VOCABULARY + 1, dtype=torch.float64)) * 3


class FakeModel:
    """Reads its whole prefix, routes a token to the expert of its id, and records what it was shown."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.masks: list[Tensor | None] = []

    def __call__(self, input_ids: Tensor, /, *, attention_mask: Tensor | None) -> Output:
        assert torch.is_inference_mode_enabled()
        self.shapes.append((input_ids.shape[0], input_ids.shape[1]))
        self.masks.append(attention_mask)
        if attention_mask is not None:
            assert bool(((input_ids == PAD) == (attention_mask == 0)).all())
        experts_NK = input_ids.flatten()[:, None]
        gates_BTS = torch.stack([input_ids % 2, (input_ids == 3) * 0.25 + (input_ids > 3) * 1.0], dim=-1).float()
        return Output(context_logits(input_ids), (Decision(experts_NK, torch.ones(experts_NK.shape)),), gates_BTS)


def by_definition(document: list[int], window: int) -> float:
    """Token p of the text is predicted in the window that scores it, one token at a time."""
    ids, stride, total = [BOS, *document], window // 2, 0.0
    for position in range(len(document)):
        number = 0 if position < window else (position - window) // stride + 1
        context = torch.tensor([ids[number * stride : position + 1]])
        total -= float(torch.log_softmax(context_logits(context)[0, -1], -1)[ids[position + 1]])
    return total


def score(documents: list[list[int]], window: int = 8, batch_size: int = 3) -> Evaluation:
    return evaluate(FakeModel(), documents, [len(each) for each in documents], Scoring(window, batch_size, BOS, PAD))


DOCUMENTS = st.lists(st.lists(st.integers(0, 4), max_size=40), max_size=8)
WINDOWS = st.sampled_from([2, 4, 8, 16, 64])


@settings(deadline=None, max_examples=60)
@given(DOCUMENTS, WINDOWS, st.integers(1, 6))
def test_losses_equal_the_definition_token_by_token(documents: list[list[int]], window: int, batch_size: int) -> None:
    result = score(documents, window, batch_size)
    assert result.document_nats == pytest.approx([by_definition(each, window) for each in documents], rel=1e-12)
    assert result.document_tokens == tuple(map(len, documents))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 200), max_size=8), WINDOWS)
def test_every_position_is_scored_once_with_half_a_window_of_context(lengths: list[int], window: int) -> None:
    windows = cut_windows(lengths, window)
    scored: Counter[tuple[int, int]] = Counter()
    columns = (windows.document_W, windows.start_W, windows.length_W, windows.scored_from_W)
    for document, start, length, first in zip(*(column.tolist() for column in columns), strict=True):
        assert 1 <= length <= window and first < start + length <= lengths[document]
        for position in range(first, start + length):
            scored[document, position] += 1
            assert position - start >= min(position, window // 2)
    assert scored == Counter({(d, p): 1 for d, length in enumerate(lengths) for p in range(length)})


@settings(deadline=None, max_examples=30)
@given(DOCUMENTS, st.randoms(use_true_random=False))
def test_permuting_documents_permutes_results_and_changes_no_sum(documents, random) -> None:
    order = random.sample(range(len(documents)), len(documents))
    a, b = score(documents), score([documents[number] for number in order])
    assert b.document_nats == tuple(a.document_nats[number] for number in order)
    assert (a.nats, a.tokens, a.bits_per_byte) == (b.nats, b.tokens, b.bits_per_byte)


@settings(deadline=None, max_examples=30)
@given(DOCUMENTS, WINDOWS)
def test_usage_counts_the_input_before_each_scored_token_once(documents: list[list[int]], window: int) -> None:
    counter = UsageCounter()
    result = evaluate(FakeModel(), documents, [1] * len(documents), Scoring(window, 2, BOS, PAD), usage=counter)
    inputs = Counter(token for each in documents if each for token in [BOS, *each[:-1]])
    assert result.usage is not None and result.usage.tokens == result.tokens == sum(inputs.values())
    for bank in result.usage.banks:
        assert bank.share == pytest.approx([inputs[token] / result.tokens for token in range(VOCABULARY)])


def test_windows_are_batched_by_length_within_a_budget_of_positions() -> None:
    model = FakeModel()
    documents = [[1] * 3, [2] * 30, [], [0] * 8, [4] * 2, [3] * 1]
    seen: list[tuple[int, int]] = []
    evaluate(
        model, documents, [1] * 6, Scoring(8, 2, BOS, PAD), on_batch=lambda done, total: seen.append((done, total))
    )
    assert model.shapes == [(2, 8), (2, 8), (2, 8), (2, 8), (3, 3)]
    assert model.masks[0] is None and model.masks[-1] is not None
    assert seen[-1] == (44, 44) and sorted(seen) == seen


def test_the_same_arguments_give_the_same_bits() -> None:
    documents = [[token % 5 for token in range(number * 7)] for number in range(6)]
    assert score(documents) == score(documents)


def test_bits_per_byte_and_perplexity_come_from_sums() -> None:
    result = Evaluation((2.0, 6.0), (1, 3), (4, 4), (), None)
    assert (result.nats, result.tokens, result.bytes, result.nats_per_byte) == (8.0, 4, 8, 1.0)
    assert result.bits_per_byte == pytest.approx(1 / math.log(2))
    assert result.perplexity == pytest.approx(math.exp(2))


def test_no_document_gives_no_number() -> None:
    for documents in ([], [[]]):
        result = score(documents)
        assert (result.nats, result.tokens, result.perplexity, result.gates) == (0.0, 0, None, ())


def test_half_precision_logits_are_normalised_in_single_precision() -> None:
    class Half(FakeModel):
        def __call__(self, input_ids: Tensor, /, *, attention_mask: Tensor | None) -> Output:
            return Output(context_logits(input_ids).bfloat16())

    class Single(FakeModel):
        def __call__(self, input_ids: Tensor, /, *, attention_mask: Tensor | None) -> Output:
            return Output(context_logits(input_ids).bfloat16().double())

    documents, scoring = [[1, 2, 3, 4] * 9], Scoring(8, 2, BOS, PAD)
    half, single = (evaluate(model, documents, [36], scoring).nats for model in (Half(), Single()))
    assert half == pytest.approx(single, rel=8 * torch.finfo(torch.float32).eps)


def test_a_loss_that_is_not_finite_names_its_token_and_document() -> None:
    class Broken(FakeModel):
        def __call__(self, input_ids: Tensor, /, *, attention_mask: Tensor | None) -> Output:
            return Output(context_logits(input_ids).masked_fill((input_ids == 3)[..., None], math.nan))

    with pytest.raises(DivergedError, match="token 2 of document 2"):
        evaluate(Broken(), [[1, 1], [], [1, 3, 1]], [1, 1, 1], Scoring(8, 2, BOS, PAD))


def test_gate_shares_and_lags_are_those_counted_by_hand() -> None:
    # Gate 0 is open on odd ids. Inputs [bos 5, 1, 2, 2], [5, 2, 1, 1], [5, 1, 1]; the empty document has no input.
    documents = [[1, 2, 2, 0], [2, 1, 1, 0], [], [1, 1, 0]]
    odd, soft = score(documents).gates
    assert (odd.gate, odd.share_open, odd.share_not_full) == (0, 8 / 11, 3 / 11)
    assert odd.document_lags == (2, 2, 0, 0) and odd.lag == 1.0
    # Gate 1 is 1 on bos, 0.25 on id 3, else 0: it settles closed after the first token.
    assert (soft.share_open, soft.share_not_full, soft.document_lags) == (3 / 11, 8 / 11, (1, 1, 0, 1))
    (_, soft) = score([[3, 3, 0]]).gates
    assert (soft.share_open, soft.share_not_full) == (1.0, 2 / 3)


def test_the_lag_of_a_long_document_counts_over_windows() -> None:
    (odd, _) = score([[2] * 20 + [1] * 10], window=4).gates
    assert odd.document_lags == (21,)


def test_a_module_in_training_mode_is_scored_without_dropout_and_put_back() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, input_ids: Tensor, *, attention_mask: Tensor | None) -> Output:
            return Output(self.dropout(context_logits(input_ids)))

    model = Dropping()
    result = evaluate(model, [[1, 2, 3]], [3], Scoring(8, 2, BOS, PAD))
    assert model.training and model.dropout.training
    assert result.nats == pytest.approx(by_definition([1, 2, 3], 8))


def test_a_large_vocabulary_is_normalised_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[1, 2, 3, 4] * 9, [2] * 5]
    whole = score(documents)
    monkeypatch.setattr("mfext.metrics.perplexity.LOGITS_AT_ONCE", 3 * VOCABULARY)
    assert score(documents).document_nats == whole.document_nats


def test_the_byte_cap_keeps_whole_documents_in_order_and_at_least_one() -> None:
    documents = ("äö", "abc", "de", "f")
    assert count_bytes(documents) == (4, 3, 2, 1)
    assert cap_documents(documents, None) == documents
    assert cap_documents(documents, 7) == ("äö", "abc")
    assert cap_documents(documents, 8) == ("äö", "abc")
    assert cap_documents(documents, 1) == ("äö",)
    assert cap_documents((), 10) == ()
