"""Weights on disk in fewer bits: int8 with a scale per output channel, or bfloat16. Reading widens them to float32.

A folder's config.json says so under `weights`; without that key tensors are what they are. A product sums over
dimension 1, both of a matrix (out, in) and of a stack of experts (E, in, out): a channel is what it sums, so that every
expert has scales of its own. They lie beside their tensor, in float32, as NAME.scale, of size 1 along dimension 1; zero
is exactly zero. Each tensor is narrowed on its own: taking a generation off before or after gives the same bits.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from mfext.errors import DamagedError, InputError

FORMATS = ("int8", "bf16")
SCALE = ".scale"
LARGEST = 127
"""Of int8 from -127 to 127, so that a weight and its negative are stored alike."""
# torchao says on import which GPU extensions this machine lacks, torch what torchao should call otherwise.
_CHATTER = ("torchao", "torch.utils._pytree")


def narrow_weights(tensors: Mapping[str, Tensor], weights: str, whole: Container[str]) -> dict[str, Tensor]:
    """What a folder of format `weights` stores; vectors and the tensors named in `whole` as float32.

    Every int8 weight is at most half a scale away from what it was, every bfloat16 one 2^-8 of itself. Raises
    InputError where int8 is asked for and the package torchao is not installed.
    """
    assert weights in FORMATS, weights
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().float()
        if plain.ndim < 2 or name in whole:
            stored[name] = plain
        elif weights == "bf16":
            stored[name] = plain.bfloat16()
        else:
            assert plain.ndim <= 3 and name + SCALE not in tensors, name
            stored[name], stored[name + SCALE] = _to_int8(plain)
    return stored


def widen_weights(stored: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """The float32 tensors that `narrow_weights` stored: a product each, the same bits on every machine.

    Raises DamagedError where an int8 tensor lacks scales that fit it.
    """
    tensors = {name: tensor for name, tensor in stored.items() if name.removesuffix(SCALE) not in _int8(stored)}
    for name in _int8(stored):
        codes, scale = stored[name], stored.get(name + SCALE)
        fits = codes.ndim >= 2 and scale is not None and scale.dtype == torch.float32
        if not fits or scale is None or scale.shape != (codes.shape[0], 1, *codes.shape[2:]):
            raise DamagedError(f"int8 tensor '{name}' has no scales that fit", where, "restore the folder from a copy")
        tensors[name] = codes.float() * scale
    return {name: tensor.float() for name, tensor in tensors.items()}


def _int8(stored: Mapping[str, Tensor]) -> set[str]:
    return {name for name, tensor in stored.items() if tensor.dtype == torch.int8}


def _to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales (size 1 along dimension 1): the largest of a channel becomes 127 or -127."""
    with _quiet_torchao():
        try:
            from torchao.quantization import quant_primitives
        except ModuleNotFoundError as error:
            fix = "pip install 'mfext[quantize]', or store them as bf16"
            raise InputError("the package torchao is not installed", "weights as int8", fix) from error
    channel = (1, tensor.shape[1], *(1 for _ in tensor.shape[2:]))
    scale, zero = quant_primitives.choose_qparams_affine(
        tensor,
        quant_primitives.MappingType.SYMMETRIC,
        channel,
        torch.int8,
        quant_min=-LARGEST,
        quant_max=LARGEST,
        scale_dtype=torch.float32,
    )
    codes = quant_primitives.quantize_affine(tensor, channel, scale, zero, torch.int8, -LARGEST, LARGEST)
    return codes, scale.reshape(tensor.shape[0], 1, *tensor.shape[2:])


@contextmanager
def _quiet_torchao() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _CHATTER]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
