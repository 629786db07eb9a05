"""Where quantizers stand: every layer of a stretch in integers in the runtime that a file is made
for.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.graph.moves import moved_from
from repfx.graph.view import GraphView
from repfx.lowering.runtimes.layers import Kernels, kernels
from repfx.quant import FakeQuant
from repfx.testing import randomise


def conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, act: type[nn.Module] = nn.ReLU
) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        act(),
    )


class Ended(nn.Module):
    """A body of 8 channels, averaged and classified."""

    gates = 0  # Of the layers, those of one position, which stay in float for TensorRT.

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 8), nn.Linear(8, 5)

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Fire(Ended):
    """Two convolutions of one value, concatenated and pooled, as in SqueezeNet and Inception."""

    layers = 6

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three, self.last = conv(8, 4, 1), conv(8, 6), conv(10, 8)
        self.pooled = conv(8, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.cat([self.one(x), self.three(x)], 1), 2)
        x = self.last(x)
        return torch.cat([x, self.pooled(F.max_pool2d(x, 3, 1, 1))], 1)[:, 8:]


class Split(Ended):
    """Half goes on through residual blocks with swish, all is concatenated: C2f of YOLO."""

    layers = 8

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(8, 8, 1, act=nn.SiLU), conv(16, 8, 1, act=nn.SiLU)
        self.steps = nn.ModuleList(
            nn.Sequential(conv(4, 4, act=nn.SiLU), conv(4, 4, act=nn.SiLU)) for _ in range(2)
        )

    def body(self, x: Tensor) -> Tensor:
        y = list(self.first(x).chunk(2, 1))
        for step in self.steps:
            y.append(y[-1] + step(y[-1]))
        return self.last(torch.cat(y, 1))


class Gate(Ended):
    """Squeeze and excitation, leaky activations and dropout."""

    layers, gates = 6, 2

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(8, 8, act=nn.LeakyReLU), conv(8, 8, act=nn.ReLU6)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.drop = nn.Dropout(0.1)

    def body(self, x: Tensor) -> Tensor:
        y = self.drop(self.two(self.drop(self.one(x))))
        return x + y * torch.sigmoid(self.up(torch.relu(self.down(y.mean((2, 3), keepdim=True)))))


class Clip(Ended):
    """Activations with ends on both sides of zero, and one that only exported programs call by this
    name.
    """

    layers = 4

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(8, 8, act=nn.Hardtanh), nn.Conv2d(8, 8, 3)

    def body(self, x: Tensor) -> Tensor:
        return F.hardtanh(self.two(self.one(x)), 0.0, 6.0)


class Dense(Ended):
    """Growing concatenations before batch norms that merge with nothing."""

    layers = 5

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 4, 3, padding=1, bias=False))
            for n in (8, 12, 16)
        )

    def body(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(x, 2)
        for step in self.steps:
            x = torch.cat([x, step(x)], 1)
        return torch.relu(x)[:, :8]


class Neck(Ended):
    """A U with a nearest resize, a skip, and a shuffle."""

    layers = 5

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep, self.up = conv(8, 16, stride=2), conv(16, 16), conv(24, 32)

    def body(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.deep(self.down(x)), scale_factor=2.0)
        return F.pixel_shuffle(self.up(torch.cat([x, y], 1)), 2)


CPUS = ["onnxruntime", "openvino"]
NETS = [Fire, Split, Gate, Clip, Dense, Neck]


def made(kind: Any, target: str, passes: str = "ptq") -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    net, x = randomise(kind().eval()), torch.randn(4, 3, 16, 16)
    quantized: Any = repfx.transform(net, [passes], example=x, target=target)
    return net, quantized, x


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", NETS)
def test_the_runtime_runs_every_layer_in_integers(kind: Any, target: str, tmp_path: Path) -> None:
    net, model, x = made(kind, target)
    repfx.calibrate(model, [x])
    assert repfx.verify(net, model, x).sqnr > 20
    artifact = repfx.lower(model, tmp_path / "int8.onnx", example=x, target=target)
    assert not [f for f in repfx.lint(artifact.onnx, target) if f.severity in "EW"]
    assert artifact.parity.agrees and artifact.there is not None and artifact.there.agrees
    assert artifact.there.sqnr > 100  # in the session that is deployed
    assert kernels(target, artifact.onnx) == Kernels(kind.layers, ())
    # Off the example's batch, values and range.
    other = 1.2 * torch.randn(3, 3, 16, 16)
    assert repfx.verify(model, _in(target, artifact.onnx), other).sqnr > 30


@pytest.mark.parametrize("kind", NETS)
def test_the_lint_finds_nothing(kind: Any, tmp_path: Path) -> None:
    _, model, x = made(kind, "tensorrt")
    repfx.calibrate(model, [x])
    found = repfx.lint(repfx.lower(model, tmp_path / "int8.onnx", example=x).onnx)
    assert not [f for f in found if f.severity in "EW"], found


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
@pytest.mark.parametrize("kind", NETS)
def test_training_and_calibration_quantize_the_same_places(
    kind: Any, target: str, tmp_path: Path
) -> None:
    _, ready, x = made(kind, target)
    _, trained, _ = made(kind, target, "repq(bn=frozen)")
    assert _places(ready) == _places(trained)
    trained.train()(x).square().mean().backward()
    fused = repfx.transform(trained.eval(), ["fuse"], target=target, example=x)
    assert repfx.lower(fused, tmp_path / "int8.onnx", example=x, target=target).parity.agrees


class Rounded(torch.fx.Interpreter):
    """Finds the quantizers that read values which only moved since they were rounded."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.view, self.again, self.changed = GraphView(model), 0, 0

    def run_node(self, n: torch.fx.Node) -> Any:
        y = super().run_node(n)
        if _rounds(self.module, n) and not self.view.quantizer(n).of_weight:
            (value,) = n.all_input_nodes
            if _rounds(self.module, moved_from(self.view, value)):
                x = self.env[value]
                self.again += 1
                near = torch.allclose(x, y, rtol=0, atol=1e-6 * float(y.abs().max()))
                self.changed += not near
        return y


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_what_moves_integers_changes_none(target: str) -> None:
    """A quantizer after a chunk or a resize rounds to the grid of the one before it.

    In OpenVINO there is one after a resize that is concatenated."""
    for kind in (Split, Neck):
        _, model, x = made(kind, target)
        repfx.calibrate(model, [x], method="mse")
        run = Rounded(model)
        run.run(x)
        assert (run.again > 0) == (target in {Split: ["onnxruntime"], Neck: CPUS}[kind])
        assert not run.changed


