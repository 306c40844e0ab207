"""What every training method answers, and what each of them is, by name."""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

from torch import Tensor, nn

from mfext.config import MethodName
from mfext.errors import InputError
from mfext.model.language_model import ModelOutput
from mfext.training.batch import Batch
from mfext.training.methods.concentrate import Concentrate
from mfext.training.methods.ewc import Ewc
from mfext.training.methods.expand import Expand
from mfext.training.methods.frozen import Frozen
from mfext.training.methods.full import Full
from mfext.training.methods.grow import Grow
from mfext.training.methods.independent import Independent
from mfext.training.methods.joint import Joint
from mfext.training.methods.lora import Lora
from mfext.training.methods.lwf import Lwf
from mfext.training.methods.replay import Replay


class Method(Protocol):
    """How one stage trains: which parameters move (all others are frozen and have no optimizer state), from which
    model the stage starts, and what the loss has beside the language model's own.

    A method crosses to other processes pickled. What it holds (anchors, a teacher) is no part of the model, of
    progress or of checkpoints: whoever resumes a stage builds the same method again.
    """

    @property
    def name(self) -> str:
        """The word used in recipes: `method=NAME`."""

    @property
    def starts_from(self) -> Literal["previous", "base"]:
        """Whether a stage continues the previous stage's model or starts again from the untouched base."""

    @property
    def balances(self) -> bool:
        """Whether the routers' balance loss belongs to the loss: not where the method concentrates what it spreads."""

    def trainable(self, model: nn.Module) -> set[str]:
        """Names (as in `model.named_parameters()`) of the parameters that train."""

    def penalty(self, model: nn.Module, output: ModelOutput, batch: Batch) -> Tensor | None:
        """What is added to the loss of one micro-batch (scalar, nats per token); None where the method adds nothing."""

    def describe(self) -> str:
        """One line for reports: what trains."""


class Declared(Protocol):
    """What a method's class says of every instance."""

    trains: ClassVar[str]
    starts_from: ClassVar[Literal["previous", "base"]]


_METHODS: dict[MethodName, type[Declared]] = {
    "grow": Grow,
    "full": Full,
    "replay": Replay,
    "ewc": Ewc,
    "lwf": Lwf,
    "lora": Lora,
    "expand": Expand,
    "concentrate": Concentrate,
    "frozen": Frozen,
    "joint": Joint,
    "independent": Independent,
}


def declared(name: MethodName) -> str:
    """What the method trains, in one line, without a model: for plans."""
    return _METHODS[name].trains


def starts_from_base(name: MethodName) -> bool:
    """Whether every stage of the method starts from the base, without a model."""
    return _METHODS[name].starts_from == "base"


def method_named(name: MethodName) -> Method:
    """The method a recipe names, where the name says it all.

    Raises InputError for those made of an earlier stage's data: `Ewc`, `Lwf` and `Expand` are built with it.
    """
    plain: dict[MethodName, Method] = {
        "grow": Grow(),
        "full": Full(),
        "replay": Replay(),
        "lora": Lora(),
        "concentrate": Concentrate(),
        "frozen": Frozen(),
        "joint": Joint(),
        "independent": Independent(),
    }
    if name not in plain:
        what = f"method={name} needs what the stage before it left"
        raise InputError(what, "method", f"known here: {', '.join(plain)}; `mfext continual` runs every method")
    return plain[name]
