"""From a config to a model with fresh weights: the one place that knows which architectures there are."""

from __future__ import annotations

from mfext.config import ModelConfig
from mfext.model.dense import DenseTransformer
from mfext.model.language_model import LanguageModel
from mfext.model.moduleformer import ModuleFormer


def new_model(config: ModelConfig) -> LanguageModel:
    """The model `config` describes, drawn from torch's global generator (on the meta device: shapes alone)."""
    return DenseTransformer(config) if config.architecture == "dense" else ModuleFormer(config)
