"""The loss of a model on documents: every text token scored exactly once, from its document's start.

A document is read as [bos] + tokens in windows of T inputs with a stride of T/2: the first window scores all it
predicts, each later one only its second half. So a token has all of its document before it, or at least T/2 tokens,
and never another document. Means of batch means are never taken (they gave 33.1 for a perplexity of 8.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mfext.errors import DivergedError
from mfext.metrics.ledger import bits_per_byte, nats_per_byte, perplexity
from mfext.metrics.usage import RoutingLike, Usage, UsageCounter

# Logits turned into log-probabilities at once: 2**24 float32 numbers are 64 MB.
LOGITS_AT_ONCE = 2**24


class ScoredOutput(Protocol):
    """What is read of a model's output."""

    @property
    def logits(self) -> Tensor: ...
    @property
    def routings(self) -> Sequence[RoutingLike]: ...
    @property
    def gates(self) -> Tensor | None: ...


class Scorable(Protocol):
    """A causal model: (B, T) token ids, mask 1 = token and 0 = right padding (None: no padding)."""

    def __call__(self, input_ids: Tensor, /, *, attention_mask: Tensor | None) -> ScoredOutput: ...


@dataclass(frozen=True)
class Scoring:
    """How documents are cut and batched. A batch holds at most `batch_size * window` positions."""

    window: int
    batch_size: int
    bos_id: int
    pad_id: int
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        assert self.window >= 2 and self.window % 2 == 0, "the stride is half of the window"
        assert self.batch_size >= 1, "a batch holds at least one window"


@dataclass(frozen=True)
class GateUsage:
    """One domain gate over all scored tokens; `gate` is its column in the model's `gates`.

    `share_open`: g > 0. `share_not_full`: g < 1. `document_lags`: per document, the tokens before the gate stays on
    the side of 1/2 on which it ends the document (0 where it never changes side).
    """

    gate: int
    share_open: float
    share_not_full: float
    document_lags: tuple[int, ...]

    @property
    def lag(self) -> float:
        """Mean over documents of the tokens until settled."""
        return math.fsum(self.document_lags) / len(self.document_lags)


@dataclass(frozen=True)
class Evaluation:
    """Raw sums per document, in the order given; `gates` is empty where the model has no gate or nothing was scored.

    `usage` counts the inputs that predict a scored token; None where no counter was given.
    """

    document_nats: tuple[float, ...]
    document_tokens: tuple[int, ...]
    document_bytes: tuple[int, ...]
    gates: tuple[GateUsage, ...]
    usage: Usage | None

    @property
    def nats(self) -> float:
        """Sum of the loss over all tokens."""
        return math.fsum(self.document_nats)

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return sum(self.document_tokens)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes scored."""
        return sum(self.document_bytes)

    @property
    def nats_per_byte(self) -> float | None:
        """Byte-weighted mean loss; None where there is no byte."""
        return nats_per_byte(self.nats, self.bytes)

    @property
    def bits_per_byte(self) -> float | None:
        """The same in bits."""
        return bits_per_byte(self.nats, self.bytes)

    @property
    def perplexity(self) -> float | None:
        """exp of the token-weighted mean loss; None where there is no token."""
        return perplexity(self.nats, self.tokens)


def count_bytes(documents: Sequence[str]) -> tuple[int, ...]:
    """UTF-8 bytes of each document."""
    return tuple(len(document.encode()) for document in documents)


def cap_documents(documents: Sequence[str], max_bytes: int | None) -> tuple[str, ...]:
    """The first whole documents that fit into `max_bytes` UTF-8 bytes, at least one; None takes all."""
    kept: list[str] = []
    total = 0
    for document in documents:
        total += len(document.encode())
        if kept and max_bytes is not None and total > max_bytes:
            break
        kept.append(document)
    return tuple(kept)


@dataclass(frozen=True)
class Windows:
    """W windows over documents: inputs [start, start + length) of a document, scored from `scored_from` on.

    Positions count in [bos] + tokens; the input at position p predicts text token p.
    """

    document_W: NDArray[np.int64]
    start_W: NDArray[np.int64]
    length_W: NDArray[np.int64]
    scored_from_W: NDArray[np.int64]


def cut_windows(document_tokens: Sequence[int], window: int) -> Windows:
    """Windows that score each of `document_tokens[d]` tokens of document d exactly once."""
    stride = window // 2
    tokens_D = np.asarray(document_tokens, dtype=np.int64)
    windows_D = np.where(tokens_D > 0, 1 + np.maximum(0, -(-(tokens_D - window) // stride)), 0)
    document_W = np.repeat(np.arange(tokens_D.size), windows_D)
    number_W = np.arange(document_W.size) - np.repeat(np.cumsum(windows_D) - windows_D, windows_D)
    start_W = number_W * stride
    length_W = np.minimum(window, tokens_D[document_W] - start_W)
    return Windows(document_W, start_W, length_W, np.where(number_W > 0, start_W + stride, 0))


def evaluate(
    model: Scorable,
    documents: Sequence[Sequence[int]],
    document_bytes: Sequence[int],
    scoring: Scoring,
    *,
    usage: UsageCounter | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score every token of `documents` (token ids without bos) in one pass, without gradients.

    `usage`, a fresh counter, also sees every routing. `on_batch(scored, total)` is called after each batch with tokens.
    Results are a pure function of the arguments. DivergedError where a loss is not finite.
    """
    assert len(documents) == len(document_bytes), "one byte count per document"
    offsets_D = _offsets(documents)
    nats_P = torch.zeros(int(offsets_D[-1]), dtype=torch.float64)
    levels_PS: Tensor | None = None
    done = 0
    with torch.inference_mode(), _evaluation_mode(model):
        for batch in _batches(documents, scoring):
            output = model(batch.input_ids_BT, attention_mask=batch.attention_mask_BT)
            nats_P[batch.text_positions_M] = _losses(output.logits, batch.scored_M, batch.targets_M)
            if output.gates is not None:
                levels_MS = _levels(output.gates.flatten(0, 1)[batch.scored_M]).cpu()
                if levels_PS is None:
                    levels_PS = levels_MS.new_zeros(nats_P.numel(), levels_MS.shape[-1])
                levels_PS[batch.text_positions_M] = levels_MS
            if usage is not None:
                valid_N = torch.zeros(batch.input_ids_BT.numel(), dtype=torch.bool, device=scoring.device)
                valid_N[batch.scored_M] = True
                usage.update(output.routings, valid_N)
            done += batch.text_positions_M.numel()
            if on_batch is not None:
                on_batch(done, nats_P.numel())
    document_nats = _document_sums(nats_P, offsets_D)
    gates = () if levels_PS is None else _gate_usage(levels_PS.numpy(), offsets_D)
    counted = None if usage is None else usage.usage()
    return Evaluation(document_nats, tuple(np.diff(offsets_D).tolist()), tuple(document_bytes), gates, counted)


