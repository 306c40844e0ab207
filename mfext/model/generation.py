"""Everything one growth adds: a container whose prefix is the pack and whose removal is the detach."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfext.config import GenerationConfig, ModelConfig
from mfext.model.domain_gate import DomainGate
from mfext.model.experts import AttentionExperts, FeedForwardExperts
from mfext.model.router import Router, RouterRows
from mfext_kernels.products import linear


class MatrixChange(nn.Module):
    """A change W of a (rows, columns) matrix, full or low-rank (left @ right), zero at growth."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        if rank >= min(rows, columns):
            self.full = nn.Parameter(torch.zeros(rows, columns))
        else:
            self.left = nn.Parameter(torch.zeros(rows, rank))
            self.right = nn.Parameter(torch.empty(rank, columns).normal_(std=columns**-0.5))

    def rows(self, ids: Tensor) -> Tensor:
        """W[ids], as an embedding (..., columns)."""
        return F.embedding(ids, self.full) if hasattr(self, "full") else F.embedding(ids, self.left) @ self.right

    def apply_to(self, x: Tensor) -> Tensor:
        """x @ W^T, as a linear layer (..., rows)."""
        return linear(x, self.full) if hasattr(self, "full") else linear(linear(x, self.right), self.left)


class NormChange(nn.Module):
    """A change of a LayerNorm's weight and bias, zero at growth."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))


class GenerationLayer(nn.Module):
    """One layer's share of a generation; absent parts are None."""

    def __init__(self, config: GenerationConfig, model: ModelConfig, layer: int, num_features: int) -> None:
        super().__init__()
        attention, feedforward = config.experts("attention", layer), config.experts("feedforward", layer)

        def router(num_experts: int) -> nn.Module:
            if config.joins_softmax:
                return RouterRows(num_features, num_experts)
            null_choice = config.mode == "side"
            return Router(model.router, model.d_model, model.d_router, num_experts + null_choice)

        self.attention = AttentionExperts(attention, model.d_model, model.d_attention) if attention else None
        self.attention_router = router(attention) if attention else None
        self.feedforward = FeedForwardExperts(feedforward, model.d_model, config.d_feedforward) if feedforward else None
        self.feedforward_router = router(feedforward) if feedforward else None
        rank = config.key_value_rank
        self.key = MatrixChange(model.d_attention, model.d_model, rank) if rank else None
        self.value = MatrixChange(model.d_attention, model.d_model, rank) if rank else None
        self.attention_norm = NormChange(model.d_model) if config.norms else None
        self.feedforward_norm = NormChange(model.d_model) if config.norms else None


class Generation(nn.Module):
    """The tensors of one growth; none is shared with anything older."""

    def __init__(self, config: GenerationConfig, model: ModelConfig) -> None:
        super().__init__()
        self.config = config
        num_features = model.d_model if model.router == "linear" else model.d_router
        self.layers = nn.ModuleList(
            GenerationLayer(config, model, layer, num_features) for layer in range(model.num_layers)
        )
        self.gate = DomainGate(config.gate, model.vocab_size) if config.gate is not None else None
        self.embedding = (
            MatrixChange(model.vocab_size, model.d_model, config.embedding_rank) if config.embedding_rank else None
        )
        self.head = MatrixChange(model.vocab_size, model.d_model, config.head_rank) if config.head_rank else None
        self.final_norm = NormChange(model.d_model) if config.norms else None

    def layer(self, index: int) -> GenerationLayer:
        """This growth's share of one layer, from 0 on."""
        layer = self.layers[index]
        assert isinstance(layer, GenerationLayer)
        return layer


def deciding_names(names: Iterable[str]) -> set[str]:
    """Of a model's parameter names, the newest generation's that decide who reaches its experts: routers and gate."""
    own = {name: name.split(".") for name in names if name.startswith("generations.")}
    newest = max((int(parts[1]) for parts in own.values()), default=-1)
    return {
        name
        for name, parts in own.items()
        if int(parts[1]) == newest
        and (parts[2] == "gate" or parts[4:5] in (["attention_router"], ["feedforward_router"]))
    }


def gate_names(names: Iterable[str]) -> set[str]:
    """Of a model's parameter names, those of domain gates, whose thresholds were calibrated on these very weights."""
    return {name for name in names if name.startswith("generations.") and name.split(".")[2] == "gate"}


@dataclass(frozen=True)
class OpenTokens:
    """Which tokens of a forward a generation with a router of its own is open on: all, in mode side.

    `gate_BT` is g in [0, 1], or None where it is known to be 1 everywhere; `tokens_M` flat indices with g > 0, or None
    where every token is open; `rows_b` the batch rows holding any, or None for all; `tokens_in_rows_M` the flat indices
    inside those rows.
    """

    number: int
    generation: Generation
    gate_BT: Tensor | None = None
    tokens_M: Tensor | None = None
    rows_b: Tensor | None = None
    tokens_in_rows_M: Tensor | None = None

    @classmethod
    def of(cls, number: int, generation: Generation, gate_BT: Tensor) -> OpenTokens | None:
        """None where the generation is closed on every token: it then costs nothing."""
        open_BT = gate_BT > 0
        if bool(open_BT.all()):
            return cls(number, generation, gate_BT)
        row_open_B = open_BT.any(1)
        if not bool(row_open_B.any()):
            return None
        rows_b = row_open_B.nonzero().squeeze(1)
        tokens_M = open_BT.flatten().nonzero().squeeze(1)
        tokens_in_rows_M = open_BT[rows_b].flatten().nonzero().squeeze(1)
        return cls(number, generation, gate_BT, tokens_M, rows_b, tokens_in_rows_M)

    def layer(self, index: int) -> GenerationLayer:
        return self.generation.layer(index)

    def add(self, y_ND: Tensor, change_MD: Tensor) -> Tensor:
        """y plus g times the change on the open tokens; every other token keeps its bits."""
        if self.gate_BT is None:
            return y_ND + change_MD
        gate_N1 = self.gate_BT.reshape(-1, 1).to(change_MD.dtype)
        if self.tokens_M is None:
            return y_ND + gate_N1 * change_MD
        return y_ND.index_add(0, self.tokens_M, (gate_N1.index_select(0, self.tokens_M) * change_MD).to(y_ND.dtype))

    def pick(self, x_ND: Tensor) -> Tensor:
        """The open tokens' rows of x."""
        return x_ND if self.tokens_M is None else x_ND.index_select(0, self.tokens_M)
