"""ModuleFormer (arXiv 2306.04640): a stack of expert attention and expert feed-forward.

    x = x + attention(norm(x))        x = x + feedforward(norm(x))

No positional embedding: order comes from stick-breaking attention alone. Generations grown
later add to this without touching any of its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mfext.config import ModelConfig
from mfext.model.attention import ExpertAttention
from mfext.model.cache import Cache
from mfext.model.compiled_step import compiled_step
from mfext.model.decoding_step import LayerWeights, attend, feed_forward
from mfext.model.feedforward import ExpertFeedForward
from mfext.model.forward_pass import Pass
from mfext.model.generation import Generation, NormChange, OpenTokens
from mfext.model.graphed_step import GraphedStep, records
from mfext.model.initialisation import initialise
from mfext.model.language_model import LanguageModel, ModelOutput
from mfext.model.linear import Linear
from mfext.model.positions import Positions
from mfext.model.router import Routing

# Sequences decoded by the compiled step; beyond, torch's products make up for their calls.
MOST_ROWS_COMPILED = 32


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a LayerNorm, each added to the residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.attention = ExpertAttention(config, layer)
        self.feedforward_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.feedforward = ExpertFeedForward(config, layer)

    def forward(self, x_BTD: Tensor, shared: Pass) -> tuple[Tensor, tuple[Routing, ...], Tensor | None]:
        layer = self.attention.site.layer
        changes = [(opened, opened.layer(layer)) for opened in shared.open_generations]
        attention_changes = [(opened, grown.attention_norm) for opened, grown in changes]
        attended = self.attention(changed_norm(self.attention_norm, x_BTD, attention_changes), shared)
        x_BTD = x_BTD + attended.update_BTD
        feedforward_changes = [(opened, grown.feedforward_norm) for opened, grown in changes]
        fed = self.feedforward(changed_norm(self.feedforward_norm, x_BTD, feedforward_changes), shared)
        return x_BTD + fed.update_BTD, attended.routings + fed.routings, attended.weights

    def weights(self) -> LayerWeights:
        """What a decoding step of one sequence reads, as it is now."""
        return LayerWeights(
            self.attention.weights(self.attention_norm), self.feedforward.weights(self.feedforward_norm)
        )


def changed_norm(norm: nn.LayerNorm, x_BTD: Tensor, changes: list[tuple[OpenTokens, NormChange | None]]) -> Tensor:
    """LayerNorm with every open generation's gated change of weight and bias."""
    out_BTD: Tensor = norm(x_BTD)
    for opened, change in changes:
        if change is not None:
            plain_MD = F.layer_norm(opened.pick(x_BTD.flatten(0, 1)), norm.normalized_shape, eps=norm.eps)
            out_BTD = opened.add(out_BTD.flatten(0, 1), plain_MD * change.weight + change.bias).view_as(x_BTD)
    return out_BTD


