"""Tensors on disk: safetensors only, finite, checked against the manifest, hashed by content."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mfext.errors import DamagedError, InputError, MfextError
from mfext.store_files import check_file_name, fsync_file, machine_errors, refusal
from mfext.store_folders import file_sha256, require_manifest_entry, verify_file

_OS_ERROR = re.compile(r"os error (\d+)")


def tensors_size_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes the tensors take on disk, headers aside."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def is_finite(tensor: Tensor) -> bool:
    """True where no element is NaN or infinite (integers always are)."""
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    wide = tensor.detach()
    if wide.element_size() == 1:
        wide = wide.float()
    if wide.is_complex():
        wide = torch.view_as_real(wide.resolve_conj())
    low, high = torch.aminmax(wide)  # one pass without a mask; NaN propagates to both
    return bool(torch.isfinite(low) and torch.isfinite(high))


def require_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raise InputError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise InputError(
                f"tensor {name!r} holds NaN or infinity",
                where,
                "non-finite tensors are never committed; go back to the last good stage",
            )


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file, fsynced. Non-finite ones are an InputError naming the tensor.
    Meant for the `write` of `commit_folder`: the commit, not this call, makes it safe to see."""
    path = Path(path)
    check_file_name(path.name, path)
    require_finite(tensors, path.name)
    with machine_errors(path):
        try:
            safetensors.torch.save_file(_separate(tensors), path, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise _refusal(error, path) from error
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(path, 0o666 & ~mask)  # the library creates 0600 files
        fsync_file(path)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no storage, as the format requires."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        storage = flat.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != flat.numel() * flat.element_size():
            flat = flat.clone()
        seen.add(flat.untyped_storage().data_ptr())
        plain[name] = flat
    return plain


def load_tensors(path: Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU. The SHA-256 is checked against `sha256` if given, else
    against the manifest beside the file if there is one; then the format and finiteness.
    Names, shapes and dtypes are the caller's to check. DamagedError or InputError."""
    path = Path(path)
    if not os.path.exists(path):
        raise InputError("no such file", path, "check the path")
    if sha256 is not None:
        if file_sha256(path, follow_links=True)[1] != sha256:
            raise DamagedError("content is damaged", path, "its SHA-256 does not match; restore it from a copy")
    elif (entry := require_manifest_entry(path)) is not None:
        verify_file(path, entry)
    return read_tensors(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a file whose hash the caller has just checked; format and finiteness are checked here."""
    with machine_errors(path):
        if not path.is_file():
            raise DamagedError("not a plain file", path, "replace it with the file itself")
        try:
            tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise _refusal(error, path) from error
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise DamagedError(f"tensor {name!r} holds NaN or infinity", path, "use another copy of this file")
    return tensors


def _refusal(error: safetensors.SafetensorError, path: Path) -> MfextError:
    found = _OS_ERROR.search(str(error))
    if found is not None:
        return refusal(OSError(int(found.group(1)), os.strerror(int(found.group(1)))), path)
    return DamagedError("not a valid safetensors file", path, str(error)[:200])


def tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's dtype, shape and bytes: equal exactly where the bits are."""
    return {name: _tensor_hash(tensor) for name, tensor in tensors.items()}


def _tensor_hash(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype}{list(plain.shape)}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_hash(tensors: Mapping[str, Tensor]) -> str:
    """One SHA-256 over all names and tensor hashes, whatever their order."""
    lines = (f"{name}\0{digest}\n" for name, digest in sorted(tensor_hashes(tensors).items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
