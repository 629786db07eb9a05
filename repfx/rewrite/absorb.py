"""absorb: moves an affine per channel into layers, as `slide` has planned, and proves that.

The proof has two parts: behind the nodes that the affine moves through, it does the same; and each
new layer is the old one with the affine in front of it or behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.algebra import Geometry, Kernel
from repfx.errors import CheckError, Inexact
from repfx.graph.axes import layer_op
from repfx.graph.edit import drop_unreferenced, layer_from, put_module, references, replace_region
from repfx.graph.ops import Map, Ref
from repfx.graph.regions import Region
from repfx.graph.run_node import call
from repfx.graph.view import GraphView
from repfx.rewrite.kernel_of import kernel_of
from repfx.rewrite.merge_regions import Merge
from repfx.rewrite.names import Names
from repfx.rewrite.prove import EXACT, input_sizes, prove, twin
from repfx.rewrite.results import Merged
from repfx.rewrite.slide import Slide, Take
from repfx.rewrite.weights import InFloat64

Fetch = Callable[[Ref], Tensor]


@dataclass(frozen=True)
class Absorbed:
    """A layer with the affine in it: its kernel, the region of the old layer, and the error."""

    take: Take
    merge: Merge
    kernel: Kernel
    error: float


def absorbed(view: GraphView, slide: Slide) -> list[Absorbed]:
    """The new layers of a slide, proved. Raises Inexact if that cannot be proved on an example."""
    fetch = InFloat64(view, keep=True)
    op = view.ops[slide.affine]
    assert isinstance(op, Map)
    scale, shift = affine_of(op, fetch)
    _prove_path(view, slide, fetch)
    done = []
    for take in slide.takes:
        layer = layer_op(view, take.layer)
        assert layer is not None and layer.own is not None
        region = Region(layer.x, take.layer, (take.layer,), frozenset())
        if view.ops[take.layer] is layer:
            old = kernel_of(view, region, fetch)
            error = prove(view, region, old, fetch)
        else:
            old, error = layer.kernel(fetch, layer.own), 0.0
            old = Kernel(layer.own, old.weight, old.bias)
        rows = list(take.rows)
        moved = _diagonal(old, scale[rows], _shift(shift, take), slide.forward)
        new = moved.then(old) if slide.forward else old.then(moved)
        first, second = (moved, old) if slide.forward else (old, moved)
        error = max(error, _prove_layer(view, take.layer, (first, second), new))
        merge = Merge(region, new.geometry, old.geometry.macs, layer.params)
        done.append(Absorbed(take, merge, new, error))
    return done


def put(
    module: fx.GraphModule, view: GraphView, slides: list[Slide], failed: dict[fx.Node, Inexact]
) -> tuple[Merged, ...]:
    """Replaces the layers of each slide and removes its affine, or adds why not to `failed`."""
    before, names = references(module.graph), Names(view, module)
    moved: dict[fx.Node, fx.Node] = {}
    replaced: list[nn.Module] = []
    done: list[Merged] = []

    def now(node: fx.Node) -> fx.Node:
        while node in moved:
            node = moved[node]
        return node

    for slide in slides:
        try:
            layers = absorbed(view, slide)
        except Inexact as why:
            failed[slide.affine] = why
            continue
        op = view.ops[slide.affine]
        assert isinstance(op, Map)
        for i, one in enumerate(layers):
            node, path = one.take.layer, names.path([one.merge])
            made = layer_from(one.kernel, view.tensor(names.weight(one.merge)))
            old = put_module(module, path, made.train(module.training))
            replaced += [] if old is None else [old]
            ops = (view.name(slide.affine), view.name(node))
            params = one.merge.params_before + (0 if i else op.params), one.kernel.geometry.params
            macs = float(one.merge.macs_before), float(one.kernel.geometry.macs)
            done.append(Merged(names.label(one.merge), ops, path, *macs, *params, one.error))
            if layer_op(view, node) is view.ops[node]:
                g, x = one.kernel.geometry, now(one.merge.region.source)
                moved[node] = replace_region(module.graph, x, node, (node,), g, path)
            else:
                node.target = path
        slide.affine.replace_all_uses_with(now(op.x))
        module.graph.erase_node(slide.affine)
        moved[slide.affine] = now(op.x)
    if done:
        drop_unreferenced(module, before, replaced)
    return tuple(done)


def affine_of(op: Map, fetch: Fetch) -> tuple[Tensor, Tensor | None]:
    """The scale and the shift of a map y = scale * x + shift, one number per channel."""
    assert op.inputs is not None
    kernel = op.kernel(fetch, Geometry.identity(op.inputs, 0, -1))
    return kernel.weight.reshape(-1), kernel.bias


def _shift(shift: Tensor | None, take: Take) -> Tensor | None:
    return None if shift is None or not take.shifts else shift[list(take.rows)]


def _diagonal(old: Kernel, scale: Tensor, shift: Tensor | None, forward: bool) -> Kernel:
    g = old.geometry
    same = Geometry.identity(g.inputs if forward else g.outputs, len(g.axes), g.channel_axis)
    return Kernel.diagonal(replace(same, bias=shift is not None), scale, shift)


def _prove_layer(
    view: GraphView, layer: fx.Node, parts: tuple[Kernel, Kernel], whole: Kernel
) -> float:
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for sizes in input_sizes(whole.geometry):
        x = torch.randn(sizes, generator=generator, dtype=torch.float64, device="cpu")
        middle = parts[0](x)
        want, got = parts[1](middle), whole(x)
        largest = max(float(v.abs().amax()) for v in (want, middle)) or 1.0
        worst = max(worst, float((want - got).abs().amax()) / largest)
    return _checked(view, layer, worst)


def _checked(view: GraphView, node: fx.Node, error: float) -> float:
    if not error <= EXACT:
        raise CheckError(
            f"the affine moved into {view.name(node)!r} gives another result, by {error:.2e}; "
            "this is a bug in repfx"
        )
    return error


def _prove_path(view: GraphView, slide: Slide, fetch: Fetch) -> None:
    """Runs the nodes that the affine moves through, with it in front of them and behind them."""
    op = view.ops[slide.affine]
    assert isinstance(op, Map)
    scale, shift = affine_of(op, fetch)
    inside = {slide.affine, *slide.nodes}

    def run(end: fx.Node, starts: dict[fx.Node, Tensor]) -> Tensor:
        found: Tensor = _Path(view, inside, fetch, dict(starts)).value(end)
        return found

    def moved(take: Take, value: Tensor) -> Tensor:
        layer = layer_op(view, take.layer)
        assert layer is not None
        after = 0 if layer.kind == "linear" else value.dim() - 2
        rows, added = list(take.rows), _shift(shift, take)
        shape = (-1, *(1,) * after)
        scaled = value * scale[rows].reshape(shape)
        return scaled if added is None else scaled + added.reshape(shape)

    generator = torch.Generator().manual_seed(0)
    if slide.forward:
        x = _example(view, op.x, generator)
        for take in slide.takes:
            layer = layer_op(view, take.layer)
            assert layer is not None
            want, got = run(layer.x, {op.x: x}), run(layer.x, {slide.affine: x})
            _compared(view, slide.affine, want, moved(take, got))
        return
    outputs = {take.layer: _example(view, take.layer, generator) for take in slide.takes}
    taken = {take.layer: moved(take, outputs[take.layer]) for take in slide.takes}
    _compared(view, slide.affine, run(slide.affine, outputs), run(op.x, taken))


def _example(view: GraphView, node: fx.Node, generator: torch.Generator) -> Tensor:
    shape = node.meta.get("shape")
    if shape is None:
        raise Inexact("the shapes inside the model are unknown", "pass an example")
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _compared(view: GraphView, node: fx.Node, want: Tensor, got: Tensor) -> None:
    if want.shape != got.shape:
        raise CheckError(f"{view.name(node)!r} would change a shape; this is a bug in repfx")
    _checked(view, node, float((want - got).abs().amax()) / (float(want.abs().amax()) or 1.0))


@dataclass
class _Path:
    """Runs the nodes `inside` in float64; of the values beside them, only the sizes are known."""

    view: GraphView
    inside: set[fx.Node]
    fetch: Fetch
    values: dict[fx.Node, Any]

    def value(self, node: fx.Node) -> Any:
        view = self.view
        if view.follows_mode(node):
            return False
        if node not in self.values:
            if view.is_constant(node):
                self.values[node] = self.fetch(node)
            elif node in self.inside or view.is_size(node):
                module, path = view.module_of(node), str(node.target)
                made = None if module is None else twin(module, path, self.fetch)
                try:
                    self.values[node] = call(node, self.value, made)
                except RuntimeError as error:  # it needs a value that is not on the path
                    raise Inexact("the operators between cannot be run by themselves") from error
            else:
                shape = node.meta.get("shape")
                if shape is None:
                    raise Inexact("the shapes inside the model are unknown", "pass an example")
                self.values[node] = torch.empty(shape, device="meta")
        return self.values[node]
