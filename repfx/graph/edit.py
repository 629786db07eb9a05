"""Edits of a graph: put a module or graph in place of a region, find free paths, drop dead modules.

Existing modules are never changed, because another call may share them. What stays keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.algebra import Geometry, Kernel, dense, swapped
from repfx.graph.effects import is_dead
from repfx.graph.spatial import same_padding

CONV_LAYERS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, type[nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


def layer_from(kernel: Kernel, like: Tensor) -> nn.Module:
    """A convolution or linear layer that computes `kernel`, except for padding it cannot express.

    It has the dtype and device of `like`, and is trainable if `like` is.
    """
    kernel = kernel.plain
    g, weight = kernel.geometry, kernel.weight
    if g.source_axis == -1:
        layer: nn.Module = nn.Linear(g.inputs, g.outputs, False, device="meta")
        weight = dense(kernel).flatten(1)
    elif g.transposed:
        layer = _TRANSPOSED[len(g.axes)](
            g.inputs,
            g.outputs,
            tuple(len(a.places) for a in g.axes),
            tuple(a.stride for a in g.axes),
            tuple(a.before for a in g.axes),
            tuple(a.before - a.after for a in g.axes),
            groups=g.groups,
            dilation=tuple(a.gap for a in g.axes),
            bias=False,
            device="meta",
        )
        weight = swapped(weight, g.groups)
    else:
        layer = CONV_LAYERS[len(g.axes)](
            g.inputs,
            g.outputs,
            tuple(len(a.places) for a in g.axes),
            tuple(a.stride for a in g.axes),
            padding_of(g) or (0,) * len(g.axes),
            groups=g.groups,
            dilation=tuple(a.gap for a in g.axes),
            bias=False,
            padding_mode=g.mode if g.pads and not uneven(g) else "zeros",
            device="meta",
        )
    for name, tensor in (("weight", weight), ("bias", kernel.bias)):
        if tensor is not None:
            value = tensor.detach().to(like, copy=True).contiguous()
            layer._parameters[name] = nn.Parameter(value, like.requires_grad)
    return layer


def padding_of(g: Geometry) -> tuple[int, ...] | str | None:
    """The padding argument of a convolution layer; None where no argument says it.

    "same" puts the odd one of an even kernel's zeros after the image."""
    if all(a.before == a.after >= 0 for a in g.axes):
        return tuple(a.before for a in g.axes)
    same = all(a.stride == 1 and (a.before, a.after) == same_padding(a.taps) for a in g.axes)
    return "same" if same and g.mode == "zeros" else None


def uneven(g: Geometry) -> bool:
    """Whether a pad must come before the layer, because the sides differ or one is cropped."""
    return not g.transposed and padding_of(g) is None


def replace_region(
    graph: fx.Graph,
    source: fx.Node,
    sink: fx.Node,
    removed: Iterable[fx.Node],
    g: Geometry,
    target: str,
) -> fx.Node:
    """Replaces the removed nodes by a call of module `target` on the source.

    The last of them is the sink. Returns the node that replaces it."""
    with graph.inserting_before(sink):
        x = source
        if g.source_axis != -1 and uneven(g):
            for step in g.pad_steps:
                x = graph.call_function(F.pad, (x, *step))
        merged = graph.call_module(target, (x,))
        if g.turned:
            shape = sink.meta.get("shape")
            seen = (
                {}
                if shape is None
                else {"shape": tuple(shape[i] for i in _inverse(g.turn)), "rank": len(shape)}
            )
            merged.meta = {**sink.meta, **seen}
            merged = graph.call_function(torch.permute, (merged, list(g.turn)))
            asked = any(n.target == "contiguous" for n in removed)
            if sink.meta.get("contiguous", asked):  # which a view may need
                merged.meta = {**sink.meta, "contiguous": False}
                merged = graph.call_method("contiguous", (merged,))
    merged.meta = dict(sink.meta)
    sink.replace_all_uses_with(merged)
    for node in sorted(removed, reverse=True):
        graph.erase_node(node)
    return merged


def _inverse(order: tuple[int, ...]) -> list[int]:
    return [order.index(i) for i in range(len(order))]


