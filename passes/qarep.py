"""qarep: moves the batch norms of a multi-branch block so that it survives INT8 (QARepVGG).

QARepVGG is arXiv 2212.01593.

    S0  B3[C3 x] + B1[C1 x] + B0[x]   ->   S4  B[ B3[C3 x] + C1' x + x ]

The trained function is kept in eval mode, up to rounding. With a batch norm written as s u + c:

    C1' = s1 C1 + diag(s0 - 1),    B = u + c1 + c0

and the statistics of B follow from the norms of the branches.

It covers sums of one kxk branch, at most one 1x1 branch and at most one identity, with any groups
and stride, whose values nothing else reads. If there is an identity but no 1x1 branch, one is
added. A norm that the sum has already stays, and takes the shifts. The variance of a new one is
derived as if the branches were independent; `repfx.calibration.match_statistics` measures it on
data. `variant` names a row of the paper's table, see `repfx.blocks.QARepVGG`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repfx.algebra import Kernel
from repfx.blocks.repvgg import VARIANTS, Norms
from repfx.errors import Declined, unknown
from repfx.graph.edit import drop_unreferenced, free_path, put_module, references
from repfx.graph.regions import Region
from repfx.graph.view import GraphView
from repfx.rewrite.as_kernel import lifted
from repfx.rewrite.branches import Branch, BranchSum, affine_of, branch_sums
from repfx.rewrite.contract import Pass, Stage, register
from repfx.rewrite.kernel_of import kernel_of
from repfx.rewrite.results import Result
from repfx.rewrite.weights import InFloat64
from repfx.rewrite.work import Work
from repfx.tolerances import MERGED


@register
@dataclass(frozen=True)
class QARep(Pass):
    """Rewrites each block as `variant`, a row of the paper's table.

    With `init="reset"` the rewritten blocks, and only those, get fresh weights and statistics, to
    be trained from scratch."""

    name: ClassVar[str] = "qarep"
    stage: ClassVar[Stage] = Stage.STRUCTURE

    variant: str = "S4"
    init: str = "preserve"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise unknown("variant", str(self.variant), VARIANTS)
        if self.init not in ("preserve", "reset"):
            raise unknown("init", str(self.init), ["preserve", "reset"])

    def run(self, work: Work) -> Result:
        view = work.view()
        inserted, declined = [], []
        moved: dict[fx.Node, fx.Node] = {}
        for block in branch_sums(view):
            keep = VARIANTS[self.variant]
            why = _why_not(view, block, keep)
            if not why and self.init == "preserve" and _has_form(block, keep):
                why = f"it has the form of {self.variant} already"
            if not why:
                target = _target(view, block, keep)
                why = "" if self.init == "reset" else _differs(view, block, target)
            if why:
                declined.append(Declined(view.name(block.sink), why))
                continue
            if self.init == "reset":
                target.reset()
            moved[block.sink] = _put(work.module, block, target, moved)
            inserted.append(target.chains[0][0][0])
        if not inserted and not declined:
            declined.append(
                Declined("qarep", "no sum of a kxk branch with a 1x1 branch or an identity")
            )
        return Result(self.name, declined=tuple(declined), inserted=tuple(inserted))


LARGEST = 1e3  # the largest weight that an identity may become
Chain = tuple[tuple[str, nn.Module], ...]  # a sequence of layers, each with its path


@dataclass(frozen=True)
class _Target:
    """What a block becomes: the sum of some chains of layers, and the norm of that sum.

    Each chain reads the source; an empty chain is the identity. The main convolution comes
    first."""

    chains: tuple[Chain, ...]
    post: Chain

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        for chain in (*self.chains, self.post):
            yield from chain

    def reset(self) -> None:
        for _, layer in self.layers():
            layer.reset_parameters()  # type: ignore[operator]


class _Sum(nn.Module):
    """A target as a module, so that its kernel can be computed."""

    def __init__(self, target: _Target) -> None:
        super().__init__()
        self.chains = nn.ModuleList(
            nn.Sequential(*(layer for _, layer in chain)) for chain in target.chains
        )
        self.post = nn.Sequential(*(layer for _, layer in target.post))

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.chains[0](x)
        for chain in self.chains[1:]:
            total = total + chain(x)
        result: Tensor = self.post(total)
        return result


def _differs(view: GraphView, block: BranchSum, target: _Target) -> str:
    """Why the target differs from the block by more than rounding; empty if it does not."""
    region = Region(block.source, block.sink, block.nodes, frozenset())
    want = kernel_of(view, region, InFloat64(view, keep=False))
    got = lifted(_Sum(target)).kernel
    dtype = next(p.dtype for _, layer in target.layers() for p in layer.parameters())
    pairs = [(want.weight, got.weight), (_bias(want), _bias(got))]
    largest = max(float(w.abs().amax()) for w, _ in pairs)
    off = max(float((w - g).abs().amax()) for w, g in pairs) / (largest or 1.0)
    if off <= MERGED[dtype]:
        return ""
    if math.isfinite(off):
        return f"rounding the weights of this variant would change the result by {off:.1e}"
    return "its weights would not be finite; use init=reset to start from fresh ones"


def _bias(kernel: Kernel) -> Tensor:
    return kernel.weight.new_zeros(1) if kernel.bias is None else kernel.bias


def _put(
    module: fx.GraphModule, block: BranchSum, target: _Target, moved: dict[fx.Node, fx.Node]
) -> fx.Node:
    """Replaces the block by the target and returns the target's output node."""
    graph, before = module.graph, references(module.graph)
    x = moved.get(block.source, block.source)
    replaced = []

    def through(chain: Chain, value: fx.Node) -> fx.Node:
        for path, layer in chain:
            old = put_module(module, path, layer.train(module.training))
            replaced.extend([] if old is None or old is layer else [old])
            value = graph.call_module(path, (value,))
        return value

    with graph.inserting_before(block.sink):
        y = through(target.chains[0], x)
        for chain in target.chains[1:]:
            y = graph.call_function(torch.add, (y, through(chain, x)))
        y = through(target.post, y)
    y.meta = dict(block.sink.meta)
    block.sink.replace_all_uses_with(y)
    for node in sorted(block.nodes, reverse=True):
        graph.erase_node(node)
    drop_unreferenced(module, before, replaced)
    return y