@dataclass(frozen=True)
class TokenScores:
    """Every token of documents: loss in nats (P), and g of every gate (P, S; S = 0 without gates) as it predicted it.

    Document d holds the tokens from `offsets_D[d]` to before `offsets_D[d + 1]`.
    """

    nats_P: NDArray[np.float64]
    gates_PS: NDArray[np.float32]
    offsets_D: NDArray[np.int64]


def score_tokens(model: Scorable, documents: Sequence[Sequence[int]], scoring: Scoring) -> TokenScores:
    """The same pass as `evaluate`, with nothing summed. DivergedError where a loss is not finite."""
    offsets_D = _offsets(documents)
    nats_P = torch.zeros(int(offsets_D[-1]), dtype=torch.float64)
    gates_PS = torch.zeros(nats_P.numel(), 0)
    with torch.inference_mode(), _evaluation_mode(model):
        for batch in _batches(documents, scoring):
            output = model(batch.input_ids_BT, attention_mask=batch.attention_mask_BT)
            nats_P[batch.text_positions_M] = _losses(output.logits, batch.scored_M, batch.targets_M)
            if output.gates is not None:
                gates_MS = output.gates.flatten(0, 1)[batch.scored_M].float().cpu()
                if gates_PS.shape[1] != gates_MS.shape[1]:
                    gates_PS = gates_MS.new_zeros(nats_P.numel(), gates_MS.shape[1])
                gates_PS[batch.text_positions_M] = gates_MS
    _require_finite(nats_P, offsets_D)
    return TokenScores(nats_P.numpy(), gates_PS.numpy(), offsets_D)


@contextmanager
def _evaluation_mode(model: Scorable) -> Iterator[None]:
    """No dropout while scoring; a module's own mode comes back afterwards."""
    if not isinstance(model, nn.Module) or not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


@dataclass(frozen=True)
class _Batch:
    """One right-padded batch. M scored tokens: flat index b*T + t, target id, position in the whole text."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor | None
    scored_M: Tensor
    targets_M: Tensor
    text_positions_M: Tensor


def _offsets(documents: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Where each document's tokens begin in the whole text, and its end."""
    return np.cumsum([0, *(len(document) for document in documents)])


