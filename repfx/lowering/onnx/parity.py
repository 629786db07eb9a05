"""Parity: the ONNX file against the torch model, code by code.

Two runtimes add in different orders, so a value halfway between two codes may be rounded either
way, and one such tie changes everything after it. To count ties where they arise, each stretch
between two quantizers is compared on the same codes: in the torch model every call of a quantizer
returns the codes that the runtime computed there, and the codes it would have computed itself are
compared with them. The model runs twice this way: in float64, which is taken as exact, and in the
file's own precision, which shows how far arithmetic of that precision errs there. With u the exact
value over the scale and c the runtime's code, a difference with

    |u - c| <= 1/2 + error / scale

is a tie, and any number of ties is fine. Anything beyond is wrong, even one code in millions.

The choices of the file, such as those of a top-k, are taken over in the same way; see
`repfx.lowering.onnx.choices`."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn

from repfx.capture.running import run_eval
from repfx.errors import CheckError, InputError, RepfxError
from repfx.graph.traits import Trait
from repfx.graph.view import GraphView
from repfx.lowering.onnx.choices import Choosing, See, picked_in, value_info
from repfx.lowering.onnx.finish import codes_name
from repfx.lowering.onnx.shares import shares
from repfx.lowering.runtimes.run import session
from repfx.quant import FakeQuant, in_float, quantizers_of
from repfx.rewrite.difference import Difference, differences, worst
from repfx.tolerances import LOWERED, Limits

_MOVED = Trait.MOVES | Trait.SAME | Trait.RESHAPES | Trait.MAXIMUM
Run = Callable[[str, Sequence[onnx.ModelProto], Sequence[Tensor]], list[list[Tensor]]]


@dataclass(frozen=True)
class CodeDifference:
    """How the codes of one quantizer compare, with equal codes at every quantizer before it.

    `codes`: how many are compared. `different`: how many differ. `largest`: the largest difference.
    `wrong`: how many differ by more than arithmetic errors explain."""

    codes: int
    different: int
    largest: int
    wrong: int = 0


@dataclass(frozen=True)
class Parity:
    """How a file run by `runtime` compares with the torch model.

    `output`: model and file each run on their own as deployed, the file in the runtime's optimized
    session. `outputs`: each output on the file's codes, against float64. `quantizers`: the codes of
    each call of an activation quantizer, in the order of the graph, on equal codes before it.
    `errors`: the relative error of torch's own arithmetic at each output. `before` and `after`: the
    torch model and the file, run as for `output`, against the model without rounding; None where
    nothing is rounded. `optimized`: whether the codes come from an optimized session too. (It may
    choose other kernels for a file whose codes are outputs.) `choices`: the indices that each
    top-k, sort and argmax picks; `wrong` are those of other scores than torch picks. `shares`: the
    outputs that are values of a sigmoid or softmax."""

    output: Difference
    outputs: tuple[Difference, ...]
    quantizers: dict[str, CodeDifference] = field(default_factory=dict)
    float16: bool = False
    errors: tuple[float, ...] = ()
    runtime: str = "onnxruntime"
    before: Difference | None = None
    after: Difference | None = None
    optimized: bool = False
    choices: dict[str, CodeDifference] = field(default_factory=dict)
    shares: tuple[bool, ...] = ()

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
        """The signal-to-quantization-noise ratio of the output in dB, file against torch."""
        return self.output.sqnr

    @property
    def agrees(self) -> bool:
        """Whether only ties differ."""
        return not self.wrong

    @property
    def wrong(self) -> tuple[str, ...]:
        """What differs by more than ties, in words.

        Empty where the file was run as deployed and its output equals torch's."""
        limits = LOWERED[self.float16]
        exact = limits.rounding + limits.spread * max(self.errors, default=0.0)
        if self.optimized and self.output.relative <= exact and not self.output.different:
            return ()
        found = [
            f"{q.wrong} of {q.codes} codes of {name}, by up to {q.largest}"
            for name, q in self.quantizers.items()
            if q.wrong
        ]
        found += [
            f"{c.wrong} of {c.codes} indices of {name}, of other scores"
            for name, c in self.choices.items()
            if c.wrong
        ]
        errors = self.errors or (0.0,) * len(self.outputs)
        for i, (off, error) in enumerate(zip(self.outputs, errors, strict=True)):
            allowed = limits.rounding + limits.spread * error
            if off.integers:
                allowed = max(limits.indices, min(limits.few / off.integers, 0.5))
            share = bool(self.shares) and self.shares[i] and off.max_abs <= limits.of_one
            # Where torch itself gives no number in this precision, anything would be allowed.
            if not (off.relative <= allowed or share) or not math.isfinite(error):
                found.append(f"output {i}: {off}")
        return tuple(found)

    def __str__(self) -> str:
        end = f"end to end {self.output}"
        picked = sum(c.different for c in self.choices.values())
        if picked:
            end = f"{picked} indices among equal scores differ; {end}"
        if not self.quantizers:
            return end
        wrong = sum(q.wrong for q in self.quantizers.values())
        ties = (
            f", {wrong} of them by more than rounding"
            if wrong
            else ", all ties"
            if self.different
            else ""
        )
        codes = f"{self.different:,} of {self.codes:,} codes differ on equal inputs{ties}; {end}"
        if self.before is None or self.after is None:
            return codes
        return (
            f"{codes}; against float {self.after.sqnr:.1f} dB, fake-quant {self.before.sqnr:.1f} dB"
        )


