"""One causal gate per generation: is the text read so far of this generation's domain?

"Is this my domain" is a question about the prefix, not about a site: token embedding, causal
convolution, gelu, running means over the document so far (plain and exponential), a small MLP
to one logit per position. State never crosses a document boundary and ignores padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfext.config_gate import DomainGateConfig
from mfext_kernels.gate_step import GateTensors, applies, gate_step

CHUNK = 32


@cache
def _decays(decays: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """1, for the plain mean, and the decays: kept, since a copy to a GPU waits for all that it was told before."""
    with torch.inference_mode(False):
        return torch.tensor([1.0, *decays], dtype=dtype, device=device)


@dataclass(frozen=True)
class GateState:
    """What a gate remembers while decoding: the last embedded tokens (B, width-1, d_embedding)
    and the running sums (means, B, d_convolution) at the last position."""

    tail_BWE: Tensor
    sums_MBC: Tensor


class DomainGate(nn.Module):
    """Probability, per position, that the document read so far belongs to one domain."""

    def __init__(self, config: DomainGateConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        means = 1 + len(config.decays)
        self.embedding = nn.Embedding(vocab_size, config.d_embedding)
        self.convolution = nn.Linear(config.convolution_width * config.d_embedding, config.d_convolution)
        self.hidden = nn.Linear(means * config.d_convolution, config.d_hidden)
        self.output = nn.Linear(config.d_hidden, 1)
        self._held: tuple[tuple[Tensor, int], ...] = ()

    def reset_parameters(self) -> None:
        """Draw fresh weights: embedding N(0, 1), linear layers at torch's default scale."""
        nn.init.normal_(self.embedding.weight)
        for linear in (self.convolution, self.hidden, self.output):
            linear.reset_parameters()

    def hold_open(self) -> None:
        """Open on every token, until its output layer is loaded, drawn anew or trains (which a fused optimizer does
        without a trace on the tensor)."""
        with torch.no_grad():
            self.output.weight.zero_()
            self.output.bias.fill_(1e9)
        self._held = tuple((each, each._version) for each in self.output.parameters() if not each.is_inference())

    @property
    def is_held_open(self) -> bool:
        """Whether g is known to be 1 everywhere without a look at any text (which, on a GPU, would wait for the card).

        False where that is not known: the gate then says so token by token.
        """
        now = tuple(self.output.parameters())
        return len(self._held) == len(now) and all(
            each is held and each._version == version and not each.requires_grad
            for each, (held, version) in zip(now, self._held, strict=True)
        )

    def new_state(self, batch_size: int) -> GateState:
        """The state before the first token."""
        weight = self.convolution.weight
        tail = weight.new_zeros(batch_size, self.config.convolution_width - 1, self.config.d_embedding)
        return GateState(tail, weight.new_zeros(1 + len(self.config.decays), batch_size, self.config.d_convolution))

    def forward(
        self, input_ids_BT: Tensor, starts_BT: Tensor, offset: int = 0, state: GateState | None = None
    ) -> tuple[Tensor, GateState]:
        """Logits (B, T) of "this domain" and the state after the last token.

        `starts_BT` holds the absolute index of each position's document start; the tokens
        given stand at `offset`, `offset` + 1, ...
        """
        batch, length = input_ids_BT.shape
        if self.output.weight.requires_grad:
            self._held = ()
        state = self.new_state(batch) if state is None else state
        if length == 1 and applies(tensors := self._tensors(), ids_B := input_ids_BT[:, 0]):
            reach_B = offset - starts_BT[:, 0]
            logits_B, tail_BWE, sums_MBC = gate_step(tensors, ids_B, reach_B, state.tail_BWE, state.sums_MBC)
            return logits_B.unsqueeze(1), GateState(tail_BWE, sums_MBC)
        width = self.config.convolution_width
        positions_T = torch.arange(offset, offset + length, device=input_ids_BT.device)
        reach_BT = positions_T - starts_BT
        padded = torch.cat([state.tail_BWE, self.embedding(input_ids_BT)], dim=1)
        windows_BTEW = padded.unfold(1, width, 1)
        back_W = torch.arange(width - 1, -1, -1, device=input_ids_BT.device)
        windows_BTEW = windows_BTEW * (back_W <= reach_BT[..., None])[:, :, None, :]
        features_BTC = F.gelu(self.convolution(windows_BTEW.flatten(2)))
        features_BTC = features_BTC * (reach_BT >= 0)[..., None]
        hidden = self._hidden if length > 1 else self._next_hidden
        hidden_BTH, sums = hidden(features_BTC, reach_BT, state.sums_MBC)
        logits_BT = self.output(F.gelu(hidden_BTH)).squeeze(-1)
        return logits_BT, GateState(padded[:, padded.shape[1] - (width - 1) :].detach(), sums.detach())

    def _tensors(self) -> GateTensors:
        convolution, hidden, output = self.convolution, self.hidden, self.output
        return GateTensors(
            self.embedding.weight,
            *(convolution.weight, convolution.bias),
            *(hidden.weight, hidden.bias),
            *(output.weight, output.bias),
            _decays(self.config.decays, output.weight.dtype, output.weight.device),
        )

    def _hidden(self, features_BTC: Tensor, reach_BT: Tensor, sums_MBC: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden layer (B, T, H) of the means over each document so far, and the sums at the last position.

        In chunks of t positions, n of them: inside a chunk one product, and what it carries to the next is a short
        loop. The layer is linear, so features pass it before they are averaged: no M*C numbers a position.
        """
        batch, length, width = features_BTC.shape
        num_inside = min(CHUNK, length)
        padding = -length % num_inside
        decays_M = _decays(self.config.decays, features_BTC.dtype, features_BTC.device)
        features_BntC = F.pad(features_BTC, (0, 0, 0, padding)).view(batch, -1, num_inside, width)
        reach_Bnt = F.pad(reach_BT, (0, padding)).view(batch, -1, num_inside)
        here_t = torch.arange(num_inside, device=features_BTC.device)
        back_tt = here_t[:, None] - here_t
        power_ttM = decays_M ** back_tt[..., None].clamp_min(0)
        seen_Bntt = (back_tt >= 0) & (back_tt <= reach_Bnt[..., None])
        weights_BnttM = power_ttM * seen_Bntt[..., None]
        carried_BntM = decays_M ** (here_t[:, None] + 1) * (reach_Bnt > here_t)[..., None]

        sums_BMC, begins = sums_MBC.transpose(0, 1), []
        ends_BnMC = weights_BnttM[:, :, -1].transpose(-1, -2) @ features_BntC
        for chunk in range(features_BntC.shape[1]):
            begins.append(sums_BMC)
            sums_BMC = ends_BnMC[:, chunk] + carried_BntM[:, chunk, -1, :, None] * sums_BMC
        if padding:
            last = num_inside - 1 - padding
            end_BMC = weights_BnttM[:, -1, last].transpose(-1, -2) @ features_BntC[:, -1]
            sums_BMC = end_BMC + carried_BntM[:, -1, last, :, None] * begins[-1]

        layer_HMC = self.hidden.weight.view(-1, len(decays_M), width)
        total_BntM = self._totals(reach_Bnt, decays_M)
        num_rows = num_inside * len(decays_M)
        passed_BnXH = (features_BntC @ layer_HMC.permute(2, 1, 0).flatten(1)).view(batch, -1, num_rows, len(layer_HMC))
        begun_BnMH = torch.einsum("bnmc,hmc->bnmh", torch.stack(begins, 1), layer_HMC)
        inside_BntH = (weights_BnttM / total_BntM[..., None, :]).flatten(3) @ passed_BnXH
        hidden_BntH = inside_BntH + (carried_BntM / total_BntM) @ begun_BnMH + self.hidden.bias
        return hidden_BntH.flatten(1, 2)[:, :length], sums_BMC.transpose(0, 1)

    def _next_hidden(self, features_B1C: Tensor, reach_B1: Tensor, sums_MBC: Tensor) -> tuple[Tensor, Tensor]:
        """What `_hidden` gives for one position, in few calls: a decoding step is bound by them."""
        decays_M = _decays(self.config.decays, features_B1C.dtype, features_B1C.device)
        sums_MBC = features_B1C.transpose(0, 1) + decays_M[:, None, None] * (reach_B1 > 0) * sums_MBC
        means_MBC = sums_MBC / self._totals(reach_B1, decays_M).permute(2, 0, 1)
        return self.hidden(means_MBC.transpose(0, 1).flatten(1)).unsqueeze(1), sums_MBC

    def _totals(self, reach_Bnt: Tensor, decays_M: Tensor) -> Tensor:
        """What the weights of a document so far sum to (..., M); 1 before it begins."""
        count = (reach_Bnt + 1).clamp_min(1).to(decays_M.dtype)[..., None]
        slow_M = decays_M[1:]
        return torch.cat([count, (1 - slow_M**count) / (1 - slow_M)], dim=-1)

    def openness(self, logits_BT: Tensor) -> Tensor:
        """g in [0, 1]: exactly 0 up to `opens_at`, exactly 1 from `full_at`, linear between."""
        config = self.config
        return ((logits_BT.sigmoid() - config.opens_at) / (config.full_at - config.opens_at)).clamp(0.0, 1.0)

    def set_thresholds(self, opens_at: float, full_at: float) -> None:
        """Move the two thresholds (probabilities); the caller keeps the model's config in step."""
        self.config = DomainGateConfig(**{**self.config.__dict__, "opens_at": opens_at, "full_at": full_at})