def _target(view: GraphView, block: BranchSum, keep: Norms) -> _Target:
    assert block.main.conv is not None
    main: Any = view.modules[str(block.main.conv.target)]
    parts = _Parts(*(_Part.of(view, b, main.weight) for b in block.branches))
    weak = _weak(parts, block, keep)
    point, left = _point(parts, block, keep, main.weight, weak)
    trunk, left = _trunk(view, block, parts.main, left, keep)
    chains = [trunk]
    if point is not None:
        old = None if block.point is None else block.point.conv
        wanted = f"{trunk[0][0]}_1x1"
        path = free_path(view.module, wanted) if old is None else str(old.target)
        norm = _unit(_norm(view, block.point), parts.point, weak) if keep.point else ()
        chains.append(((path, _conv(main, point, None)), *norm))
    if block.identity is not None:
        chains.append(_norm(view, block.identity) if keep.skip else ())
    post: Chain = ()
    if block.post is not None:
        ((name, norm_of_sum),) = _norm(view, Branch(None, block.post))
        post = ((name, _before(norm_of_sum, left)),)
    elif keep.post:
        after = block.main.norm or block.main.conv
        post = ((free_path(view.module, f"{after.target}_post"), _post(main, parts, left)),)
    return _Target(tuple(chains), post)


def _trunk(
    view: GraphView, block: BranchSum, part: _Part, left: Tensor, keep: Norms
) -> tuple[Chain, Tensor]:
    """The main branch, and the shift that remains for the norm of the sum.

    If the variant keeps the branch's norm, convolution and norm stay as they are; otherwise the
    norm is folded into the weight. If there is no norm of the sum, the main branch also takes the
    shift of the norms that the other branches lost."""
    assert block.main.conv is not None and part.weight is not None
    path = str(block.main.conv.target)
    main: Any = view.modules[path]
    norm = _norm(view, block.main)
    if norm and not keep.main:
        weight = part.weight * _rows(part.scale, part.weight)
        return ((path, _conv(main, weight, None)),), left + part.shift
    if keep.post or not left.any():
        return ((path, main), *norm), left
    if norm:
        ((name, layer),) = norm
        assert isinstance(layer, _BatchNorm)
        return ((path, main), (name, _shifted(layer, left))), torch.zeros_like(left)
    return ((path, _conv(main, part.weight, left + part.shift)),), torch.zeros_like(left)


