"""branches: finds sums of branches that read one source, by their structure.

y = [B] ( [B] C3 x + [B] C1 x + [B] x )    at most one branch of each kind, each B there or not
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.algebra import KernelNorm
from repfx.graph.ops import Map, Op, Sum
from repfx.graph.view import GraphView
from repfx.rewrite.merge_regions import plan_merges


@dataclass(frozen=True)
class Branch:
    """One term: a convolution and its batch norm, each of which may be missing.

    A term with neither is the source itself.
    """

    conv: fx.Node | None
    norm: fx.Node | None


@dataclass(frozen=True)
class BranchSum:
    """A sum of branches, found in a graph.

    `main` has the widest kernel, `point` is 1x1 and `identity` has no convolution. `post` is the
    batch norm of the sum. `nodes` ends with it, or with the sum.
    """

    source: fx.Node
    sink: fx.Node
    nodes: tuple[fx.Node, ...]
    main: Branch
    point: Branch | None
    identity: Branch | None
    post: fx.Node | None = None

    @property
    def branches(self) -> tuple[Branch, Branch | None, Branch | None]:
        return self.main, self.point, self.identity


def branch_sums(view: GraphView) -> Iterator[BranchSum]:
    """Every sum of branches whose inner values nothing else reads, in graph order."""
    for merge in plan_merges(view).merges:
        region = merge.region
        found = None if region.kept else _read(view, region.source, region.sink, region.nodes)
        if found is not None:
            yield found


def merged_pairs(view: GraphView) -> Iterator[tuple[str, str, str, str]]:
    """The sums of a kxk and a 1x1 branch, each with a norm, that `repq` trains merged.

    Yields the paths of a kxk convolution, its norm, the 1x1 convolution and its norm. Their terms
    in the program of the weight are W * scale, where the norm computes the scale from W."""
    for node in view.nodes:
        layer = view.layer(node)
        total: Any = None if layer is None else layer.weight
        while isinstance(total, fx.Node) and view.quantizer(total):
            total = total.args[0]
        scaled = _scaled(view, total)  # by the norm of the sum, if there is one
        if scaled is not None and scaled[0].op != "get_attr":
            total = scaled[0]
        terms = _summands(total)
        pairs = [p for term in terms if (p := _plain_pair(view, term)) is not None]
        wide = [p for p in pairs if p[2] > 1]
        point = [p for p in pairs if p[2] == 1]
        others = len(terms) - len(pairs)
        identities = sum(_is_identity(view, term) for term in terms)
        if len(wide) == len(point) == 1 and others == identities <= 1:
            yield (*wide[0][:2], *point[0][:2])


def _plain_pair(view: GraphView, term: fx.Node) -> tuple[str, str, int] | None:
    """The convolution, the norm and the number of taps of a term W * scale; W is trained."""
    found = _scaled(view, term)
    if found is None or found[0].op != "get_attr":
        return None
    weight = view.tensor(found[0])
    if not isinstance(weight, nn.Parameter):
        return None
    path = str(found[0].target).rpartition(".")[0]
    return path, str(found[1].target), prod(weight.shape[2:])


def _is_identity(view: GraphView, term: fx.Node) -> bool:
    """Whether a term is the kernel of an identity, with a norm or without."""
    while term.op in ("call_function", "call_method") and term.target != operator.getitem:
        inputs = [n for n in term.all_input_nodes if n.op != "get_attr"] or term.all_input_nodes
        if len(inputs) != 1:
            return False
        term = inputs[0]
    if term.target is operator.getitem:
        norm = view.module_of(term.all_input_nodes[0])
        return isinstance(norm, KernelNorm) and norm.geometry.is_diagonal
    value = view.tensor(term) if term.op == "get_attr" else None
    return value is not None and not isinstance(value, nn.Parameter) and prod(value.shape[2:]) == 1


def _scaled(view: GraphView, term: Any) -> tuple[fx.Node, fx.Node] | None:
    """(W, norm) of a product W * scale whose scale the norm has computed from W."""
    if not isinstance(term, fx.Node) or term.target is not operator.mul:
        return None
    weight, scale = term.args
    while isinstance(scale, fx.Node) and scale.op != "call_module":
        scale = scale.args[0] if scale.args else None
    if not isinstance(scale, fx.Node) or not isinstance(view.module_of(scale), KernelNorm):
        return None
    return (weight, scale) if isinstance(weight, fx.Node) and scale.args[1] is weight else None


def _summands(node: Any) -> list[fx.Node]:
    """The terms of a sum of kernels; the smaller ones are padded, alone or together."""
    while isinstance(node, fx.Node) and node.target is F.pad:
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return []
    if node.target is operator.add:
        return [term for value in node.args for term in _summands(value)]
    return [node]


def affine_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A batch norm's scale and shift in eval mode, each (channels,): B[u] = scale * u + shift."""
    m: Any = norm
    scale = torch.rsqrt(m.running_var + m.eps)
    scale = scale if m.weight is None else scale * m.weight
    shift = -m.running_mean * scale
    return scale, shift if m.bias is None else shift + m.bias