class ModuleFormer(LanguageModel):
    """The model: embedding, L blocks, final norm, untied head, and the generations grown on it.

    `masked` is set inside `masked(model, plan)` (growth/masking.py) alone: its routers then hide experts, which the
    decoding step of one token, reading their weights itself, would not see.
    """

    masked: bool = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        self.generations = nn.ModuleList(Generation(generation, config) for generation in config.generations)
        self.gradient_checkpointing = False
        initialise(self)

    def generation(self, number: int) -> Generation:
        """The generation with this 1-based number."""
        generation = self.generations[number - 1]
        assert isinstance(generation, Generation)
        return generation

    def new_cache(self, batch_size: int, capacity: int) -> Cache:
        """An empty decoding cache with room for `capacity` positions."""
        weight = self.embedding.weight
        shape = (2, batch_size, self.config.num_heads, capacity, self.config.d_head)
        return Cache([weight.new_zeros(shape) for _ in self.blocks])

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
        """As every LanguageModel's; the output says how every site routed, and how far every gate was open."""
        offset = 0 if cache is None else cache.length
        cached_starts_B = None if cache is None else cache.starts_B
        positions = Positions.of(input_ids, offset, attention_mask, document_starts, cached_starts_B)
        gates = self._open_gates(input_ids, positions, cache)
        opened = self._open_generations(gates)
        competing = tuple(
            self.generation(number) for number, each in enumerate(self.config.generations, 1) if each.joins_softmax
        )
        if cache is not None and not (return_hidden or return_attentions or self.observed or self.masked):
            if not competing and self._decodes(input_ids, positions, cache, opened):
                return self._decode(input_ids, positions, cache, gates, opened)
            if attention_mask is None and document_starts is None and records(self, input_ids, cache):
                return self._replay(input_ids, cache)
            if cache.filled_1 is not None:
                positions = replace(positions, ends_B=(cache.filled_1 + 1).expand(len(input_ids)))
        shared = Pass(positions, opened, competing, cache, return_attentions, self.observed)
        x_BTD = self._embed(input_ids, opened)
        routings: list[Routing] = []
        hidden, attentions = [x_BTD], []
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BTD, new_routings, weights = checkpoint(block, x_BTD, shared, use_reentrant=False)
            else:
                x_BTD, new_routings, weights = block(x_BTD, shared)
            routings.extend(new_routings)
            hidden.append(x_BTD)
            attentions.append(weights)
        x_BTD = changed_norm(self.final_norm, x_BTD, [(each, each.generation.final_norm) for each in opened])
        hidden[-1] = x_BTD
        if cache is not None:
            cache.length += input_ids.shape[1]
            cache.steps += input_ids.shape[1] == 1
            cache.starts_B = None if positions.starts_BT is None else positions.starts_BT[:, -1]
        return ModelOutput(
            self._head(x_BTD, opened),
            tuple(routings),
            _stacked(gates),
            tuple(hidden) if return_hidden else (),
            tuple(attentions) if return_attentions else (),
        )

    def sites(self) -> Iterator[tuple[ExpertAttention, ExpertFeedForward, tuple[nn.LayerNorm, nn.LayerNorm]]]:
        """Every layer's attention, feed-forward, and the norms before them."""
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block.attention, block.feedforward, (block.attention_norm, block.feedforward_norm)

    def _decodes(self, input_ids: Tensor, positions: Positions, cache: Cache, opened: tuple[OpenTokens, ...]) -> bool:
        """Whether this is one token of a few sequences on the CPU with nothing to train.

        Of more than one, of one that does not see its cache from the first key on, or with a generation open on it, by
        the compiled step alone.
        """
        rows = cache.keys_values[0].shape[1]
        simple = (
            input_ids.shape == (rows, 1)
            and rows <= MOST_ROWS_COMPILED
            and input_ids.device.type == "cpu"
            and cache.length < cache.capacity
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )
        if not simple or cache.compiled is not None:
            return simple
        config = self.config
        if config.router != "mlp" or any(each.mode != "gated" for each in config.generations):
            return False
        if cache.weights is None:
            cache.compiled = compiled_step(self, cache)
        plain = rows == 1 and positions.starts_BT is None and not (config.identity_keys_values or opened)
        torch_too = plain and self.embedding.weight.dtype in (torch.float32, torch.float64)
        return cache.compiled is not None or torch_too

    def _decode(
        self,
        input_ids: Tensor,
        positions: Positions,
        cache: Cache,
        gates: dict[int, Tensor],
        opened: tuple[OpenTokens, ...],
    ) -> ModelOutput:
        """One token a row: by the compiled step, which reports no routings, or by the shortest path through torch."""
        routings: list[Routing] = []
        if cache.compiled is not None:
            starts_B = None if positions.starts_BT is None else positions.starts_BT[:, 0]
            gates_GB = torch.cat([each.view(1, -1) for each in gates.values()]).float() if opened else None
            logits_BTV = cache.compiled(input_ids[:, 0], cache.length, starts_B, gates_GB)[:, None]
            cache.starts_B = starts_B
        else:
            if cache.weights is None:
                cache.weights = tuple(block.weights() for block in self.blocks if isinstance(block, Block))
            x_BD = self.embedding(input_ids[:, 0])
            for weights, keys_values in zip(cache.weights, cache.keys_values, strict=True):
                x_BD, attention_routing = attend(x_BD, weights.attention, keys_values, cache.length)
                x_BD, feedforward_routing = feed_forward(x_BD, weights.feedforward)
                routings += attention_routing, feedforward_routing
            logits_BTV = self.lm_head(self.final_norm(x_BD.unsqueeze(1)))
        cache.length += 1
        return ModelOutput(logits_BTV, tuple(routings), _stacked(gates))

    def _replay(self, input_ids: Tensor, cache: Cache) -> ModelOutput:
        """One token a row on a GPU, as it was recorded; no routings, which lie in the graph's own memory."""
        if cache.graphed is None:
            cache.graphed = GraphedStep(self, cache)
        logits_BTV = cache.graphed(input_ids, cache.length)
        cache.length += 1
        return ModelOutput(logits_BTV, ())

    def _open_gates(self, input_ids: Tensor, positions: Positions, cache: Cache | None) -> dict[int, Tensor]:
        """g (B, T) of every gated generation by number, computed once for the whole model."""
        gates = {}
        for number in range(1, len(self.generations) + 1):
            gate = self.generation(number).gate
            if gate is not None and cache is None and gate.is_held_open:
                gates[number] = gate.output.weight.new_ones(input_ids.shape)
            elif gate is not None:
                state = None if cache is None else cache.gates.get(number)
                logits_BT, state = gate(input_ids, positions.dense_starts(input_ids), positions.offset, state)
                gates[number] = gate.openness(logits_BT)
                if cache is not None:
                    cache.gates[number] = state
        return gates

    def _open_generations(self, gates: dict[int, Tensor]) -> tuple[OpenTokens, ...]:
        """The gated generations open on any token, and every side generation, in order of number."""
        opened: list[OpenTokens | None] = []
        for number, config in enumerate(self.config.generations, 1):
            generation = self.generation(number)
            if config.mode == "side" or (generation.gate is not None and generation.gate.is_held_open):
                opened.append(OpenTokens(number, generation))
            elif number in gates:
                opened.append(OpenTokens.of(number, generation, gates[number]))
        return tuple(each for each in opened if each is not None)

    def _embed(self, input_ids: Tensor, opened: tuple[OpenTokens, ...]) -> Tensor:
        x_BTD: Tensor = self.embedding(input_ids)
        for each in opened:
            if each.generation.embedding is not None:
                change_MD = each.generation.embedding.rows(each.pick(input_ids.flatten()))
                x_BTD = each.add(x_BTD.flatten(0, 1), change_MD).view_as(x_BTD)
        return x_BTD

    def _head(self, x_BTD: Tensor, opened: tuple[OpenTokens, ...]) -> Tensor:
        logits_BTV: Tensor = self.lm_head(x_BTD)
        for each in opened:
            if each.generation.head is not None:
                change_MV = each.generation.head.apply_to(each.pick(x_BTD.flatten(0, 1)))
                logits_BTV = each.add(logits_BTV.flatten(0, 1), change_MV).view_as(logits_BTV)
        return logits_BTV


def _stacked(gates: dict[int, Tensor]) -> Tensor | None:
    """g of every gated generation (B, T, G), None where there is none."""
    return torch.stack(list(gates.values()), dim=-1) if gates else None