@pytest.mark.parametrize("kind", [Fire, Split, Dense, Neck])
def test_joins_stand_between_integers(kind: Any) -> None:
    """For operators from integers to integers what goes into joins is rounded, and what comes
    out."""
    _, model, _ = made(kind, "onnxruntime")
    joins = [
        n for n in model.graph.nodes if n.target in (torch.cat, torch.add, operator.add, torch.mul)
    ]
    assert joins
    for join in joins:
        assert all(_rounds(model, n) for n in join.all_input_nodes), join
        after = (
            [join] if len(join.users) > 1 else [join, *join.users]
        )  # or a ReLU that rounding does as well
        assert any(all(_rounds(model, u) for u in n.users) for n in after), join


@pytest.mark.parametrize(
    ("kind", "inputs", "whole"), [(Fire, 1, 2), (Split, 4, 0), (Dense, 6, 2), (Neck, 2, 0)]
)
def test_no_value_is_written_in_float_and_in_integers(kind: Any, inputs: int, whole: int) -> None:
    """In OpenVINO a concatenation that a layer reads is rounded, and the runtime moves that to what
    goes in. All that goes in is rounded before if a layer reads some of it, or a norm reads all.
    """
    _, model, _ = made(kind, "openvino")
    joins = [n for n in model.graph.nodes if n.target is torch.cat]
    readers = [u for n in joins for u in n.users]
    through = [w for u in readers for w in (u.users if u.target is operator.getitem else [u])]
    assert sum(_rounds(model, i) for n in joins for i in n.all_input_nodes) == inputs
    assert sum(_rounds(model, u) for u in through) == whole


def _rounds(model: Any, node: Any) -> bool:
    return node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), FakeQuant)