def _weak(parts: _Parts, block: BranchSum, keep: Norms) -> Tensor:
    """The channels whose norm in the 1x1 branch scales too little to carry an identity as well."""
    if not keep.point or keep.skip or block.identity is None or parts.point.weight is None:
        return torch.zeros_like(parts.main.shift, dtype=torch.bool)
    return (parts.identity.scale - 1).abs() > LARGEST * parts.point.scale.abs()


def _point(
    parts: _Parts, block: BranchSum, keep: Norms, like: Tensor, weak: Tensor
) -> tuple[Tensor | None, Tensor]:
    """The weight of the 1x1 branch (None without one), and the shift of the norms removed.

    An identity that loses its norm stays as x, and the norm's scale is added to this weight:
    C1' = s1 C1 + diag(s0 - 1), or C1 + diag((s0 - 1) / s1) if this branch keeps its norm and s1 is
    not `weak`."""
    out = like.shape[0]
    left, into = like.new_zeros(out), like.new_ones(out)
    weight = parts.point.weight
    if weight is not None and keep.point and block.point is not None and block.point.norm:
        into = torch.where(weak, 1.0, parts.point.scale)
        weight = torch.where(_rows(weak, weight), weight * _rows(parts.point.scale, weight), weight)
    elif weight is not None:
        weight, left = weight * _rows(parts.point.scale, weight), left + parts.point.shift
    if block.identity is not None and not keep.skip:
        if weight is None:
            weight = like.new_zeros(out, like.shape[1], *(1,) * (like.dim() - 2))
        weight = weight + _diagonal((parts.identity.scale - 1) / into, like.shape[1], weight)
        left = left + parts.identity.shift
    return weight, left


def _unit(norm: Chain, part: _Part, weak: Tensor) -> Chain:
    """The norm of the 1x1 branch, whose convolution loses its bias.

    Where it is `weak` it gets a scale of 1, and keeps its shift."""
    if not norm or not (weak.any() or part.bias.any()):
        return norm
    ((path, layer),) = norm
    twin = _twin(layer)
    with torch.no_grad():
        twin.running_mean.sub_(part.bias)
        unit = torch.sqrt(twin.running_var + twin.eps)
        twin.weight.copy_(torch.where(weak, unit, twin.weight))
        twin.bias.copy_(torch.where(weak, part.shift + twin.running_mean, twin.bias))
    return ((path, twin),)


def _norm(view: GraphView, branch: Branch | None) -> Chain:
    if branch is None or branch.norm is None:
        return ()
    path = str(branch.norm.target)
    return ((path, view.modules[path]),)


@dataclass(frozen=True)
class _Part:
    """A branch in numbers: s (W x) + c, and the mean and variance of its output.

    c includes s times the bias of the convolution. All zeros if there is no such branch."""

    weight: Tensor | None
    bias: Tensor
    scale: Tensor
    shift: Tensor
    mean: Tensor
    var: Tensor

    @staticmethod
    def of(view: GraphView, branch: Branch | None, like: Tensor) -> _Part:
        zero, one = like.new_zeros(()), like.new_ones(())
        if branch is None:
            return _Part(None, zero, zero, zero, zero, zero)
        conv: Any = None if branch.conv is None else view.modules[str(branch.conv.target)]
        weight = None if conv is None else conv.weight.detach()
        bias = zero if conv is None or conv.bias is None else conv.bias.detach()
        if branch.norm is None:
            return _Part(weight, bias, one, bias, bias, one)
        norm: Any = view.modules[str(branch.norm.target)]
        scale, shift = (t.detach() for t in affine_of(norm))
        gamma = one if norm.weight is None else norm.weight.detach()
        beta = zero if norm.bias is None else norm.bias.detach()
        return _Part(weight, bias, scale, shift + scale * bias, beta, gamma.square())


