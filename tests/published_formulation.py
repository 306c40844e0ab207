"""ModuleFormer as published, in plain torch: what `mfext.model` and the kernels are measured against.

Independent of mfext: written from the paper's equations (arXiv 2306.04640) over the published tensor names, in the
published way of computing. That means the suffix sum of stick-breaking attention as a product with a T x T
triangular matrix for every batch row, chosen expert and head (T^3 work); one matrix product per expert over sorted
rows, joined by cat; zeros and index_add to bring rows back to tokens. Any float dtype; float64 matches the golden
files. Tests and the bench call it "the published formulation".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PublishedConfig:
    """The part of a published config.json that decides what is computed."""

    vocab_size: int
    n_embd: int
    n_layer: int
    n_head: int
    att_hidden: int
    ffd_hidden: int
    n_att_experts: int
    k_att: int
    n_mlp_experts: int
    k_mlp: int
    gating_size: int
    aux_loss_weight: float = 0.01
    aux_loss_type: str = "mi"
    gate_type: str = "mlp"
    layer_norm_epsilon: float = 1e-5
    block_size: int = 2048

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> PublishedConfig:
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})

    @property
    def shared_identity(self) -> bool:
        return self.n_head == 1 and self.att_hidden == self.n_embd


@dataclass
class PublishedOutput:
    logits: Tensor
    hidden_states: list[Tensor] = field(default_factory=list)
    attentions: list[Tensor] = field(default_factory=list)
    aux_loss: Tensor | float = 0.0
    cache: Cache = field(default_factory=list)


@dataclass(frozen=True)
class _Gating:
    """Rows sorted by expert: which token each serves, its gate, how many each expert has, and how to undo the sort."""

    sizes: list[int]
    tokens: Tensor
    gates: Tensor
    order: Tensor


class PublishedModuleFormer:
    """Computes with a dict of tensors under their published names; gradients land on those tensors."""

    def __init__(self, config: PublishedConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self.tensors = dict(tensors)
        some = self.tensors["transformer.wte.weight"]
        # The published code keeps both triangles as buffers of the whole context and slices them.
        full = torch.ones(config.block_size, config.block_size, dtype=some.dtype, device=some.device)
        self.visible = full.tril()
        self.cum_weight = full.tril(-1)

    def forward(self, input_ids: Tensor, cache: Cache | None = None) -> PublishedOutput:
        config = self.config
        x = F.embedding(input_ids, self.tensors["transformer.wte.weight"])
        out = PublishedOutput(logits=x, hidden_states=[x])
        for layer in range(config.n_layer):
            prefix = f"transformer.h.{layer}."
            x = x + self._attention(
                prefix + "attn.", self._norm(prefix + "ln_1.", x), out, cache[layer] if cache else None
            )
            x = x + self._feedforward(prefix + "mlpf.", self._norm(prefix + "ln_2.", x), out)
            out.hidden_states.append(x)
        x = self._norm("transformer.ln_f.", x)
        out.hidden_states[-1] = x
        out.logits = F.linear(x, self.tensors["lm_head.weight"])
        return out

    def loss(self, input_ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Total loss, cross-entropy and auxiliary loss; without `targets`, the next input id is the target."""
        out = self.forward(input_ids)
        logits = out.logits if targets is not None else out.logits[:, :-1]
        wanted = targets if targets is not None else input_ids[:, 1:]
        entropy = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        aux = torch.as_tensor(out.aux_loss)
        return entropy + self.config.aux_loss_weight * aux, entropy, aux

    @torch.no_grad()
    def greedy(self, prompt: Tensor, count: int) -> Tensor:
        """Continue one prompt (1, T) by `count` ids through the key-value cache."""
        ids, fed, cache = prompt, prompt, None
        for _ in range(count):
            out = self.forward(fed, cache)
            cache = out.cache
            fed = out.logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, fed], dim=1)
        return ids

    def _norm(self, prefix: str, x: Tensor) -> Tensor:
        weight, bias = self.tensors[prefix + "weight"], self.tensors[prefix + "bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.config.layer_norm_epsilon)

    def _gate(self, prefix: str, x: Tensor, chosen: int, out: PublishedOutput) -> _Gating:
        if self.config.gate_type == "linear":
            logits = F.linear(x, self.tensors[prefix + "w_gate.0.weight"])
        else:
            hidden = F.linear(x, self.tensors[prefix + "w_gate.0.weight"], self.tensors[prefix + "w_gate.0.bias"])
            logits = F.linear(F.gelu(hidden), self.tensors[prefix + "w_gate.3.weight"])
        probabilities = logits.softmax(-1)
        gates, experts = probabilities.topk(chosen, dim=-1)
        sizes = experts.flatten().bincount(minlength=logits.shape[-1])
        out.aux_loss = out.aux_loss + self._aux(logits, probabilities, sizes)
        order = experts.flatten().sort(stable=True).indices
        return _Gating(sizes.tolist(), order.div(chosen, rounding_mode="trunc"), gates.flatten()[order], order)

    def _aux(self, logits: Tensor, probabilities: Tensor, sizes: Tensor) -> Tensor:
        mean = probabilities.mean(0)
        if self.config.aux_loss_type == "switch":
            share = sizes.to(mean.dtype) / sizes.sum()
            balance = logits.shape[-1] * (mean / mean.sum() * share).sum()
            return balance + 0.1 * logits.logsumexp(-1).square().mean()
        conditional = -(probabilities * logits.log_softmax(-1)).sum(-1).mean()
        marginal = -(mean * mean.log()).sum()
        return conditional - marginal

    def _experts(self, name: str, rows: Tensor, sizes: list[int]) -> Tensor:
        weight = self.tensors[name]
        return torch.cat([part @ weight[e] for e, part in enumerate(rows.split(sizes, dim=0))])

    def _attention(self, prefix: str, x: Tensor, out: PublishedOutput, past: tuple[Tensor, Tensor] | None) -> Tensor:
        config = self.config
        batch, length, width = x.shape
        flat = x.reshape(-1, width)
        gating = self._gate(prefix + "q_proj.gate.", flat, config.k_att, out)
        rows = self._experts(prefix + "q_proj.experts.weight", flat[gating.tokens], gating.sizes)
        queries = torch.zeros(len(flat) * config.k_att, config.att_hidden, dtype=x.dtype, device=x.device)
        queries = queries.index_add(0, gating.order, rows)
        queries = queries.view(batch, length, config.k_att, config.n_head, -1)
        keys, values = self._keys_values(prefix, x)
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=1), torch.cat([past[1], values], dim=1)
        out.cache.append((keys, values))
        attended, weights = self._stickbreaking(queries, keys, values)
        out.attentions.append(weights)
        rows = attended.reshape(-1, config.att_hidden)[gating.order]
        return self._reduce(prefix + "q_proj.output_experts.weight", rows, gating, x)

    def _keys_values(self, prefix: str, x: Tensor) -> tuple[Tensor, Tensor]:
        heads = (*x.shape[:2], self.config.n_head, -1)
        if self.config.shared_identity:
            return x.view(heads), x.view(heads)
        keys, values = (
            F.linear(x, self.tensors[f"{prefix}{name}.weight"], self.tensors[f"{prefix}{name}.bias"])
            for name in ("k_proj", "v_proj")
        )
        return keys.view(heads), values.view(heads)

    def _stickbreaking(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        length, context = q.shape[1], k.shape[1]
        logits = torch.einsum("bikhd,bjhd->bkhij", q, k) / math.sqrt(k.shape[-1])
        hidden = (self.visible[context - length : context, :context] == 0).expand_as(logits)
        taken = torch.sigmoid(logits).masked_fill(hidden, 0)
        log_left = F.logsigmoid(-logits).masked_fill(hidden, 0)
        suffix = torch.einsum("bkhij,jm->bkhim", log_left, self.cum_weight[:context, :context])
        weights = taken * suffix.exp()
        return torch.einsum("bkhij,bjhd->bikhd", weights, v), weights

    def _feedforward(self, prefix: str, x: Tensor, out: PublishedOutput) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        gating = self._gate(prefix + "gate.", flat, self.config.k_mlp, out)
        rows = self._experts(prefix + "experts.weight", flat[gating.tokens], gating.sizes)
        return self._reduce(prefix + "output_experts.weight", F.gelu(rows, approximate="tanh"), gating, x)

    def _reduce(self, name: str, rows: Tensor, gating: _Gating, like: Tensor) -> Tensor:
        rows = self._experts(name, rows, gating.sizes) * gating.gates.unsqueeze(-1)
        zeros = torch.zeros(like.shape[0] * like.shape[1], like.shape[2], dtype=like.dtype, device=like.device)
        return zeros.index_add(0, gating.tokens, rows).view_as(like)


def random_tensors(config: PublishedConfig, seed: int, std: float = 0.02) -> dict[str, Tensor]:
    """float32 tensors of every published name: N(0, std), except experts at N(0, 1 / fan_in) and norms at 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    width, inner, gating = config.n_embd, config.att_hidden, config.gating_size
    shapes = {"transformer.wte.weight": (config.vocab_size, width), "lm_head.weight": (config.vocab_size, width)}
    norms = ["transformer.ln_f."]
    for layer in range(config.n_layer):
        prefix = f"transformer.h.{layer}."
        norms += [prefix + "ln_1.", prefix + "ln_2."]
        sites = (
            ("attn.", "q_proj.", config.n_att_experts, inner),
            ("mlpf.", "", config.n_mlp_experts, config.ffd_hidden),
        )
        for kind, inside, experts, hidden in sites:
            shapes[f"{prefix}{kind}{inside}experts.weight"] = (experts, width, hidden)
            shapes[f"{prefix}{kind}{inside}output_experts.weight"] = (experts, hidden, width)
            first = experts if config.gate_type == "linear" else gating
            shapes[f"{prefix}{kind}{inside}gate.w_gate.0.weight"] = (first, width)
            if config.gate_type == "mlp":
                shapes[f"{prefix}{kind}{inside}gate.w_gate.0.bias"] = (gating,)
                shapes[f"{prefix}{kind}{inside}gate.w_gate.3.weight"] = (experts, gating)
        if not config.shared_identity:
            for name in ("k_proj.", "v_proj."):
                shapes[f"{prefix}attn.{name}weight"], shapes[f"{prefix}attn.{name}bias"] = (inner, width), (inner,)
    tensors = {}
    for name, shape in shapes.items():
        scale = shape[1] ** -0.5 if "experts.weight" in name else std
        tensors[name] = torch.randn(shape, generator=generator) * scale
    for prefix in norms:
        tensors[prefix + "weight"], tensors[prefix + "bias"] = torch.ones(width), torch.zeros(width)
    return tensors
