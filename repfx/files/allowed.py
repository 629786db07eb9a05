"""What a saved file may name: layers of torch.nn and repfx, and functions that only compute.

The functions are those that torch lists as overridable, Python's operators, and aten operators.
"""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from repfx.algebra import Fixed, KernelNorm, Moments, pad_with
from repfx.errors import InputError
from repfx.graph.guards import holds
from repfx.graph.holders import is_holder
from repfx.graph.modes import Mode
from repfx.quant import Affine, FakeQuant

_OWN: dict[str, type[nn.Module]] = {"repfx.FakeQuant": FakeQuant, "repfx.Mode": Mode}
_OWN |= {"repfx.Affine": Affine, "repfx.Fixed": Fixed}
_OWN |= {"repfx.KernelNorm": KernelNorm, "repfx.Moments": Moments}
READABLE = {
    "shape",
    "ndim",
    "dtype",
    "device",
    "T",
    "mT",
    "H",
    "mH",
    "real",
    "imag",
    "requires_grad",
    "is_cuda",
}


def class_name(module: nn.Module, path: str) -> str:
    for name, own in _OWN.items():
        if type(module) is own:
            return name
    if isinstance(module, fx.GraphModule):
        return "torch.fx.GraphModule"
    if is_holder(module):
        return "torch.nn.modules.module.Module"
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name == "torch.nn.modules.module.Module" or (
        name.startswith("torch.nn.modules.") and class_named(name)
    ):
        return name
    raise InputError(
        f"cannot save {path or 'the model'}: {name} is code of your own, which cannot be saved "
        "without pickle. "
        "Save its state_dict next to your code, or use torch.export.save"
    )


def is_known(module: nn.Module) -> bool:
    """Whether a module can be saved, as far as its class goes."""
    try:
        return bool(class_name(module, ""))
    except (InputError, ValueError):
        return False


def class_named(name: str) -> type[nn.Module]:
    if name in _OWN:
        return _OWN[name]
    if name == "torch.fx.GraphModule":
        return fx.GraphModule
    *_, short = name.split(".")
    found = nn.Module if short == "Module" else getattr(nn, short, None)
    found = found or getattr(nn.modules.linear, short, None)
    if not (
        isinstance(found, type) and issubclass(found, nn.Module) and name.startswith("torch.nn.")
    ):
        raise ValueError(f"class {name!r} is not allowed")
    return found


@cache
def _functions() -> dict[str, Any]:
    table: dict[str, Any] = {"getattr": getattr, "repfx.pad_with": pad_with, "repfx.holds": holds}
    table |= {"math.ceil": math.ceil, "math.floor": math.floor, "math.trunc": math.trunc}
    table |= {"round": round, "collections.OrderedDict": OrderedDict}
    for space, functions in torch.overrides.get_overridable_functions().items():
        prefix = getattr(space, "__name__", "")
        if space is not torch.Tensor and isinstance(prefix, str):
            table.update({f"{prefix}.{f.__name__}": f for f in functions if hasattr(f, "__name__")})
    makers = {"attrgetter", "itemgetter", "methodcaller", "call"}
    table.update(
        {f"operator.{n}": getattr(operator, n) for n in operator.__all__ if n not in makers}
    )
    # torch does not list the variants that work in place.
    for space in (torch, torch.nn.functional):
        spellings = {
            n: getattr(space, n)
            for n in dir(space)
            if n.endswith("_") and n[:-1] and not n.startswith("_")
        }
        known = {f.__name__ for f in table.values() if hasattr(f, "__name__")}
        table.update({f"{space.__name__}.{n}": f for n, f in spellings.items() if n[:-1] in known})
    return table


@cache
def _names() -> dict[Any, str]:
    return {f: name for name, f in _functions().items()}


@cache
def methods() -> set[str]:
    found = {
        getattr(f, "__name__", "")
        for f in torch.overrides.get_overridable_functions()[torch.Tensor]
    }
    return {name for name in found if name.isidentifier() and not name.startswith("_")}


def function_name(f: Any) -> str:
    if isinstance(f, torch._ops.OpOverload) and f.namespace == "aten":
        return f"aten:{f._opname}.{f._overloadname}"
    if f in _names():
        return _names()[f]
    raise InputError(
        f"cannot save: function {getattr(f, '__name__', f)!r} cannot be saved without pickle"
    )


def is_computation(op: Any) -> bool:
    """Whether an aten operator computes from tensors.

    Operators without a tensor argument are not safe: from_file, for one, reads and writes files."""
    if not isinstance(op, torch._ops.OpOverload):
        return False
    arguments = [str(a.type) for a in op._schema.arguments]
    return any(
        t.startswith(("Tensor", "List[Tensor", "Optional[Tensor", "List[Optional[Tensor"))
        for t in arguments[:3]
    )


def function_named(name: str) -> Any:
    if name.startswith("aten:"):
        op, _, overload = name.removeprefix("aten:").rpartition(".")
        found = getattr(getattr(torch.ops.aten, op), overload)
        if not is_computation(found):
            raise ValueError(f"function {name!r} is not allowed")
        return found
    if name not in _functions():
        raise ValueError(f"function {name!r} is not allowed")
    return _functions()[name]
