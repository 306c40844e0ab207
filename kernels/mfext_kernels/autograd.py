"""Calling a torch.autograd.Function, whose `apply` torch leaves without types: the one place that looks away."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function


def applied(function: type[Function], *arguments: object) -> Tensor:
    """The one tensor that `function` gives."""
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result
