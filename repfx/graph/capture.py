"""capture: a module, a GraphModule or an exported program -> a private model whose traceable parts are GraphModules.

The result has the names, the tensors' values and the modes of the model it was made from, and shares its storage until
`own_tensors` gives it its own. It is checked against the model on an input before anything is rewritten:

    module M --trace--> graph G;   G(example) == M(example), or M stays as written and its children are tried alone.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from repfx.errors import Declined, InputError
from repfx.graph.modes import TrainOnly
from repfx.graph.normalise import normalise
from repfx.graph.tracer import BRANCHES, Tracer, is_leaf, signature


@dataclass
class Captured:
    """`model`: a GraphModule, or the model's own class with GraphModules inside where its forward cannot be traced."""

    model: nn.Module
    declined: list[Declined] = field(default_factory=list)
    examples: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # inputs that each graph was checked on


def capture(model: Any, example: tuple[Any, ...] | None = None) -> Captured:
    """Traces a private copy of the model, in eval meaning, keeping each module's own mode flag.

    `example` is the tuple of positional arguments of a forward; without one an image or a feature batch is guessed from
    the first layer. Raises InputError where the model holds NaN or infinity, or does not accept the given example.
    """
    if isinstance(model, torch.export.ExportedProgram):
        model = from_exported(model)
    if not isinstance(model, nn.Module):
        raise InputError(f"a model is an nn.Module, a GraphModule or an ExportedProgram, not a {type(model)}")
    _refuse_non_finite(model)
    skeleton = _alias(model)
    given = example is not None
    if example is None:
        example = _guess_example(skeleton)
    expected = None
    if example is not None:
        try:
            expected = run_eval(skeleton, example)
        except Exception as error:
            if given:
                raise InputError(f"the model does not accept the example {_describe(example)}: {error}") from error
            example = None
    captured = Captured(skeleton)
    captured.model = _capture(skeleton, "", example, expected, captured)
    return captured


def graphs(model: nn.Module) -> Iterator[tuple[str, fx.GraphModule]]:
    """The GraphModules of a captured model with their paths: the model itself, or those inside what stays opaque."""
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            yield path, module


def own_tensors(model: nn.Module, original: nn.Module) -> None:
    """Gives every tensor that `model` still shares with `original` storage of its own, ties kept."""
    shared = {t.untyped_storage().data_ptr() for t in _tensors(original)}
    done = set()
    for tensor in _tensors(model):
        if id(tensor) not in done and tensor.untyped_storage().data_ptr() in shared:
            tensor.data = tensor.data.clone()
            done.add(id(tensor))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for store in (module._parameters, module._buffers, module.__dict__):
            yield from (t for t in store.values() if isinstance(t, Tensor) and not t.is_meta)


def _capture(
    module: nn.Module, path: str, example: tuple[Any, ...] | None, expected: Any, captured: Captured
) -> nn.Module:
    if isinstance(module, fx.GraphModule):
        normalise(module.graph)
        module.recompile()
        if example is not None:
            run_eval(_Ranks(module), example)
            captured.examples[path] = example
        return module
    reason = None
    try:
        names = _names_of(module, example)
        tracer = Tracer(names)
        graph = tracer.trace(module)
        if tracer.branches and signature(graph) != signature(Tracer(names, training=True).trace(module)):
            raise TraceError(BRANCHES)
        normalise(graph)
        result = _graph_module(module, graph, tracer)
        if tracer.opaque:
            _inside_opaque(result, path, tracer.opaque, example, captured)
        if example is None:
            return result
        if _agree(run_eval(_Ranks(result), example), expected):
            captured.examples[path] = example
            return result
        reason = "the traced graph does not compute what its forward computes"
    except Exception as error:
        reason = f"its forward cannot be traced: {str(error).strip().splitlines()[0][:200] if str(error) else error!r}"
    captured.declined.append(Declined(path or "the model", reason, "its children are transformed on their own"))
    _children(module, path, example, captured)
    if example is not None and not _agree(run_eval(module, example), expected):
        raise InputError(f"{path or 'the model'} reaches into its children: it changed when they were traced")
    return module