def _read(
    view: GraphView, source: fx.Node, sink: fx.Node, nodes: tuple[fx.Node, ...]
) -> BranchSum | None:
    post, total = None, _past_identities(view, sink, source)
    op = view.ops[total]
    if isinstance(op, Map) and op.kind == "bn" and total.op == "call_module":
        post, total = total, op.x
    terms = _terms(view, total, source)
    if len(terms) < 2:
        return None
    branches = [_branch(view, t, source) for t in terms]
    if any(b is None for b in branches):
        return None
    convs = [b for b in branches if b is not None and b.conv is not None]
    rest = [b for b in branches if b is not None and b.conv is None]
    convs.sort(key=lambda b: _taps(view, b), reverse=True)
    if (
        not convs
        or len(convs) > 2
        or len(rest) > 1
        or (len(convs) == 2 and _taps(view, convs[1]) != 1)
    ):
        return None
    if _taps(view, convs[0]) == 1:
        return None
    count = sum((b.conv is not None) + (b.norm is not None) for b in (*convs, *rest))
    steps = [n for n in nodes if view.ops[n].kind != "identity"]  # type: ignore[union-attr]
    count += len(terms) - 1 + (post is not None)
    if count != len(steps):  # the region contains something else
        return None
    return BranchSum(
        source,
        sink,
        nodes,
        convs[0],
        convs[1] if len(convs) == 2 else None,
        rest[0] if rest else None,
        post,
    )


def _terms(view: GraphView, node: fx.Node, source: fx.Node) -> list[fx.Node]:
    node = _past_identities(view, node, source)
    op = view.ops[node]
    if node is source or not _plain_sum(op):
        return [node]
    return [t for value, _ in op.terms for t in _terms(view, value, source)]  # type: ignore[union-attr]


def _past_identities(view: GraphView, node: fx.Node, source: fx.Node) -> fx.Node:
    """The value before any identities: `nn.Identity`, x + 0, x * 1, ..."""
    op = view.ops[node]
    while node is not source and isinstance(op, Map) and op.kind == "identity":
        node = op.x
        op = view.ops[node]
    return node


def _plain_sum(op: Op) -> bool:
    return isinstance(op, Sum) and op.arrange is None and all(factor == 1 for _, factor in op.terms)


def _branch(view: GraphView, node: fx.Node, source: fx.Node) -> Branch | None:
    parts: dict[str, fx.Node] = {}
    for kind in ("bn", "conv"):
        node = _past_identities(view, node, source)
        op = view.ops[node]
        if (
            node is not source
            and isinstance(op, Map)
            and op.kind == kind
            and node.op == "call_module"
        ):
            parts[kind], node = node, op.x
    node = _past_identities(view, node, source)
    return Branch(parts.get("conv"), parts.get("bn")) if node is source else None


def _taps(view: GraphView, branch: Branch) -> int:
    op: Any = view.ops[branch.conv]  # type: ignore[index]
    taps: int = op.own.taps
    return taps
