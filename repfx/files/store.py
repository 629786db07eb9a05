"""save and load without pickle: a safetensors file with modules and graphs as JSON in its header.

Loading creates only the layers and functions that `repfx.files.allowed` lists. Everything else in a
file is data, so a file cannot run code."""

from __future__ import annotations

import json
import keyword
import math
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from repfx.algebra import Axis, Geometry, Links
from repfx.errors import InputError
from repfx.files.allowed import (
    READABLE,
    class_name,
    class_named,
    function_name,
    function_named,
    is_known,
    methods,
)
from repfx.graph.holders import is_holder
from repfx.graph.inputs import IMAGES, KEY, note_preprocessing, noted_preprocessing
from repfx.graph.modes import TrainOnly
from repfx.quant import FakeQuant, Grid

_VALUES: dict[str, Any] = {"grid": Grid, "geometry": Geometry, "axis": Axis, "links": Links}

FORMAT = "1"
# What reading a tree of strange JSON may raise.
_UNREADABLE = (
    *(KeyError, IndexError, TypeError, ValueError, AttributeError),
    *(RuntimeError, AssertionError),
)
_INTERNAL = set(nn.Module().__dict__) | {"on", "observer"}
_PATH = re.compile(r"[^\"'\\\x00-\x1f]+")


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the graphs, layers, tensors and modes of a model to `path`, completely or not at all.

    A module of your own class that works in training only, such as stochastic depth, is saved as an
    identity, which it is in eval mode. Raises InputError if the model has any other module of your
    own class, or if the path cannot be written."""
    tensors, text = _encoded(model)
    write_whole(path, lambda part: save_file(tensors, part, metadata={"repfx": text}))


def check_savable(model: nn.Module) -> None:
    """Raises InputError where `save` would refuse the model; writes nothing."""
    _encoded(model)


def _encoded(model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """The tensors of a model, and everything else as JSON."""
    tensors: dict[str, Tensor] = {}
    tree = _encode_module(model, "", tensors, {}, {})
    meta = getattr(model, "meta", None)
    noted = {k: meta.get(k) for k in (KEY, IMAGES)} if isinstance(meta, dict) else {}
    text = json.dumps({"format": FORMAT, "model": tree, **noted})
    try:  # check that the file can be read again before it is written
        _decode_module(json.loads(text)["model"], tensors, {})
    except _UNREADABLE as error:
        raise InputError(f"cannot save: {error}") from error
    return tensors, text


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Loads a model that `save` wrote. Raises InputError for a missing, damaged or other file."""
    if not Path(path).is_file():
        raise InputError(f"no such file: {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("repfx")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is not a model saved by repfx, or it is damaged: {error}"
        ) from error
    if text is None:
        raise InputError(f"{path} has tensors but no model: it was not written by repfx.save")
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise InputError(f"{path} has format {data['format']!r}; this version reads {FORMAT!r}")
        model = _decode_module(data["model"], tensors, {})
        _note_again(model, data.get(KEY))
        meta = getattr(model, "meta", None)
        if isinstance(meta, dict) and data.get(IMAGES):
            meta[IMAGES] = data[IMAGES]
            note_preprocessing(model, noted_preprocessing(model))  # raises for a strange record
        return model
    except (*_UNREADABLE, InputError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _note_again(model: nn.Module, inputs: Any) -> None:
    """Puts the sizes of the inputs back. Raises ValueError where they are not such sizes."""
    if not inputs:
        return
    for kind, size in inputs:
        if not isinstance(getattr(torch, kind, None), torch.dtype):
            raise ValueError(f"{kind!r} is not a type of tensors")
        if not all(isinstance(n, int) and n >= 0 for n in size):
            raise ValueError(f"{size!r} is not a size")
    meta = getattr(model, "meta", None)
    if isinstance(meta, dict):
        meta[KEY] = inputs


def write_whole(path: str | os.PathLike[str], write: Callable[[str], Any]) -> None:
    """Calls `write` with a temporary path and moves the result to `path`.

    So a half-written file is never left. Raises InputError if `path` cannot be written."""
    goal = Path(path)
    try:
        handle, part = tempfile.mkstemp(dir=goal.parent, prefix=f".{goal.name}.")
        os.close(handle)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        write(part)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)
        os.replace(part, goal)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {error}") from error
    finally:
        Path(part).unlink(missing_ok=True)


