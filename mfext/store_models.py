"""Model folders: config.json + model.safetensors + further safetensors or JSON files + MANIFEST.json."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias, cast

from torch import Tensor

from mfext.errors import InputError
from mfext.store_files import check_file_name, machine_errors, make_folders, require_free_space, write_new_file
from mfext.store_folders import MANIFEST_NAME, Manifest, absolute, recover_folder, replace_folder, verify_folder
from mfext.store_json import dump_json, read_json_object
from mfext.store_tensors import read_tensors, require_finite, save_tensors, tensors_size_bytes
from mfext.store_weights import FORMATS, widen_weights

MODEL_TYPE = "mfext_moduleformer"
MODEL_FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
TENSORS_NAME = "model.safetensors"
MODEL_KINDS = ("model", "stage")
WEIGHTS_KEY = "weights"
"""In config.json: the number format of tensors stored in fewer bits; absent where they are what they are."""
FORMAT_KEYS = ("model_type", "format_version", WEIGHTS_KEY)
"""Keys of config.json that are no keys of the model's config."""

Extra: TypeAlias = Mapping[str, object]
"""Further files of a folder by name: a mapping of tensors becomes NAME.safetensors, bytes the file
NAME as they are, anything else NAME.json."""


class ModelFolder(NamedTuple):
    """What a verified model folder holds; tensors are on the CPU, those stored in fewer bits widened to float32."""

    config: dict[str, object]
    tensors: dict[str, Tensor]
    manifest: Manifest


def model_config_json(config: Mapping[str, object]) -> dict[str, object]:
    """`config` with the model type and format version our config.json carries."""
    return {"model_type": MODEL_TYPE, "format_version": MODEL_FORMAT_VERSION, **config}


def config_hash(config: Mapping[str, object]) -> str:
    """SHA-256 of the canonical JSON text of a config."""
    return hashlib.sha256(dump_json(config)).hexdigest()


def model_writer(tensors: Mapping[str, Tensor], config: Mapping[str, object], extra: Extra) -> Callable[[Path], None]:
    """A `write` for `commit_folder` that fills a folder with a model and its extra files."""
    require_finite(tensors, TENSORS_NAME)

    def write(folder: Path) -> None:
        write_new_file(folder / CONFIG_NAME, dump_json(model_config_json(config)))
        save_tensors(folder / TENSORS_NAME, tensors)
        write_extra(folder, extra)

    return write


def write_extra(folder: Path, extra: Extra) -> None:
    """Write the extra files of a model or progress folder."""
    for name, value in extra.items():
        if isinstance(value, bytes):
            file_name = name
        elif _holds_tensors(value) or name.endswith(".safetensors"):
            file_name = name if name.endswith(".safetensors") else f"{name}.safetensors"
        else:
            file_name = name if name.endswith(".json") else f"{name}.json"
        assert file_name not in (CONFIG_NAME, TENSORS_NAME, MANIFEST_NAME), file_name
        path = folder / check_file_name(file_name, folder)
        if isinstance(value, bytes):
            write_new_file(path, value)
        elif file_name.endswith(".safetensors"):
            save_tensors(path, cast("Mapping[str, Tensor]", value))
        else:
            write_new_file(path, dump_json(value))


def extra_size_bytes(extra: Extra) -> int:
    """Bytes of the tensors and raw files among the extra files."""
    size = 0
    for value in extra.values():
        if isinstance(value, bytes):
            size += len(value)
        elif _holds_tensors(value):
            size += tensors_size_bytes(cast("Mapping[str, Tensor]", value))
    return size


def _holds_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def save_model(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, object],
    target: Path,
    metadata: Mapping[str, object],
    extra: Extra | None = None,
) -> Manifest:
    """Commit a model folder at `target`. A verified model folder there is replaced safely; any other
    folder that is not empty is an InputError. `metadata["parent"]`, if given, is the parent's identity."""
    target, extra = absolute(target), extra or {}
    parent = metadata.get("parent")
    assert parent is None or isinstance(parent, str), "the identity of a manifest"
    make_folders(target.parent)
    require_free_space(target.parent, tensors_size_bytes(tensors) + extra_size_bytes(extra))
    write = model_writer(tensors, config, extra)
    return replace_folder(
        target, write, kind="model", metadata=metadata, parent=parent, config_hash=config_hash(config)
    )


def load_model_folder(path: Path) -> ModelFolder:
    """Config, tensors and manifest of a model or stage folder, every file's SHA-256 checked.
    InputError or DamagedError; names, shapes and dtypes are the caller's to check."""
    path = absolute(path)
    recover_folder(path)
    manifest = verify_folder(path)
    missing = [name for name in (CONFIG_NAME, TENSORS_NAME) if name not in manifest.files]
    if manifest.kind not in MODEL_KINDS or missing:
        raise InputError(
            f"this folder holds a {manifest.kind}, not a model", path, "give a model folder or a run folder"
        )
    config = read_json_object(path / CONFIG_NAME)
    if config.get("model_type") != MODEL_TYPE or config.get("format_version") != MODEL_FORMAT_VERSION:
        found = f"{str(config.get('model_type'))[:40]}, version {str(config.get('format_version'))[:20]}"
        raise InputError(
            f"not a model this mfext reads ({found})",
            path / CONFIG_NAME,
            f"it reads {MODEL_TYPE}, version {MODEL_FORMAT_VERSION}",
        )
    weights = config.get(WEIGHTS_KEY)
    if weights is not None and weights not in FORMATS:
        fix = f"it reads {', '.join(FORMATS)}; use a newer mfext"
        raise InputError(f"weights of a format this mfext does not read ({str(weights)[:20]})", path, fix)
    with machine_errors(path):
        tensors = read_tensors(path / TENSORS_NAME)
        return ModelFolder(config, tensors if weights is None else widen_weights(tensors, path), manifest)