class Ways(nn.Module):
    """Concatenations: one that the model gives, one that a layer reads, one that both do, through
    another, and one of what no layer made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b = torch.tanh(self.a(x)), torch.tanh(self.b(x))
        read, given = torch.cat([a, b], 1), torch.cat([b, a], 1)
        both = torch.cat([torch.abs(a), b], 1)
        inputs = torch.cat([torch.tanh(x), x, x[:, :2]], 1)
        return (
            self.c(torch.selu(read)),
            given,
            self.c(both),
            torch.cat([both, both], 1),
            self.c(inputs),
        )


@pytest.mark.parametrize("passes", ["ptq", "repq(bn=frozen)"])
def test_concatenations_that_the_model_gives_stay_as_they_are(passes: str) -> None:
    net, x = Ways().eval(), torch.randn(2, 3, 9, 9)
    model: Any = repfx.transform(net, [passes], example=x, target="openvino")
    joins = [n for n in model.graph.nodes if n.target is torch.cat]
    assert [sum(_rounds(model, i) for i in n.all_input_nodes) for n in joins] == [2, 0, 0, 0, 0]


def test_a_product_reads_what_is_rounded_for_another() -> None:
    """Squeeze and excitation: the average reads integers, so the product does, but not its gate."""
    counts = {}
    for target in ("openvino", "tensorrt"):
        _, model, _ = made(Gate, target)
        (product,) = [n for n in model.graph.nodes if n.target is operator.mul]
        counts[target] = [_rounds(model, n) for n in product.args]
    assert counts == {"openvino": [True, False], "tensorrt": [False, False]}


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_what_a_dropout_gives_in_training_is_what_is_rounded(target: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3))
    model: Any = repfx.transform(
        net.eval(), ["repq(bn=frozen)"], example=torch.randn(2, 3, 9, 9), target=target
    )
    (dropout,) = [n for n in model.graph.nodes if n.target == "2"]
    assert all(_rounds(model, n) for n in dropout.users) and not _rounds(
        model, dropout.all_input_nodes[0]
    )


ZEROS: list[tuple[type[nn.Module], str, set[int]]] = [
    (Dense, "onnxruntime", {0, 128}),
    (Dense, "openvino", {0}),
    (Dense, "tensorrt", {0}),
]
ZEROS += [(Split, "onnxruntime", {0, 128}), (Split, "openvino", {0, 128}), (Split, "tensorrt", {0})]


@pytest.mark.parametrize(("kind", "target", "zeros"), ZEROS)
def test_codes_of_signed_values_are_what_the_kernels_take(
    kind: Any, target: str, zeros: set[int], tmp_path: Path
) -> None:
    """Around 128 in ONNX Runtime, and in OpenVINO where they are a concatenation's."""
    import onnx

    _, model, x = made(kind, target)
    repfx.calibrate(model, [x])
    proto = _onnx(repfx.lower(model, tmp_path / "m.onnx", example=x, target=target).onnx)
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    rounding = [n for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    assert {int(constants[n.input[2]]) for n in rounding} == zeros
    if target == "openvino" and 128 in zeros:
        read: dict[str, list[Any]] = {}
        for n in proto.graph.node:
            for name in n.input:
                read.setdefault(name, []).append(n)

        def joined(name: str) -> bool:
            """Whether a concatenation reads it, perhaps after a split."""
            return any(
                n.op_type == "Concat"
                or (n.op_type in ("Split", "DequantizeLinear") and any(map(joined, n.output)))
                for n in read.get(name, ())
            )

        for n in rounding:
            assert (int(constants[n.input[2]]) == 128) == joined(n.output[0]), n.name


@torch.fx.wrap
def sum_of(pieces: tuple[Tensor, ...]) -> Tensor:
    """An operator of several tensors that is no move."""
    return sum(pieces[1:], pieces[0])


class Pieces(nn.Module):
    """Halves of one value: both read by layers, one of them by something else as well, or one
    alone.
    """

    def __init__(self, all_read: bool, how: str = "chunk") -> None:
        super().__init__()
        self.stem, self.all_read, self.how = nn.Conv2d(3, 8, 1), all_read, how
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.stem(x))
        if self.how == "sum":
            pieces = y.chunk(2, 1)
            return self.a(sum_of(pieces)) - self.b(sum_of(pieces))
        if self.how == "part":
            return self.a(y[:, :4])
        a, b = y.chunk(2, 1)
        y = self.a(a) - self.b(F.interpolate(F.max_pool2d(b, 2), scale_factor=2.0))
        return y if self.all_read else y * torch.exp(a)


@pytest.mark.parametrize("passes", ["ptq", "repq(bn=frozen)"])
@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
@pytest.mark.parametrize("all_read", [True, False])
def test_a_quantizer_goes_before_what_moves_values(
    all_read: bool, target: str, passes: str, tmp_path: Path
) -> None:
    net, x = Pieces(all_read).eval(), torch.randn(2, 3, 8, 8)
    model: Any = repfx.transform(net, [passes], example=x, target=target)
    if passes == "ptq":
        repfx.calibrate(model, [x])
    else:
        model.train()(x).square().mean().backward()
        model = repfx.transform(model.eval(), ["fuse"], example=x, target=target)
    (chunk,) = [n for n in model.graph.nodes if n.target == "chunk"]
    assert _rounds(model, chunk.all_input_nodes[0]) == all_read
    acts = [
        n
        for n in model.graph.nodes
        if _rounds(model, n) and not model.get_submodule(str(n.target)).of_weight
    ]
    # The layer after the resize has a quantizer of its own, with the same scale.
    assert len({str(n.target) for n in acts}) == (2 if all_read else 3)
    assert len(acts) == (3 if all_read else 4)
    assert repfx.verify(net, model, x).sqnr > 25
    assert repfx.lower(model, tmp_path / "m.onnx", example=x, target=target).parity.agrees


