"""The vocabulary: spellings of one operator mean the same, and what a row claims is so."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import repfx
from repfx.graph.ops import Map, Sum
from repfx.graph.signs import non_negative
from repfx.graph.traits import Trait
from repfx.graph.view import GraphView
from repfx.graph.vocabulary import KINDS, UNKNOWN, kind_of_layer
from repfx.quant import FakeQuant

aten = torch.ops.aten
TARGETS = ("tensorrt", "onnxruntime", "openvino")


class Between(nn.Module):
    """conv, the operator, conv: the quantizers' places and grids depend on the operator."""

    def __init__(self, name: str, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        # What is linear would merge with the convolutions, were there nothing between.
        self.before: nn.Module = nn.Hardswish() if name in LINEAR else nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.before(self.first(x))))


LINEAR = ("average pool", "transpose", "concatenation", "zero padding", "dropout")

# The spellings of one operator, each a function of a value (n, 4, 8, 8), or a layer.
SAME: dict[str, list[Any]] = {
    "max(x, 0)": [
        nn.ReLU(),
        F.relu,
        torch.relu,
        lambda x: x.relu(),
        lambda x: F.relu_(x.clone()),
        aten.relu.default,
        lambda x: x.clamp(min=0),
        lambda x: x.clamp_min(0),
        lambda x: torch.clamp(x, 0),
        lambda x: torch.clip(x, min=0.0),
        lambda x: x.clip(0),
        lambda x: F.threshold(x, 0, 0),
        nn.Threshold(0, 0),
    ],
    "min(max(x, 0), 6)": [
        nn.ReLU6(),
        F.relu6,
        lambda x: x.clamp(0, 6),
        lambda x: torch.clamp(x, min=0, max=6),
        lambda x: F.hardtanh(x, 0, 6),
        nn.Hardtanh(0, 6),
        lambda x: aten.clamp.default(x, 0, 6),
        lambda x: aten.hardtanh.default(x, 0, 6),
    ],
    "clamp(x, -1, 1)": [
        nn.Hardtanh(),
        F.hardtanh,
        lambda x: x.clamp(-1, 1),
        lambda x: torch.clip(x, -1, 1),
    ],
    "sigmoid": [
        nn.Sigmoid(),
        torch.sigmoid,
        F.sigmoid,
        lambda x: x.sigmoid(),
        torch.special.expit,
        aten.sigmoid.default,
    ],
    "silu": [nn.SiLU(), F.silu, aten.silu.default],
    "leaky relu": [nn.LeakyReLU(), F.leaky_relu, aten.leaky_relu.default],
    "max pool": [
        nn.MaxPool2d(2),
        lambda x: F.max_pool2d(x, 2),
        lambda x: torch.max_pool2d(x, 2, 2),
        lambda x: aten.max_pool2d.default(x, [2, 2], [2, 2]),
    ],
    "adaptive max pool": [
        nn.Sequential(nn.ReLU(), nn.AdaptiveMaxPool2d(1)),
        lambda x: F.adaptive_max_pool2d(F.relu(x), 1),
    ],
    "average pool": [
        nn.AvgPool2d(2),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, (2, 2), 2),
        lambda x: aten.avg_pool2d.default(x, [2, 2]),
    ],
    "mean over space": [
        nn.AdaptiveAvgPool2d(1),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: x.mean((2, 3), keepdim=True),
        lambda x: torch.mean(x, dim=(2, 3), keepdim=True),
        lambda x: aten.adaptive_avg_pool2d.default(x, [1, 1]),
        lambda x: aten.mean.dim(x, [2, 3], True),
    ],
    "transpose": [
        lambda x: x.transpose(2, 3),
        lambda x: torch.transpose(x, 2, 3),
        lambda x: x.swapaxes(2, 3),
        lambda x: torch.swapaxes(x, 2, 3),
        lambda x: x.swapdims(3, 2),
        lambda x: aten.transpose.int(x, 2, 3),
    ],
    "concatenation": [
        lambda x: torch.cat([x, x + 1], 1)[:, :4],
        lambda x: torch.concat((x, x + 1), dim=1)[:, :4],
        lambda x: torch.concatenate([x, x + 1], **{"axis": 1})[:, :4],
    ],
    "x * gate": [
        lambda x: x * torch.sigmoid(x),
        lambda x: torch.mul(x, x.sigmoid()),
        lambda x: x.mul(F.sigmoid(x)),
        lambda x: operator.mul(x, torch.sigmoid(x)),
        lambda x: torch.multiply(x, torch.sigmoid(x)),
        lambda x: aten.mul.Tensor(x, torch.sigmoid(x)),
    ],
    "nearest resize": [
        nn.Upsample(scale_factor=2),
        nn.UpsamplingNearest2d(scale_factor=2),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.interpolate(x, None, 2, "nearest"),
    ],
    "zero padding": [
        nn.ZeroPad2d(1),
        nn.ConstantPad2d(1, 0.0),
        lambda x: F.pad(x, [1] * 4),
        lambda x: F.pad(x, (1, 1, 1, 1), "constant", 0),
        lambda x: torch.constant_pad_nd(x, [1] * 4),
        lambda x: aten.constant_pad_nd.default(x, [1, 1, 1, 1]),
    ],
    "dropout": [nn.Dropout(), nn.Identity(), nn.Dropout2d(), lambda x: x.contiguous()],
}


