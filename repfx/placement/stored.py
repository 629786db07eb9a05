"""Concatenations that only batch norms read, as in a DenseNet, stored in integers.

    norm(cat(a, b))   ->   norm(cat(Q(a), Q(b)))      one scale for all parts

A kernel writes each part to memory, and the kernels of many norms read it, so integers save most of
what such a net reads and writes. But a norm evens out the ranges of its channels. One step s for
channels of different ranges may cost more than it saves, and only data tell. So these quantizers
are `optional`: `uneven` names those whose rounding, seen behind the norm, is too coarse.

    noise / signal of norm(Q(x)) = s^2 / 12 * sum gamma^2 / (var + eps) / sum gamma^2
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from functools import cache, partial

import torch
from torch import Tensor, fx, nn

from repfx.capture.model import graphs
from repfx.graph.calls import call_of
from repfx.graph.edit import take_out
from repfx.graph.moves import joins, moves
from repfx.graph.ops import Map, Sum
from repfx.graph.traits import Trait
from repfx.graph.view import GraphView
from repfx.placement.moved import (
    Place,
    is_divided,
    layers_ahead,
    takes_one_scale,
    takes_quantizer,
)
from repfx.quant import FakeQuant, Target

# 27 dB. Rounding to 8 bits leaves 1e-4 where the largest value is 4 standard deviations, but here
# all channels have the step of the widest. A trained DenseNet has 1e-3 to 2e-3 and loses 1.5 dB.
WORST = 2e-3


def before_norms(view: GraphView, layers: Collection[fx.Node], target: Target) -> list[Place]:
    """The places at concatenations that batch norms read, and at norms that read one of the parts.

    Every reader of a part and of a concatenation is a batch norm or another such concatenation, so
    that nothing is stored twice, and one of them leads into a layer of `layers`."""
    if target.between != "sums":
        return []
    ahead = layers_ahead(view, layers, every=False)
    members = {n: (n, *view.data_inputs(n)) for n in view.nodes if _takes(view, n, target)}

    def lead(node: fx.Node) -> fx.Node | None:
        return next((ahead[value] for value in members[node] if value in ahead), None)

    def sound(value: fx.Node) -> bool:
        return all(
            user in members or _is_norm(view, user) or (moves(view, user) and sound(user))
            for user in value.users
        )

    while bad := [n for n, own in members.items() if not (lead(n) and all(map(sound, own)))]:
        for node in bad:
            del members[node]
    return [
        (reader, value, ahead.get(value) or layer)
        for node, own in members.items()
        if (layer := lead(node))
        for value in own
        for reader in value.users
        if value in members or reader not in members
    ]


def uneven(view: GraphView, scales: Mapping[FakeQuant, Tensor]) -> set[FakeQuant]:
    """The optional quantizers that round too coarsely for the norms that read them."""
    found: set[FakeQuant] = set()
    gain = cache(partial(_gain, view))
    for node in view.nodes:
        quant = view.quantizer(node)
        if quant is None or quant not in scales or not quant.optional:
            continue
        noise = float(scales[quant].double().square().max()) / 12
        if any(noise * gain(norm) > WORST for norm in _norms(view, node)):
            found.add(quant)
    return found


def leave_out(model: nn.Module, quants: Container[FakeQuant] | None = None) -> None:
    """Takes quantizers out of the model's graphs, in place: these, or else all optional ones."""
    for _, graph in graphs(model):
        view = GraphView(graph)
        given = {node: quant for node in view.nodes if (quant := view.quantizer(node)) is not None}
        take_out(
            graph, [n for n, q in given.items() if (q.optional if quants is None else q in quants)]
        )


def _norms(view: GraphView, value: fx.Node) -> set[fx.Node]:
    """The batch norms that read a value, also after it was joined, moved, averaged or rounded."""
    seen, todo = {value}, [value]
    while todo:
        for reader in todo.pop().users:
            passes = joins(view, reader) or moves(view, reader)
            passes = passes or Trait.AVERAGES in view.traits(reader)
            passes = passes or view.quantizer(reader) is not None
            if reader not in seen and (passes or _is_norm(view, reader)):
                seen.add(reader)
                todo += [reader] if passes else []
    return {node for node in seen if _is_norm(view, node)}


def _is_norm(view: GraphView, node: fx.Node) -> bool:
    op = view.ops[node]
    return isinstance(op, Map) and op.kind == "bn"


def _gain(view: GraphView, norm: fx.Node) -> float:
    """sum gamma^2 / (var + eps) / sum gamma^2."""
    called = call_of(norm, view.module_of(norm))
    assert called is not None
    named = called.kind.bound(called.args, called.kwargs)
    var = view.tensor(named["running_var" if "running_var" in named else "var"]).detach().double()
    weight = named["weight"]
    gamma = torch.ones_like(var) if weight is None else view.tensor(weight).detach().double()
    return float((gamma.square() / (var + named["eps"])).sum() / gamma.square().sum())


def _takes(view: GraphView, node: fx.Node, target: Target) -> bool:
    """Whether the node joins channels that can have one scale."""
    if not joins(view, node) or not isinstance(view.ops[node], Sum):
        return False
    values = (node, *view.data_inputs(node))
    whole = all(takes_quantizer(view, v) and not is_divided(view, v) for v in values)
    return whole and takes_one_scale(view, node, target)
