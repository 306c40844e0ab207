"""Decoding on a GPU without the launches: one step of a batch, recorded once as a CUDA graph, then replayed.

A step of a few tokens is thousands of small kernels, and launching them takes longer than running them. A graph's
shapes are fixed, so the step reads the cache's whole room and learns from a tensor how much of it is filled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mfext_kernels.backends import on_device_of

if TYPE_CHECKING:
    from mfext.model.cache import Cache
    from mfext.model.language_model import LanguageModel

# Recording costs about as much as three steps; a short answer is done before that pays.
STEPS_BEFORE_RECORDING = 4


class GraphedStep:
    """One step of the rows of `cache`, recorded when made; it writes keys and values where the eager step would."""

    def __init__(self, model: LanguageModel, cache: Cache) -> None:
        rows, device = cache.keys_values[0].shape[1], cache.keys_values[0].device
        self._token_B1 = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._filled_1 = torch.full((1,), cache.length, dtype=torch.int64, device=device)
        fixed = replace(cache, filled_1=self._filled_1, gates={}, graphed=None)
        with on_device_of(self._token_B1):
            self._logits_BTV = self._record(model, fixed)

    def __call__(self, token_B1: Tensor, filled: int) -> Tensor:
        """Logits (B, 1, V) of the tokens that follow `filled` cached ones."""
        self._token_B1.copy_(token_B1)
        self._filled_1.fill_(filled)
        self._graph.replay()
        return self._logits_BTV.clone()

    def _record(self, model: LanguageModel, fixed: Cache) -> Tensor:
        length = fixed.length
        model(self._token_B1, cache=fixed)  # compiles what is not compiled yet; what it writes is written over
        fixed.length = length
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            logits_BTV: Tensor = model(self._token_B1, cache=fixed).logits
        return logits_BTV


def records(model: LanguageModel, input_ids: Tensor, cache: Cache) -> bool:
    """Whether this step of one token a row on a GPU is to be replayed: nothing trains, and enough steps have passed.

    A domain gate's state lives in Python, so a model with gates of its own is decoded launch by launch.
    """
    return (
        input_ids.is_cuda
        and input_ids.shape == (cache.keys_values[0].shape[1], 1)
        and cache.filled_1 is None
        and cache.length < cache.capacity
        and cache.steps >= STEPS_BEFORE_RECORDING
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and all(generation.joins_softmax for generation in model.config.generations)
    )