def described(model: nn.Module, target: str) -> list[Any]:
    """Every quantizer in order: its grid, what it reads, by kinds, and the kinds of its readers."""
    found = repfx.transform(model, ["ptq"], example=torch.randn(1, 3, 10, 10), target=target)
    view = GraphView(found)

    def kind(node: fx.Node) -> str:
        quantizer = view.quantizer(node)
        if quantizer is not None:
            return "weight" if quantizer.of_weight else "quantizer"
        layer = view.layer(node)
        return (
            f"layer {layer.path}" if layer else "input" if node.op == "placeholder" else "operator"
        )

    return [
        (kind(n.args[0]), view.quantizer(n).grid, sorted(map(kind, n.users)))  # type: ignore
        for n in view.nodes
        if view.quantizer(n) is not None
    ]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SAME)
def test_every_spelling_has_the_same_quantizers(name: str, target: str) -> None:
    first, *others = SAME[name]
    want = described(Between(name, first).eval(), target)
    assert len(want) >= 4  # two inputs, two weights
    for i, other in enumerate(others, 1):
        assert described(Between(name, other).eval(), target) == want, f"{name}, spelling {i}"


@pytest.mark.parametrize("name", SAME)
def test_every_spelling_has_the_same_op_and_sign(name: str) -> None:
    found = set()
    for act in SAME[name]:
        traced = repfx.transform(Between(name, act).eval(), [], example=torch.randn(1, 3, 10, 10))
        view = GraphView(traced)
        (last,) = (n for n in view.nodes if (layer := view.layer(n)) and layer.path == "last")
        op = view.ops[last.args[0]]  # type: ignore[index]
        kind = getattr(op, "kind", "")
        same = "" if kind in ("dropout", "identity", "conv") else kind  # a no-op may be gone
        found.add((same, non_negative(view, last.args[0])))  # type: ignore[arg-type]
    assert len(found) == 1, found
    assert {sign for _, sign in found} == {name in NEVER_NEGATIVE}


NEVER_NEGATIVE = ("max(x, 0)", "min(max(x, 0), 6)", "sigmoid", "adaptive max pool")
KEEP_THE_SIGN = ("max pool", "average pool", "mean over space", "transpose", "nearest resize")


@pytest.mark.parametrize("name", [*KEEP_THE_SIGN, "leaky relu", "silu", "clamp(x, -1, 1)"])
def test_the_sign_goes_through_what_keeps_it(name: str) -> None:
    for act in SAME[name]:
        model = Between(name, act).eval()
        model.before = nn.Softplus()
        traced = repfx.transform(model, [], example=torch.randn(1, 3, 10, 10))
        view = GraphView(traced)
        (last,) = (n for n in view.nodes if (layer := view.layer(n)) and layer.path == "last")
        assert non_negative(view, last.args[0]) is (name in KEEP_THE_SIGN)  # type: ignore[arg-type]


def test_a_product_of_values_that_are_not_negative_is_not_negative() -> None:
    graph = fx.symbolic_trace(lambda x: F.relu(x) * torch.sigmoid(x) * 2)
    view = GraphView(graph)
    product = view.nodes[-3]
    assert non_negative(view, product)
    graph = fx.symbolic_trace(lambda x: F.relu(x) * x)
    view = GraphView(graph)
    assert not non_negative(view, view.nodes[-2])
    graph = fx.symbolic_trace(lambda x: F.relu(x) * -2)
    view = GraphView(graph)
    assert not non_negative(view, view.nodes[-2]) and isinstance(view.ops[view.nodes[-2]], Map)