@dataclass(frozen=True)
class Theirs:
    """What a file computed: codes by name, the indices of choices, and quantizers of a softmax.

    `near`: how far values may be apart, relative to the largest, that are equal up to rounding."""

    codes: dict[str, Tensor]
    choices: Sequence[tuple[str, Tensor]]
    softmax: frozenset[str] = frozenset()
    near: float = 0.0


def compare(
    model: nn.Module,
    proto: onnx.ModelProto,
    args: tuple[Tensor, ...],
    runtime: str = "onnxruntime",
    rounded: nn.Module | None = None,
    run: Run | None = None,
) -> Parity:
    """Runs model and file on the same input and compares outputs and all activation codes.

    `rounded`: for a file in float16, the model rounded to float16 after each operator. `run`: a
    function that runs the files, both optimized, such as `Isa.run` or `as_deployed`. Without it the
    codes come from a session without optimizations.

    Raises MissingPart where the runtime is not installed, CheckError where it does not run the
    file, InputError where a quantizer is given NaN."""
    exposed, steps, picked = expose(proto)
    outputs = len(proto.graph.output)
    shown, deployed = _run_files(run or as_written, runtime, [exposed, proto], args)
    named = dict(zip((o.name for o in exposed.graph.output), shown, strict=True))
    codes = {
        name: (value.double() / step).round().to(torch.int16)
        for (name, step), value in zip(steps.items(), shown[outputs:], strict=False)
    }
    coarse = runtime == "onnxruntime" and run is not None
    softmax = _after_softmax(model) if coarse else frozenset[str]()
    limits = LOWERED[rounded is not None]
    near = limits.spread * limits.rounding
    theirs = Theirs(codes, [(kind, named[name]) for name, kind in picked.items()], softmax, near)
    in_precision, inputs = _in_precision(rounded or model, args, theirs)
    exact, found, choices = _exactly(model, args, theirs, inputs, limits)
    free = run_eval(rounded or model, args)
    before, after = _against_float(model, args, free, deployed)
    return Parity(
        worst(differences(_tensors(free), deployed)),
        differences(_tensors(exact), shown[:outputs]),
        found,
        rounded is not None,
        tuple(d.relative for d in differences(exact, in_precision)),
        runtime,
        before,
        after,
        run is not None,
        choices,
        shares(proto),
    )


