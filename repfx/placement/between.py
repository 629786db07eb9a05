"""Places for quantizers between layers, so that nothing between two layers runs in float.

conv + skip    ->   conv + Q(skip)         the convolution and the sum become one kernel
mean(x)        ->   mean(Q(x))             an average pool between quantized layers

Only if the target asks for it:

cat(a, b)      ->   cat(Q(a), Q(b))        if every path from it leads into a layer
x * gate       ->   Q(x) * gate            if another node reads Q(x): one value instead of two
norm(permute(sum))  ->  norm(permute(Q(sum)))  a sum as above, which its kernel writes to memory
norm(cat(a, b))  ->  norm(cat(Q(a), Q(b)))  if calibration finds it fine (`stored`)

Some targets have operators from integers to integers, but none from integers to float. They need
every value in between quantized:

f(relu(conv))  ->   f(Q(relu(conv)))       every output of a convolution
a * b          ->   Q(Q(a) * Q(b))         sums, products, concatenations and tables of such values
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from repfx.graph.effects import writes
from repfx.graph.moves import joined, moved_from, moves
from repfx.graph.ops import Sum
from repfx.graph.signs import non_negative
from repfx.graph.traits import Trait
from repfx.graph.view import GraphView
from repfx.graph.vocabulary import kind_of
from repfx.placement.formats import pads_average
from repfx.placement.moved import (
    Joint,
    Place,
    is_divided,
    layers_ahead,
    moved_up,
    origins,
    takes_quantizer,
)
from repfx.placement.stored import before_norms
from repfx.quant import Target


def spell_out(module: fx.GraphModule, target: Target) -> None:
    """Writes silu(x) as x * sigmoid(x) for a target that has integer kernels only for these two."""
    modules = dict(module.named_modules())
    for node in list(module.graph.nodes) if target.between == "all" else ():
        called = modules[str(node.target)] if node.op == "call_module" else None
        if Trait.SWISH not in kind_of(node, called).traits or len(node.all_input_nodes) != 1:
            continue
        (x,) = node.all_input_nodes
        if len(x.users) > 1 and writes(node, called):
            continue  # it works in place, and others read its result
        with module.graph.inserting_before(node):
            gate = module.graph.call_function(torch.sigmoid, (x,))
            product = module.graph.call_function(torch.mul, (x, gate))
        gate.meta = product.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        module.graph.erase_node(node)


@dataclass(frozen=True)
class Layers:
    """The layers to be quantized: `inputs` maps each to its input.

    `convolutions` is a subset of them. `inside` maps nodes that become part of a layer to that
    layer. `gates` stay in float; what they average is rounded as that of the others is."""

    inputs: Mapping[fx.Node, fx.Node]
    convolutions: Collection[fx.Node]
    inside: Mapping[fx.Node, fx.Node]
    gates: Collection[fx.Node] = ()


@dataclass(frozen=True)
class Places:
    """Every place for a quantizer, in order.

    `origins` has for each value the value whose quantizer it uses, mostly the value itself. Those
    in `optional` are worth their rounding only if it turns out to be fine (see `before_norms`)."""

    all: list[Place]
    origins: dict[fx.Node, fx.Node]
    optional: frozenset[fx.Node] = frozenset()


def find_places(
    view: GraphView, layers: Layers, target: Target, inner: bool = False, optional: bool = False
) -> Places:
    """Finds the places. `inner`: another graph reads on in what this one returns.

    `optional`: also those that are left only if their rounding turns out to be fine."""
    inputs = layers.inputs
    others = _skips_and_averages(view, inputs, {*inputs, *layers.gates})
    if target.between == "all":
        others += _stretches(view, layers.convolutions, inner)
    elif target.between == "joins":
        others += _joined(view, inputs, {*inputs.values(), *(value for _, value, _ in others)})
    elif target.between == "sums":
        others += _moved_sums(view, inputs, others)
    plain = _placed(view, layers, target, others)
    stored = before_norms(view, inputs, target) if optional else []
    if not stored:
        return plain
    more = _placed(view, layers, target, others + stored, {value for _, value, _ in stored})
    needed = set(plain.all)
    shared = {more.origins.get(value) for _, value, _ in needed}
    new = {more.origins[place[1]] for place in more.all if place not in needed}
    # What is needed must stay as it is if the others are taken out.
    if not needed.issubset(more.all) or new & shared:
        return plain
    return replace(more, optional=frozenset(new))


def _placed(
    view: GraphView,
    layers: Layers,
    target: Target,
    others: list[Place],
    stored: Collection[fx.Node] = (),
) -> Places:
    """The places at layers and `others`, moved to where their values are made."""
    others = others + _averages_within(view, others)
    if target.offset == "joined":
        others = _without_float_averages(view, layers.inputs, others)
    others = [
        (n, x, layer)
        for n, x, layer in others
        if takes_quantizer(view, x) and not view.writes.through(n, x)
    ]
    joint: Joint = {}
    found = [
        *((n, x, n) for n, x in layers.inputs.items()),
        *(p for p in others if p[0] not in layers.inside),
    ]
    if target.between != "all":  # with "all", moved values are quantized again, which is harmless
        found, joint = moved_up(view, found, layers.inside, target, stored)
    found = sorted(dict.fromkeys(found), key=lambda place: view.index[place[0]])
    return Places(found, origins(view, found, joint))


def _without_float_averages(
    view: GraphView, layers: Mapping[fx.Node, fx.Node], others: list[Place]
) -> list[Place]:
    """Leaves out averages that OpenVINO gets wrong if their inputs are integers.

    A padded average of signed values needs another integer format than a layer that reads them,
    too. An average that several nodes read must be rounded for all: OpenVINO returns integers, also
    to those that read it unrounded."""
    padded = {node for node, _, _ in others if pads_average(view.ops[node])}
    read = [*layers.values(), *(value for node, value, _ in others if node not in padded)]
    shared = {moved_from(view, value) for value in read}
    rounded = {*layers.items(), *((node, value) for node, value, _ in others)}

    def whole(value: fx.Node) -> bool:
        users = [user for user in value.users if not view.is_size(user) and user.op != "output"]
        return all(
            (user, value) in rounded or (moves(view, user) and whole(user)) for user in users
        )

    def stays_float(node: fx.Node, value: fx.Node) -> bool:
        if node in padded and moved_from(view, value) in shared and not non_negative(view, value):
            return True
        return Trait.AVERAGES in view.traits(node) and len(node.users) > 1 and not whole(node)

    return [place for place in others if not stays_float(*place[:2])]


def _skips_and_averages(
    view: GraphView, layers: Collection[fx.Node], readers: Collection[fx.Node]
) -> list[Place]:
    found: list[Place] = []
    for node in view.nodes:
        op = view.ops[node]
        if isinstance(op, Sum):
            layer, value = _skip(view, op, layers)
        else:
            layer = _reader(view, node, readers)
            value = None if layer is None else _averaged(view, node)
        if layer is not None and value is not None:
            found.append((node, value, layer))
    return found


def _moved_sums(
    view: GraphView, layers: Mapping[fx.Node, fx.Node], others: list[Place]
) -> list[Place]:
    """The sums of convolutions and skips that are permuted, which ends their kernel, for one norm.

    Only where every path from them leads into a layer."""
    found: list[Place] = []
    ahead = layers_ahead(view, layers)
    for node, _, layer in others:
        value = end = _given(view, node)
        while len(end.users) == 1 and moves(view, next(iter(end.users))):
            (end,) = end.users
        after = [view.kind(user).name for user in end.users]
        sums = isinstance(view.ops[node], Sum) and value in ahead
        if sums and end is not value and after == ["norm"]:
            found.append((next(iter(value.users)), value, layer))
    return found


def _averages_within(view: GraphView, others: list[Place]) -> list[Place]:
    """The inputs of averages that are rounded themselves, as those in concatenations are."""
    rounded = {value: layer for _, value, layer in others}
    means = ((node, _averaged(view, node)) for node in view.nodes if node in rounded)
    return [(node, value, rounded[node]) for node, value in means if value is not None]


def _joined(
    view: GraphView, layers: Collection[fx.Node], rounded: Collection[fx.Node]
) -> list[Place]:
    """The inputs of concatenations, and the inputs of products that are in `rounded`.

    Only those from which every path leads into a layer. Where a concatenation is itself quantized,
    the runtime moves that to its inputs, so only inputs that a layer reads, too, are quantized
    here: otherwise the layer before would write them once in float and once in integers."""
    whole = {joined(view, value) for value in rounded}
    made = {moved_from(view, value) for value in rounded}
    found: list[Place] = []
    ahead = layers_ahead(view, layers)
    # The values that come from a layer; the model's inputs are in float anyway.
    behind: set[fx.Node] = set()
    for node in view.nodes:
        if node in layers or not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
    for node in reversed(view.nodes):
        if node not in ahead:
            continue
        goal, op = ahead[node], view.ops[node]
        if node in whole:
            whole |= {joined(view, value) for value in view.data_inputs(node)}
            found += [
                (node, value, goal)
                for value in view.data_inputs(node)
                if value in behind and moved_from(view, value) in made
            ]
            continue
        joins = isinstance(op, Sum) and op.kind == "concat" and node in behind
        if joins or Trait.PRODUCT in view.traits(node):
            found += [
                (node, value, goal) for value in view.data_inputs(node) if joins or value in rounded
            ]
    return found


def _stretches(view: GraphView, convolutions: Collection[fx.Node], inner: bool) -> list[Place]:
    """The outputs of convolutions, and what the integer operators after them read and return.

    Outputs of the model stay in float."""
    found: list[Place] = []
    layer: dict[fx.Node, fx.Node] = {}  # for a value in integers: the convolution it comes from
    for node in view.nodes:
        near = [n for n in view.data_inputs(node) if n in layer]
        value = node
        if node in convolutions:
            source, value = node, _given(view, node)
        elif near and _takes_integers(view, node):
            source, value = layer[near[0]], _given(view, node)
            found += [(node, other, source) for other in view.data_inputs(node)]
        elif near and moves(view, node):
            source = layer[near[0]]
        else:
            continue
        if inner or all(reader.op != "output" for reader in value.users):
            layer[value] = source
            if not is_divided(view, value):  # the pieces are handled one by one
                found += [(reader, value, source) for reader in value.users]
    return found


def _takes_integers(view: GraphView, node: fx.Node) -> bool:
    op, traits = view.ops[node], view.traits(node)
    if isinstance(op, Sum):
        several = len({*op.values}) == len(op.terms) > 1
        return (
            several and op.kind in ("add", "concat") and all(factor == 1 for _, factor in op.terms)
        )
    pair = len(view.data_inputs(node)) == 2
    return Trait.TABLE in traits or (Trait.PRODUCT in traits and pair)


def _skip(
    view: GraphView, op: Sum, layers: Collection[fx.Node]
) -> tuple[fx.Node | None, fx.Node | None]:
    """The layer whose output is summed, and the other value."""
    if op.kind != "add" or op.arrange is not None or len(op.terms) != 2:
        return None, None
    a, b = op.values
    if a is b or any(factor != 1 for _, factor in op.terms):
        return None, None
    # A dropout between them is gone in the deployed file.
    mains = {n: layer for n in (a, b) if (layer := _made_by(view, n)) in layers}
    if not mains:
        return None, None
    main = max(mains, key=view.index.__getitem__)
    return mains[main], a if main is b else b


def _made_by(view: GraphView, value: fx.Node) -> fx.Node | None:
    """What gives this value, before dropouts; None where others read it too."""
    while len(value.users) == 1 and Trait.SAME in view.traits(value):
        values = view.values_of(value)
        if len(values) != 1:  # a copy of a weight, say
            return None
        (value,) = values
    return value if len(value.users) == 1 else None


def _given(view: GraphView, node: fx.Node) -> fx.Node:
    """A layer's output after the activations that its quantizer can take over."""
    while len(node.users) == 1:
        (reader,) = node.users
        if not view.traits(reader) & (Trait.CLIPS | Trait.SAME):
            break
        node = reader
    return node


def _averaged(view: GraphView, node: fx.Node) -> fx.Node | None:
    values = view.values_of(node)
    return values[0] if Trait.AVERAGES in view.traits(node) and len(values) == 1 else None


def _reader(view: GraphView, node: fx.Node, layers: Collection[fx.Node]) -> fx.Node | None:
    """The layer that reads this node's output, directly or after a few single readers."""
    for _ in range(4):
        users = [user for user in node.users if not view.is_size(user)]
        found = next((user for user in users if user in layers), None)
        if found is not None or len(users) != 1:
            return found
        (node,) = users
    return None