# What a row claims is tried on values, by each spelling that takes some of these arguments.
W = torch.ones(4)
REST: dict[str, list[tuple[Any, ...]]] = {
    "conv": [(torch.randn(4, 4, *[3] * n),) for n in (1, 2, 3)],
    "conv_transpose": [(torch.randn(4, 4, *[3] * n),) for n in (1, 2, 3)],
    "linear": [(torch.randn(8, 8),)],
    "bn": [(W, W), (W, W, W, W, False, 0.1, 1e-5, False)],
    "norm": [([8],), (2,), ()],
    "prelu": [(W,)],
    "clamp": [(-1, 1)],
    "clamp_min": [(0,)],
    "clamp_max": [(1,)],
    "threshold": [(0, 0)],
    "pow": [(2,)],
    "avgpool": [(2,)],
    "max_pool": [(2,), ([2, 2],), ([2, 2, 2],)],
    "average": [(2,), ([2, 2],), ([2, 2, 2],), ()],
    "adaptive_max_pool": [(1,)],
    "transpose": [(1, 2)],
    "permute": [([0, 2, 1],)],
    "movedim": [(1, -1)],
    "flip": [([1],)],
    "chunk": [(2, 1)],
    "split": [(2, 1), ([2, 2], 1)],
    "narrow": [(1, 0, 2)],
    "index_select": [(1, torch.tensor([0, 2]))],
    "pad": [([1, 1],), ([1, 1], torch.ones(1, 4, 1))],
    "squeeze": [(0,)],
    "flatten": [(1,)],
    "reshape": [([2, 32],), (1, [2, 2]), (torch.zeros(2, 32),)],
    "expand": [([2, 4, 8],), (torch.zeros(2, 4, 8),)],
    "softmax": [(1,)],
    "log_softmax": [(1,)],
    "channel_shuffle": [(2,)],
    "pixel_shuffle": [(2,)],
    "resize": [([4],), ([4], False), ([4, 4], False), ([4, 4, 4], False), ([4, 4],), ([4, 4, 4],)],
    "product of matrices": [(torch.randn(2, 8, 4),), (torch.randn(8, 4),)],
}
CLAIMS = Trait.FRESH | Trait.NON_NEGATIVE | Trait.MOVES
ROWS = [row for row in KINDS if row.spelled and row.traits & CLAIMS]


def tried(row: Any, spelling: Any) -> tuple[Tensor, list[Tensor]] | None:
    """An input and what the spelling makes of it; None where it takes other arguments."""
    for shape in ((2, 4, 8), (2, 4, 8, 8), (2, 4, 4, 8, 8)):
        x = torch.randn(shape)
        for rest in (*REST.get(row.name, [(torch.randn(shape),)]), ()):
            args: tuple[Any, ...] = ([x], *rest) if Trait.JOINS in row.traits else (x, *rest)
            try:
                if isinstance(spelling, str):
                    y = getattr(x, spelling)(*rest)
                else:
                    y = spelling(*args)
            except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
                continue  # other arguments
            several = y if isinstance(y, (tuple, list)) else [y]
            values = [v for v in several if isinstance(v, Tensor)]
            if values and all(v.dtype.is_floating_point for v in values):
                return x, values
    return None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_a_row_claims_is_so(row: Any) -> None:
    torch.manual_seed(0)
    count = 0
    for spelling in row.spelled:
        name = str(getattr(spelling, "__name__", spelling)).split(".")[0]
        mutable = isinstance(spelling, torch._ops.OpOverload) and spelling._schema.is_mutable
        if name.endswith("_") or (name[:1] == "i" and hasattr(operator, name)) or mutable:
            continue  # in place: `effects` tells by the name
        found = tried(row, spelling)
        if found is None:
            continue
        count += 1
        x, values = found
        shared = x.untyped_storage().data_ptr()
        if Trait.FRESH in row.traits and not isinstance(spelling, torch._ops.OpOverload):
            assert all(v.untyped_storage().data_ptr() != shared for v in values), spelling
        if Trait.NON_NEGATIVE in row.traits:
            assert all(bool((v.nan_to_num() >= 0).all()) for v in values), spelling
        if Trait.MOVES in row.traits:
            entries = set(x.flatten().tolist())
            assert all(set(v.flatten().tolist()) <= entries for v in values), spelling
    assert count > 0, "none of its spellings was tried"


def test_a_layer_with_a_forward_of_its_own_is_unknown() -> None:
    class Own(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return x - 1

    class Same(nn.ReLU):
        pass

    assert kind_of_layer(Own()) is UNKNOWN and kind_of_layer(Same()).name == "relu"


def test_the_view_reads_layers_and_quantizers() -> None:
    model = repfx.transform(
        nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(4, 2)),
        ["ptq"],
        example=torch.randn(1, 3, 4, 4),
    )
    view = GraphView(model)
    layers = [layer for n in view.nodes if (layer := view.layer(n))]
    assert [(x.kind.name, x.channel_axis) for x in layers] == [("conv", 1), ("linear", -1)]
    assert layers[0].rest["stride"] == (2, 2) and layers[0].rest["groups"] == 1
    for layer in layers:
        assert isinstance(view.quantizer(layer.x), FakeQuant)
        assert view.quantizer(layer.weight).of_weight  # type: ignore[union-attr]
    plain = GraphView(fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3))))
    (layer,) = (x for n in plain.nodes if (x := plain.layer(n)))
    assert (layer.path, layer.weight, layer.bias) == ("0", "0.weight", "0.bias")
    assert isinstance(plain.ops[layer.node], Map) and not isinstance(plain.ops[layer.node], Sum)