def _run_files(
    run: Run, runtime: str, files: Sequence[onnx.ModelProto], args: Sequence[Tensor]
) -> list[list[Tensor]]:
    try:
        return run(runtime, files, args)
    except RepfxError:
        raise
    except Exception as error:  # each runtime raises exceptions of its own
        raise CheckError(
            f"{runtime} does not run the file: {' '.join(str(error).split())[:300]}"
        ) from error


def _in_precision(
    model: nn.Module, args: tuple[Tensor, ...], theirs: Theirs
) -> tuple[Any, dict[str, Tensor]]:
    """The output on the file's codes in the file's own precision, and each quantizer's input."""
    inputs: dict[str, Tensor] = {}

    def note(key: str, m: Any, x: Tensor, codes: Tensor) -> None:
        inputs[key] = x.float()

    def picked(call: int, mine: Tensor, chosen: Tensor, different: int) -> None:
        inputs[f"choice {call + 1}"] = chosen.float()

    return _forced(model, args, theirs, note, picked), inputs


def _exactly(
    model: nn.Module,
    args: tuple[Tensor, ...],
    theirs: Theirs,
    inputs: dict[str, Tensor],
    limits: Limits,
) -> tuple[Any, dict[str, CodeDifference], dict[str, CodeDifference]]:
    """The output on the file's codes in float64, and how codes and choices compare with the exact.

    It runs in float32 where the forward insists on that. `inputs`: each quantizer's input in the
    file's precision, which shows how far that precision errs."""
    found: dict[str, CodeDifference] = {}
    choices: dict[str, CodeDifference] = {}

    def allowed(key: str, x: Tensor) -> float:
        erred = _largest(inputs.get(key, x).double() - x)
        return limits.spread * erred + limits.rounding * _largest(x)

    def picked(call: int, mine: Tensor, chosen: Tensor, different: int) -> None:
        key = f"choice {call + 1}"
        off = (mine.double() - chosen.double()).abs()
        wrong = int((off > allowed(key, chosen.double())).sum())
        choices[key] = CodeDifference(off.numel(), different, different, wrong)

    def judge(key: str, m: FakeQuant, x: Tensor, codes: Tensor) -> None:
        x, step = x.double(), m.step.double()
        error: Any = allowed(key, x)
        if key.partition(",")[0] in theirs.softmax:  # 1 / step is cut to an integer there
            error = error + x.abs() * step
        u = (x / step).clamp(m.grid.low, m.grid.high)
        off = (m.grid.codes(x, step) - codes).abs()
        wrong = (u - codes).abs() > 0.5 + error / step
        found[key] = CodeDifference(
            off.numel(), int((off > 0).sum()), int(_largest(off)), int(wrong.sum())
        )

    wide = tuple(a.double() if a.is_floating_point() else a for a in args)
    try:
        return _forced(_double(model), wide, theirs, judge, picked), found, choices
    except RepfxError:
        raise
    except Exception:  # a forward that insists on float32
        found.clear()
        return _forced(model, args, theirs, judge, picked), found, choices


def _against_float(
    model: nn.Module, args: tuple[Tensor, ...], free: Any, deployed: list[Tensor]
) -> tuple[Difference | None, Difference | None]:
    """The torch model and the file against the model without rounding; None if nothing rounds."""
    if not any(isinstance(m, FakeQuant) for m in model.modules()):
        return None, None
    with in_float(quantizers_of(model).values()):
        plain = run_eval(model, args)
    return worst(differences(plain, free)), worst(differences(_tensors(plain), deployed))


def _after_softmax(model: nn.Module) -> frozenset[str]:
    """The quantizers that read a softmax.

    ONNX Runtime's optimized session computes it from integers to integers."""
    found: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            view = GraphView(module)
            for node in view.nodes:
                if isinstance(view.module_of(node), FakeQuant) and _is_softmax(view, node):
                    found.add(f"{path}.{node.target}".lstrip("."))
    return frozenset(found)


def _is_softmax(view: GraphView, node: fx.Node) -> bool:
    """Whether what a node reads are values of a softmax, perhaps moved to other places."""
    values = view.values_of(node)
    while len(values) == 1 and view.traits(values[0]) & _MOVED:
        values = view.values_of(values[0])
    return len(values) == 1 and view.kind(values[0]).name == "softmax"


