"""fold_affine: folds an Affine into the scale, integer weights and bias of its layer."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from repfx.errors import InputError
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
        given = str(weight.args[0].target)
        with torch.no_grad():
            codes = quant.codes(operator.attrgetter(given)(module))
            scale = quant.step * affine.eta.abs()
            turned = codes * affine.eta.sign().reshape(-1, *(1,) * (codes.dim() - 1))
            old = (
                operator.attrgetter(str(bias.target))(module) if isinstance(bias, fx.Node) else None
            )
            _, shift = affine(codes, old)
        # New tensors, because the current ones may still be shared with the caller's model.
        _put(quant, "scale", scale)
        # c s / s rounds to c, so the integer weights stay.
        _put(module, given, turned * quant.grid.along(scale, codes))
        if isinstance(bias, fx.Node):
            _put(module, str(bias.target), shift)
        else:
            holder: nn.Module = module.get_submodule(path.rpartition(".")[0])
            name = "bias" if getattr(holder, "bias", None) is None else "affine_bias"
            holder.register_parameter(name, nn.Parameter(shift))
            with graph.inserting_before(node):
                bias = graph.get_attr(f"{path.rpartition('.')[0]}.{name}".lstrip("."))
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


def _put(module: nn.Module, path: str, value: torch.Tensor) -> None:
    """Replaces a parameter or buffer."""
    holder_path, _, name = path.rpartition(".")
    holder = module.get_submodule(holder_path)
    if name in holder._parameters:
        holder._parameters[name] = nn.Parameter(value.detach())
    else:
        holder._buffers[name] = value.detach()