@pytest.mark.parametrize("how", ["sum", "part"])
def test_a_quantizer_stays_after_what_does_not_move_all_values(how: str) -> None:
    net, x = Pieces(True, how).eval(), torch.randn(2, 3, 8, 8)
    model: Any = repfx.transform(net, ["ptq"], example=x, target="openvino")
    (conv,) = [n for n in model.graph.nodes if n.target is F.conv2d and "a_" in str(n.args[1])]
    assert _rounds(model, conv.args[0]) and not _rounds(model, conv.args[0].args[0])


@pytest.mark.parametrize(("mode", "shared"), [("nearest", True), ("bilinear", False)])
def test_only_what_moves_values_takes_their_quantizer(mode: str, shared: bool) -> None:
    class Resize(Neck):
        def body(self, x: Tensor) -> Tensor:
            return self.up(
                torch.cat([x, F.interpolate(self.deep(self.down(x)), None, 2.0, mode)], 1)
            )[:, :8]

    _, model, _ = made(Resize, "onnxruntime")
    (resize,) = [n for n in model.graph.nodes if n.target is F.interpolate]
    (after,) = resize.users
    assert (after.target == resize.all_input_nodes[0].target) == shared


def test_outputs_of_the_model_stay_as_they_are(tmp_path: Path) -> None:
    """A map that the model gives is not rounded, whoever else reads it, so the layer that makes it
    runs in float.
    """

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (
                nn.Conv2d(3, 4, 3),
                nn.Conv2d(4, 4, 3),
                nn.Conv2d(4, 2, 1),
            )

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.relu(self.two(torch.relu(self.one(x))))
            return y, self.three(y)

    net, x = Maps().eval(), torch.randn(4, 3, 24, 24)
    model = repfx.transform(net, ["ptq"], example=x, target="onnxruntime")
    repfx.calibrate(model, [x])
    assert all(t.unique().numel() > 300 for t in model(x))  # 256 codes would be fewer
    found = kernels(
        "onnxruntime", repfx.lower(model, tmp_path / "m.onnx", example=x, target="onnxruntime").onnx
    )
    assert (found.integers, len(found.floats)) == (1, 2)
    assert str(found).startswith("1 of 3 layers run in integers, ") and str(found).endswith(
        " in float"
    )


def test_swish_is_written_out_where_its_parts_run_in_integers() -> None:
    for inplace in (False, True):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(inplace), nn.Conv2d(4, 4, 3)).eval()
        x = torch.randn(2, 3, 9, 9)
        names = {}
        for target in ("onnxruntime", "tensorrt"):
            model = repfx.transform(net, ["ptq"], example=x, target=target)
            names[target] = {
                getattr(n.target, "__name__", str(n.target)) for n in model.graph.nodes
            }
            repfx.calibrate(model, [x])
            assert repfx.verify(net, model, x).sqnr > 25
        assert "sigmoid" in names["onnxruntime"] and "1" not in names["onnxruntime"]
        assert "1" in names["tensorrt"] and "sigmoid" not in names["tensorrt"]


