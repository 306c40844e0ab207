"""`ContinualModuleFormer`: a ModuleFormer that trains under anyone's `lightning.Trainer`.

    module = ContinualModuleFormer(ModuleFormer(ModelConfig()))
    lightning.Trainer(max_steps=500, gradient_clip_val=1.0).fit(module, loader)
    module.grow(GrowthConfig(), "code", text=windows)

Growing, freezing and detaching are thin over mfext.growth: the one place where a room imports
its sibling growth, because a user's script should need one object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import lightning
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from mfext.config import GrowthConfig, TrainingConfig
from mfext.config_pruning import PruningConfig
from mfext.growth.apply import apply_plan, freeze, set_trainable
from mfext.growth.gate_training import GateCalibration, require_gate, train_gate
from mfext.growth.growable import growable
from mfext.growth.growing import grow
from mfext.growth.plan import Plan, plan_detach, plan_growth
from mfext.growth.probes import Windows, document_starts, own_samples, self_probes
from mfext.growth.pruning import RemovedExperts, Scores, apply_pruning, plan_pruning
from mfext.model.language_model import LanguageModel, ModelOutput
from mfext.model.losses import language_loss, routing_loss
from mfext.training.batch import read_batch
from mfext.training.guard import NonFiniteGuard, StepRecord
from mfext.training.methods.full import Full
from mfext.training.methods.grow import Grow
from mfext.training.methods.method import Method
from mfext.training.optimizer_state import load_optimizer_state_by_name, make_optimizer, optimizer_state_by_name
from mfext.training.routing_log import routing_numbers
from mfext.training.schedule import learning_rate


@dataclass(frozen=True)
class Span:
    """Where a Trainer's steps lie in the whole stage: it starts at `start` of `total` optimizer steps."""

    start: int
    total: int


