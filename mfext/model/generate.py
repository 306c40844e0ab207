"""Text from a model, token by token, with a cache: batches, sampling, stops.

A model here is anything with the few members of `Decoder`: every `LanguageModel` has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from mfext.config import ModelConfig
from mfext.model.cache import Cache

# Prompts are read in pieces of this many positions, so that logits of a long prompt never exist at once:
# at V = 50 000 a piece costs 51 MB per row in float32.
PREFILL = 256
# Characters of slack, in tokens, when looking for a stop string at the end of what was generated: room for
# special tokens that decode to nothing and for a decoder that treats its first token differently.
STOP_SLACK = 8

Finish = Literal["eos", "stop", "length"]
Decode = Callable[[list[int]], str]


class Logits(Protocol):
    """What a forward returns, as far as decoding looks at it."""

    @property
    def logits(self) -> Tensor: ...


class Decoder(Protocol):
    """What decoding asks of a model."""

    config: ModelConfig

    @property
    def device(self) -> torch.device: ...

    def new_cache(self, batch_size: int, capacity: int) -> Cache: ...

    def __call__(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        document_starts: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Logits: ...


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token and when to stop; wrong values raise ValueError.

    `temperature` 0 is greedy (then `top_k`, `top_p` and `seed` have no effect); `top_k` 0 and `top_p` 1 switch the
    cut-offs off. `stop` holds token sequences, `stop_strings` text (needs `decode`); a row ends when
    what it generated ends with (or, for text, contains) one of them.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[tuple[int, ...], ...] = ()
    stop_strings: tuple[str, ...] = ()
    stop_at_eos: bool = True
    seed: int = 1

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            "temperature",
            self.temperature,
            "0 (greedy) or a positive number",
        )
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or a positive count")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (off)")
        _require(
            all(len(sequence) > 0 for sequence in self.stop), "stop", self.stop, "token sequences of at least one token"
        )
        _require(all(self.stop_strings), "stop_strings", self.stop_strings, "texts of at least one character")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2**63 - 1")


@dataclass(frozen=True)
class Continuation:
    """What was generated after one prompt.

    `tokens` are all generated ids, a final eos or stop included; `text` is their decoding
    without eos and cut before the first stop string (None where no `decode` was given).
    """

    tokens: tuple[int, ...]
    finish: Finish
    text: str | None = None


@dataclass(frozen=True)
class Continuations:
    """What was generated for a batch: one row per prompt, in the prompts' order."""

    rows: tuple[Continuation, ...]


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as (input_ids, attention_mask), both (B, T) long, padded at the left."""
    lengths = [len(prompt) for prompt in prompts]
    _require(
        bool(lengths) and min(lengths) > 0,
        "prompts",
        lengths,
        "one or more prompts of at least one token each (start from bos)",
    )
    longest = max(lengths)
    ids_BT = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BT = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    return ids_BT, mask_BT


def generate(
    model: Decoder,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None,
    sampling: Sampling,
    decode: Decode | None = None,
) -> Continuations:
    """Continue every prompt; prompts of different lengths are padded at either side.

    `attention_mask_BT` marks tokens with 1 and padding with 0, None means no padding. Each
    row's random numbers depend on the seed and the row's index alone. Tensors are moved to the
    model's device. Raises ValueError for a mask with holes or an empty prompt.
    """
    _require(
        not sampling.stop_strings or decode is not None,
        "stop_strings",
        sampling.stop_strings,
        "given together with decode",
    )
    ids_BT, mask_BT = _left_padded(input_ids_BT.to(model.device), attention_mask_BT)
    batch, length = ids_BT.shape
    with torch.no_grad():
        cache = model.new_cache(batch, length + sampling.max_new_tokens)
        logits_BV = _prefill(model, ids_BT, mask_BT, cache)
        chance_BT = uniform(batch, sampling.max_new_tokens, sampling.seed)
        rows = [_Row(model.config.eos_id, sampling, decode) for _ in range(batch)]
        for step in range(sampling.max_new_tokens):
            chosen_B = choose(logits_BV, sampling, chance_BT[:, step])
            for row, token in zip(rows, chosen_B.tolist(), strict=True):
                row.append(token)
            if step + 1 == sampling.max_new_tokens or all(row.finish is not None for row in rows):
                break
            live_B = torch.tensor([row.finish is None for row in rows], device=chosen_B.device)
            fed_B = torch.where(live_B, chosen_B, model.config.pad_id)
            logits_BV = model(fed_B[:, None], cache=cache).logits[:, -1]
    return Continuations(tuple(row.finished() for row in rows))


def sample_documents(model: Decoder, num: int, length: int, seed: int, batch: int = 64) -> Tensor:
    """Text as the model itself would write it: (num, length) long, on the CPU, every row starting with bos.

    Sampled at temperature 1 from bos. A document that ends is followed by a new one, which sees
    nothing of the old: eos counts as the bos of the next. Padding is never drawn.
    """
    _require(num >= 0, "num", num, "at least 0")
    _require(length >= 1, "length", length, "at least 1")
    _require(batch >= 1, "batch", batch, "at least 1")
    chance = uniform(num, length, seed)
    parts = [torch.empty(0, length, dtype=torch.long)]
    with torch.no_grad():
        parts += [_sample_batch(model, chance[first : first + batch]) for first in range(0, num, batch)]
    return torch.cat(parts)


def _sample_batch(model: Decoder, chance_BT: Tensor) -> Tensor:
    config, sampling = model.config, Sampling(temperature=1.0)
    batch, length = chance_BT.shape
    cache = model.new_cache(batch, length)
    token_B = torch.full((batch,), config.bos_id, device=model.device)
    starts_B = torch.zeros_like(token_B)
    tokens = [token_B]
    for step in range(1, length):
        logits_BV = model(token_B[:, None], document_starts=starts_B[:, None], cache=cache).logits[:, -1]
        if config.pad_id not in (config.bos_id, config.eos_id):
            logits_BV = logits_BV.index_fill(1, torch.tensor([config.pad_id], device=logits_BV.device), -math.inf)
        token_B = choose(logits_BV, sampling, chance_BT[:, step])
        token_B = torch.where(token_B == config.eos_id, config.bos_id, token_B)
        starts_B = torch.where(token_B == config.bos_id, step, starts_B)
        tokens.append(token_B)
    return torch.stack(tokens, dim=1).cpu()


def uniform(rows: int, columns: int, seed: int) -> Tensor:
    """Numbers in [0, 1), (rows, columns) float64 on the CPU; row r is the same for any number of rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator, dtype=torch.float64)