class Twice(nn.Module):
    """An activation in place whose input another layer reads after it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = F.silu(y, inplace=True)
        return self.b(z) + self.c(y)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_a_swish_in_place_is_still_seen(target: str) -> None:
    net, x = Twice().eval(), torch.randn(2, 3, 9, 9)
    model = repfx.transform(net, ["ptq"], example=x, target=target)
    repfx.calibrate(model, [x])
    assert repfx.verify(net, model, x).sqnr > 30


def _places(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, FakeQuant)}


def _onnx(path: Path) -> Any:
    import onnx

    return onnx.load(path)


def _in(runtime: str, path: Path) -> nn.Module:
    from repfx.lowering.runtimes.run import session

    class Run(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return session(runtime, path)((x,))[0]

    return Run()


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_what_is_learned_about_chunks_and_joins(target: str, tmp_path: Path) -> None:
    """Ranges, bias correction, learning and sensitivity, in ONNX Runtime with quantizers that are
    called twice.
    """
    pictures, found = torch.randn(128, 3, 16, 16), {}
    for name in ("ranges", "bias", "learned"):
        net, model, x = made(Split, target, "ptq(weights=mse)")
        if name == "learned":
            repfx.reconstruct(model, [pictures], loss="mse", iterations=150, batch=32)
        else:
            repfx.calibrate(model, [pictures], method="mse", bias=name == "bias")
        found[name] = repfx.verify(net, model, pictures).sqnr
    assert found["ranges"] + 1 < min(found["bias"], found["learned"]), found
    rows = repfx.sensitivity(model, [pictures[:16]]).rows
    assert len(rows) == Split.layers and all(r.alone > 0 for r in rows)
    assert repfx.lower(model, tmp_path / "int8.onnx", example=x, target=target).parity.agrees


class Kept(Ended):
    """A skip and a layer read one value, the layer through something that the file does not have.

    Such a quantizer stands before the skip and again before the layer."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.between, self.drop = between, nn.Dropout(0.5)
        self.first, self.second = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)

    def body(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.between == "dropout":
            y = self.drop(x)
        elif self.between == "slice":
            y = x[:, :8]
        else:
            y = x.transpose(2, 3).transpose(3, 2)
        return self.second(y).relu() + x


@pytest.mark.parametrize("between", ["dropout", "slice", "two transposes"])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_no_value_is_rounded_twice_in_a_row(between: str, target: str, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    net = randomise(Kept(between).eval())
    int8 = repfx.transform(net, ["ptq"], example=x, target=target)
    repfx.calibrate(int8, [x])
    found = repfx.lower(int8, tmp_path / "int8.onnx", example=x, target=target)
    assert "Q18" not in {f.rule for f in repfx.lint(found.onnx, target)}
    assert found.parity.codes > 0 and found.parity.agrees


class Boxes(nn.Module):
    """Writes into a view of what a convolution gives, after its size was read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        height, width = y.shape[2:]
        z = y.reshape(-1, 2, 4, height * width)
        z[:, :, :2] = z[:, :, :2].sigmoid()
        return z


class Head(nn.Module):
    """A detector's head: in training it returns what its convolutions give, in eval mode boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.scores = (nn.Sequential(conv(8, 8), nn.Conv2d(8, n, 1)) for n in (4, 6))

    def forward(self, x: Tensor) -> Any:
        boxes, scores = self.boxes(x).flatten(2), self.scores(x).flatten(2)
        if self.training:
            return boxes, scores
        return torch.cat([boxes.exp(), scores.sigmoid()], 1)


def detector() -> nn.Module:
    return nn.Sequential(conv(3, 8, act=nn.SiLU), Head())


@pytest.mark.parametrize("net", [Boxes, detector])
def test_what_the_model_reads_on_is_rounded_for_onnxruntime(net: Any, tmp_path: Path) -> None:
    """There a convolution runs in integers only if what it gives is rounded (Q26)."""
    x = torch.randn(2, 3, 16, 16)
    model = randomise(net().eval())
    int8 = repfx.transform(model, ["ptq"], example=x, target="onnxruntime")
    repfx.calibrate(int8, [x])
    path = tmp_path / "int8.onnx"
    repfx.lower(int8, path, example=x, target="onnxruntime")
    assert not [f for f in repfx.lint(path, "onnxruntime") if f.severity in "EW"]
    assert not kernels("onnxruntime", path).floats


def test_two_formats_in_a_row_both_stay(tmp_path: Path) -> None:
    """After a ReLU the stem's output is unsigned. The head's layers do not know its sign."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    model = randomise(nn.Sequential(conv(3, 8), Head()).eval())
    int8 = repfx.transform(model, ["ptq"], example=x, target="onnxruntime")
    repfx.calibrate(int8, [x])
    found = repfx.lower(int8, tmp_path / "int8.onnx", example=x, target="onnxruntime")
    assert found.parity.agrees
    assert [f.rule for f in repfx.lint(found.onnx, "onnxruntime") if f.severity in "EW"] == ["Q18"]


class Through(nn.Module):
    """A convolution's output is written to through a view of it, and read by another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.how == "slice":
            y[:, :2].sub_(0.5)
        elif self.how == "view":
            y.view_as(y).mul_(0.1)
        elif self.how == "size":
            return self.b(y) + x.size(2)
        else:
            y = y.relu()
            y.flatten(2).sub_(1.0)
        return self.b(y)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
@pytest.mark.parametrize("how", ["slice", "view", "flatten", "size"])
def test_no_quantizer_takes_a_write_away(how: str, target: str) -> None:
    x = torch.randn(4, 3, 16, 16)
    net = Through(how).eval()
    int8 = repfx.transform(net, ["ptq"], example=x, target=target)
    repfx.calibrate(int8, [x])
    assert repfx.verify(net, int8, x).sqnr > 25
