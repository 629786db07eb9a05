"""The proxies of a trace: values that depend on the input, and constants that do not."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx


class Value(fx.Proxy):
    """A proxy that records `x += y` and `x[i] = y` as changes in place.

    It also knows how many pieces a chunk or a split has, so that `Tracer.iter` can iterate over
    them."""

    def __len__(self) -> int:
        count = pieces(self.node)
        return super().__len__() if count is None else count

    def _in_place(self, f: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", f, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def pieces(node: fx.Node) -> int | None:
    """How many tensors a chunk, or a split by sizes, returns. None for any other node."""
    asked = node.args[1] if len(node.args) > 1 else None
    if node.target in (torch.chunk, "chunk"):
        asked = node.kwargs.get("chunks", asked)
        return asked if isinstance(asked, int) else None
    if node.target in (torch.split, "split", "split_with_sizes"):
        asked = next(
            (
                node.kwargs[k]
                for k in ("split_size_or_sections", "split_size", "split_sizes")
                if k in node.kwargs
            ),
            asked,
        )
        return len(asked) if isinstance(asked, (list, tuple)) else None
    return None


class ConstantProxy(Value):
    """A parameter, a buffer, or an expression of these. It is recorded like any other proxy.

    Unlike other proxies, it has a concrete shape and dtype."""

    def __init__(self, node: fx.Node, tracer: fx.proxy.TracerBase, value: Tensor) -> None:
        super().__init__(node, tracer)
        self.value = value

    shape = property(lambda self: self.value.shape)
    ndim = property(lambda self: self.value.ndim)
    dtype = property(lambda self: self.value.dtype)
    device = property(lambda self: self.value.device)
    requires_grad = property(lambda self: self.value.requires_grad)

    def size(self, dim: int | None = None) -> Any:
        return self.value.size() if dim is None else self.value.size(dim)

    def dim(self) -> int:
        return self.value.dim()

    def numel(self) -> int:
        return self.value.numel()

    def __len__(self) -> int:
        return len(self.value)

    def __repr__(self) -> str:
        return f"ConstantProxy({self.node.name}, {tuple(self.value.shape)})"
