"""Parity: the ONNX file against the torch model, code by code.

Two runtimes add in different orders, so a value on the edge between two codes may go either way, and one such tie moves
everything after it. To count ties and nothing else, each stretch between two quantizers is compared on the same codes:
the torch model runs with every quantizer answering what ONNX Runtime computed there, and is asked what it would have
said. One layer deep, codes may differ by one, rarely; anything more is an error of the lowering.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from repfx.graph.running import run_eval
from repfx.lower.runtimes import session
from repfx.quant import FakeQuant
from repfx.rewrite.verify import Difference, difference

# Ties are rare: more than this share of differing codes at one quantizer, more than so many in a small one, or this error
# of the output, is not rounding. In float16 the last bit, which runtimes round differently, is up to a tenth of a step.
LIMITS = {False: (1e-3, 2, 1e-3), True: (5e-2, 8, 4e-3)}


@dataclass(frozen=True)
class CodeDifference:
    """At one quantizer, on equal codes before it: `codes` compared, how many are `different`, the `largest` difference."""

    codes: int
    different: int
    largest: int


@dataclass(frozen=True)
class Parity:
    """`output`: the torch model against the file, each on its own. `forced`: the same on the file's codes.

    `quantizers`: per activation quantizer, in order of the graph. `float16`: of a file in half precision.
    `noise`: what rounding to half precision alone does to the output of a net without quantizers, relative.
    """

    output: Difference
    forced: Difference
    quantizers: dict[str, CodeDifference] = field(default_factory=dict)
    float16: bool = False
    noise: float = 0.0

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
        share, few, error = LIMITS[self.float16]
        ties = all(q.largest <= 1 and q.different <= max(few, share * q.codes) for q in self.quantizers.values())
        return ties and self.forced.relative <= error + 2 * self.noise

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
    """Runs both on the same input and compares the output and every activation quantizer's codes.

    Raises MissingPart where the runtime is not installed.
    """
    quants = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuant) and not m.of_weight}
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    outputs = len(proto.graph.output)
    zeros = {t.name: t for t in proto.graph.initializer}
    made = {n.output[0]: zeros[n.input[2]] for n in proto.graph.node if n.op_type == "QuantizeLinear"}
    names = [n for n in quants if f"{n}.codes" in made]
    for name in names:
        kind = made[f"{name}.codes"].data_type
        exposed.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}.codes", kind, None))
    reference = session(runtime, exposed, optimize=False)(args)
    theirs = {
        name: codes.float() - float(onnx.numpy_helper.to_array(made[f"{name}.codes"]))
        for name, codes in zip(names, reference[outputs:], strict=True)
    }
    found: dict[str, CodeDifference] = {}

    def force(name: str) -> Any:
        def hook(m: Any, inputs: tuple[Any, ...], result: Tensor) -> Tensor:
            codes = theirs[name].to(result)
            off = (m.codes(inputs[0]) - codes).abs()
            found[name] = CodeDifference(off.numel(), int((off > 0).sum()), int(off.max()) if off.numel() else 0)
            return codes * m.step

        return hook

    free = run_eval(model, args)
    hooks = [quants[n].register_forward_hook(force(n)) for n in names]
    try:
        forced = run_eval(model, args)
    finally:
        for hook in hooks:
            hook.remove()
    leaves = lambda value: [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]  # noqa: E731
    deployed = difference(leaves(free), session(runtime, proto)(args))
    return Parity(deployed, difference(leaves(forced), reference[:outputs]), found, float16)
