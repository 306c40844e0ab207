"""Which models can grow: those that have experts to add to."""

from __future__ import annotations

from mfext.config import ModelConfig
from mfext.errors import InputError
from mfext.model.language_model import LanguageModel
from mfext.model.moduleformer import ModuleFormer


def require_growable(config: ModelConfig) -> None:
    """Raise InputError where the model is dense."""
    if config.architecture == "dense":
        fix = "grow a ModuleFormer, or train all of this model with --method full"
        raise InputError("a dense model has no experts to add to", "architecture=dense", fix)


def growable(model: LanguageModel) -> ModuleFormer:
    """The same model, as one that can grow. Raises InputError where it is dense."""
    require_growable(model.config)
    assert isinstance(model, ModuleFormer)
    return model
