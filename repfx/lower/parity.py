"""Parity: the ONNX file against the torch model, code by code.

Two runtimes add in different orders, so a value on the edge between two codes may go either way, and one such tie moves
everything after it. To count ties and nothing else, each stretch between two quantizers is compared on the same codes:
the torch model runs with every call of a quantizer answering what ONNX Runtime computed there, and is asked what it
would have said. One layer deep, codes may differ by one, rarely; anything more is an error of the lowering.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from repfx.errors import CheckError, InputError, RepfxError
from repfx.graph.running import run_eval
from repfx.lower.finish import codes_name
from repfx.lower.runtimes import session
from repfx.quant import FakeQuant
from repfx.rewrite.verify import Difference, differences, worst


@dataclass(frozen=True)
class Limits:
    """Ties are rare. More is not rounding: at one quantizer than `share` of the codes, and than `few` in a small one;
    in one output than `error`, relative; of an output of indices than `indices` of the entries, `few`, never most."""

    share: float
    few: int
    error: float
    indices: float


# By whether it is float16, whose last bit, which runtimes round differently, is up to a tenth of a step.
LIMITS = {False: Limits(1e-3, 2, 1e-3, 1e-2), True: Limits(5e-2, 8, 4e-3, 5e-2)}


@dataclass(frozen=True)
class CodeDifference:
    """At one quantizer, on equal codes before it: `codes` compared, how many are `different`, the `largest` difference."""

    codes: int
    different: int
    largest: int


@dataclass(frozen=True)
class Parity:
    """`output`: the torch model against the file, each on its own. `outputs`: of each the same on the file's codes.

    `quantizers`: per call of an activation quantizer, in order of the graph. `float16`: of a file in half precision.
    `noise`: what rounding to half precision alone does to each output of a net without quantizers, relative.
    """

    output: Difference
    outputs: tuple[Difference, ...]
    quantizers: dict[str, CodeDifference] = field(default_factory=dict)
    float16: bool = False
    noise: tuple[float, ...] = ()

    @property
    def forced(self) -> Difference:
        """The worst of `outputs`."""
        return worst(self.outputs)

    @property
    def different(self) -> int:
        return sum(q.different for q in self.quantizers.values())

    @property
    def codes(self) -> int:
        return sum(q.codes for q in self.quantizers.values())

    @property
    def sqnr(self) -> float:
        """Signal over noise of the output in dB, torch against the file."""
        return self.output.sqnr

    @property
    def agrees(self) -> bool:
        """Whether nothing but ties differs."""
        return not self.wrong

    @property
    def wrong(self) -> tuple[str, ...]:
        """What differs by more than ties, in words."""
        limits = LIMITS[self.float16]
        found = []
        for name, q in self.quantizers.items():
            if q.largest > 1 or q.different > max(limits.few, limits.share * q.codes):
                found.append(f"{q.different} of {q.codes} codes of {name}, by up to {q.largest}")
        noises = self.noise or (0.0,) * len(self.outputs)
        for i, (off, noise) in enumerate(zip(self.outputs, noises, strict=True)):
            allowed = limits.error
            if off.integers:
                allowed = max(limits.indices, min(limits.few / off.integers, 0.5))
            if not off.relative <= allowed + 2 * noise:
                found.append(f"output {i}: {off}")
        return tuple(found)

    def __str__(self) -> str:
        most = max((q.largest for q in self.quantizers.values()), default=0)
        by = "one" if most <= 1 else f"up to {most}"
        codes = f"{self.different} of {self.codes} codes differ by {by}; " if self.quantizers else ""
        return f"{codes}output: {self.output}"


def compare(
    model: nn.Module,
    proto: onnx.ModelProto,
    args: tuple[Tensor, ...],
    runtime: str = "onnxruntime",
    float16: bool = False,
) -> Parity:
    """Runs both on the same input and compares the output and the codes of every call of an activation quantizer.

    Raises MissingPart where the runtime is not installed, CheckError where it does not run the file, InputError where a
    quantizer is given NaN.
    """
    quants = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuant) and not m.of_weight}
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    outputs = len(proto.graph.output)
    held = {t.name: t for t in proto.graph.initializer}
    zeros: dict[str, onnx.TensorProto] = {}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear" and len(node.input) > 2 and node.input[2] in held:
            zeros[node.output[0]] = zero = held[node.input[2]]
            exposed.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], zero.data_type, None))
    reference = _run(runtime, exposed, args, optimize=False)
    theirs = {
        name: codes.float() - float(onnx.numpy_helper.to_array(zero))
        for (name, zero), codes in zip(zeros.items(), reference[outputs:], strict=True)
    }
    found: dict[str, CodeDifference] = {}

    def force(name: str) -> Any:
        calls = itertools.count()
        seen: list[tuple[Tensor, Tensor]] = []

        def hook(m: Any, inputs: tuple[Any, ...], result: Tensor) -> Tensor | None:
            x, call = inputs[0], next(calls)
            if x.isnan().any():
                raise InputError(f"{name} is given NaN, which no code stands for: the example cannot be compared")
            codes = theirs.get(codes_name(name, call))
            if codes is None:  # the exporter writes two calls on equal values as one
                codes = next((c for other, c in seen if torch.equal(other, x)), None)
            if codes is None:
                return None
            seen.append((x, codes))
            off = (m.codes(x) - codes.to(x)).abs()
            key = f"{name}, call {call + 1}" if call else name
            found[key] = CodeDifference(off.numel(), int((off > 0).sum()), int(off.max()) if off.numel() else 0)
            return codes.to(result) * m.step

        return hook

    free = run_eval(model, args)
    hooks = [quant.register_forward_hook(force(n)) for n, quant in quants.items()]
    try:
        forced = run_eval(model, args)
    finally:
        for hook in hooks:
            hook.remove()
    deployed = worst(differences(_tensors(free), _run(runtime, proto, args)))
    return Parity(deployed, differences(_tensors(forced), reference[:outputs]), found, float16)


def _run(runtime: str, proto: onnx.ModelProto, args: Sequence[Tensor], optimize: bool = True) -> list[Tensor]:
    try:
        return session(runtime, proto, optimize)(args)
    except RepfxError:
        raise
    except Exception as error:  # each runtime has exceptions of its own
        raise CheckError(f"{runtime} does not run the file: {' '.join(str(error).split())[:300]}") from error


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]
