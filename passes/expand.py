"""expand: turns convolutions (with their batch norm) into re-parameterizable blocks for training.

bn(conv(x))   ->   B[C3 x] + B[C(3,1) x] + B[C(1,3) x],      and `fuse` gives one convolution again

It covers 2-d convolutions with zero padding, alone or followed by a batch norm that is their only
reader. `kernel`, `stride`, `groups` and `layers` (a glob) narrow the choice. A convolution that the
block cannot represent is declined. With init="preserve" the block computes the same as before in
eval mode, up to rounding: the main branch gets whatever the other branches do not contribute,
K = (W - rest) / scale. With "reset" the block starts from its own initialisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from repfx.algebra import Kernel
from repfx.blocks import BLOCKS
from repfx.errors import CheckError, Declined, InputError, unknown
from repfx.graph.edit import free_path
from repfx.graph.ops import Map
from repfx.graph.regions import Region
from repfx.graph.view import GraphView
from repfx.rewrite.as_kernel import Lifted, assign, lifted
from repfx.rewrite.contract import Pass, Stage, register
from repfx.rewrite.kernel_of import kernel_of
from repfx.rewrite.names import weight_of
from repfx.rewrite.prove import EXACT
from repfx.rewrite.results import Result
from repfx.rewrite.weights import InFloat64
from repfx.rewrite.work import Work


@register
@dataclass(frozen=True)
class Expand(Pass):
    """Replaces convolutions by blocks.

    `block` is a name from repfx.blocks, or a class or function that takes the arguments of
    nn.Conv2d and keeps the same contract."""

    name: ClassVar[str] = "expand"
    stage: ClassVar[Stage] = Stage.EXPAND

    block: str | Callable[..., nn.Module] = "repvgg"
    kernel: int | tuple[int, int] | None = None
    stride: int | tuple[int, int] | None = None
    groups: int | None = None
    layers: str = "*"
    init: str = "preserve"

    def __post_init__(self) -> None:
        if isinstance(self.block, str) and self.block not in BLOCKS:
            raise unknown("block", self.block, BLOCKS)
        if not isinstance(self.block, str) and not callable(self.block):
            raise unknown("block", repr(self.block), BLOCKS)
        if not isinstance(self.layers, str):
            raise InputError(f"layers is a glob of names, such as 'layer1.*', not {self.layers!r}")
        for name in ("kernel", "stride"):
            value = getattr(self, name)
            pair = (
                isinstance(value, tuple)
                and len(value) == 2
                and all(isinstance(v, int) for v in value)
            )
            if not (value is None or isinstance(value, int) or pair):
                raise InputError(f"{name} is an integer or a pair of them, not {value!r}")
        if self.init not in ("preserve", "reset"):
            raise unknown("init", str(self.init), ["preserve", "reset"])

    def run(self, work: Work) -> Result:
        view = work.view()
        # All blocks are read from the graph before any is written into it.
        planned: list[tuple[Region, Lifted, str]] = []
        inserted, declined = [], []
        for region in _convolutions(view):
            conv = region.nodes[0]
            name, shape = view.name(conv), _arguments(view, conv)
            if not self._wants(name, shape):
                continue
            try:
                planned.append((region, self._block(view, region, shape), name))
            except ValueError as why:
                # The blocks in repfx.blocks raise this for a shape they cannot take.
                declined.append(Declined(name, f"no {self._title} block: {why}"))
        # The output of each new block, by the value it replaces: a later block may read that value.
        moved: dict[fx.Node, fx.Node] = {}
        for region, block, name in planned:
            path = (
                name
                if region.nodes[0].op == "call_module"
                else free_path(work.module, f"{name}_expanded")
            )
            here = replace(region, source=moved.get(region.source, region.source))
            moved[region.sink] = work.expand(here, block.module.graph, _holder(block.module), path)
            inserted.append(path)
        if not inserted and not declined:
            declined.append(
                Declined(
                    "expand",
                    "no convolution matches the given kernel, stride, groups and name (layers=)",
                )
            )
        return Result(self.name, declined=tuple(declined), inserted=tuple(inserted))

    @property
    def _title(self) -> str:
        return (
            self.block if isinstance(self.block, str) else getattr(self.block, "__name__", "given")
        )

    def _wants(self, name: str, shape: dict[str, Any]) -> bool:
        asked = {"kernel_size": self.kernel, "stride": self.stride}
        same = all(
            v is None or shape[k] == (v if isinstance(v, tuple) else (v, v))
            for k, v in asked.items()
        )
        return same and self.groups in (None, shape["groups"]) and fnmatchcase(name, self.layers)

    def _block(self, view: GraphView, region: Region, shape: dict[str, Any]) -> Lifted:
        """The block that replaces the region. Raises ValueError if the region cannot become one."""
        conv = region.nodes[0]
        like = view.tensor(weight_of(conv))
        if sum(n.target == conv.target for n in view.nodes if n.op == "call_module") > 1:
            raise ValueError("the convolution is called more than once")
        if (
            sum(
                view.tensor(weight_of(n)) is like
                for n in view.nodes
                if getattr(view.ops[n], "kind", "") == "conv"
            )
            > 1
        ):
            raise ValueError("its weight is shared with another convolution")
        if shape["padding"] is None:
            raise ValueError("it pads its sides by different amounts, or not with zeros")
        make = BLOCKS[self.block] if isinstance(self.block, str) else self.block
        with torch.device("cpu"):
            block = make(**shape).double()
        given = lifted(block)
        if self.init == "preserve":
            _fit(given, block, kernel_of(view, region, InFloat64(view, keep=False)), self._title)
        given.module.to(like).train(view.module.training)
        norm = region.nodes[-1]
        if norm is not conv and norm.op == "call_module":
            for m in given.module.modules():
                m.training = m.training and view.modules[str(norm.target)].training
        if not like.requires_grad:
            given.module.requires_grad_(False)
        return given


def _holder(module: fx.GraphModule) -> nn.Module:
    """A module with a block's children and tensors, but without its graph.

    The block's graph is inlined into the model's graph, so that there is one graph to rewrite."""
    holder = nn.Module()
    holder._modules, holder._parameters, holder._buffers = (
        module._modules,
        module._parameters,
        module._buffers,
    )
    holder._non_persistent_buffers_set = module._non_persistent_buffers_set
    constants = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
    holder.__dict__.update(constants, training=module.training)
    return holder


def _convolutions(view: GraphView) -> Iterator[Region]:
    """Each 2-d convolution, together with its batch norm where that is its only reader."""
    for node in view.nodes:
        op = view.ops[node]
        if not isinstance(op, Map) or op.kind != "conv" or op.space != (2, 1):
            continue
        reader = next(iter(node.users)) if len(node.users) == 1 else node
        after = view.ops[reader]
        nodes = (node, reader) if isinstance(after, Map) and after.kind == "bn" else (node,)
        yield Region(op.x, nodes[-1], nodes, frozenset())


def _arguments(view: GraphView, conv: fx.Node) -> dict[str, Any]:
    """The nn.Conv2d arguments of a convolution; padding is None where nn.Conv2d has no equal."""
    op: Any = view.ops[conv]
    g = op.geometry(None)
    even = g.mode == "zeros" and all(a.before == a.after for a in g.axes)
    return {
        "in_channels": g.inputs,
        "out_channels": g.outputs,
        "kernel_size": tuple(len(a.places) for a in g.axes),
        "stride": tuple(a.stride for a in g.axes),
        "padding": tuple(a.before for a in g.axes) if even else None,
        "dilation": tuple(a.gap for a in g.axes),
        "groups": g.groups,
    }


def _fit(given: Lifted, block: Any, wanted: Kernel, title: str) -> None:
    """Sets a block's kernel and shift so that the block equals `wanted`.

    The block is linear in each of the two: scale * value + rest."""
    if not (hasattr(block, "kernel") and hasattr(block, "shift")):
        raise InputError(
            f"block {title} does not name its `kernel` and `shift`, the parameters to solve for"
        )
    if wanted.geometry.axes != given.kernel.geometry.axes:
        raise InputError(f"block {title} is not a convolution of the requested shape")
    for name, part in ((block.kernel, "weight"), (block.shift, "bias")):
        parameter = block.get_parameter(name)

        def read(kernel: Kernel, part: str = part) -> Tensor:
            found = getattr(kernel, part)
            return kernel.weight.new_zeros(kernel.geometry.outputs) if found is None else found

        assign(block, name, torch.zeros_like(parameter))
        rest = read(given.kernel)
        assign(block, name, torch.ones_like(parameter))
        assign(block, name, (read(wanted) - rest) / (read(given.kernel) - rest))
    largest = max(wanted.weight.abs().amax(), block.get_parameter(block.kernel).abs().amax()).clamp(
        min=1e-30
    )
    off = (given.kernel.weight - wanted.weight).abs().amax() / largest
    if not off <= EXACT:
        raise CheckError(
            f"block {title} does not reproduce the convolution: off by {float(off):.1e}"
        )
    given.prove()
