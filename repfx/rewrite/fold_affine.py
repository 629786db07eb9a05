"""fold_affine: folds an Affine or a batch norm into the step, integer weights and bias of a layer.

    eta (conv(Q(x), s codes) + b) + eps  =  conv(Q(x), |eta| s (sign(eta) codes)) + eta b + eps

For a batch norm eta = gamma / sqrt(var + eps), eps = beta - mean eta."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repfx.errors import InputError
from repfx.graph.calls import Layer, layer_of
from repfx.graph.edit import drop_unreferenced, references
from repfx.quant import Affine, FakeQuant
from repfx.rewrite.results import Merged


def fold_affines(module: fx.GraphModule) -> tuple[Merged, ...]:
    """Folds every Affine of the graph in place.

    Raises InputError, naming the parameter, if an eta is 0 or not finite.
    """
    graph, before = module.graph, references(module.graph)
    done, replaced = [], []
    for node in list(graph.nodes):
        affine = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(affine, Affine):
            continue
        path = str(node.target)
        weight, bias = node.args[0], node.args[1] if len(node.args) > 1 else None
        assert isinstance(weight, fx.Node) and isinstance(weight.args[0], fx.Node)
        quant = module.get_submodule(str(weight.target))
        assert isinstance(quant, FakeQuant)
        if not bool(torch.isfinite(affine.eta).all() and (affine.eta != 0).all()):
            raise InputError(
                f"{path}.eta is 0 or not finite in a channel, which no scale can represent"
            )
        if quant.grid.full and bool((affine.eta < 0).any()):
            raise InputError(
                f"{path}.eta is negative in a channel, and its grid has no code {-quant.grid.low}"
            )
        shift = _take(module, quant, str(weight.args[0].target), bias, affine.eta, affine.eps)
        if isinstance(bias, fx.Node):
            _put(module, str(bias.target), shift)
        else:
            bias = _new_bias(module, node, path.rpartition(".")[0], shift)
        for item in list(node.users):
            item.replace_all_uses_with(weight if item.args[1] == 0 else bias)
            graph.erase_node(item)
        graph.erase_node(node)
        replaced.append(affine)
        count = affine.eta.numel()
        done.append(Merged(path, (path,), str(weight.target), 0.0, 0.0, 2 * count, 0, 0.0))
    if done:
        drop_unreferenced(module, before, replaced)
    return tuple(done)


def fold_norms(module: fx.GraphModule) -> tuple[Merged, ...]:
    """Folds each batch norm that stands behind a quantized layer, in place."""
    graph, before = module.graph, references(module.graph)
    done, replaced = [], []
    for node in list(graph.nodes):
        norm: Any = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        found = _quantized_before(module, node) if isinstance(norm, _BatchNorm) else None
        if found is None or norm.running_var is None:
            continue
        layer, weight, bias = found
        quant = module.get_submodule(str(weight.target))
        assert isinstance(quant, FakeQuant) and isinstance(weight.args[0], fx.Node)
        with torch.no_grad():
            eta = torch.rsqrt(norm.running_var + norm.eps)
            eta = eta if norm.weight is None else eta * norm.weight
            eps = -norm.running_mean * eta
            eps = eps if norm.bias is None else eps + norm.bias
        if quant.grid.full and bool((eta < 0).any()):  # the sign of the lowest code cannot turn
            continue
        given = str(weight.args[0].target)
        shift = _take(module, quant, given, bias, eta, eps)
        if bias is not None:
            _put(module, str(bias.target), shift)
        else:
            bias = _new_bias(module, layer.node, given.rpartition(".")[0], shift)
            named = {k: v for k, v in layer.node.kwargs.items() if k != "bias"}
            layer.node.args = (*layer.node.args[:2], bias, *layer.node.args[3:])
            layer.node.kwargs = named
        node.replace_all_uses_with(layer.node)
        graph.erase_node(node)
        replaced.append(norm)
        path, count = str(node.target), eta.numel()
        done.append(Merged(path, (path,), str(weight.target), 0.0, 0.0, 2 * count, 0, 0.0))
    if done:
        drop_unreferenced(module, before, replaced)
    return tuple(done)


def _quantized_before(
    module: fx.GraphModule, norm: fx.Node
) -> tuple[Layer, fx.Node, fx.Node | None] | None:
    """The layer before a batch norm, its quantized weight and its bias, if the norm folds into it.

    Nothing else may read what changes: the layer, its weight and its bias."""
    call = norm.args[0] if norm.args else None
    layer = layer_of(call) if isinstance(call, fx.Node) and len(call.users) == 1 else None
    weight = None if layer is None else layer.weight
    if layer is None or not isinstance(weight, fx.Node) or weight.op != "call_module":
        return None
    quant = module.get_submodule(str(weight.target))
    given, bias = weight.args[0], layer.bias
    # The channels of a linear layer are the norm's only where its output has two dimensions.
    last = layer.kind.name == "linear" and len(layer.node.meta.get("shape") or ()) != 2
    if not isinstance(quant, FakeQuant) or quant.grid.axis != 0 or last:
        return None
    reads = Counter(n.target for n in module.graph.nodes if n.op in ("get_attr", "call_module"))
    for held in (weight, given, bias):
        if isinstance(held, fx.Node) and (len(held.users) > 1 or reads[held.target] > 1):
            return None
    if not isinstance(given, fx.Node) or given.op != "get_attr":
        return None
    if bias is not None and (not isinstance(bias, fx.Node) or bias.op != "get_attr"):
        return None
    return layer, weight, bias


def _take(
    module: fx.GraphModule,
    quant: FakeQuant,
    given: str,
    bias: object,
    eta: torch.Tensor,
    eps: torch.Tensor,
) -> torch.Tensor:
    """Multiplies a quantized weight by eta per channel; returns the bias times eta plus eps.

    A channel whose eta is 0 keeps its step and has integer values of 0. The tensors are new ones,
    because the current ones may still be shared with the caller's model."""
    with torch.no_grad():
        codes = quant.codes(operator.attrgetter(given)(module))
        scale = torch.where(eta == 0, quant.scale, quant.scale * eta.abs())
        turned = codes * eta.sign().reshape(-1, *(1,) * (codes.dim() - 1))
        if isinstance(bias, fx.Node):
            eps = eps + eta * operator.attrgetter(str(bias.target))(module)
        _put(quant, "scale", scale)
        # c s / s rounds to c, so the integer weights stay.
        _put(module, given, turned * quant.grid.along(quant.step, codes))
    return eps


def _new_bias(module: fx.GraphModule, before: fx.Node, path: str, value: torch.Tensor) -> fx.Node:
    """Registers a bias in the module at `path`, and a node that reads it."""
    holder: nn.Module = module.get_submodule(path)
    name = "bias" if getattr(holder, "bias", None) is None else "affine_bias"
    holder.register_parameter(name, nn.Parameter(value.detach()))
    with module.graph.inserting_before(before):
        return module.graph.get_attr(f"{path}.{name}".lstrip("."))


def _put(module: nn.Module, path: str, value: torch.Tensor) -> None:
    """Replaces a parameter or buffer."""
    holder_path, _, name = path.rpartition(".")
    holder = module.get_submodule(holder_path)
    if name in holder._parameters:
        holder._parameters[name] = nn.Parameter(value.detach())
    else:
        holder._buffers[name] = value.detach()
