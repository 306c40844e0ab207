"""Modules without weights, where shapes alone are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DRAWING = (torch.Tensor.normal_, torch.Tensor.uniform_)


class _NothingDrawn(TorchFunctionMode):
    """Tensors are left as they are where they would be drawn: on the meta device that would load torch's compiler, a
    second of time and 165 MB, for nothing."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or func in DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Inside, what is built lies on the meta device, with nothing drawn."""
    with torch.device("meta"), _NothingDrawn():
        yield