def _encode_module(
    module: nn.Module,
    path: str,
    tensors: dict[str, Tensor],
    keys: dict[int, str],
    seen: dict[int, str],
    unused: frozenset[int] = frozenset(),
) -> dict[str, Any]:
    if id(module) in seen:
        return {"same": seen[id(module)]}
    seen[id(module)] = path
    _refuse_hooks(module, path)
    idle = id(module) in unused and not is_known(module)
    if idle or (isinstance(module, TrainOnly) and not module.training):
        return {"class": "torch.nn.Identity", "training": module.training}
    out: dict[str, Any] = {
        "class": class_name(module, path),
        "training": module.training,
        "path": path,
    }
    names: dict[str, dict[str, Any]] = {"params": module._parameters, "buffers": module._buffers}
    for kind, store in names.items():
        out[kind] = {
            k: _encode_tensor(v, f"{path}.{k}".lstrip("."), tensors, keys) for k, v in store.items()
        }
    out["transient"] = sorted(module._non_persistent_buffers_set)
    if isinstance(module, fx.GraphModule):
        out["graph"] = _encode_graph(module.graph)
        out["name"] = type(module).__name__
        unused = _unused(module)
    elif not is_holder(module):
        attributes = {
            k: v for k, v in module.__dict__.items() if k not in _INTERNAL and k != "meta"
        }
        out["attributes"] = {
            k: _encode(v, f"{path}.{k}") for k, v in attributes.items() if not isinstance(v, Tensor)
        }
    plain = {k: v for k, v in module.__dict__.items() if isinstance(v, Tensor)}
    out["plain"] = {
        k: _encode_tensor(v, f"{path}.{k}".lstrip("."), tensors, keys) for k, v in plain.items()
    }
    out["children"] = {
        k: None
        if m is None
        else _encode_module(m, f"{path}.{k}".lstrip("."), tensors, keys, seen, unused)
        for k, m in module._modules.items()
    }
    return out


def _refuse_hooks(module: nn.Module, path: str) -> None:
    if module._forward_hooks or module._forward_pre_hooks:
        raise InputError(
            f"cannot save {path or 'the model'}: it has forward hooks, which are code of your own. "
            "Remove them first; for spectral_norm that is torch.nn.utils.remove_spectral_norm or "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )


def _unused(graph: fx.GraphModule) -> frozenset[int]:
    """The ids of modules that hold no tensor and that the graph does not reach.

    Such as the layer of someone else's class whose operators were traced."""
    reached = [str(n.target) for n in graph.graph.nodes if n.op in ("call_module", "get_attr")]
    return frozenset(
        id(m)
        for name, m in graph.named_modules(remove_duplicate=False)
        if not any(True for _ in (*m.parameters(), *m.buffers()))
        and not any(f"{path}.".startswith(f"{name}.") for path in reached)
    )


def _decode_module(
    data: dict[str, Any], tensors: dict[str, Tensor], seen: dict[str, nn.Module]
) -> nn.Module:
    if "same" in data:
        return seen[data["same"]]
    cls = class_named(data["class"])
    module = (
        cls.__new__(cls)
        if cls is not fx.GraphModule
        else fx.GraphModule(nn.Module(), fx.Graph(), _safe_name(data))
    )
    if cls is not fx.GraphModule:
        nn.Module.__init__(module)
    if "path" in data:
        seen[data["path"]] = module
    module.training = bool(data["training"])
    for key, value in data.get("attributes", {}).items():
        if key in _INTERNAL or hasattr(nn.Module, key):
            raise ValueError(f"attribute {key!r} cannot be set")
        module.__dict__[key] = _decode(value, {})
    for name, entry in data.get("params", {}).items():
        module._parameters[name] = None if entry is None else _decode_tensor(entry, tensors)  # type: ignore[assignment]
    for name, entry in data.get("buffers", {}).items():
        module._buffers[name] = None if entry is None else _decode_tensor(entry, tensors)
    for name, entry in data.get("plain", {}).items():
        module.__dict__[name] = _decode_tensor(entry, tensors)
    module._non_persistent_buffers_set = set(data.get("transient", []))
    if isinstance(module, FakeQuant):
        module.renew()
    for name, child in data.get("children", {}).items():
        module._modules[name] = None if child is None else _decode_module(child, tensors, seen)
    if isinstance(module, fx.GraphModule):
        module.graph = _decode_graph(data["graph"])
        module.graph.lint()
    return module


def _encode_tensor(
    t: Tensor | None, name: str, tensors: dict[str, Tensor], keys: dict[int, str]
) -> Any:
    if t is None:
        return None
    if id(t) not in keys:
        keys[id(t)] = name
        tensors[name] = t.detach().contiguous().clone()
    return [keys[id(t)], isinstance(t, nn.Parameter), t.requires_grad]


