"""Model folders to models and back: `mfext.load` and `mfext.save`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mfext.config import ModelConfig
from mfext.conversion import from_mapping, to_mapping
from mfext.errors import DamagedError, InputError
from mfext.hub.molm import config_from_published, is_published_config, tensors_from_published
from mfext.model.build import new_model
from mfext.model.language_model import LanguageModel
from mfext.model.shapes import shapes_alone
from mfext.store import (
    FORMAT_KEYS,
    WEIGHTS_KEY,
    find_model_folder,
    load_model_folder,
    load_tensors,
    model_hash,
    read_json_object,
)
from mfext.store import (
    save_model as commit_model,
)

SHARD_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class OpenedModel:
    """A model, the folder it came from, what that folder records (lineage, domains, tokenizer) and its SHA-256.

    `weights` is int8 or bf16 where the folder stores fewer bits than the model has, else None. The SHA-256 is of the
    tensors the model computes with, in whatever format they lie on disk.
    """

    model: LanguageModel
    folder: Path
    metadata: Mapping[str, object]
    sha256: str
    weights: str | None


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> LanguageModel:
    """The model of a model or run folder of mfext's, or of a folder in the published MoLM layout.

    In eval mode, nothing requires gradients until a method says so. Raises InputError or
    DamagedError where the folder is not one, or its content is not what it says.
    """
    model = open_model(path).model
    return model.to(device=device, dtype=dtype)


def save_model(model: LanguageModel, path: str | Path, metadata: Mapping[str, object] | None = None) -> None:
    """Commit `model` as a model folder at `path`; a model folder there is replaced safely.

    Raises InputError where `path` holds anything else or a tensor is not finite, MachineError
    where the machine refuses.
    """
    commit_model(model_tensors(model), to_mapping(model.config), Path(path).expanduser(), metadata or {})


def open_model(path: str | Path) -> OpenedModel:
    """Like `load_model`, with the folder's metadata and hash."""
    folder = Path(path).expanduser()
    if _is_published(folder):
        config, tensors = _read_published(folder)
        metadata: Mapping[str, object] = {"source": "published MoLM layout"}
        weights = None
    else:
        folder = find_model_folder(folder)
        mapping, tensors, manifest = load_model_folder(folder)
        config = from_mapping(
            ModelConfig,
            {key: value for key, value in mapping.items() if key not in FORMAT_KEYS},
            str(folder / "config.json"),
        )
        metadata = manifest.metadata
        weights = None if mapping.get(WEIGHTS_KEY) is None else str(mapping[WEIGHTS_KEY])
    return OpenedModel(build_model(config, tensors, folder), folder, metadata, model_hash(tensors), weights)


def build_model(config: ModelConfig, tensors: Mapping[str, Tensor], where: object) -> LanguageModel:
    """A model whose every tensor comes from `tensors`; DamagedError where one is missing, odd or left over."""
    with shapes_alone():
        model = new_model(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() ^ tensors.keys()):
        problem = "lacks" if name in expected else "has an unknown"
        raise DamagedError(f"the model {problem} tensor '{name}'", where, "its config.json says otherwise")
    for name, shape in expected.items():
        if tensors[name].shape != shape or not tensors[name].is_floating_point():
            given = f"{tensors[name].dtype} {list(tensors[name].shape)}"
            raise DamagedError(f"tensor '{name}' is {given}", where, f"its config.json says {list(shape)}")
    model.load_state_dict(dict(tensors), assign=True)
    model.requires_grad_(False)
    return model.eval()


def model_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """Every tensor of the model by name, detached, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def _is_published(folder: Path) -> bool:
    config = folder / "config.json"
    if not config.is_file() or (folder / "MANIFEST.json").exists():
        return False
    return is_published_config(read_json_object(config))


def _read_published(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    config = config_from_published(read_json_object(folder / "config.json"))
    names = ["model.safetensors"]
    if (folder / SHARD_INDEX).is_file():
        weight_map = read_json_object(folder / SHARD_INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(
                "no weight_map", folder / SHARD_INDEX, "expected tensor names and the files that hold them"
            )
        names = sorted({str(name) for name in weight_map.values()})
        strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if strange:
            raise InputError(
                f"shard '{strange[0]}'", folder / SHARD_INDEX, "shards are .safetensors files beside the index"
            )
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"no {name}", folder, "weights are read from safetensors files only; convert a .bin first")
        tensors |= load_tensors(folder / name)
    return config, tensors_from_published(tensors, config)
