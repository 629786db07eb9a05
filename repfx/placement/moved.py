"""Quantizers in front of what only moves values, where the layer before can write integers.

Q(max(x))               ->   max(Q(x))
Q(cat(a, b)), Q(a)      ->   cat(Q(a), Q(b)), Q(a)      one scale for all three

The second for a target that rounds the inputs of a concatenation, and only if a layer reads one of
them, too. With two scales a kernel of its own would bring that input to the scale of the
concatenation, and round it twice. And for a concatenation that is to be stored in integers."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import fx

from repfx.graph.moves import joined, joins, moves
from repfx.graph.ops import Sum
from repfx.graph.signs import non_negative
from repfx.graph.traits import Trait
from repfx.graph.view import GraphView
from repfx.placement.formats import pads_average
from repfx.quant import Target

Place = tuple[fx.Node, fx.Node, fx.Node]  # the reader, the value, the layer that sets its bits
Joint = dict[fx.Node, Sequence[fx.Node]]  # concatenations, and the values that share a quantizer


def moved_up(
    view: GraphView,
    places: Iterable[Place],
    owner: Mapping[fx.Node, fx.Node],
    target: Target,
    stored: Collection[fx.Node] = (),
) -> tuple[list[Place], Joint]:
    """The places, with quantizers moved in front of moves and concatenations.

    A quantizer stays where the moved value has other readers. TensorRT moves no DequantizeLinear
    across a resize, and OpenVINO only across some, so the layer after a resize keeps a quantizer of
    its own, with the same scale. `owner` maps nodes that become part of a layer to that layer;
    `stored` are concatenations to be stored in integers.

    Also returns the concatenations whose inputs are rounded in place of the whole."""
    readers: dict[fx.Node, list[Place]] = {}
    for place in places:
        readers.setdefault(place[1], []).append(place)
    joint: Joint = {}
    for node in reversed(view.nodes):
        ends = [node] if joins(view, node) else _ends(view, node)
        values = view.data_inputs(node)
        mine = [place for end in ends for place in readers.get(end, ())]
        quantized = {(reader, v) for reader, v, _ in mine}
        alone = all((owner.get(u, u), end) in quantized for end in ends for u in end.users)
        if not (mine and alone) or any(view.writes.changed(end) for end in ends):
            continue
        if not all(takes_quantizer(view, v) and not is_divided(view, v) for v in values):
            continue
        if joins(view, node):
            padded = any(pads_average(view.ops[reader]) for reader, _, _ in mine)
            saves = target.between == "joins" and _joins_rounded(view, node, readers)
            if padded or not (node in stored or (saves and takes_one_scale(view, node, target))):
                continue
            joint[node] = values
        if view.kind(node).name != "resize":
            for end in ends:
                readers.pop(end, None)
        for value in dict.fromkeys(values):
            readers.setdefault(value, []).extend((node, value, layer) for _, _, layer in mine)
    return [place for some in readers.values() for place in some], joint


def origins(view: GraphView, places: Iterable[Place], joint: Joint) -> dict[fx.Node, fx.Node]:
    """For each value the one whose quantizer it uses.

    A move of integers keeps them. What is joined under one scale uses that of the concatenation."""
    pairs = {(reader, value) for reader, value, _ in places}
    whole: dict[fx.Node, fx.Node] = {}  # for a value that moves integers: where they were made
    for node in view.nodes:
        inputs = view.data_inputs(node)
        if len(inputs) == 1 and moves(view, node):
            if (node, inputs[0]) in pairs:
                whole[node] = whole.get(inputs[0], inputs[0])
            elif inputs[0] in whole:
                whole[node] = whole[inputs[0]]
    found = {value: whole.get(value, value) for _, value in pairs}
    root: dict[fx.Node, fx.Node] = {}

    def end(value: fx.Node) -> fx.Node:
        while value in root:
            value = root[value]
        return value

    for node, values in joint.items():
        for value in values:
            while value not in found and value not in joint:
                (value,) = view.data_inputs(value)  # its quantizer was moved further up
            part, one = end(found.get(value, value)), end(node)
            if part is not one:
                root[part] = one
    return {value: end(made) for value, made in found.items()}


def layers_ahead(
    view: GraphView, layers: Collection[fx.Node], every: bool = True
) -> dict[fx.Node, fx.Node]:
    """For each value the first layer that it leads into, on every path or else on any."""
    found: dict[fx.Node, fx.Node] = {}
    for node in reversed(view.nodes):
        goals = [u if u in layers else found.get(u) for u in node.users]
        reached = [goal for goal in goals if goal is not None]
        if reached and (len(reached) == len(goals) or not every):
            found[node] = reached[0]
    return found


def is_divided(view: GraphView, node: fx.Node) -> bool:
    """Whether the node returns several tensors."""
    return getattr(view.ops[node], "pieces", None) is not None


def takes_quantizer(view: GraphView, value: fx.Node) -> bool:
    """Whether it is one tensor of floats that keeps its values and has no quantizer yet."""
    free = not view.writes.changed(value) and view.quantizer(value) is None
    return free and not view.is_size(value) and _has_values(value)


def _has_values(value: fx.Node) -> bool:
    """Whether it has floats in it, and is not a pool's values with their indices.

    Some pyramids begin with a value of 0 channels."""
    dtype, shape = value.meta.get("dtype"), value.meta.get("shape")
    if shape is None:
        return not any(user.target is operator.getitem for user in value.users)
    return (dtype is None or dtype.is_floating_point) and 0 not in shape


def takes_one_scale(view: GraphView, node: fx.Node, target: Target) -> bool:
    """Whether a concatenation and its inputs can share a quantizer.

    None of them is a constant, and all have the same number format."""
    inputs = view.data_inputs(node)
    alike = len({target.activation(8, non_negative(view, v)) for v in (node, *inputs)}) == 1
    return isinstance(view.ops[node], Sum) and alike and all(view.varies(v) for v in inputs)


def _joins_rounded(
    view: GraphView, node: fx.Node, readers: Mapping[fx.Node, Sequence[Place]]
) -> bool:
    """Whether a part of a concatenation is rounded before, perhaps in one within it."""
    for value in view.data_inputs(node):
        if any(reader is node for reader, _, _ in readers.get(value, ())):
            return True
        within = joined(view, value)
        if within is not None and _joins_rounded(view, within, readers):
            return True
    return False


def _ends(view: GraphView, node: fx.Node) -> list[fx.Node]:
    """The outputs that together carry all values of a node's one input: the node, or its pieces.

    Empty for a dropout, which scales in training; for a reshape, which costs nothing; and for a
    slice, whose range may be smaller than that of the whole."""
    if len(view.data_inputs(node)) != 1 or not moves(view, node):
        return []
    if isinstance(view.ops[node], Sum):
        pieces = list(node.users) if is_divided(view, node) else []
        return (
            pieces if len(pieces) > 1 and all(p.target is operator.getitem for p in pieces) else []
        )
    return [] if view.traits(node) & (Trait.SAME | Trait.RESHAPES) else [node]