@dataclass(frozen=True)
class _Parts:
    main: _Part
    point: _Part
    identity: _Part

    def moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the sum, as if the branches were independent."""
        parts = (self.main, self.point, self.identity)
        # Half-precision values are summed in float32.
        zero = like.new_zeros(like.shape[0], dtype=torch.float32)
        mean, var = (
            sum((v for v in values), zero)
            for values in zip(*((p.mean, p.var) for p in parts), strict=True)
        )
        return mean.to(like), var.to(like)


def _has_form(block: BranchSum, keep: Norms) -> bool:
    """Whether the block has a norm where the variant has one, and nowhere else."""
    if block.point is None:
        return False
    branches = zip(block.branches, keep[:3], strict=True)
    same = all(b is None or (b.norm is not None) == has for b, has in branches)
    return same and (block.post is not None) == keep.post


def _why_not(view: GraphView, block: BranchSum, keep: Norms) -> str:
    calls = [n for n in block.nodes if n.op == "call_module"]
    if any(
        sum(m.op == "call_module" and m.target == n.target for m in view.nodes) > 1 for n in calls
    ):
        return "one of its layers is called more than once"
    if block.point is None and block.identity is None:
        return "it has no 1x1 branch and no identity"
    if block.post is not None and not keep.post:
        return "its sum has a batch norm, and this variant has none there"
    if block.point is not None and block.point.conv is not None and block.main.conv is not None:
        one, main = (view.modules[str(n.target)] for n in (block.point.conv, block.main.conv))
        if one.groups != main.groups:
            return "its branches have different groups"
    return ""


def _rows(values: Tensor, weight: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (weight.dim() - 1)) if values.dim() else values


def _diagonal(values: Tensor, width: int, like: Tensor) -> Tensor:
    """The 1x1 kernel (out, width, 1, ...) that scales channels, in groups of `width` inputs."""
    at = torch.arange(like.shape[0], device=like.device)
    found = torch.zeros_like(like)
    found.flatten(2)[at, at % width, 0] = values.expand(like.shape[0])
    return found


def _conv(main: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A convolution like `main` with another kernel, centred on the kernel of `main`."""
    taps = tuple(weight.shape[2:])
    pads = main.padding
    if taps != main.kernel_size:
        whole = zip(main.dilation, main.kernel_size, strict=True)
        before = {"valid": [0] * len(taps), "same": [d * (k - 1) // 2 for d, k in whole]}
        pads = tuple(
            p - d * (k - n) // 2
            for p, d, k, n in zip(
                before.get(main.padding, main.padding),
                main.dilation,
                main.kernel_size,
                taps,
                strict=True,
            )
        )
    sizes = (
        main.in_channels,
        main.out_channels,
        taps,
        main.stride,
        pads,
        main.dilation,
        main.groups,
    )
    layer: nn.Module = type(main)(*sizes, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), main.weight.requires_grad)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
    return layer


def _shifted(norm: _BatchNorm, left: Tensor) -> nn.Module:
    """A copy of the batch norm with `left` added to its shift; the original may be shared."""
    if not left.any():
        return norm
    twin: nn.Module = _twin(norm)
    with torch.no_grad():
        twin.bias.add_(left)  # type: ignore[operator]
    return twin


def _before(norm: nn.Module, left: Tensor) -> nn.Module:
    """A copy of the batch norm that adds `left` to its input; its statistics stay exact."""
    if not left.any():
        return norm
    twin = copy.deepcopy(norm)
    with torch.no_grad():
        twin.running_mean.sub_(left)  # type: ignore[operator]
    return twin


def _twin(norm: Any) -> Any:
    """A copy of the batch norm with a scale and a shift; the original may be shared."""
    like = norm.running_mean
    twin = type(norm)(
        norm.num_features, norm.eps, norm.momentum, device=like.device, dtype=like.dtype
    )
    twin.load_state_dict(norm.state_dict(), strict=False)
    return twin


def _post(main: Any, parts: _Parts, left: Tensor) -> nn.Module:
    """A batch norm that adds `left` in eval mode and has the statistics of its input."""
    mean, var = parts.moments(main.weight.detach())
    kinds = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
    kind: type[_BatchNorm] = kinds[type(main)]
    norm = kind(main.out_channels, device=main.weight.device, dtype=main.weight.dtype)
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.copy_(mean - left)
        norm.running_var.copy_(var)
        norm.weight.copy_(torch.sqrt(var + norm.eps))
        norm.bias.copy_(mean)
    return norm.requires_grad_(main.weight.requires_grad)
