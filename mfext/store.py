"""Where everything written goes: run and model folders, locked, atomic, hashed, pickle-free.

One door to the store_*.py files: files (atomic writes, locks), json (sealed JSON, ledger lines),
folders (the commit protocol, manifests), tensors (safetensors, hashes), weights (fewer bits), models, runs.
"""

from __future__ import annotations

from mfext.store_files import require_free_space, write_file_atomically
from mfext.store_folders import FileEntry, Manifest, commit_folder, read_manifest, require_replaceable, verify_folder
from mfext.store_json import append_line, append_lines, dump_json, read_json, read_json_object, read_lines, seal, unseal
from mfext.store_models import (
    FORMAT_KEYS,
    MODEL_TYPE,
    WEIGHTS_KEY,
    ModelFolder,
    config_hash,
    load_model_folder,
    model_config_json,
    save_model,
)
from mfext.store_runs import LEDGER_KEY, Progress, Run, Stage, find_model_folder, is_run_folder
from mfext.store_tensors import is_finite, load_tensors, model_hash, save_tensors, tensor_hashes, tensors_size_bytes
from mfext.store_weights import narrow_weights, widen_weights

__all__ = [
    "FORMAT_KEYS",
    "LEDGER_KEY",
    "MODEL_TYPE",
    "WEIGHTS_KEY",
    "FileEntry",
    "Manifest",
    "ModelFolder",
    "Progress",
    "Run",
    "Stage",
    "append_line",
    "append_lines",
    "commit_folder",
    "config_hash",
    "dump_json",
    "find_model_folder",
    "is_finite",
    "is_run_folder",
    "load_model_folder",
    "load_tensors",
    "model_config_json",
    "model_hash",
    "narrow_weights",
    "read_json",
    "read_json_object",
    "read_lines",
    "read_manifest",
    "require_free_space",
    "require_replaceable",
    "save_model",
    "save_tensors",
    "seal",
    "tensor_hashes",
    "tensors_size_bytes",
    "unseal",
    "verify_folder",
    "widen_weights",
    "write_file_atomically",
]
