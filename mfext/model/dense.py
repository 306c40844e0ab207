"""The dense baseline: a decoder-only transformer with softmax attention and rotary positions.

    x = x + attention(norm(x))        x = x + feedforward(norm(x))

What ModuleFormer is judged against, so what helped at no cost is in: pre-norm (RMSNorm), rotary
positions (arXiv 2104.09864), no biases, a scaled start. Tried on equal parameters and 400 000 tokens
(2026-11-25, bits per byte): GELU 2.84, SwiGLU (arXiv 2002.05202) 2.88; LayerNorm 2.89 where RMSNorm
had 2.88; normalised queries and keys 2.95. Same inputs, outputs, cache and head as ModuleFormer; it
routes nothing and cannot grow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mfext.config import ModelConfig
from mfext.model.cache import Cache
from mfext.model.initialisation import STD
from mfext.model.language_model import LanguageModel, ModelOutput
from mfext.model.linear import Linear
from mfext.model.positions import Positions

ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class Reach:
    """What every layer of one forward shares.

    `rotations` (2, T, C): cosines and sines of the new positions. `visible` (B or 1, 1, T, S): True
    where a position sees another; None where `causal` (everything up to itself) or all cached
    positions are seen.
    """

    rotations: Tensor
    visible: Tensor | None
    causal: bool
    cache: Cache | None
    return_attentions: bool


class DenseAttention(nn.Module):
    """Multi-head softmax attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.queries_keys_values = Linear(config.d_model, 3 * config.d_attention, bias=False)
        self.output = Linear(config.d_attention, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor, reach: Reach) -> tuple[Tensor, Tensor | None]:
        """Residual update (B, T, D) of normalised activations, and the attention weights (B, 1, H, T, S) if asked."""
        batch, length, _ = x_BTD.shape
        heads, width = self.config.num_heads, self.config.d_head
        qkv_BTGC = self.queries_keys_values(x_BTD).view(batch, length, 3 * heads, width)
        qk_BTGC, v_BTHC = qkv_BTGC.split((2 * heads, heads), dim=2)
        q_BTHC, k_BSHC = rotate(qk_BTGC, reach.rotations).chunk(2, dim=2)
        v_BSHC = v_BTHC
        if reach.cache is not None:
            k_BSHC, v_BSHC = reach.cache.extend(self.layer, k_BSHC, v_BTHC)
        q_BHTC, k_BHSC, v_BHSC = (each.transpose(1, 2) for each in (q_BTHC, k_BSHC, v_BSHC))
        o_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHSC, v_BHSC, attn_mask=reach.visible, is_causal=reach.causal)
        update_BTD: Tensor = self.output(o_BHTC.transpose(1, 2).reshape(batch, length, heads * width))
        return update_BTD, attention_weights(q_BHTC, k_BHSC, reach) if reach.return_attentions else None


class DenseFeedForward(nn.Module):
    """Two matrices with GELU between them, as in ModuleFormer's experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.d_model, config.d_feedforward, bias=False)
        self.down = Linear(config.d_feedforward, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Residual update of normalised activations (B, T, D)."""
        update_BTD: Tensor = self.down(F.gelu(self.up(x_BTD), approximate="tanh"))
        return update_BTD


class DenseBlock(nn.Module):
    """One layer: attention and feed-forward, each behind a norm, each added to the residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_eps)
        self.attention = DenseAttention(config, layer)
        self.feedforward_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_eps)
        self.feedforward = DenseFeedForward(config)

    def forward(self, x_BTD: Tensor, reach: Reach) -> tuple[Tensor, Tensor | None]:
        update_BTD, weights = self.attention(self.attention_norm(x_BTD), reach)
        x_BTD = x_BTD + update_BTD
        return x_BTD + self.feedforward(self.feedforward_norm(x_BTD)), weights


class DenseTransformer(LanguageModel):
    """The model: embedding, L blocks, final norm, untied head. Of `config` it reads the widths, layers and heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.architecture == "dense", "made by new_model"
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(DenseBlock(config, layer) for layer in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_eps)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        initialise_dense(self)

    def new_cache(self, batch_size: int, capacity: int) -> Cache:
        """An empty decoding cache with room for `capacity` positions."""
        weight, config = self.embedding.weight, self.config
        shape = (2, batch_size, config.num_heads, capacity, config.d_head)
        rotations = rotations_of(0, capacity, config.d_head, weight)
        return Cache([weight.new_empty(shape) for _ in self.blocks], rotations=rotations)

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
        """As every LanguageModel's; a document's logits do not depend on where it stands."""
        offset = 0 if cache is None else cache.length
        cached_starts_B = None if cache is None else cache.starts_B
        positions = Positions.of(input_ids, offset, attention_mask, document_starts, cached_starts_B)
        reach = self._reach(input_ids, positions, cache, return_attentions)
        x_BTD: Tensor = self.embedding(input_ids)
        hidden, attentions = [x_BTD], []
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BTD, weights = checkpoint(block, x_BTD, reach, use_reentrant=False)
            else:
                x_BTD, weights = block(x_BTD, reach)
            hidden.append(x_BTD)
            attentions.append(weights)
        x_BTD = hidden[-1] = self.final_norm(x_BTD)
        if cache is not None:
            cache.length += input_ids.shape[1]
            cache.starts_B = None if positions.starts_BT is None else positions.starts_BT[:, -1]
        return ModelOutput(
            self.lm_head(x_BTD),
            (),
            None,
            tuple(hidden) if return_hidden else (),
            tuple(attentions) if return_attentions else (),
        )

    def _reach(self, input_ids: Tensor, positions: Positions, cache: Cache | None, return_attentions: bool) -> Reach:
        length = input_ids.shape[1]
        if cache is not None and cache.rotations is not None:
            rotations = cache.rotations.narrow(1, positions.offset, length)
        else:
            rotations = rotations_of(positions.offset, length, self.config.d_head, self.embedding.weight)
        causal = positions.offset == 0 and positions.starts_BT is None
        everything = length == 1 and positions.starts_BT is None
        visible = None if causal or everything else visible_positions(positions, length, input_ids.device)
        return Reach(rotations, visible, causal, cache, return_attentions)