class _Ranks(nn.Module):
    """Runs a GraphModule and notes the number of dimensions of each value on its node."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module

    def forward(self, *args: Any) -> Any:
        class Interpreter(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if isinstance(result, Tensor):
                    n.meta["rank"] = result.dim()
                return result

        return Interpreter(self.graph_module).run(*args)


def _inside_opaque(
    result: fx.GraphModule, path: str, opaque: dict[str, Declined], inputs: Any, captured: Captured
) -> None:
    """Captures the children of each leaf that could not be traced, on the inputs they see in a run of the whole."""
    seen = _record(result, [result.get_submodule(name) for name in opaque], inputs)
    for name, why in opaque.items():
        leaf = result.get_submodule(name)
        full = f"{path}.{name}".lstrip(".")
        captured.declined.append(Declined(full, why.reason, "its children are transformed on their own"))
        _children(leaf, full, seen.get(id(leaf)), captured)


def _children(module: nn.Module, path: str, example: tuple[Any, ...] | None, captured: Captured) -> None:
    """Replaces each child that can be traced by its graph; lists and other containers are entered."""
    parts = list(_parts(module))
    seen = _record(module, [child for _, _, child in parts], example)
    done: dict[int, nn.Module] = {}
    for holder, name, child in parts:
        if id(child) not in done:
            child_example = seen.get(id(child))
            plain = all(p.default is not p.empty or p.kind is not p.KEYWORD_ONLY for p in _parameters(child))
            if not plain or (child_example is None and example is not None):
                done[id(child)] = child  # never called by the forward, or called in a way a graph cannot take
            else:
                expected = None if child_example is None else run_eval(child, child_example)
                full = ".".join(p for p in (path, _path_in(module, child)) if p)
                done[id(child)] = _capture(child, full, child_example, expected, captured)
        holder._modules[name] = done[id(child)]


def _parts(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for name, child in module._modules.items():
        if child is None or is_leaf(child):
            continue
        if type(child).forward is nn.Module.forward or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _parts(child)
        else:
            yield module, name, child


def _path_in(module: nn.Module, child: nn.Module) -> str:
    return next((name for name, m in module.named_modules() if m is child), "")


def _record(module: nn.Module, children: list[nn.Module], example: tuple[Any, ...] | None) -> dict[int, tuple[Any, ...]]:
    """The positional arguments each child is first called with; children called with keywords are left out."""
    seen: dict[int, tuple[Any, ...]] = {}
    if example is None:
        return seen
    keyworded = set()

    def note(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs:
            keyworded.add(id(child))
        seen.setdefault(id(child), args)

    hooks = [child.register_forward_pre_hook(note, with_kwargs=True) for child in children]
    try:
        run_eval(module, example)
    finally:
        for hook in hooks:
            hook.remove()
    return {key: args for key, args in seen.items() if key not in keyworded}


def _graph_module(root: nn.Module, graph: fx.Graph, tracer: Tracer) -> fx.GraphModule:
    """A GraphModule over the whole module tree of `root`, so that every key of its state_dict survives."""
    for path in tracer.plain_norms:
        module = root.get_submodule(path)
        base = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn."))
        plain = base.__new__(base)
        plain.__dict__.update(module.__dict__)
        _replace(root, path, plain)
    for path in tracer.train_only:
        _replace(root, path, TrainOnly(root.get_submodule(path)).train(root.get_submodule(path).training))
    result = fx.GraphModule(nn.Module(), fx.Graph(), type(root).__name__)
    called = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    plain_tree = _plain(root, "", called, {})
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        result.__dict__[name] = plain_tree.__dict__[name]
    for name, value in root.__dict__.items():
        if isinstance(value, Tensor):  # a constant that the tracer stowed away, or a tensor kept as a plain attribute
            result.__dict__[name] = value
    result.training = root.training
    result.graph = graph
    return result


def _plain(module: nn.Module, path: str, called: set[str], memo: dict[int, nn.Module]) -> nn.Module:
    """The module tree with what the graph does not call reduced to plain holders of names."""
    if id(module) in memo:
        return memo[id(module)]
    if path in called or is_leaf(module):
        memo[id(module)] = module
        return module
    holder = nn.Module()
    memo[id(module)] = holder
    holder._parameters, holder._buffers = module._parameters, module._buffers
    holder._non_persistent_buffers_set = module._non_persistent_buffers_set
    holder.training = module.training
    for name, value in module.__dict__.items():
        if isinstance(value, Tensor):
            holder.__dict__[name] = value
    for name, child in module._modules.items():
        holder._modules[name] = None if child is None else _plain(child, f"{path}.{name}".lstrip("."), called, memo)
    return holder


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = module


def _alias(model: nn.Module) -> nn.Module:
    """A structural copy that shares storage with the model but no Python object, so tracing cannot change the model.

    What copy.deepcopy does, without visiting the dozen empty hook tables and the plain values of every module.
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors(model):
        if id(tensor) not in memo:
            alias = tensor.detach()
            memo[id(tensor)] = nn.Parameter(alias, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else alias
    plain: list[tuple[nn.Module, nn.Module]] = []
    for module in model.modules():
        if not isinstance(module, fx.GraphModule) and not hasattr(module, "__deepcopy__"):
            memo[id(module)] = type(module).__new__(type(module))
            plain.append((module, memo[id(module)]))
    try:
        for module, twin in plain:
            twin.__dict__.update({k: _alias_value(v, memo) for k, v in module.__dict__.items()})
        return memo[id(model)] if id(model) in memo else copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(f"the model cannot be copied: {error}") from error


def _alias_value(value: Any, memo: dict[int, Any]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if type(value) in (dict, OrderedDict):
        if not value:
            return type(value)()
        return type(value)((k, _alias_value(v, memo)) for k, v in value.items())
    return copy.deepcopy(value, memo)


def _refuse_non_finite(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor.sum()):
            if not torch.isfinite(tensor).all():
                raise InputError(f"{name} holds NaN or infinity")


def from_exported(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a module with its original names, free of the guards that export adds."""
    module = program.module()
    for node in list(module.graph.nodes):
        if node.op == "call_module" and not node.users and str(node.target).startswith("_guards"):
            module.graph.erase_node(node)
            delattr(module, str(node.target))
    result = fx.GraphModule(module, module.graph)
    for name in ("_parameters", "_buffers", "_modules"):
        result.__dict__[name] = module.__dict__[name]
    return result


def _guess_example(model: nn.Module) -> tuple[Any, ...] | None:
    """A random image or feature batch that the model accepts, or None."""
    required = [p for p in _parameters(model) if p.default is p.empty]
    if len(required) != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            continue
        if isinstance(module, nn.Linear):
            shapes = [(2, module.in_features)]
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            axes = weight.dim() - 2
            shapes = [(2, module.in_channels, *(size,) * axes) for size in ((64, 224) if axes == 2 else (32,))]
        else:
            continue
        for shape in shapes:
            x = torch.randn(shape, generator=generator).to(weight)
            try:
                run_eval(model, (x,))
                return (x,)
            except Exception:  # the guess was wrong: the next one, or none
                continue
        return None
    return None


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    try:
        found = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return []
    return [p for p in found if p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL]


def _names_of(module: nn.Module, example: tuple[Any, ...] | None) -> frozenset[str]:
    if example is None:
        return frozenset()
    return frozenset(p.name for p, _ in zip(_parameters(module), example, strict=False))


def run_eval(model: nn.Module, example: tuple[Any, ...]) -> Any:
    """The eval output, each module's own mode restored after, the random state untouched."""
    kept = [(m, m.training) for m in model.modules()]
    for m, _ in kept:
        m.__dict__["training"] = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return model(*example)
    finally:
        for m, training in kept:
            m.__dict__["training"] = training


def _agree(a: Any, b: Any) -> bool:
    """Equality of outputs up to the last bits: the same operators ran on the same numbers."""
    flat_a, spec_a = torch.utils._pytree.tree_flatten(a)
    flat_b, spec_b = torch.utils._pytree.tree_flatten(b)
    if len(flat_a) != len(flat_b):
        return False
    for x, y in zip(flat_a, flat_b, strict=True):
        if isinstance(x, Tensor) != isinstance(y, Tensor):
            return False
        if isinstance(x, Tensor):
            if x.shape != y.shape or not torch.allclose(x.double(), y.double(), rtol=1e-4, atol=1e-6, equal_nan=True):
                return False
        elif x != y:
            return False
    return True


def _describe(example: tuple[Any, ...]) -> str:
    return ", ".join(str(tuple(e.shape)) if isinstance(e, Tensor) else repr(e) for e in example)