class ContinualModuleFormer(lightning.LightningModule):
    """Language modelling with a ModuleFormer, one stage after another.

    Batches are mappings with `input_ids` and either `targets` (already shifted, -100 not scored)
    or `labels` (unshifted), optionally `attention_mask` and `document_starts`, all (B, T) long.
    The loss is cross-entropy (nats per token) + `routing_loss_weight` x the routers' balance loss, unless the method
    leaves it out, + the method's penalty, where it has one.

    `training` gives learning rate, schedule and weight decay (its budget of tokens and batch shape
    belong to mfext's own loop: under a plain Trainer, max_steps and the loader decide). `method`
    says what trains; by default the newest generation, or everything where there is none.

    A step whose loss or gradient is not finite is dropped whole; ten in a row raise DivergedError.
    The optimizer's state outlives a fit and a growth: the next fit takes up what still trains, by
    name. Call `forget_optimizer()` for a fresh start.
    """

    def __init__(
        self, model: LanguageModel, training: TrainingConfig | None = None, method: Method | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.settings = training or TrainingConfig()
        self.guard = NonFiniteGuard(self.settings.max_bad_steps_in_a_row)
        self.span: Span | None = None
        self.record: StepRecord | None = None
        self.watch_routing = False
        self.progress = 1.0
        self.routing_numbers: dict[str, float] = {}
        self.optimizer_state: dict[str, Tensor] = {}
        self._optimizer: AdamW | None = None
        self._gradient_norm = torch.zeros(())
        self.method: Method = method or (Grow() if model.config.generations else Full())
        self.choose(self.method)

    # -- changing the model ------------------------------------------------------------------

    def choose(self, method: Method) -> None:
        """Train by `method` from now on: sets which parameters require gradients."""
        self.method = method
        set_trainable(self.model, method.trainable(self.model))

    def plan(self, growth: GrowthConfig, name: str) -> Plan:
        """What `grow` would do, as data; nothing changes."""
        return plan_growth(self.model.config, growth, name)

    def grow(self, growth: GrowthConfig, name: str, text: Tensor | None = None, seed: int = 1) -> Plan:
        """Add a generation `name`, freeze all that was there, and train the new one from now on.

        `text` holds token windows (M, T) of the new domain, bos before each document. In mode gated
        with `gate.learns` before it teaches the domain gate, against windows sampled from the model
        itself; with after, the gate is held open until `teach_gate`. Without text the gate has
        fresh weights that nobody taught. Raises InputError where the name is taken, there are fewer
        than 8 windows, or the model is dense.
        """
        plan = plan_growth(self.model.config, growth, name)
        if text is None:
            apply_plan(growable(self.model), plan)
        else:
            bos_id = self.model.config.bos_id
            first = growth.mode == "gated" and growth.gate.learns == "before"
            model, growth = growable(self.model), replace(growth, gate=replace(growth.gate, probe="self"))
            probes = self_probes(model, growth.gate.probe_sequences, growth.gate.probe_length, seed) if first else None
            grow(model, plan, growth, Windows(text, document_starts(text, bos_id)), probes, seed)
        self.choose(Grow())
        return plan

    def teach_gate(self, growth: GrowthConfig, text: Tensor, seed: int = 1) -> GateCalibration:
        """Teach the newest generation's gate where to open, once its experts have learned.

        `text` is as in `grow`. It is told apart from samples of what was before; samples of the new
        experts count as new text. Raises InputError where there is no gate, or fewer than 8 windows.
        """
        model, settings = growable(self.model).eval(), replace(growth.gate, probe="self")
        windows = Windows(text, document_starts(text, model.config.bos_id))
        size = settings.probe_sequences, settings.probe_length
        require_gate(model)
        old = self_probes(model, *size, seed, len(model.generations) - 1)
        return train_gate(model, windows, old, settings, seed, own_samples(model, *size, seed))

    def detach(self) -> Plan:
        """Remove the newest generation: the model is bit for bit what it was before. All stays frozen."""
        plan = plan_detach(self.model.config)
        apply_plan(growable(self.model), plan)
        return plan

    def freeze(self) -> Self:
        """Nothing trains any more, until `choose` or `grow`."""
        freeze(self.model)
        return self

    def prune(self, scores: Scores, settings: PruningConfig) -> RemovedExperts:
        """Remove the experts of the lowest `scores` (growth.pruning) for good; nothing trains until `choose`.

        What is returned goes back with `growth.pruning.restore_experts`. Raises InputError where the
        budget is below what tokens choose, a score is missing, or the model is dense.
        """
        model = growable(self.model)
        removed = apply_pruning(model, plan_pruning(model.config, scores, settings))
        freeze(model)
        return removed

    # -- one step ----------------------------------------------------------------------------

    def forward(self, input_ids: Tensor) -> ModelOutput:
        """Next-token logits of `input_ids` (B, T), and how they were routed."""
        output: ModelOutput = self.model(input_ids)
        return output

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of one micro-batch, in nats per token."""
        read = replace(read_batch(batch), progress=self.progress)
        output: ModelOutput = self.model(
            read.input_ids_BT, attention_mask=read.attention_mask_BT, document_starts=read.document_starts_BT
        )
        language = language_loss(output.logits, read.targets_BT)
        weight = self.model.config.routing_loss_weight if self.method.balances else 0.0
        balance = (
            routing_loss(output.routings, read.valid_N, self.model.config.routing_loss)
            if weight
            else torch.zeros_like(language)
        )
        loss = language + weight * balance.to(language.device)
        penalty = self.method.penalty(self.model, output, read)
        if penalty is not None:
            loss = loss + penalty.to(loss.device)
        self.guard.add(language, balance, penalty, read.input_ids_BT.shape[0])
        if self.watch_routing:
            self.routing_numbers = routing_numbers(output, self.model.config, read.input_ids_BT.numel())
        # A gate closed on the whole batch leaves nothing to differentiate: no gradient, no error.
        return loss if loss.requires_grad else loss.detach().requires_grad_()

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy in nats per token, logged as `validation_loss`."""
        read = read_batch(batch)
        output: ModelOutput = self.model(
            read.input_ids_BT, attention_mask=read.attention_mask_BT, document_starts=read.document_starts_BT
        )
        loss = language_loss(output.logits, read.targets_BT)
        self.log("validation_loss", loss, batch_size=read.input_ids_BT.shape[0], sync_dist=True)
        return loss

    # -- the optimizer -----------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps done in this stage."""
        return self.trainer.global_step + (self.span.start if self.span else 0)

    def total_steps(self) -> int:
        """Length of the learning-rate schedule: the stage's, else the Trainer's, else the token budget's."""
        if self.span is not None:
            return self.span.total
        steps = self.trainer.estimated_stepping_batches
        return int(steps) if 0 < steps < float("inf") else self.settings.steps

    def configure_optimizers(self) -> AdamW:
        """Fused AdamW over what trains; decay on matrices only; state taken up by parameter name."""
        state = self.current_optimizer_state()
        optimizer = make_optimizer(self.model, self.settings)
        load_optimizer_state_by_name(optimizer, self.model, state)
        self._optimizer = optimizer
        self.trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return optimizer

    def current_optimizer_state(self) -> dict[str, Tensor]:
        """State of the optimizer as `PARAMETER/KEY`, of parameters the model still has."""
        return self.optimizer_state if self._optimizer is None else optimizer_state_by_name(self._optimizer, self.model)

    def forget_optimizer(self) -> None:
        """Start the next fit with fresh moments and an empty count of dropped steps."""
        self.optimizer_state, self._optimizer = {}, None
        self.guard = NonFiniteGuard(self.settings.max_bad_steps_in_a_row)

    def on_train_start(self) -> None:
        self._total_steps = self.total_steps()

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Note how far the stage is: a pure function of the step."""
        self.progress = self.step / self._total_steps

    def on_train_end(self) -> None:
        self.progress = 1.0

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop a bad step, and set this step's learning rate: a pure function of the step."""
        self.record, self._gradient_norm = self.guard.check(self.trained)
        rate = learning_rate(self.step, self._total_steps, self.settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        self.learning_rate = rate
        if not self.trainer.barebones:
            self._log_step(self.record)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm the guard has just measured, instead of measuring it again."""
        if not gradient_clip_val or (self.record is not None and self.record.skipped):
            return
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.trained, float(gradient_clip_val))
        else:
            torch.nn.utils.clip_grads_with_norm_(self.trained, float(gradient_clip_val), self._gradient_norm)

    def _log_step(self, record: StepRecord) -> None:
        numbers = {"routing_loss": record.routing_loss, "gradient_norm": record.gradient_norm}
        numbers |= {"learning_rate": self.learning_rate, "skipped_windows": float(self.guard.skipped_windows)}
        if record.penalty is not None:
            numbers["penalty"] = record.penalty
        self.log("loss", record.loss_nats_per_token, prog_bar=True)
        self.log_dict(numbers)