def _batches(documents: Sequence[Sequence[int]], scoring: Scoring) -> Iterator[_Batch]:
    """Batches of windows of like length, longest first so that memory peaks at once; ties keep document order."""
    offsets_D = _offsets(documents)
    pieces = [np.asarray((scoring.bos_id, *document), dtype=np.int64) for document in documents]
    ids_P = torch.from_numpy(np.concatenate(pieces)) if pieces else torch.zeros(0, dtype=torch.int64)
    windows = cut_windows(np.diff(offsets_D).tolist(), scoring.window)
    order_W = np.argsort(-windows.length_W, kind="stable")
    # Every document before this one added its bos to the ids, but not to the text.
    shift_D = np.arange(offsets_D.size)
    first = 0
    while first < order_W.size:
        length = int(windows.length_W[order_W[first]])
        chosen_B = order_W[first : first + max(1, scoring.batch_size * scoring.window // length)]
        first += chosen_B.size
        document_B = windows.document_W[chosen_B]
        position_BT = torch.from_numpy(windows.start_W[chosen_B])[:, None] + torch.arange(length)
        end_B = windows.start_W[chosen_B] + windows.length_W[chosen_B]
        inside_BT = position_BT < torch.from_numpy(end_B)[:, None]
        scored_BT = inside_BT & (position_BT >= torch.from_numpy(windows.scored_from_W[chosen_B])[:, None])
        text_BT = position_BT + torch.from_numpy(offsets_D[document_B])[:, None]
        ids_BT = text_BT + torch.from_numpy(shift_D[document_B])[:, None]
        input_ids_BT = torch.where(inside_BT, ids_P[ids_BT.clamp_max(ids_P.numel() - 1)], scoring.pad_id)
        padded = bool(windows.length_W[chosen_B[-1]] < length)
        scored_M = scored_BT.flatten().nonzero().squeeze(1)
        yield _Batch(
            input_ids_BT.to(scoring.device),
            inside_BT.long().to(scoring.device) if padded else None,
            scored_M.to(scoring.device),
            ids_P[ids_BT[scored_BT] + 1].to(scoring.device),
            text_BT[scored_BT],
        )


def _losses(logits_BTV: Tensor, scored_M: Tensor, targets_M: Tensor) -> Tensor:
    """Negative log-likelihood in nats of the targets (M), at scored positions only; float64 on the CPU."""
    logits_NV = logits_BTV.flatten(0, 1)
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    rows = max(1, LOGITS_AT_ONCE // logits_NV.shape[-1])
    slices = [slice(first, first + rows) for first in range(0, scored_M.numel(), rows)]
    parts = [F.cross_entropy(logits_NV[scored_M[m]].to(dtype), targets_M[m], reduction="none") for m in slices]
    return torch.cat(parts).double().cpu()


def _levels(gates_MS: Tensor) -> Tensor:
    """0 closed, 1 up to a half, 2 above a half, 3 fully open: all that the shares and the lag need, one byte each."""
    return (gates_MS > 0).byte() + (gates_MS > 0.5).byte() + (gates_MS >= 1).byte()


def _document_sums(nats_P: Tensor, offsets_D: NDArray[np.int64]) -> tuple[float, ...]:
    """Float64 sums per document, in text order whatever the batches were."""
    _require_finite(nats_P, offsets_D)
    nats = nats_P.numpy()
    return tuple(float(nats[a:b].sum()) for a, b in pairwise(offsets_D))


def _require_finite(nats_P: Tensor, offsets_D: NDArray[np.int64]) -> None:
    finite_P = torch.isfinite(nats_P)
    if not bool(finite_P.all()):
        first = int((~finite_P).nonzero()[0, 0])
        document = int(np.searchsorted(offsets_D, first, side="right")) - 1
        where = f"token {first - offsets_D[document]} of document {document}"
        raise DivergedError("a loss is not finite", where, "the model's weights went bad; evaluate an earlier stage")


def _gate_usage(levels_PS: NDArray[np.uint8], offsets_D: NDArray[np.int64]) -> tuple[GateUsage, ...]:
    lengths_D = np.diff(offsets_D)
    full_D = np.flatnonzero(lengths_D)
    side_PS = levels_PS >= 2
    final_PS = np.repeat(side_PS[offsets_D[1:][full_D] - 1], lengths_D[full_D], axis=0)
    number_P = np.arange(len(levels_PS)) - np.repeat(offsets_D[:-1], lengths_D) + 1
    unsettled_PS = np.where(side_PS != final_PS, number_P[:, None], 0)
    lags_DS = np.zeros((lengths_D.size, levels_PS.shape[1]), dtype=np.int64)
    lags_DS[full_D] = np.maximum.reduceat(unsettled_PS, offsets_D[:-1][full_D], axis=0)
    return tuple(
        GateUsage(
            gate=gate,
            share_open=float((levels_PS[:, gate] > 0).mean()),
            share_not_full=float((levels_PS[:, gate] < 3).mean()),
            document_lags=tuple(lags_DS[:, gate].tolist()),
        )
        for gate in range(levels_PS.shape[1])
    )
