"""What every language model here offers, whatever it is made of: logits, a decoding cache, text.

Training, measuring, decoding and storing ask for no more than this; growing asks for a ModuleFormer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mfext.config import ModelConfig
from mfext.model.cache import Cache
from mfext.model.generate import Continuations, Decode, Sampling, generate
from mfext.model.router import Routing


@dataclass(frozen=True)
class ModelOutput:
    """What a forward returns.

    logits (B, T, V); routings of every site, in order of depth (none from a compiled decoding
    step or a dense model); gates (B, T, S) of the S gated generations, None without any;
    hidden_states: L+1 tensors (B, T, D), the last after the final norm; attentions: L tensors
    (B, K, H, T, S), K = 1 in a dense model.
    """

    logits: Tensor
    routings: tuple[Routing, ...]
    gates: Tensor | None = None
    hidden_states: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = ()


class LanguageModel(nn.Module, ABC):
    """A causal language model over token ids, with one embedding and an untied head.

    `observed` is set inside `observing(model)` alone: routings then say how large the experts' outputs were.
    """

    config: ModelConfig
    embedding: nn.Embedding
    gradient_checkpointing: bool
    observed: bool = False

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        document_starts: Tensor | None = None,
        cache: Cache | None = None,
        return_hidden: bool = False,
        return_attentions: bool = False,
    ) -> ModelOutput:
        """Next-token logits of `input_ids` (B, T).

        `attention_mask` (B, T): 1 for tokens, 0 for padding at the left or right.
        `document_starts` (B, T): index of the first token of each position's document (packed
        batches); with a cache, an absolute index. With `cache`, the tokens follow those it holds.
        """

    @abstractmethod
    def new_cache(self, batch_size: int, capacity: int) -> Cache:
        """An empty decoding cache with room for `capacity` positions."""

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Recompute each block's activations in the backward pass instead of storing them."""
        self.gradient_checkpointing = on

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        sampling: Sampling | None = None,
        decode: Decode | None = None,
    ) -> Continuations:
        """Continue every prompt of `input_ids` (B, T) with a cache; None samples as `Sampling()` does: greedily.

        `attention_mask` (B, T): 0 marks padding at either side of shorter prompts. `decode` turns token ids into
        text, for the rows' `text` and for stop strings. Raises ValueError for what cannot be continued.
        """
        return generate(self, input_ids, attention_mask, sampling or Sampling(), decode)
