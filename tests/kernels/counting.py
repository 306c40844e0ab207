"""Work as it is counted, not timed: operations dispatched, floating-point operations of products, bytes, sizes.

The numbers are the same on every machine and at every load. Under the mode every operation that reaches torch's
dispatcher is seen, also those inside our own autograd Functions, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mfext_kernels.native import Source

# How many of the leading operands are not factors of the product.
ADDENDS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1, "addbmm": 1}
ONEDNN = "mkldnn::_linear_pointwise"  # x @ weight^T, called by mfext_kernels.products
ATTENTION = ("scaled_dot_product", "efficient_attention", "flash_attention")


class Counted(TorchDispatchMode):
    """What ran inside `with Counted() as work`: multiplications and additions of matrix products count one each, those
    of compiled code, which tells them, too.

    `bytes` adds up the memory of every fresh result, not of views and not of results written into what was there.
    `shapes` holds the shape of every result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.flops = 0
        self.onednn_calls = 0
        self.bytes = 0
        self.shapes: set[torch.Size] = set()

    def __enter__(self) -> Counted:
        self._operations = Source.operations
        Source.operations = self._counting  # type: ignore[method-assign]
        entered: Counted = super().__enter__()
        return entered

    def __exit__(self, *error: Any) -> None:
        Source.operations = self._operations  # type: ignore[method-assign]
        super().__exit__(*error)

    @property
    def _counting(self) -> Callable[..., Callable[..., int]]:
        def operations(source: Source, name: str, arguments: tuple[type, ...]) -> Callable[..., int]:
            function = self._operations(source, name, arguments)

            def call(*args: Any) -> int:
                done = function(*args)
                self.flops += done
                return done

            return call

        return operations

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        known = {each.untyped_storage().data_ptr() for each in tensors_of((args, kwargs))}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        assert not any(part in name for part in ATTENTION), "fused attention is not counted here"
        self.operations += 1
        if name in ADDENDS:
            left, right = args[ADDENDS[name] : ADDENDS[name] + 2]
            self.flops += 2 * left.numel() * right.shape[-1]
        elif name == ONEDNN:
            self.onednn_calls += 1
            self.flops += 2 * args[0].numel() * args[1].shape[0]
        for each in tensors_of(result):
            self.shapes.add(each.shape)
            if each.untyped_storage().data_ptr() not in known:
                self.bytes += each.untyped_storage().nbytes()
        return result

    @property
    def largest(self) -> int:
        """Elements of the largest result."""
        return max(shape.numel() for shape in self.shapes)


def tensors_of(tree: Any) -> Iterator[Tensor]:
    return (each for each in tree_leaves(tree) if isinstance(each, Tensor))


def counted(run: Callable[[], object]) -> Counted:
    with Counted() as work:
        run()
    return work


@dataclass
class Stored:
    """What autograd keeps for backward, in bytes by the name of the outermost watched module it was made in."""

    bytes: dict[str, int] = field(default_factory=dict)
    inside: list[str] = field(default_factory=list)

    def note(self, tensor: Tensor) -> Tensor:
        where = self.inside[0] if self.inside else "outside"
        self.bytes[where] = self.bytes.get(where, 0) + tensor.numel() * tensor.element_size()
        return tensor


@contextmanager
def stored(modules: Mapping[str, nn.Module]) -> Iterator[Stored]:
    """Watch what is kept for backward inside these modules; parameters too, since a product keeps its factors."""
    kept = Stored()
    handles = []
    for name, module in modules.items():
        handles += [
            module.register_forward_pre_hook(lambda *_, name=name: kept.inside.append(name)),
            module.register_forward_hook(lambda *_: (kept.inside.pop(), None)[1]),
        ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor):
            yield kept
    finally:
        for handle in handles:
            handle.remove()