def choose(logits_BV: Tensor, sampling: Sampling, chance_B: Tensor) -> Tensor:
    """Next tokens (B): the largest logit at temperature 0, else drawn from what the cut-offs leave.

    `chance_B` holds one number in [0, 1) per row; equal numbers draw equal tokens.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    probs_BK, tokens_BK = candidates(logits_BV, sampling)
    cumulative_BK = probs_BK.cumsum(-1)
    target_B1 = chance_B.to(probs_BK.device)[:, None] * cumulative_BK[:, -1:]
    # The first candidate whose cumulative probability exceeds the target: never one of probability zero.
    picked_B1 = torch.searchsorted(cumulative_BK, target_B1, right=True).clamp_max(probs_BK.shape[-1] - 1)
    return tokens_BK.gather(1, picked_B1).squeeze(1)


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities (B, K) in float64, falling where a cut-off is on, and the tokens they belong to.

    The largest logit is subtracted before dividing by the temperature, so that no temperature
    overflows. `top_p` keeps the smallest set of most probable tokens whose mass reaches it, at least one.
    """
    logits_BV = logits_BV.double()
    vocab = logits_BV.shape[-1]
    kept = min(sampling.top_k or vocab, vocab)
    if kept == vocab and sampling.top_p == 1:
        tokens_BK = torch.arange(vocab, device=logits_BV.device).expand_as(logits_BV)
        logits_BK = logits_BV
    else:
        logits_BK, tokens_BK = logits_BV.topk(kept, dim=-1)
    probs_BK = ((logits_BK - logits_BK.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        before_BK = probs_BK.cumsum(-1) - probs_BK
        before_BK[:, 0] = 0.0
        probs_BK = probs_BK.masked_fill(before_BK >= sampling.top_p, 0.0)
    return probs_BK, tokens_BK


@dataclass
class _Row:
    """One row while it grows."""

    eos_id: int
    sampling: Sampling
    decode: Decode | None
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def append(self, token: int) -> None:
        if self.finish is not None:
            return
        self.tokens.append(token)
        if self.sampling.stop_at_eos and token == self.eos_id:
            self.finish = "eos"
        elif self._stops():
            self.finish = "stop"

    def _stops(self) -> bool:
        if any(tuple(self.tokens[-len(sequence) :]) == sequence for sequence in self.sampling.stop):
            return True
        if not self.sampling.stop_strings or self.decode is None:
            return False
        # A token carries at least a byte, so a stop string ends within this many last tokens.
        reach = max(len(text.encode()) for text in self.sampling.stop_strings) + STOP_SLACK
        tail = self.decode(self.tokens[-reach:])
        return any(text in tail for text in self.sampling.stop_strings)

    def finished(self) -> Continuation:
        finish: Finish = "length" if self.finish is None else self.finish
        if self.decode is None:
            return Continuation(tuple(self.tokens), finish)
        text = self.decode(self.tokens[:-1] if finish == "eos" else self.tokens)
        ends = [text.find(stop) for stop in self.sampling.stop_strings if stop in text]
        return Continuation(tuple(self.tokens), finish, text[: min(ends)] if ends else text)


def _prefill(model: Decoder, ids_BT: Tensor, mask_BT: Tensor | None, cache: Cache) -> Tensor:
    """Read the prompts into the cache; logits (B, V) after their last tokens."""
    logits_BV = None
    for begin in range(0, ids_BT.shape[1], PREFILL):
        piece = slice(begin, begin + PREFILL)
        mask_BP = None if mask_BT is None else mask_BT[:, piece]
        logits_BV = model(ids_BT[:, piece], attention_mask=mask_BP, cache=cache).logits[:, -1]
    assert logits_BV is not None
    return logits_BV


def _left_padded(ids_BT: Tensor, mask_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same prompts with all padding at the left; no mask where there is none."""
    _require(
        ids_BT.ndim == 2 and ids_BT.numel() > 0,
        "input_ids",
        tuple(ids_BT.shape),
        "(B, T) with at least one token per row",
    )
    if mask_BT is None:
        return ids_BT, None
    real_BT = mask_BT.to(device=ids_BT.device, dtype=torch.bool)
    _require(
        real_BT.shape == ids_BT.shape,
        "attention_mask",
        tuple(mask_BT.shape),
        f"of the shape of input_ids {tuple(ids_BT.shape)}",
    )
    if bool(real_BT.all()):
        return ids_BT, None
    _require(bool(real_BT.any(1).all()), "attention_mask", "a row of zeros", "one token or more per row")
    real_BT = real_BT.long()
    runs_B = (real_BT.diff(dim=1) == 1).sum(1) + real_BT[:, 0]
    _require(
        bool((runs_B == 1).all()),
        "attention_mask",
        "tokens with padding between them",
        "one run of ones per row, padding at its left or right",
    )
    # A stable sort by the mask moves a row's padding to its left and keeps its tokens' order.
    order_BT = real_BT.argsort(dim=1, stable=True)
    return ids_BT.gather(1, order_BT), real_BT.gather(1, order_BT)


def _require(condition: bool, key: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{key}={value!r}: must be {rule}")
