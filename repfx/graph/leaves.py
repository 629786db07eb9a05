"""The table's other half: leaf modules, each read as the function call it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from repfx.graph.channels import channel_shuffle
from repfx.graph.modes import TrainOnly
from repfx.graph.ops import Constants, Op, Opaque
from repfx.graph.pointwise import identity, train_only
from repfx.graph.spatial import (
    avg_pool,
    batch_norm,
    convolution,
    linear,
    pad,
    transposed_convolution,
)

Rule = Callable[[Constants, str, Any, fx.Node], Op]


def _conv(c: Constants, path: str, m: Any, x: fx.Node) -> Op:
    bias = None if m.bias is None else f"{path}.bias"
    return convolution(
        c, x, f"{path}.weight", bias, m.stride, m.padding, m.dilation, m.groups, m.padding_mode
    )


def _conv_transpose(c: Constants, path: str, m: Any, x: fx.Node) -> Op:
    bias = None if m.bias is None else f"{path}.bias"
    args = (m.stride, m.padding, m.output_padding, m.groups, m.dilation)
    return transposed_convolution(c, x, f"{path}.weight", bias, *args)


def _linear(c: Constants, path: str, m: Any, x: fx.Node) -> Op:
    return linear(c, x, f"{path}.weight", None if m.bias is None else f"{path}.bias")


def _norm(axes: int | None) -> Rule:
    def rule(c: Constants, path: str, m: Any, x: fx.Node) -> Op:
        names = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (
            None if getattr(m, name, None) is None else f"{path}.{name}" for name in names
        )
        return batch_norm(c, x, mean, var, weight, bias, eps=m.eps, axes=axes)

    return rule


def _pool(axes: int) -> Rule:
    def rule(c: Constants, path: str, m: Any, x: fx.Node) -> Op:
        divisor = getattr(m, "divisor_override", None)
        return avg_pool(
            c,
            x,
            m.kernel_size,
            m.stride,
            m.padding,
            m.ceil_mode,
            m.count_include_pad,
            divisor,
            axes=axes,
        )

    return rule


def _pad(mode: str) -> Rule:
    return lambda c, path, m, x: pad(
        c, x, _sides(m), mode, getattr(m, "value", 0) if mode == "constant" else None
    )


def _sides(m: Any) -> tuple[int, ...]:
    return tuple(m.padding)


def _identity(c: Constants, path: str, m: Any, x: fx.Node) -> Op:
    return identity(c, x)


def _train_only(c: Constants, path: str, m: Any, x: fx.Node) -> Op:
    return train_only(c, x)


MODULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys([nn.Conv1d, nn.Conv2d, nn.Conv3d], _conv),
    **dict.fromkeys([nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d], _conv_transpose),
    nn.Linear: _linear,
    nn.BatchNorm1d: _norm(None),
    nn.BatchNorm2d: _norm(2),
    nn.BatchNorm3d: _norm(3),
    nn.SyncBatchNorm: _norm(None),
    nn.AvgPool1d: _pool(1),
    nn.AvgPool2d: _pool(2),
    nn.AvgPool3d: _pool(3),
    **dict.fromkeys([nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d], _pad("constant")),
    **dict.fromkeys([nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d], _pad("constant")),
    **dict.fromkeys([nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d], _pad("reflect")),
    **dict.fromkeys(
        [nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d], _pad("replicate")
    ),
    **dict.fromkeys([nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d], _pad("circular")),
    nn.ChannelShuffle: lambda c, path, m, x: channel_shuffle(c, x, m.groups),
    nn.Identity: _identity,
    **dict.fromkeys(
        [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, TrainOnly],
        _train_only,
    ),
}


def of_module(
    c: Constants, path: str, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Op:
    """The Op of a leaf module's call: by its class, or the base whose forward it still runs."""
    if len(args) + len(kwargs) != 1 or not all(
        isinstance(v, fx.Node) for v in (*args, *kwargs.values())
    ):
        return Opaque()
    for base in type(m).__mro__:
        if base in MODULES:
            if type(m).forward is not base.forward or "forward" in m.__dict__:
                return Opaque("its class overrides the forward of a known layer")
            if m._forward_hooks or m._forward_pre_hooks:
                return Opaque("it has forward hooks", "remove the hooks")
            return MODULES[base](c, path, m, (*args, *kwargs.values())[0])
    return Opaque()
