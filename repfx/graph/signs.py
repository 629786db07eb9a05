"""Which values cannot be negative, by structure: what the unsigned number formats of a target need
to know.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from repfx.graph.ops import Map, Sum
from repfx.graph.view import GraphView

_NON_NEGATIVE: set[Any] = {
    *(nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softplus),
    *(
        F.relu,
        torch.relu,
        F.relu6,
        torch.sigmoid,
        F.sigmoid,
        F.hardsigmoid,
        F.softmax,
        torch.softmax,
    ),
    *("relu", "relu_", "sigmoid", "softmax", "abs", "square", torch.abs, torch.square),
    *(torch.ops.aten.relu.default, torch.ops.aten.relu_.default, torch.ops.aten.sigmoid.default),
}
_KEEPS_SIGN: set[Any] = {
    *(
        nn.MaxPool1d,
        nn.MaxPool2d,
        nn.MaxPool3d,
        nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveMaxPool2d,
    ),
    *(nn.Flatten, nn.PixelShuffle, nn.Upsample, F.max_pool2d, F.adaptive_avg_pool2d, F.interpolate),
    *(
        torch.flatten,
        torch.cat,
        torch.reshape,
        torch.permute,
        torch.mean,
        torch.max_pool2d,
        operator.getitem,
    ),
    *("flatten", "view", "reshape", "permute", "transpose", "mean", "chunk", "split"),
    *(
        torch.ops.aten.max_pool2d.default,
        torch.ops.aten.adaptive_avg_pool2d.default,
        torch.ops.aten.flatten.using_ints,
    ),
    *(torch.ops.aten.mean.dim, torch.ops.aten.view.default, torch.ops.aten.cat.default),
}


def non_negative(view: GraphView, node: fx.Node) -> bool:
    """Whether every entry of this value is at least zero, as far as the operators tell."""
    todo, seen = [node], {node}
    while todo:
        at = todo.pop()
        module = view.modules[str(at.target)] if at.op == "call_module" else None
        target: Any = at.target if module is None else type(module)
        op = view.ops[at]
        # Whoever reads the value may find what a later operator wrote there.
        needed = [w for w in view.writes.of.get(at, ()) if view.index[w] > view.index[at]]
        if target not in _NON_NEGATIVE:
            values = view.data_inputs(at)
            keeps = target in _KEEPS_SIGN and set(at.all_input_nodes) <= set(values)
            keeps &= "bicubic" not in (*at.args, *at.kwargs.values(), getattr(module, "mode", None))
            passes = keeps or (
                isinstance(op, Map) and op.kind in ("identity", "dropout", "avgpool")
            )
            sums = isinstance(op, Sum) and all(factor >= 0 for _, factor in op.terms)
            if not (passes or sums):
                return False
            needed += values
        for value in needed:
            if value not in seen:
                seen.add(value)
                todo.append(value)
    return True
