"""Measures the numbers of a report from a model and, where there is some, data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from repfx.calibration import calibrate
from repfx.capture.model import graphs
from repfx.capture.running import guess_example, run_eval
from repfx.data.batches import Batch, Batches
from repfx.errors import InputError
from repfx.graph.calls import layer_of
from repfx.graph.naming import short
from repfx.graph.traits import Trait
from repfx.graph.view import GraphView
from repfx.graph.vocabulary import kind_of_layer
from repfx.quant import FakeQuant
from repfx.reporting.advice import advice, judged
from repfx.reporting.deployed import on_data
from repfx.reporting.drawing import drawing
from repfx.reporting.numbers import Branch, Form, Layer, Norm, Numbers, Region, decibels
from repfx.reporting.operands import operands
from repfx.reporting.regions import branches_of, deployed_layers, norms_of, regions_of
from repfx.reporting.spreads import reach, spread
from repfx.rewrite.contract import Pass, Stage, resolve
from repfx.rewrite.difference import difference
from repfx.rewrite.results import Report
from repfx.rewrite.runner import rewrite


def measure(
    model: Any,
    data: Iterable[Any] | None = None,
    *,
    title: str = "model",
    passes: Sequence[str | Pass] = ("fuse", "ptq"),
    example: Any = None,
    target: str = "tensorrt",
    progress: bool = False,
) -> Numbers:
    """The numbers of one float model, measured on the CPU.

    `data`: batches of inputs, or of (inputs, labels) with labels (N,) for top-1; quantizers are
    calibrated on them. Without it activations and errors are not measured. `passes`: the passes
    that make the deployed net; the last one quantizes.

    Raises InputError as `transform` and `calibrate` do, and for a model that already has
    quantizers."""
    model = _float_on_cpu(model)
    batches = None if data is None else _checked(data)
    x = batches[0].tensor[:2] if batches else _on_cpu(example)
    asked = _Asked.of(passes, x, target, batches, progress)
    nets = _nets(model, asked)
    regions = regions_of(model, nets.report, x)
    layers, notes = _layers(nets, regions, asked)
    numbers = Numbers(
        title,
        asked.bits,
        _forms(nets.forms, batches, _as_input(x, nets.base)),
        regions,
        tuple(judged(layer, asked.bits) for layer in layers),
        drawing(nets.base, regions, False),
        drawing(nets.merged, regions, True),
    )
    return replace(numbers, warnings=advice(numbers), notes=notes)


@dataclass(frozen=True)
class _Asked:
    """What to measure: the passes in order, an input, and batches where there is data."""

    passes: tuple[Pass, ...]
    x: Any
    target: str
    batches: list[Batch] | None
    progress: bool

    @staticmethod
    def of(
        passes: Sequence[str | Pass],
        x: Any,
        target: str,
        batches: list[Batch] | None,
        progress: bool,
    ) -> _Asked:
        """The passes, put in order. Raises InputError where they make no deployed net."""
        ordered = tuple(resolve(passes))
        kinds = {p.stage for p in ordered}
        if Stage.QUANTIZE not in kinds or Stage.TRAIN in kinds:
            raise InputError(
                "the passes of a report must make the deployed net: one quantizes, such as ptq, "
                "and none is for training"
            )
        return _Asked(ordered, x, target, batches, progress)

    @property
    def merging(self) -> list[Pass]:
        return [p for p in self.passes if p.stage < Stage.QUANTIZE]

    @property
    def quantizing(self) -> list[Pass]:
        return [p for p in self.passes if p.stage >= Stage.QUANTIZE]

    @property
    def bits(self) -> int:
        return next((p.bits for p in self.passes if hasattr(p, "bits")), 8)

    def run(self, model: Any, passes: Sequence[str | Pass]) -> tuple[nn.Module, Report]:
        return rewrite(model, passes, self.x, self.target)


@dataclass(frozen=True)
class _Nets:
    """The model as written, merged (with the report on merging) and deployed.

    `forms` has these and the steps between them, by title."""

    base: nn.Module
    merged: nn.Module
    report: Report
    deployed: nn.Module
    forms: dict[str, nn.Module]


def _nets(model: Any, asked: _Asked) -> _Nets:
    base, _ = asked.run(model, [])
    merged, report = asked.run(model, asked.merging)
    deployed, _ = asked.run(merged, asked.quantizing)
    if asked.batches:
        calibrate(deployed, asked.batches, progress=asked.progress)
    if any(p.stage is Stage.ADJUST for p in asked.passes):
        # Parameters that a pass added for learning fold into their layers.
        deployed, _ = asked.run(deployed, ["fuse"])
    forms: dict[str, nn.Module] = {"as written": base}
    for p in asked.merging[:-1]:
        forms[f"after {p.name}"], _ = asked.run([*forms.values()][-1], [p])
    integers = f"INT{asked.bits}" if asked.batches else f"INT{asked.bits}, weights"
    return _Nets(base, merged, report, deployed, {**forms, "merged": merged, integers: deployed})


def _layers(
    nets: _Nets, regions: tuple[Region, ...], asked: _Asked
) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """The layers of the deployed net, and notes on what could not be measured."""
    codes = _coded(nets.deployed)
    layers = [
        _layer(
            name,
            node,
            view,
            codes.get(name),
            branches_of(nets.base, regions, name),
            norms_of(nets.base, regions, name),
        )
        for name, node, view in deployed_layers(nets.merged)
    ]
    if not asked.batches:
        note = "No data was given: activations, errors and accuracy are not measured."
        return tuple(layers), (note,)
    if not isinstance(nets.deployed, fx.GraphModule) or not isinstance(nets.base, fx.GraphModule):
        note = "The model was traced only in parts: the errors of its layers are not measured."
        return tuple(layers), (note,)
    added = operands(nets.base, regions, asked.batches)
    layers = [replace(layer, operands=added.get(layer.name, ())) for layer in layers]
    return tuple(on_data(nets.deployed, layers, asked.batches, asked.progress)), ()


def _float_on_cpu(model: Any) -> Any:
    if not isinstance(model, nn.Module):
        return model
    if any(isinstance(m, FakeQuant) for m in model.modules()):
        raise InputError("a report needs the float model: it quantizes a copy itself")
    devices = {t.device.type for t in (*model.parameters(), *model.buffers())}
    return model if devices <= {"cpu", "meta"} else copy.deepcopy(model).cpu()


def _as_input(x: Any, model: nn.Module) -> tuple[Any, ...] | None:
    if x is None:
        return guess_example(model)[0]
    return x if isinstance(x, tuple) else (x,)


def _on_cpu(values: Any) -> Any:
    return tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, values)


def _checked(data: Iterable[Any]) -> list[Batch]:
    batches = [batch.to(torch.device("cpu")) for batch in Batches(data, "data")]
    for batch in batches:
        x, labels = batch.tensor, batch.labels
        if isinstance(labels, Tensor) and labels.dim() == 1 and len(labels) != len(x):
            raise InputError(f"a batch has {len(x)} inputs but {len(labels)} labels")
    return batches


def _forms(
    parts: dict[str, nn.Module], batches: list[Batch] | None, args: tuple[Any, ...] | None
) -> tuple[Form, ...]:
    found = []
    truth: list[Tensor] = []
    for i, (name, model) in enumerate(parts.items()):
        coded = {id(w): m.grid.bits for m, w in _coded(model).values()}
        params = list({id(p): p for p in model.parameters() if not _is_scale(model, p)}.values())
        size = sum(p.numel() * coded.get(id(p), 32) // 8 for p in params)
        sqnr = top1 = None
        if batches:
            outputs = [run_eval(model, (batch.tensor,)) for batch in batches]
            leaves = [
                [t for t in tree_leaves(o) if isinstance(t, Tensor) and t.is_floating_point()]
                for o in outputs
            ]
            # Each output, concatenated over the batches.
            given = [torch.cat([t.flatten() for t in same]) for same in zip(*leaves, strict=False)]
            truth = truth or given
            sqnr = None if i == 0 or not given else difference(truth, given).sqnr
            top1 = _top1(outputs, batches)
        convs, macs = _cost(model, args)
        found.append(Form(name, convs, sum(p.numel() for p in params), macs, size, sqnr, top1))
    return tuple(found)


def _is_scale(model: nn.Module, p: Tensor) -> bool:
    quants = (m for m in model.modules() if isinstance(m, FakeQuant))
    return any(p is own for m in quants for own in (*m.parameters(), *m.buffers()))


def _coded(model: nn.Module) -> dict[str, tuple[FakeQuant, Tensor]]:
    """The weight quantizers, each with the weight it rounds, by the path of the layer."""
    found: dict[str, tuple[FakeQuant, Tensor]] = {}
    for path, module in graphs(model):
        view = GraphView(module)
        for node in view.nodes:
            quant = view.modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(quant, FakeQuant) and quant.of_weight:
                source = node.all_input_nodes[0]
                name = (f"{path}." if path else "") + str(node.target).rpartition(".")[0]
                found[name] = (
                    quant,
                    view.tensor(str(source.target) if source.op == "get_attr" else source),
                )
    return found


def _top1(outputs: list[Any], batches: list[Batch]) -> float | None:
    labels = [b.labels for b in batches if isinstance(b.labels, Tensor)]
    logits = all(isinstance(o, Tensor) and o.dim() == 2 for o in outputs)
    if (
        len(labels) != len(outputs)
        or not logits
        or any(y.dim() != 1 or y.is_floating_point() for y in labels)
    ):
        return None
    right = sum(int((o.argmax(1) == y).sum()) for o, y in zip(outputs, labels, strict=True))
    return 100 * right / sum(len(y) for y in labels)


def _cost(model: nn.Module, args: tuple[Any, ...] | None) -> tuple[int, float]:
    """The number of convolutions and linear layers, and the MACs for one input."""
    if args is None:
        return sum(1 for m in model.modules() if Trait.LAYER in kind_of_layer(m).traits), 0.0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run_eval(model, args)
    found = counter.get_flop_counts().get("Global", {})
    views = [GraphView(m) for _, m in graphs(model)]
    calls = sum(_weighted(node, view) for view in views for node in view.nodes)
    return calls, sum(found.values()) / 2 / max(1, len(args[0]))


def _weighted(node: fx.Node, view: GraphView) -> bool:
    return (node.op == "call_function" and layer_of(node) is not None) or bool(
        getattr(view.ops.get(node), "macs", 0)
    )


def _layer(
    name: str,
    node: fx.Node,
    view: GraphView,
    coded: tuple[FakeQuant, Tensor] | None,
    branches: tuple[Branch, ...],
    norms: tuple[Norm, ...],
) -> Layer:
    op: Any = view.ops[node]
    weight = (
        view.tensor(f"{node.target}.weight" if node.op == "call_module" else _weight_of(view, node))
        .detach()
        .float()
    )
    sqnr = used = None
    if coded is not None:
        quant, held = coded
        held = held.detach()
        codes = quant.codes(held)
        noise = float((held - codes * quant.grid.along(quant.step, held)).double().square().sum())
        sqnr = decibels(float(held.double().square().sum()), noise)
        used = len(codes.unique()) / (quant.grid.high - quant.grid.low + 1)
    wide, median = reach(weight.abs().flatten(1).amax(1))
    rows = (wide, len(weight), median)
    return Layer(
        name, short(op.own), 0.0, weight.numel(), spread(weight), rows, sqnr, used, branches, norms
    )


def _weight_of(view: GraphView, node: fx.Node) -> Any:
    layer = view.layer(node)
    assert layer is not None
    weight = layer.weight
    return str(weight.target) if isinstance(weight, fx.Node) and layer.path else weight
