"""Grow a ModuleFormer with new experts so that it learns a new domain without forgetting the old ones.

Importing this package is cheap: each name below loads its own module on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mfext.commands.continual import run as continual
    from mfext.commands.evaluate import run as evaluate
    from mfext.commands.grow import run as grow
    from mfext.commands.models import load_model as load
    from mfext.commands.models import save_model as save
    from mfext.commands.pretrain import run as pretrain
    from mfext.config import GrowthConfig, ModelConfig, Recipe, TrainingConfig
    from mfext.errors import InputError, MfextError
    from mfext.model.moduleformer import ModuleFormer
    from mfext.recipe import load_recipe
    from mfext.training.module import ContinualModuleFormer

_HOMES = {
    "ContinualModuleFormer": ("mfext.training.module", "ContinualModuleFormer"),
    "GrowthConfig": ("mfext.config", "GrowthConfig"),
    "InputError": ("mfext.errors", "InputError"),
    "MfextError": ("mfext.errors", "MfextError"),
    "ModelConfig": ("mfext.config", "ModelConfig"),
    "ModuleFormer": ("mfext.model.moduleformer", "ModuleFormer"),
    "Recipe": ("mfext.config", "Recipe"),
    "TrainingConfig": ("mfext.config", "TrainingConfig"),
    "continual": ("mfext.commands.continual", "run"),
    "evaluate": ("mfext.commands.evaluate", "run"),
    "grow": ("mfext.commands.grow", "run"),
    "load": ("mfext.commands.models", "load_model"),
    "load_recipe": ("mfext.recipe", "load_recipe"),
    "pretrain": ("mfext.commands.pretrain", "run"),
    "save": ("mfext.commands.models", "save_model"),
}

__all__ = [
    "ContinualModuleFormer",
    "GrowthConfig",
    "InputError",
    "MfextError",
    "ModelConfig",
    "ModuleFormer",
    "Recipe",
    "TrainingConfig",
    "__version__",
    "continual",
    "evaluate",
    "grow",
    "load",
    "load_recipe",
    "pretrain",
    "save",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'mfext' has no attribute {name!r}; it has: {', '.join(__all__)}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
