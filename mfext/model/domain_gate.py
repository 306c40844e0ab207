"""One causal gate per generation: is the text read so far of this generation's domain?

"Is this my domain" is a question about the prefix, not about a site: token embedding, causal
convolution, gelu, running means over the document so far (plain and exponential), a small MLP
to one logit per position. State never crosses a document boundary and ignores padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfext.config_gate import DomainGateConfig

CHUNK = 64


@dataclass(frozen=True)
class GateState:
    """What a gate remembers while decoding: the last embedded tokens (B, width-1, d_embedding)
    and the running sums (means, B, d_convolution) at the last position."""

    tail_BWE: Tensor
    sums_MBC: Tensor


class DomainGate(nn.Module):
    """Probability, per position, that the document read so far belongs to one domain."""

    opens_at: Tensor
    full_at: Tensor
    decays: Tensor

    def __init__(self, config: DomainGateConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        means = 1 + len(config.decays)
        self.embedding = nn.Embedding(vocab_size, config.d_embedding)
        self.convolution = nn.Linear(config.convolution_width * config.d_embedding, config.d_convolution)
        self.hidden = nn.Linear(means * config.d_convolution, config.d_hidden)
        self.output = nn.Linear(config.d_hidden, 1)

    def reset_parameters(self) -> None:
        """Draw fresh weights: embedding N(0, 1), linear layers at torch's default scale."""
        nn.init.normal_(self.embedding.weight)
        for linear in (self.convolution, self.hidden, self.output):
            linear.reset_parameters()

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
        state = self.new_state(batch) if state is None else state
        width = self.config.convolution_width
        positions_T = torch.arange(offset, offset + length, device=input_ids_BT.device)
        reach_BT = positions_T - starts_BT
        padded = torch.cat([state.tail_BWE, self.embedding(input_ids_BT)], dim=1)
        windows_BTEW = padded.unfold(1, width, 1)
        back_W = torch.arange(width - 1, -1, -1, device=input_ids_BT.device)
        windows_BTEW = windows_BTEW * (back_W <= reach_BT[..., None])[:, :, None, :]
        features_BTC = F.gelu(self.convolution(windows_BTEW.flatten(2)))
        features_BTC = features_BTC * (reach_BT >= 0)[..., None]
        means, sums = self._running_means(features_BTC, reach_BT, state.sums_MBC)
        logits_BT = self.output(F.gelu(self.hidden(means))).squeeze(-1)
        return logits_BT, GateState(padded[:, padded.shape[1] - (width - 1) :].detach(), sums.detach())

    def _running_means(self, features_BTC: Tensor, reach_BT: Tensor, sums_MBC: Tensor) -> tuple[Tensor, Tensor]:
        """Means (B, T, M*C) over each document so far, in chunks: no T x T tensor is formed."""
        decays_M = features_BTC.new_tensor([1.0, *self.config.decays])
        out = []
        for begin in range(0, features_BTC.shape[1], CHUNK):
            chunk_BtC = features_BTC[:, begin : begin + CHUNK]
            reach_Bt = reach_BT[:, begin : begin + CHUNK]
            here_t = torch.arange(chunk_BtC.shape[1], device=features_BTC.device)
            back_tt = here_t[:, None] - here_t
            power_Mtt = decays_M[:, None, None] ** back_tt.clamp_min(0)
            seen_Btt = (back_tt >= 0) & (back_tt <= reach_Bt[..., None])
            weights_MBtt = power_Mtt[:, None] * seen_Btt
            carried_MBt = decays_M[:, None, None] ** (here_t + 1) * (reach_Bt > here_t)
            sums_MBtC = weights_MBtt @ chunk_BtC + carried_MBt[..., None] * sums_MBC[:, :, None]
            sums_MBC = sums_MBtC[:, :, -1]
            count_Bt = (reach_Bt + 1).clamp_min(1).to(features_BTC.dtype)
            slow_M = decays_M[1:, None, None]
            totals = torch.cat([count_Bt[None], (1 - slow_M**count_Bt) / (1 - slow_M)])
            out.append((sums_MBtC / totals[..., None]).permute(1, 2, 0, 3).flatten(2))
        return torch.cat(out, dim=1), sums_MBC

    def openness(self, logits_BT: Tensor) -> Tensor:
        """g in [0, 1]: exactly 0 up to `opens_at`, exactly 1 from `full_at`, linear between."""
        config = self.config
        return ((logits_BT.sigmoid() - config.opens_at) / (config.full_at - config.opens_at)).clamp(0.0, 1.0)

    def set_thresholds(self, opens_at: float, full_at: float) -> None:
        """Move the two thresholds (probabilities); the caller keeps the model's config in step."""
        self.config = DomainGateConfig(**{**self.config.__dict__, "opens_at": opens_at, "full_at": full_at})
