"""Builds a GraphModule from a traced graph and its module, and keeps every name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from repfx.capture.owned import DEPLOYED, INPUTS, as_object_of
from repfx.capture.tracer import MODE, Tracer, is_leaf
from repfx.graph.holders import holder_of
from repfx.graph.modes import Mode, TrainOnly


def graph_module(root: nn.Module, graph: fx.Graph, tracer: Tracer) -> fx.GraphModule:
    """A GraphModule over the whole module tree of `root`. It keeps every key of the state_dict."""
    made: dict[int, nn.Module] = {}
    for path in tracer.plain_norms:
        module = root.get_submodule(path)
        base: Any = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn."))
        made[id(module)] = base.__new__(base)
        made[id(module)].__dict__.update(module.__dict__, _modules=dict(module._modules))
    for path in tracer.train_only:
        module = root.get_submodule(path)
        made[id(module)] = TrainOnly(module)
        made[id(module)].training = module.training
    result = fx.GraphModule(nn.Module(), fx.Graph(), "GraphModule")
    called = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    plain_tree = _plain(root, "", called, made)
    for path, part in tracer.parts.items():
        holder = plain_tree.get_submodule(path.rpartition(".")[0])
        holder.add_module(path.rpartition(".")[2], part.train(holder.training))
    for path in tracer.modes:
        holder = plain_tree.get_submodule(path.rpartition(".")[0])
        holder.add_module(MODE, Mode().train(holder.training))
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        result.__dict__[name] = plain_tree.__dict__[name]
    for name, value in root.__dict__.items():
        # A constant that the tracer stored, or a tensor that was a plain attribute.
        if isinstance(value, Tensor):
            result.__dict__[name] = value
    result.training = root.training
    result.__dict__[INPUTS], result.__dict__[DEPLOYED] = tracer.inputs, sorted(tracer.deployed)
    as_object_of(result, root).graph = graph
    return result


def _plain(module: nn.Module, path: str, called: set[str], memo: dict[int, nn.Module]) -> nn.Module:
    """The module tree, with modules that the graph does not call replaced by plain holders."""
    if id(module) in memo:
        return memo[id(module)]
    # A layer that is not called; only its tensors may be read.
    read_only = type(module).__module__.startswith("torch.nn.modules.") and not module._modules
    if path in called or (is_leaf(module) and not read_only):
        memo[id(module)] = module
        return module
    holder = holder_of(module)
    memo[id(module)] = holder
    holder._parameters, holder._buffers = module._parameters, module._buffers
    holder._non_persistent_buffers_set = module._non_persistent_buffers_set
    holder.training = module.training
    for name, value in module.__dict__.items():
        if isinstance(value, Tensor):
            holder.__dict__[name] = value
    for name, child in module._modules.items():
        holder._modules[name] = (
            None if child is None else _plain(child, f"{path}.{name}".lstrip("."), called, memo)
        )
    return holder
