"""Choices: the places where a model picks among scores, such as the queries of a detector.

    top-k, sort, argmax

Two scores that are equal up to rounding may be picked in either order, and everything behind them
changes its place. So the torch model takes what the file has picked, as it takes its codes, and
only the scores of what was picked are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PICKED = {"TopK": 1, "ArgMax": 0, "ArgMin": 0}  # by operator: the output that holds the indices
_BOTH = {"topk": "TopK", "sort": "TopK", "max": "ArgMax", "min": "ArgMin"}  # values and indices
_INDICES = {"argsort": "TopK", "argmax": "ArgMax", "argmin": "ArgMin"}

# Called with the number of the choice, the scores of what torch picks and of what the file picked,
# and how many indices differ.
See = Callable[[int, Tensor, Tensor, int], None]


def picked_in(proto: onnx.ModelProto) -> dict[str, str]:
    """The names of the values that hold the indices of each choice, in order, and its operator."""
    made = [n for n in proto.graph.node if n.op_type in _PICKED]
    return {n.output[_PICKED[n.op_type]]: n.op_type for n in made}


class Choosing(TorchFunctionMode):
    """While it is on, each choice of torch takes the file's indices, in the order of the graph."""

    def __init__(self, theirs: Sequence[tuple[str, Tensor]], see: See) -> None:
        super().__init__()
        self.theirs, self.see, self.calls = theirs, see, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
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


def _scores(x: Tensor, indices: Tensor, axis: int | None, kept: bool) -> Tensor:
    """What is at the indices along an axis of x; without an axis x is flat."""
    if axis is None:
        return x.flatten()[indices.flatten()]
    if indices.dim() < x.dim() and not kept:
        return x.gather(axis, indices.unsqueeze(axis)).squeeze(axis)
    return x.gather(axis, indices)