def expose(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, float], dict[str, str]]:
    """The file with every dequantized activation and every choice as an output.

    Returned with the step by name of the codes, and the choices' names and operators. (If the codes
    themselves were outputs, OpenVINO would choose other kernels.)"""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    held = {t.name: t for t in proto.graph.initializer}
    made = {o for n in proto.graph.node if n.op_type == "QuantizeLinear" for o in n.output}
    steps: dict[str, float] = {}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in made - set(steps):
            scale = held[node.input[1]]
            steps[node.input[0]] = float(onnx.numpy_helper.to_array(scale))
            exposed.graph.output.append(
                onnx.helper.make_tensor_value_info(node.output[0], scale.data_type, None)
            )
    picked, given = picked_in(proto), {o.name for o in proto.graph.output}
    exposed.graph.output.extend(
        value_info(name, operator) for name, operator in picked.items() if name not in given
    )
    return exposed, steps, picked


def _forced(
    model: nn.Module,
    args: tuple[Tensor, ...],
    theirs: Theirs,
    see: Callable[[str, FakeQuant, Tensor, Tensor], None],
    picked: See,
) -> Any:
    """Runs the model with the file's codes in place of those of each activation quantizer.

    Choices are those of the file, too, and `picked` is called with each. `see` is called with the
    name of each call, the quantizer, its input and the file's codes."""

    seen: dict[Any, Tensor] = {}  # codes by step, shape and values

    def force(name: str) -> Any:
        calls = itertools.count()

        def hook(m: Any, inputs: tuple[Any, ...], result: Tensor) -> Tensor | None:
            x, call = inputs[0], next(calls)
            if x.isnan().any():
                raise InputError(
                    f"{name} is given NaN, which no code can represent: file and model cannot be "
                    "compared on this example"
                )
            # The exporter merges calls on equal values into one, also of two equal quantizers.
            same = float(m.step), x.shape, _digest(x)
            codes = theirs.codes.get(codes_name(name, call), seen.get(same))
            if codes is None:
                return None
            seen[same] = codes
            see(f"{name}, call {call + 1}" if call else name, m, x, codes.to(x))
            forced: Tensor = codes.to(result) * m.step.to(result)
            return forced

        return hook

    quants = {
        n: m for n, m in model.named_modules() if isinstance(m, FakeQuant) and not m.of_weight
    }
    hooks = [quant.register_forward_hook(force(n)) for n, quant in quants.items()]
    try:
        with Choosing(theirs.choices, picked, theirs.near):
            return run_eval(model, args)
    finally:
        for hook in hooks:
            hook.remove()


def _double(model: nn.Module) -> nn.Module:
    """A copy in float64 whose quantized weights keep the codes of the file, rounded in float32."""
    model = copy.deepcopy(model).double()

    def same_codes(m: Any, inputs: tuple[Any, ...], result: Tensor) -> Tensor:
        codes: Tensor = m.grid.codes(inputs[0].float(), m.step.float()).double()
        steps: Tensor = m.grid.along(m.step, result)
        return codes * steps

    for m in model.modules():
        if isinstance(m, FakeQuant) and m.of_weight:
            m.register_forward_hook(same_codes)
    return model


def _digest(values: Tensor) -> bytes:
    return hashlib.blake2b(values.detach().cpu().contiguous().numpy().tobytes()).digest()


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def as_written(
    runtime: str, files: Sequence[onnx.ModelProto], args: Sequence[Tensor]
) -> list[list[Tensor]]:
    """The files' outputs: all but the last run without optimizations, the last as deployed."""
    return [session(runtime, f, optimize=f is files[-1])(args) for f in files]


def as_deployed(
    runtime: str, files: Sequence[onnx.ModelProto], args: Sequence[Tensor]
) -> list[list[Tensor]]:
    """The files' outputs in the runtime's own optimized session."""
    return [session(runtime, f)(args) for f in files]


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]
