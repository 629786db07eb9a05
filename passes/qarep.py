"""qarep: where the batch norms of a multi-branch block must stand so that it survives INT8
(QARepVGG, arXiv 2212.01593).

    S0  B3[C3 x] + B1[C1 x] + B0[x]   ->   S4  B[ B3[C3 x] + C1' x + x ]

Trained weights are kept exactly, in eval mode. With a batch norm as s u + c:

    C1' = s1 C1 + diag(s0 - 1),    B = u + c1 + c0, its statistics implied by the branches' norms

Cases: sums of one kxk branch, at most one 1x1 branch and at most one identity, of modules read by
nothing else; groups and strides included. Where there is an identity and no 1x1 branch, one is
made. `variant` names a row of the paper's table, as `repfx.blocks.QARepVGG` lists them; S0, Eq6 and
S1 are the structure that is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repfx.blocks.repvgg import VARIANTS, Norms
from repfx.errors import Declined, unknown
from repfx.graph.edit import free_path, put_module
from repfx.graph.view import GraphView
from repfx.rewrite.branches import BranchSum, affine_of, branch_sums
from repfx.rewrite.contract import Pass, Result, Stage, register
from repfx.rewrite.work import Work


@register
@dataclass(frozen=True)
class QARep(Pass):
    """`variant`: a row of the paper's table. `init="reset"`: fresh weights and statistics, to train
    from scratch.
    """

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
            why = _why_not(view, block)
            if why:
                declined.append(Declined(view.name(block.sink), why))
            else:
                inserted.append(self._rewrite(work, view, block, moved))
        if not inserted and not declined:
            declined.append(
                Declined("qarep", "no sum of a kxk branch with a 1x1 branch or an identity")
            )
        return Result(self.name, declined=tuple(declined), inserted=tuple(inserted))

    def _rewrite(
        self, work: Work, view: GraphView, block: BranchSum, moved: dict[fx.Node, fx.Node]
    ) -> str:
        keep = VARIANTS[self.variant]
        modules = {n: view.modules[str(n.target)] for n in block.nodes if n.op == "call_module"}
        conv3: Any = modules[block.main.conv]  # type: ignore[index]
        like, out = conv3.weight, conv3.out_channels
        branches = {"3": block.main, "1": block.point, "0": block.identity}
        parts = {k: _Part.of(modules, b, like) for k, b in branches.items()}
        zero = like.new_zeros(out, dtype=torch.float32)  # sums of half numbers in more
        mean = sum((p.mean for p in parts.values()), zero).to(like)
        var = sum((p.var for p in parts.values()), zero).to(like)
        left = like.new_zeros(out)  # shifts that have lost their batch norm
        point = parts["1"].weight
        if block.identity is not None and not keep.skip:
            scale = parts["0"].scale
            if point is None:
                point = like.new_zeros(out, like.shape[1], *(1,) * (like.dim() - 2))
            into = (
                parts["1"].scale if keep.point and block.point is not None else like.new_ones(out)
            )
            if not (keep.point and block.point is not None):
                point = point * _rows(parts["1"].scale, point)
                left = left + parts["1"].shift
            point = point + _diagonal((scale - 1) / into, like.shape[1], point)
            left = left + parts["0"].shift
        elif block.point is not None and not keep.point:
            assert point is not None
            point, left = point * _rows(parts["1"].scale, point), left + parts["1"].shift

        with work.module.graph.inserting_before(block.sink):
            return self._write(work, view, block, moved, parts, point, left, mean, var, keep)

    def _write(
        self,
        work: Work,
        view: GraphView,
        block: BranchSum,
        moved: dict[fx.Node, fx.Node],
        parts: dict[str, _Part],
        point: Tensor | None,
        left: Tensor,
        mean: Tensor,
        var: Tensor,
        keep: Norms,
    ) -> str:
        graph, module = work.module.graph, work.module
        x = moved.get(block.source, block.source)
        conv3, norm3 = block.main.conv, block.main.norm
        assert conv3 is not None
        main: Any = view.modules[str(conv3.target)]
        gone = [str(n.target) for n in block.nodes if n.op == "call_module"]

        def call(path: str, layer: nn.Module, value: fx.Node) -> fx.Node:
            put_module(module, path, layer.train(module.training))
            if path in gone:
                gone.remove(path)
            return graph.call_module(path, (value,))

        if norm3 is None or keep.main:
            y = call(str(conv3.target), main, x)
            if norm3 is not None:
                kept: Any = view.modules[str(norm3.target)]
                y = call(str(norm3.target), kept if keep.post else _shifted(kept, left), y)
        else:
            weight = main.weight * _rows(parts["3"].scale, main.weight)
            y, left = call(str(conv3.target), _conv(main, weight, None), x), left + parts["3"].shift
        if point is not None:
            old = block.point.conv if block.point is not None else None
            path = str(old.target) if old is not None else free_path(module, f"{conv3.target}_1x1")
            z = call(path, _conv(main, point, None), x)
            if block.point is not None and block.point.norm is not None and keep.point:
                z = call(
                    str(block.point.norm.target), view.modules[str(block.point.norm.target)], z
                )
            y = graph.call_function(torch.add, (y, z))
        if block.identity is not None:
            z = x
            if keep.skip and block.identity.norm is not None:
                z = call(
                    str(block.identity.norm.target),
                    view.modules[str(block.identity.norm.target)],
                    x,
                )
            y = graph.call_function(torch.add, (y, z))
        if keep.post:
            path = free_path(module, f"{norm3.target if norm3 is not None else conv3.target}_post")
            y = call(path, _post(main, mean, var, left), y)
        y.meta = dict(block.sink.meta)
        moved[block.sink] = y
        block.sink.replace_all_uses_with(y)
        for node in sorted(block.nodes, reverse=True):
            graph.erase_node(node)
        for path in gone:
            parent, _, name = path.rpartition(".")
            del module.get_submodule(parent)._modules[name]
        if self.init == "reset":
            for layer in {
                id(n): module.get_submodule(str(n.target))
                for n in graph.nodes
                if n.op == "call_module"
            }.values():
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()  # type: ignore[operator]
        return str(conv3.target)


@dataclass(frozen=True)
class _Part:
    """A branch in numbers: s (W x) + c, and the mean and variance that its norm has seen of it."""

    weight: Tensor | None
    scale: Tensor
    shift: Tensor
    mean: Tensor
    var: Tensor

    @staticmethod
    def of(modules: dict[fx.Node, nn.Module], branch: Any, like: Tensor) -> _Part:
        zero, one = like.new_zeros(()), like.new_ones(())
        if branch is None:
            return _Part(None, zero, zero, zero, zero)
        conv: Any = None if branch.conv is None else modules[branch.conv]
        weight = None if conv is None else conv.weight.detach()
        if branch.norm is None:
            bias = zero if conv is None or conv.bias is None else conv.bias.detach()
            return _Part(weight, one, bias, bias, one)
        norm: Any = modules[branch.norm]
        scale, shift = (t.detach() for t in affine_of(norm))
        gamma = one if norm.weight is None else norm.weight.detach()
        beta = zero if norm.bias is None else norm.bias.detach()
        if conv is not None and conv.bias is not None:
            shift = shift + scale * conv.bias.detach()
        return _Part(weight, scale, shift, beta, gamma.square())


def _why_not(view: GraphView, block: BranchSum) -> str:
    calls = [n for n in block.nodes if n.op == "call_module"]
    if any(
        sum(m.op == "call_module" and m.target == n.target for m in view.nodes) > 1 for n in calls
    ):
        return "a layer of it is called more than once"
    if block.point is None and block.identity is None:
        return "it has no 1x1 branch and no identity"
    if block.point is not None and block.point.conv is not None and block.main.conv is not None:
        one, main = (view.modules[str(n.target)] for n in (block.point.conv, block.main.conv))
        if one.groups != main.groups:
            return "its branches have different groups"
    return ""


def _rows(values: Tensor, weight: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (weight.dim() - 1)) if values.dim() else values


def _diagonal(values: Tensor, width: int, like: Tensor) -> Tensor:
    """The 1x1 kernel (out, width, 1, ...) of a scale by channel, in groups of `width` inputs."""
    at = torch.arange(like.shape[0], device=like.device)
    found = torch.zeros_like(like)
    found.flatten(2)[at, at % width, 0] = values.expand(like.shape[0])
    return found


def _conv(main: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A convolution like `main` of another kernel, centred on its own."""
    taps = tuple(weight.shape[2:])
    pads = tuple(
        p - d * (k - n) // 2
        for p, d, k, n in zip(main.padding, main.dilation, main.kernel_size, taps, strict=True)
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
    """The batch norm with `left` on top of its shift; a new one, since another call may read
    this."""
    if not left.any():
        return norm
    twin = type(norm)(
        norm.num_features, norm.eps, norm.momentum, device=left.device, dtype=left.dtype
    )
    twin.load_state_dict(norm.state_dict(), strict=False)
    with torch.no_grad():
        twin.bias.add_(left)
    return twin


def _post(main: Any, mean: Tensor, var: Tensor, left: Tensor) -> nn.Module:
    """A batch norm that adds `left` in eval mode and has the statistics of what it reads."""
    kinds = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
    kind: type[_BatchNorm] = kinds[type(main)]
    norm = kind(main.out_channels, device=main.weight.device, dtype=main.weight.dtype)
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.copy_(mean - left)
        norm.running_var.copy_(var)
        norm.weight.copy_(torch.sqrt(var + norm.eps))
        norm.bias.copy_(mean)
    return norm
