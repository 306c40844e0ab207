"""Low-rank adapters: every adapted weight W becomes W + alpha / rank * left @ right, and only the factors train.

Source: Hu et al. 2021 (arXiv 2106.09685). Our own, because peft addresses `nn.Linear` and whole parameters, not each
expert of a stacked (E, in, out) one with factors of its own; and torch's parametrizations refuse to be pickled, which
training in several processes needs. A dense layer is held to numbers that peft computed (tests/training/test_lora.py).

The changed weight is computed anew at each use, so a step multiplies as much as full fine-tuning does. What is saved
is the optimizer's state and what a commit stores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfext.config_methods import LoraConfig
from mfext.errors import InputError
from mfext.model.experts import AttentionExperts, FeedForwardExperts
from mfext.model.language_model import LanguageModel, ModelOutput
from mfext.training.batch import Batch
from mfext_kernels.products import linear


@dataclass(frozen=True)
class Lora:
    """Trains the adapters of a model that has some (`add_adapters`); the weights under them stay as they are.

    One set serves one stage: `merge_adapters` at its end, so that the next stage starts from an ordinary model.
    """

    trains: ClassVar[str] = "low-rank adapters of attention and feed-forward experts, merged when the stage ends"
    name: str = "lora"
    starts_from: ClassVar[Literal["previous", "base"]] = "previous"
    balances: ClassVar[bool] = True

    def trainable(self, model: nn.Module) -> set[str]:
        """Raises InputError where the model has no adapter."""
        adapters = [name for name, module in model.named_modules() if isinstance(module, Adapter)]
        if not adapters:
            raise InputError(
                "method=lora has nothing to train", "this model has no adapter", "add_adapters(model) first"
            )
        return {f"{name}.{factor}" for name in adapters for factor in ("left", "right")}

    def penalty(self, model: nn.Module, output: ModelOutput, batch: Batch) -> None:
        return None

    def describe(self) -> str:
        return self.trains


class Adapter(nn.Module):
    """A change scale * left @ right of a weight (..., rows, columns): left (..., rows, r), right (..., r, columns).

    Starts at zero: the factor at the `output_side` is zero, the other uniform within 1 / sqrt(fan-in) as in peft.
    """

    def __init__(self, weight: Tensor, config: LoraConfig, output_side: Literal["left", "right"]) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        self.scale = config.alpha / config.rank
        self.output_side = output_side
        self.left = nn.Parameter(weight.new_zeros(*stack, rows, config.rank))
        self.right = nn.Parameter(weight.new_zeros(*stack, config.rank, columns))

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Fresh numbers for the factor at the input side, drawn on the CPU: the same on every device."""
        factor, fan_in = (
            (self.right, self.right.shape[-1]) if self.output_side == "left" else (self.left, self.left.shape[-2])
        )
        drawn = torch.rand(factor.shape, generator=generator, device="cpu") * 2 - 1
        factor.copy_(drawn * fan_in**-0.5)

    def changed(self, weight: Tensor) -> Tensor:
        """The weight with the change, in the weight's precision also under autocast: what merging stores."""
        with torch.autocast(weight.device.type, enabled=False):
            if weight.ndim == 3:
                return torch.baddbmm(weight, self.left, self.right, alpha=self.scale)
            return torch.addmm(weight, self.left, self.right, alpha=self.scale)


class Adapted(nn.Module, ABC):
    """A module in the place of the `original` one, whose weights it shows changed; pickles like any other."""

    def __init__(self, original: nn.Module, config: LoraConfig, output_side: Literal["left", "right"]) -> None:
        super().__init__()
        self.original = original
        self.adapters = nn.ModuleDict(
            {
                name: Adapter(weight, config, output_side)
                for name, weight in original.named_parameters(recurse=False)
                if name != "bias"
            }
        )

    def changed(self, name: str) -> Tensor:
        """The original's parameter `name` with its adapter's change."""
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter.changed(self.original.get_parameter(name))

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The original module, the changes now in its own weights."""
        for name in self.adapters:
            self.original.get_parameter(name).copy_(self.changed(name))
        return self.original


class AdaptedAttentionExperts(Adapted):
    """AttentionExperts with changed stacks, a low rank for each expert alone."""

    @property
    def query(self) -> Tensor:
        return self.changed("query")

    @property
    def output(self) -> Tensor:
        return self.changed("output")


class AdaptedFeedForwardExperts(Adapted):
    """FeedForwardExperts with changed stacks, a low rank for each expert alone."""

    @property
    def up(self) -> Tensor:
        return self.changed("up")

    @property
    def down(self) -> Tensor:
        return self.changed("down")


class _AdaptedMatrix(Adapted):
    """A layer of one matrix `weight` (out, in)."""

    @property
    def weight(self) -> Tensor:
        return self.changed("weight")

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class AdaptedLinear(_AdaptedMatrix):
    """nn.Linear with a changed weight; its bias stays."""

    @property
    def bias(self) -> Tensor | None:
        return self.original.get_parameter("bias") if "bias" in dict(self.original.named_parameters()) else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class AdaptedEmbedding(_AdaptedMatrix):
    """nn.Embedding with a changed table (V, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight)


def add_adapters(model: LanguageModel, config: LoraConfig, seed: int) -> None:
    """Put adapters on the base's attention and feed-forward weights, in place; the model stays the same function.

    Experts are adapted each for itself; keys and values (of a dense model: every linear layer) as matrices; routers,
    embedding and head where `config` says so. Norms and biases stay. What is drawn depends on `seed` alone.
    """
    assert not any(isinstance(module, Adapted) for module in model.modules()), "merge the adapters it has first"
    generator = torch.Generator().manual_seed(seed)
    for path, module in list(model.named_modules()):
        adapted = _adapted(path, module, config)
        if adapted is not None:
            for adapter in adapted.adapters.values():
                assert isinstance(adapter, Adapter)
                adapter.draw(generator)
            _put(model, path, adapted)


def merge_adapters(model: LanguageModel) -> None:
    """Add every adapter's change to the weight under it, in place, and take the adapters off.

    Names in `state_dict()` are those from before `add_adapters`, and so is what the model computes.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, Adapted):
            _put(model, path, module.merge())


def _adapted(path: str, module: nn.Module, config: LoraConfig) -> Adapted | None:
    parts = path.split(".")
    if parts[0] == "blocks":
        if isinstance(module, AttentionExperts):
            return AdaptedAttentionExperts(module, config, "right")
        if isinstance(module, FeedForwardExperts):
            return AdaptedFeedForwardExperts(module, config, "right")
        if isinstance(module, nn.Linear) and (config.routers or "router" not in parts):
            return AdaptedLinear(module, config, "left")
    if config.embedding_and_head and path == "embedding":
        return AdaptedEmbedding(module, config, "left")
    if config.embedding_and_head and path == "lm_head":
        return AdaptedLinear(module, config, "left")
    return None


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
