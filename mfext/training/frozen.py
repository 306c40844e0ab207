"""Proof that what is frozen did not change: SHA-256 over the bytes of every frozen tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def tensor_sha256(tensor: Tensor) -> str:
    """Hex SHA-256 of the tensor's bytes, row by row as in a file."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def frozen_hashes(model: nn.Module) -> dict[str, str]:
    """Hash of every tensor in the state dict that does not train, by name."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor_sha256(tensor) for name, tensor in model.state_dict().items() if name not in trainable}


def one_hash(hashes: Mapping[str, str]) -> str:
    """One SHA-256 for all of them, in the order of their names."""
    return hashlib.sha256("\n".join(f"{name} {hashes[name]}" for name in sorted(hashes)).encode()).hexdigest()
