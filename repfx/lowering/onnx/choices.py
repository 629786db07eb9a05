"""Choices: the places where a model picks among scores, such as the queries of a detector.

    top-k, sort, argmax; <, >, <=, >=

Two scores that are equal up to rounding may be picked in either order, and everything behind them
changes its place. So the torch model takes what the file has picked, as it takes its codes, and
only the scores of what was picked are compared. Where the two sides of a comparison are equal up to
rounding, it takes the file's answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PICKED = {"TopK": 1, "ArgMax": 0, "ArgMin": 0}  # by operator: the output that holds the indices
_BOTH = {"topk": "TopK", "sort": "TopK", "max": "ArgMax", "min": "ArgMin"}  # values and indices
_INDICES = {"argsort": "TopK", "argmax": "ArgMax", "argmin": "ArgMin"}
_COMPARED = {"lt": "Less", "gt": "Greater", "le": "LessOrEqual", "ge": "GreaterOrEqual"}
_COMPARED |= {f"__{name}__": operator for name, operator in _COMPARED.items()}

# Called with the number of the choice, the scores of what torch picks and of what the file picked,
# and how many indices differ.
See = Callable[[int, Tensor, Tensor, int], None]


def picked_in(proto: onnx.ModelProto) -> dict[str, str]:
    """The names of the values that hold the indices of each choice, in order, and its operator.

    A comparison has answers instead of indices."""
    at = _PICKED | dict.fromkeys(_COMPARED.values(), 0)
    return {n.output[at[n.op_type]]: n.op_type for n in proto.graph.node if n.op_type in at}


def value_info(name: str, operator: str) -> onnx.ValueInfoProto:
    """The declaration of a choice as an output of the file."""
    compared = operator in _COMPARED.values()
    kind = onnx.TensorProto.BOOL if compared else onnx.TensorProto.INT64
    return onnx.helper.make_tensor_value_info(name, kind, None)


class Choosing(TorchFunctionMode):
    """While it is on, each choice of torch takes the file's indices, in the order of the graph.

    `near`: what is equal up to rounding, relative to the largest value that is compared."""

    def __init__(self, theirs: Sequence[tuple[str, Tensor]], see: See, near: float) -> None:
        super().__init__()
        self.theirs = [t for t in theirs if t[0] in _PICKED]
        self.answers = [t for t in theirs if t[0] not in _PICKED]
        self.see, self.calls, self.near = see, 0, near

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _COMPARED:
            return self._compared(_COMPARED[name], result, *args[:2])
        pair = name in _BOTH and isinstance(result, tuple)
        if not pair and name not in _INDICES:
            return result
        own, call = result[1] if pair else result, self.calls
        operator, found = self.theirs[call] if call < len(self.theirs) else ("", own)
        # The file does not have a choice that nothing reads, such as where the largest values are.
        if operator != (_BOTH if pair else _INDICES)[name] or found.numel() != own.numel():
            return result
        self.calls += 1
        indices = found.reshape(own.shape).to(own)
        x = args[0] if args else kwargs["input"]
        given = dict(zip(("k", "dim") if name == "topk" else ("dim",), args[1:], strict=False))
        given |= kwargs or {}
        axis = given.get("dim", None if name in ("argmax", "argmin") else -1)
        mine, chosen = (_scores(x, i, axis, given.get("keepdim", False)) for i in (own, indices))
        self.see(call, mine, chosen, int((own != indices).sum()))
        if not pair:
            return indices
        return type(result)((chosen.reshape(own.shape), indices))

    def _compared(self, operator: str, own: Any, *sides: Any) -> Any:
        """The answers of a comparison: torch's, or the file's where both sides are nearly equal."""
        a, b = (s if isinstance(s, Tensor) else torch.as_tensor(s) for s in sides)
        if not isinstance(own, Tensor) or not (a.is_floating_point() or b.is_floating_point()):
            return own
        alike = (
            i
            for i, (kind, v) in enumerate(self.answers)
            if (kind, v.numel()) == (operator, own.numel())
        )
        at = next(alike, None)
        if at is None:  # a comparison of constants
            return own
        theirs = self.answers[at][1].reshape(own.shape).to(own)
        del self.answers[: at + 1]
        largest = max((float(v.abs().max()) for v in (a, b) if v.numel()), default=0.0)
        return torch.where((a - b).abs() <= self.near * largest, theirs, own)


def _scores(x: Tensor, indices: Tensor, axis: int | None, kept: bool) -> Tensor:
    """What is at the indices along an axis of x; without an axis x is flat."""
    if axis is None:
        return x.flatten()[indices.flatten()]
    if indices.dim() < x.dim() and not kept:
        return x.gather(axis, indices.unsqueeze(axis)).squeeze(axis)
    return x.gather(axis, indices)
