"""Which version of an op a call takes: the one forced by name, else the one its tensors ask for."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["reference", "cpu", "triton"]
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_CAPABILITY = (8, 0)


def choose(backend: Backend | None, tensor: Tensor) -> Backend:
    """`backend` itself, or for None: "triton" for CUDA tensors it can take (dtype, card), else "cpu".

    The "cpu" versions are torch alone and run on any device. Raises ValueError for a name that is none of the three,
    and where "triton" is forced on what it cannot take.
    """
    if backend is None:
        if tensor.device.type != "cuda" or tensor.dtype not in TRITON_DTYPES:
            return "cpu"
        return "triton" if _importable() and _capability(tensor.device) >= OLDEST_CAPABILITY else "cpu"
    if backend not in ("reference", "cpu", "triton"):
        raise ValueError(f"backend={backend!r}: must be 'reference', 'cpu', 'triton' or None")
    if backend == "triton":
        _check_triton(tensor)
    return backend


def interpreting() -> bool:
    """Whether Triton's kernels are run by its interpreter, on CPU tensors; decided when triton is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Inside, kernels are launched on the tensor's GPU; does nothing for a CPU tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _check_triton(tensor: Tensor) -> None:
    if not _importable():
        raise ValueError("backend='triton': triton is not installed (it exists for Linux only); use backend='cpu'")
    if tensor.device.type != "cuda" and not interpreting():
        raise ValueError(
            f"backend='triton': needs CUDA tensors, not {tensor.device.type}; use backend='cpu', or set "
            "TRITON_INTERPRET=1 before python starts to run the kernels in Triton's interpreter"
        )
    if tensor.dtype not in TRITON_DTYPES:
        raise ValueError(f"backend='triton': takes fp32, fp16 and bf16, not {tensor.dtype}; use backend='cpu'")


@cache
def _importable() -> bool:
    return find_spec("triton") is not None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
