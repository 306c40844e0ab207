"""Stick-breaking attention with experts for queries and outputs, shared keys and values.

Source: arXiv 2306.04640, section 2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfext.config import ModelConfig
from mfext.model.decoding_step import SiteWeights, join
from mfext.model.experts import AttentionExperts, mix_outputs, project_queries
from mfext.model.forward_pass import Pass, SiteOutput, competing_layers, route_jointly
from mfext.model.generation import OpenTokens
from mfext.model.linear import Linear
from mfext.model.observing import observe_attention, observe_null
from mfext.model.positions import Positions
from mfext.model.router import Chosen, Router, RouterRows, Routing, Site, route, without_null
from mfext_kernels.grouped_linear.one_token import Matrices
from mfext_kernels.stickbreaking import stickbreaking_attention, stickbreaking_decode
from mfext_kernels.stickbreaking.reference import stickbreaking_weights


class ExpertAttention(nn.Module):
    """One layer's attention: router, experts (queries and outputs), shared keys and values."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.site = Site(layer, "attention")
        self.router = Router(config.router, config.d_model, config.d_router, config.experts("attention", layer))
        self.experts = AttentionExperts(config.experts("attention", layer), config.d_model, config.d_attention)
        self.key = None if config.identity_keys_values else Linear(config.d_model, config.d_attention)
        self.value = None if config.identity_keys_values else Linear(config.d_model, config.d_attention)

    def forward(self, x_BTD: Tensor, shared: Pass) -> SiteOutput:
        """Residual update of normalised activations x (B, T, D)."""
        batch, length, width = x_BTD.shape
        x_ND = x_BTD.reshape(batch * length, width)
        k_BSHC, v_BSHC = self._keys_values(x_BTD, x_ND, shared)
        competing = competing_layers(shared, self.site.layer)
        rows = [each.attention_router for each in competing if isinstance(each.attention_router, RouterRows)]
        stacks = [self.experts, *(each.attention for each in competing if isinstance(each.attention, AttentionExperts))]
        chosen = self.config.attention_experts_per_token
        routing = route_jointly(self.router(x_ND, rows), rows, chosen, self.site, shared)
        q_BTKHC = self._heads(project_queries(x_ND, stacks, routing), batch)
        o_MKA = self._attend(q_BTKHC, k_BSHC, v_BSHC, shared.positions)
        y_ND = mix_outputs(o_MKA, stacks, routing)
        routings = [observe_attention(routing, o_MKA, stacks, shared)]
        for opened in shared.open_generations:
            grown = opened.layer(self.site.layer)
            if isinstance(grown.attention, AttentionExperts):
                add = self._add_gated if opened.generation.config.mode == "gated" else self._add_side
                y_ND, grown_routing = add(y_ND, x_ND, (k_BSHC, v_BSHC), opened, shared)
                routings.append(grown_routing)
        weights = (
            stickbreaking_weights(q_BTKHC, k_BSHC, shared.positions.starts_BT) if shared.return_attentions else None
        )
        return SiteOutput(y_ND.view(batch, length, width), tuple(routings), weights)

    def weights(self, norm: nn.LayerNorm) -> SiteWeights:
        """What a decoding step of one sequence reads."""
        assert self.key is not None and self.value is not None
        return SiteWeights(
            self.site,
            self.config.attention_experts_per_token,
            norm,
            *join(self.key, self.value, self.router.hidden),
            self.router.output.weight.t(),
            Matrices.of(self.experts.query),
            Matrices.of(self.experts.output),
        )

    def _heads(self, q_MKA: Tensor, batch: int) -> Tensor:
        return q_MKA.view(batch, -1, q_MKA.shape[1], self.config.num_heads, self.config.d_head)

    def _keys_values(self, x_BTD: Tensor, x_ND: Tensor, shared: Pass) -> tuple[Tensor, Tensor]:
        k_NA = x_ND if self.key is None else self.key(x_ND)
        v_NA = x_ND if self.value is None else self.value(x_ND)
        for opened in shared.open_generations:
            grown = opened.layer(self.site.layer)
            if grown.key is not None and grown.value is not None:
                x_MD = opened.pick(x_ND)
                k_NA = opened.add(k_NA, grown.key.apply_to(x_MD))
                v_NA = opened.add(v_NA, grown.value.apply_to(x_MD))
        shape = (*x_BTD.shape[:2], self.config.num_heads, self.config.d_head)
        k_BTHC, v_BTHC = k_NA.view(shape), v_NA.view(shape)
        return (k_BTHC, v_BTHC) if shared.cache is None else shared.cache.extend(self.site.layer, k_BTHC, v_BTHC)

    def _attend(self, q_BTKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, positions: Positions) -> Tensor:
        """Attended values (B*T, K, A); one new position takes the decoding step."""
        if q_BTKHC.shape[1] == 1 and positions.offset > 0:
            starts_B = None if positions.starts_BT is None else positions.starts_BT[:, 0]
            o_BTKHC = stickbreaking_decode(q_BTKHC[:, 0], k_BSHC, v_BSHC, starts_B, ends_B=positions.ends_B)
        else:
            o_BTKHC = stickbreaking_attention(q_BTKHC, k_BSHC, v_BSHC, positions.starts_BT)
        return o_BTKHC.reshape(-1, q_BTKHC.shape[2], self.config.d_attention)

    def _add_gated(
        self, y_ND: Tensor, x_ND: Tensor, keys_values: tuple[Tensor, Tensor], opened: OpenTokens, shared: Pass
    ) -> tuple[Tensor, Routing]:
        """Add an open generation's attention experts; closed tokens keep their bits."""
        grown, config = opened.layer(self.site.layer), opened.generation.config
        assert isinstance(grown.attention_router, Router) and grown.attention is not None
        x_MD = opened.pick(x_ND)
        routing = route(
            grown.attention_router(x_MD), config.attention_experts_per_token, self.site, opened.number, opened.tokens_M
        )
        q_MKA = project_queries(x_MD, [grown.attention], routing)
        k_BSHC, v_BSHC = keys_values
        starts_BT = shared.positions.starts_BT
        batch = k_BSHC.shape[0]
        if opened.rows_b is not None and opened.tokens_in_rows_M is not None:
            batch = opened.rows_b.shape[0]
            k_BSHC, v_BSHC = (each.index_select(0, opened.rows_b) for each in keys_values)
            starts_BT = None if starts_BT is None else starts_BT.index_select(0, opened.rows_b)
            length = y_ND.shape[0] // keys_values[0].shape[0]
            spread = q_MKA.new_zeros(batch * length, *q_MKA.shape[1:])
            q_MKA = spread.index_copy(0, opened.tokens_in_rows_M, q_MKA)
        o_MKA = self._attend(self._heads(q_MKA, batch), k_BSHC, v_BSHC, Positions(shared.positions.offset, starts_BT))
        if opened.tokens_in_rows_M is not None:
            o_MKA = o_MKA.index_select(0, opened.tokens_in_rows_M)
        change_MD = mix_outputs(o_MKA, [grown.attention], routing)
        return opened.add(y_ND, change_MD), observe_attention(routing, o_MKA, [grown.attention], shared)

    def _add_side(
        self, y_ND: Tensor, x_ND: Tensor, keys_values: tuple[Tensor, Tensor], opened: OpenTokens, shared: Pass
    ) -> tuple[Tensor, Routing]:
        """Add a side generation's attention experts where a token's choice is not the null one."""
        grown, config = opened.layer(self.site.layer), opened.generation.config
        assert isinstance(grown.attention_router, Router) and grown.attention is not None
        logits_NE = grown.attention_router(x_ND)
        routing = route(logits_NE, config.attention_experts_per_token, self.site, opened.number, has_null=True)
        chosen = without_null(routing)
        if not chosen.num_slots:
            return y_ND, observe_null(routing, chosen.routing, shared)
        q_R1A = project_queries(x_ND.index_select(0, chosen.rows_R), [grown.attention], chosen.routing)
        o_R1A = self._attend_chosen(q_R1A.squeeze(1), chosen, keys_values, shared.positions).unsqueeze(1)
        change_RD = mix_outputs(o_R1A, [grown.attention], chosen.routing)
        own = observe_attention(chosen.routing, o_R1A, [grown.attention], shared)
        return y_ND.index_add(0, chosen.rows_R, change_RD.to(y_ND.dtype)), observe_null(routing, own, shared)

    def _attend_chosen(
        self, q_RA: Tensor, chosen: Chosen, keys_values: tuple[Tensor, Tensor], positions: Positions
    ) -> Tensor:
        """Attended values (R, A): over the batch rows that chose any expert, and as many slots as any token fills."""
        batch = keys_values[0].shape[0]
        length = chosen.num_tokens // batch
        row_R = torch.div(chosen.rows_R, length, rounding_mode="floor")
        used_B = torch.zeros(batch, dtype=torch.bool, device=row_R.device).index_fill(0, row_R, True)
        rows_b, at_R = used_B.nonzero().squeeze(1), (used_B.cumsum(0) - 1).index_select(0, row_R)
        starts_BT = positions.starts_BT
        if len(rows_b) < batch:
            keys_values = (keys_values[0].index_select(0, rows_b), keys_values[1].index_select(0, rows_b))
            starts_BT = None if starts_BT is None else starts_BT.index_select(0, rows_b)
        places = (at_R * length + chosen.rows_R % length, chosen.slots_R)
        q_MKA = q_RA.new_zeros(len(rows_b) * length, chosen.num_slots, q_RA.shape[1]).index_put(places, q_RA)
        q_BTKHC = self._heads(q_MKA, len(rows_b))
        return self._attend(q_BTKHC, *keys_values, Positions(positions.offset, starts_BT))[places]