def inline(
    graph: fx.Graph,
    source: fx.Node,
    sink: fx.Node,
    removed: Iterable[fx.Node],
    inner: fx.Graph,
    path: str,
) -> fx.Node:
    """Replaces the removed nodes by a copy of `inner`, applied to the source.

    `inner` is the graph of a module with one input, and that module is at `path` now. The last of
    the removed nodes is the sink. Returns the node that replaces it."""
    made: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(sink):
        for node in inner.nodes:
            if node.op == "placeholder":
                made[node] = source
            elif node.op == "output":
                result = made[node.args[0]]
                sink.replace_all_uses_with(result)
            else:
                made[node] = graph.node_copy(node, made.__getitem__)
                if node.op in ("call_module", "get_attr"):
                    made[node].target = f"{path}.{node.target}"
                stack = node.meta.get("nn_module_stack", {})
                made[node].meta["nn_module_stack"] = {
                    k: (f"{path}.{p}".rstrip("."), c) for k, (p, c) in stack.items()
                }
    for node in sorted(removed, reverse=True):
        graph.erase_node(node)
    return result


def put_module(root: nn.Module, path: str, module: nn.Module) -> nn.Module | None:
    """Puts a module at a dotted path and returns the module that was there before, or None.

    Parents that are missing are made as plain holders."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    old = root._modules.get(name)
    root._modules[name] = module
    return old


def free_path(root: nn.Module, wanted: str) -> str:
    """The first path of wanted, wanted_1, wanted_2, ... that is not taken."""
    path, n = wanted, 0
    while _exists(root, path):
        n += 1
        path = f"{wanted}_{n}"
    return path


def references(graph: fx.Graph) -> set[str]:
    """Every path that the graph reads."""
    return {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}


def take_out(module: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
    """Removes calls of layers with one input. What read them reads that input."""
    paths = set()
    for node in nodes:
        (value,) = node.all_input_nodes
        node.replace_all_uses_with(value)
        module.graph.erase_node(node)
        paths.add(str(node.target))
    for path in paths - references(module.graph):
        parent, _, name = path.rpartition(".")
        del module.get_submodule(parent)._modules[name]
    module.recompile()


def drop_unreferenced(
    module: fx.GraphModule, before: set[str], replaced: Iterable[nn.Module]
) -> None:
    """Removes dead constants, then the modules and tensors that the graph does not read any more.

    `before`: the paths that the graph read before the rewrite."""
    graph = module.graph
    for node in reversed(graph.nodes):
        if is_dead(node):
            graph.erase_node(node)
    now = references(graph)
    # A path stays if something below it is still read, or if a new layer above it owns it now.
    above = {path[:i] for path in now for i, c in enumerate(path) if c == "."}
    # The objects are kept here, so that no new object gets the id of one of them.
    gone: dict[int, Any] = {id(m): m for m in replaced}
    for path in sorted(before - now, key=lambda p: -p.count(".")):  # the inner ones first
        if any(path[:i] in now for i, c in enumerate(path) if c == "."):
            continue
        parent, _, name = path.rpartition(".")
        holder = module.get_submodule(parent)
        # A batch norm that contains its activation: its own tensors go, the rest stays.
        if path in above:
            rest = nn.Module()
            old: Any = holder._modules[name]
            rest._modules, rest.training = dict(old._modules), old.training
            rest._parameters = {k: p for k, p in old._parameters.items() if f"{path}.{k}" in now}
            rest._buffers = {k: b for k, b in old._buffers.items() if f"{path}.{k}" in now}
            holder._modules[name] = rest
            continue
        for store in (holder._modules, holder._parameters, holder._buffers, holder.__dict__):
            found: Any = store.get(name)
            if isinstance(found, (nn.Module, Tensor)):
                gone[id(found)] = found
                del store[name]
        if parent and parent not in now and parent not in above and not _holds_anything(holder):
            gone[id(holder)] = holder  # a layer without its weights is useless
    live = {id(module.get_submodule(path)) for path in now if _is_module(module, path)}
    for holder in list(module.modules()):
        for name in [
            n
            for n, m in holder._modules.items()
            if m is not None and id(m) in gone and id(m) not in live
        ]:
            del holder._modules[name]
    _prune(module, live)


def _holds_anything(module: nn.Module) -> bool:
    tensors = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    return bool(module._modules) or any(isinstance(t, Tensor) for t in tensors)


def _prune(module: nn.Module, live: set[int]) -> None:
    """Removes plain holders that are empty now."""
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        _prune(child, live) if type(child) is nn.Module else None
        empty = type(child) is nn.Module and not _holds_anything(child)
        if empty and id(child) not in live:
            del module._modules[name]


def _exists(root: nn.Module, path: str) -> bool:
    *parents, name = path.split(".")
    for parent in parents:
        child = root._modules.get(parent)
        if child is None:
            return False
        root = child
    return hasattr(root, name)


def _is_module(root: nn.Module, path: str) -> bool:
    *parents, name = path.split(".")
    for parent in parents:
        root = root._modules[parent]  # type: ignore[assignment]
    return isinstance(root._modules.get(name), nn.Module)
