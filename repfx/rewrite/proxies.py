"""ConstantProxy: a weight, or an expression of weights, that records what is computed from it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx


class ConstantProxy(fx.Proxy):
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