def rotations_of(first: int, length: int, width: int, like: Tensor) -> Tensor:
    """Cosines and sines (2, T, C) of positions `first` on, each frequency twice; dtype and device of `like`.

    Position p turns the pair (c, c + C/2) by p * 10000^(-2c / C) radians: arXiv 2104.09864, equation 15.
    """
    exact = torch.promote_types(like.dtype, torch.float32)
    frequency_c = ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=exact, device=like.device) / width)
    position_T = torch.arange(first, first + length, dtype=exact, device=like.device)
    angle_Tc = position_T[:, None] * frequency_c
    angle_TC = torch.cat((angle_Tc, angle_Tc), dim=-1)
    return torch.stack((angle_TC.cos(), angle_TC.sin())).to(like.dtype)


def rotate(x_BTHC: Tensor, rotations_2TC: Tensor) -> Tensor:
    """Every head's vector turned by its position's angles."""
    cos_T1C, sin_T1C = rotations_2TC.to(x_BTHC.dtype).unsqueeze(2).unbind(0)
    first, second = x_BTHC.chunk(2, dim=-1)
    return x_BTHC * cos_T1C + torch.cat((-second, first), dim=-1) * sin_T1C


def visible_positions(positions: Positions, length: int, device: torch.device) -> Tensor:
    """(B or 1, 1, T, S): whether a new position sees a position: its own document, up to itself.

    Padding, whose start lies behind it, sees itself alone: a softmax over nothing would be NaN.
    """
    seen_S = torch.arange(positions.offset + length, device=device)
    own_T1 = seen_S[positions.offset :, None]
    visible_BTS = (seen_S <= own_T1)[None]
    if positions.starts_BT is not None:
        visible_BTS = (visible_BTS & (seen_S >= positions.starts_BT[:, :, None])) | (seen_S == own_T1)
    return visible_BTS[:, None]


def attention_weights(q_BHTC: Tensor, k_BHSC: Tensor, reach: Reach) -> Tensor:
    """The softmax itself, (B, 1, H, T, S); only for whoever wants to look at it."""
    scores_BHTS: Tensor = q_BHTC @ k_BHSC.transpose(2, 3) / math.sqrt(q_BHTC.shape[-1])
    visible = reach.visible
    if reach.causal:
        visible = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q_BHTC.device).tril()
    if visible is not None:
        scores_BHTS = scores_BHTS.masked_fill(~visible, -math.inf)
    return scores_BHTS.softmax(-1).unsqueeze(1)


def initialise_dense(model: DenseTransformer) -> None:
    """Draw every weight anew from torch's global generator.

    `scaled`: matrices N(0, 1/sqrt(fan_in)), embedding N(0, 1), so that a token is as large in the residual as what
    branches add to it (2.88 against 2.96 bits per byte with 0.02). `published`: all N(0, 0.02), as GPT-2 (3.10).
    In both the head is N(0, 0.02), what is added to the residual is divided by sqrt(2 L), and norms start at 1.
    """
    config = model.config
    scaled, residual = config.init == "scaled", 1 / math.sqrt(2 * config.num_layers)
    nn.init.normal_(model.embedding.weight, std=1.0 if scaled else STD)
    nn.init.normal_(model.lm_head.weight, std=STD)
    for name, weight in model.blocks.named_parameters():
        if weight.ndim == 2:
            std = weight.shape[1] ** -0.5 if scaled else STD
            nn.init.normal_(weight, std=std * (residual if name.endswith(("output.weight", "down.weight")) else 1.0))