def _decode_tensor(entry: Any, tensors: dict[str, Tensor]) -> Tensor:
    key, parameter, requires_grad = entry
    if parameter and not isinstance(tensors[key], nn.Parameter):
        tensors[key] = nn.Parameter(tensors[key], bool(requires_grad))
    return tensors[key]


def _encode_graph(graph: fx.Graph) -> list[Any]:
    nodes = []
    for node in graph.nodes:
        target = function_name(node.target) if node.op == "call_function" else node.target
        rank = node.meta.get("rank")
        nodes.append(
            [
                node.name,
                node.op,
                target,
                _encode(node.args, node.name),
                _encode(node.kwargs, node.name),
                rank,
            ]
        )
    return nodes


def _decode_graph(nodes: list[Any]) -> fx.Graph:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for name, op, target, args, kwargs, rank in nodes:
        if op == "call_function":
            target = function_named(target)
        elif op == "call_method" and target not in methods():
            raise ValueError(f"method {target!r} is not allowed")
        elif op in ("placeholder", "output") and not _is_name(target):
            raise ValueError(f"{target!r} is not an identifier")
        elif op in ("call_module", "get_attr") and not _PATH.fullmatch(target):
            raise ValueError(f"{target!r} is not a path")
        decoded_args, decoded_kwargs = _decode(args, made), _decode(kwargs, made)
        if not all(_is_name(key) for key in decoded_kwargs):
            raise ValueError("an argument's name is not an identifier")
        if target is getattr and decoded_args[1] not in READABLE:
            raise ValueError(f"attribute {decoded_args[1]!r} is not allowed")
        made[name] = graph.create_node(op, target, decoded_args, decoded_kwargs, name=name)
        if isinstance(rank, int):
            made[name].meta["rank"] = rank
    return graph


def _encode(v: Any, where: str) -> Any:
    """Plain data as JSON. Types that JSON lacks become objects with one key."""
    if v is None or isinstance(v, (bool, int, str)) or (isinstance(v, float) and math.isfinite(v)):
        return v
    if isinstance(v, float):
        return {"float": str(v)}
    if isinstance(v, fx.Node):
        return {"node": v.name}
    if isinstance(v, (list, tuple, set, torch.Size)):
        kind = "list" if isinstance(v, list) else "set" if isinstance(v, set) else "tuple"
        return {kind: [_encode(e, where) for e in v]}
    if isinstance(v, dict):
        return {"dict": [[_encode(k, where), _encode(e, where)] for k, e in v.items()]}
    if isinstance(v, slice):
        return {"slice": [_encode(e, where) for e in (v.start, v.stop, v.step)]}
    for name, kind in _VALUES.items():
        if isinstance(v, kind):
            return {name: [_encode(getattr(v, f.name), where) for f in fields(kind)]}
    if isinstance(v, (torch.dtype, torch.memory_format, torch.layout)):
        return {"torch": str(v).removeprefix("torch.")}
    if isinstance(v, torch.device):
        return {"device": str(v)}
    if v is Ellipsis:
        return {"ellipsis": 0}
    if callable(v):
        return {"function": function_name(v)}
    raise InputError(f"cannot save {where}: a value of {type(v)} cannot be saved without pickle")


def _decode(v: Any, nodes: dict[str, fx.Node]) -> Any:
    if not isinstance(v, dict):
        return v
    ((kind, data),) = v.items()
    if kind == "node":
        return nodes[data]
    if kind in ("list", "tuple", "set"):
        return {"list": list, "tuple": tuple, "set": set}[kind](_decode(e, nodes) for e in data)
    if kind == "dict":
        return {_decode(k, nodes): _decode(e, nodes) for k, e in data}
    if kind in _VALUES:
        return _VALUES[kind](*(_decode(e, nodes) for e in data))
    if kind == "slice":
        return slice(*(_decode(e, nodes) for e in data))
    if kind == "torch":
        found = getattr(torch, data)
        if not isinstance(found, (torch.dtype, torch.memory_format, torch.layout)):
            raise ValueError(f"torch.{data} is not allowed")
        return found
    simple: dict[str, Callable[[Any], Any]] = {
        "float": float,
        "device": torch.device,
        "ellipsis": lambda _: Ellipsis,
        "function": function_named,
    }
    return simple[kind](data)


def _is_name(text: Any) -> bool:
    """Whether a text is safe as a name in generated code."""
    return isinstance(text, str) and text.isidentifier() and not keyword.iskeyword(text)


def _safe_name(data: dict[str, Any]) -> str:
    name = str(data.get("name", "GraphModule"))
    return name if _is_name(name) else "GraphModule"
