"""Feed-forward experts behind a router. Source: arXiv 2306.04640, section 2.1."""

from __future__ import annotations

from torch import Tensor, nn

from mfext.config import ModelConfig
from mfext.model.decoding_step import SiteWeights, join
from mfext.model.experts import FeedForwardExperts, mix_feedforward
from mfext.model.forward_pass import Pass, SiteOutput, competing_layers, route_jointly
from mfext.model.generation import OpenTokens
from mfext.model.observing import observe_feedforward, observe_null
from mfext.model.router import Router, RouterRows, Routing, Site, route, without_null
from mfext_kernels.grouped_linear.one_token import Matrices


class ExpertFeedForward(nn.Module):
    """One layer's feed-forward: router and experts."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.site = Site(layer, "feedforward")
        num_experts = config.experts("feedforward", layer)
        self.router = Router(config.router, config.d_model, config.d_router, num_experts)
        self.experts = FeedForwardExperts(num_experts, config.d_model, config.d_feedforward)

    def forward(self, x_BTD: Tensor, shared: Pass) -> SiteOutput:
        """Residual update of normalised activations x (B, T, D)."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        competing = competing_layers(shared, self.site.layer)
        rows = [each.feedforward_router for each in competing if isinstance(each.feedforward_router, RouterRows)]
        grown_stacks = [each.feedforward for each in competing if isinstance(each.feedforward, FeedForwardExperts)]
        chosen = self.config.feedforward_experts_per_token
        routing = route_jointly(self.router(x_ND, rows), rows, chosen, self.site, shared)
        stacks = [self.experts, *grown_stacks]
        y_ND = mix_feedforward(x_ND, stacks, routing)
        routings = [observe_feedforward(routing, x_ND, stacks, shared)]
        for opened in shared.open_generations:
            if opened.layer(self.site.layer).feedforward is not None:
                y_ND, grown_routing = self._add_generation(y_ND, x_ND, opened, shared)
                routings.append(grown_routing)
        return SiteOutput(y_ND.view_as(x_BTD), tuple(routings))

    def _add_generation(self, y_ND: Tensor, x_ND: Tensor, opened: OpenTokens, shared: Pass) -> tuple[Tensor, Routing]:
        """Add a generation's experts: of a gated one on its open tokens, of a side one where the choice is not null."""
        grown, config = opened.layer(self.site.layer), opened.generation.config
        assert isinstance(grown.feedforward_router, Router) and grown.feedforward is not None
        num_chosen, stacks = config.feedforward_experts_per_token, [grown.feedforward]
        x_MD = opened.pick(x_ND)
        logits_ME = grown.feedforward_router(x_MD)
        if config.mode == "gated":
            routing = route(logits_ME, num_chosen, self.site, opened.number, opened.tokens_M)
            change_MD = mix_feedforward(x_MD, stacks, routing)
            return opened.add(y_ND, change_MD), observe_feedforward(routing, x_MD, stacks, shared)
        routing = route(logits_ME, num_chosen, self.site, opened.number, has_null=True)
        chosen = without_null(routing)
        if not chosen.num_slots:
            return y_ND, observe_null(routing, chosen.routing, shared)
        x_RD = x_ND.index_select(0, chosen.rows_R)
        change_RD = mix_feedforward(x_RD, stacks, chosen.routing)
        own = observe_feedforward(chosen.routing, x_RD, stacks, shared)
        return y_ND.index_add(0, chosen.rows_R, change_RD.to(y_ND.dtype)), observe_null(routing, own, shared)

    def weights(self, norm: nn.LayerNorm) -> SiteWeights:
        """What a decoding step of one sequence reads."""
        return SiteWeights(
            self.site,
            self.config.feedforward_experts_per_token,
            norm,
            *join(self.router.hidden),
            self.router.output.weight.t(),
            Matrices.of(self.experts.up),
            Matrices.of(self.experts.down),
        )
