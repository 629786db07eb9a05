"""THE table: every spelling of an operator, as a function, a method or an aten overload, and its
rule.

Leaf modules have the other half, in `repfx.graph.leaves`. A rule is a function with the operator's
own signature, so Python binds and defaults its arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from repfx.algebra import pad_with
from repfx.graph.channels import (
    cat,
    channel_shuffle,
    chunk,
    flip,
    getitem,
    index_select,
    narrow,
    permute,
    slice_dim,
    split,
    transpose,
)
from repfx.graph.ops import Op
from repfx.graph.pointwise import add, div, dropout, identity, mul, neg, rsub, sub
from repfx.graph.spatial import (
    aten_batch_norm,
    avg_pool,
    batch_norm,
    convolution,
    linear,
    pad,
    pad_own,
    transposed_convolution,
)

aten = torch.ops.aten


def _pool_rule(axes: int) -> Callable[..., Op]:
    return lambda c, *args, **kwargs: avg_pool(c, *args, **kwargs, axes=axes)


CALLS: dict[Any, Callable[..., Op]] = {
    **dict.fromkeys([F.conv1d, F.conv2d, F.conv3d], convolution),
    **dict.fromkeys([aten.conv1d.default, aten.conv2d.default, aten.conv3d.default], convolution),
    **dict.fromkeys([aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding], convolution),
    **dict.fromkeys(
        [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d], transposed_convolution
    ),
    **dict.fromkeys(
        [aten.conv_transpose1d.default, aten.conv_transpose2d.input], transposed_convolution
    ),
    aten.conv_transpose3d.input: transposed_convolution,
    **dict.fromkeys([F.linear, aten.linear.default], linear),
    F.batch_norm: batch_norm,
    **dict.fromkeys([torch.batch_norm, aten.batch_norm.default], aten_batch_norm),
    **dict.fromkeys(
        [operator.add, operator.iadd, torch.add, "add", "add_", aten.add.Tensor, aten.add_.Tensor],
        add,
    ),
    **dict.fromkeys(
        [operator.sub, operator.isub, torch.sub, "sub", "sub_", aten.sub.Tensor, aten.sub_.Tensor],
        sub,
    ),
    **dict.fromkeys([torch.rsub, aten.rsub.Scalar, aten.rsub.Tensor], rsub),
    **dict.fromkeys(
        [operator.mul, operator.imul, torch.mul, "mul", "mul_", aten.mul.Tensor, aten.mul_.Tensor],
        mul,
    ),
    **dict.fromkeys([torch.multiply, "multiply", "multiply_"], mul),
    **dict.fromkeys([torch.subtract, "subtract", "subtract_"], sub),
    **dict.fromkeys(
        [
            operator.truediv,
            operator.itruediv,
            torch.div,
            torch.divide,
            torch.true_divide,
            "div",
            "divide",
            "true_divide",
        ],
        div,
    ),
    **dict.fromkeys(["div_", aten.div.Tensor, aten.div_.Tensor], div),
    **dict.fromkeys([operator.neg, torch.neg, "neg", aten.neg.default], neg),
    **dict.fromkeys([F.dropout, aten.dropout.default], dropout),
    **dict.fromkeys(
        ["contiguous", aten.contiguous.default, aten.clone.default, aten.alias.default, "clone"],
        identity,
    ),
    **dict.fromkeys([F.pad, aten.pad.default, aten.constant_pad_nd.default], pad),
    pad_with: pad_own,
    **dict.fromkeys([torch.cat, torch.concat, torch.concatenate, aten.cat.default], cat),
    **dict.fromkeys([torch.chunk, "chunk", aten.chunk.default], chunk),
    **dict.fromkeys(
        [torch.split, "split", aten.split.Tensor, aten.split_with_sizes.default], split
    ),
    operator.getitem: getitem,
    aten.slice.Tensor: slice_dim,
    **dict.fromkeys([torch.narrow, "narrow", aten.narrow.default], narrow),
    **dict.fromkeys([torch.index_select, "index_select", aten.index_select.default], index_select),
    **dict.fromkeys([torch.flip, "flip", aten.flip.default], flip),
    **dict.fromkeys(
        [F.channel_shuffle, torch.channel_shuffle, aten.channel_shuffle.default], channel_shuffle
    ),
    **dict.fromkeys([torch.permute, "permute", aten.permute.default], permute),
    **dict.fromkeys(
        [torch.transpose, "transpose", torch.swapaxes, "swapaxes", aten.transpose.int], transpose
    ),
    **dict.fromkeys([F.avg_pool1d, aten.avg_pool1d.default], _pool_rule(1)),
    **dict.fromkeys([F.avg_pool2d, aten.avg_pool2d.default], _pool_rule(2)),
    **dict.fromkeys([F.avg_pool3d, aten.avg_pool3d.default], _pool_rule(3)),
}
CALLS[aten.constant_pad_nd.default] = lambda c, input, p, value=0: pad(
    c, input, p, "constant", value
)
