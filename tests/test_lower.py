"""Lowering: valid ONNX, integer constants, the same codes as torch, and nothing half-written."""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.blocks import RepVGG
from repfx.lowering.onnx import half
from repfx.lowering.onnx.index import Index
from repfx.lowering.onnx.parity import compare
from repfx.lowering.runtimes.run import session
from repfx.rewrite.difference import difference
from repfx.testing import randomise


def block(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(RepVGG(inputs, outputs, 3, stride, 1, groups=groups), nn.ReLU())


def net() -> nn.Module:
    """Plain, grouped, depthwise and strided convolutions, a skip, a gate and a linear."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = block(3, 16)
            self.depthwise = nn.Sequential(
                nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
            )
            self.point = nn.Conv2d(16, 16, 1, bias=False)
            self.down = block(16, 32, stride=2, groups=4)
            self.gate = nn.Conv2d(32, 32, 1)
            self.head = nn.Linear(32, 7)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = self.down(x + torch.nn.functional.silu(self.point(torch.relu(self.depthwise(x)))))
            x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
            return self.head(x.mean((2, 3)))

    return randomise(Net().eval())


def pictures(n: int = 8) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def quantized(target: str, spec: str = "ptq") -> nn.Module:
    return repfx.calibrate(repfx.transform(net(), [spec], target=target), [pictures()])


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime", "openvino"])
def test_the_file_computes_the_same_codes(target: str, tmp_path: Path) -> None:
    model = quantized(target)
    beyond = 1.5 * pictures()  # past the calibrated range: both must clip at the same codes
    artifact = repfx.lower(model, tmp_path / "model.onnx", example=beyond, target=target)
    parity = artifact.parity
    # one an input, but not of the gate for TensorRT; for ONNX Runtime also what a convolution gives
    # and what is added, multiplied or passed to SiLU
    wanted = {"tensorrt": 7, "onnxruntime": 13, "openvino": 8}
    assert len(parity.quantizers) == wanted[target] and parity.codes > 50_000
    assert all(q.largest <= 1 for q in parity.quantizers.values())
    assert parity.different <= 5, str(parity)  # rounding ties
    assert parity.sqnr > 25
    assert f"{parity.different} of {parity.codes:,} codes differ on equal inputs" in str(parity)
    assert str(parity).endswith(
        f"against float {parity.after.sqnr:.1f} dB, fake-quant {parity.before.sqnr:.1f} dB"
    )
    assert abs(parity.after.sqnr - parity.before.sqnr) < 1


@pytest.mark.parametrize("spec", ["fuse", "ptq"])
def test_channels_last_gives_the_same_file(spec: str, tmp_path: Path) -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    made, x = [], pictures()
    for form in (torch.contiguous_format, torch.channels_last):
        given = nn.Sequential(*layers).eval().to(memory_format=form)
        model = repfx.transform(given, [spec], example=x.to(memory_format=form))
        if spec == "ptq":
            repfx.calibrate(model, [x.to(memory_format=form)])
        path = repfx.lower(model, tmp_path / "model.onnx", example=x.to(memory_format=form)).onnx
        made.append([n.op_type for n in onnx.load(path).graph.node])
    assert made[0] == made[1] and "Gather" not in made[0]


def test_what_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    repfx.lower(quantized("tensorrt"), path, example=pictures())
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    made = {o: n for n in proto.graph.node for o in n.output}
    constants = {t.name: t for t in proto.graph.initializer}
    weighted = [n for n in proto.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(weighted) == 6
    for node in (n for n in weighted if made[n.input[0]].op_type != "ReduceMean"):
        activation, weight = (made[node.input[i]] for i in (0, 1))
        while weight.op_type == "Transpose":
            weight = made[weight.input[0]]
        assert activation.op_type == weight.op_type == "DequantizeLinear"
        assert made[activation.input[0]].op_type == "QuantizeLinear"
        codes = constants[weight.input[0]]
        assert codes.data_type == onnx.TensorProto.INT8
        values = onnx.numpy_helper.to_array(codes)
        assert values.min() >= -127 and values.max() == 127
        if len(node.input) > 2:
            assert constants[node.input[2]].data_type == onnx.TensorProto.FLOAT
    zeros = [
        onnx.numpy_helper.to_array(constants[n.input[2]])
        for n in made.values()
        if "Quantize" in n.op_type
    ]
    assert all((z == 0).all() for z in zeros)
    assert {n.op_type for n in proto.graph.node} & {
        "BatchNormalization",
        "QLinearConv",
        "Clip",
    } == set()


def test_onnx_runtime_runs_every_layer_in_integers(tmp_path: Path) -> None:
    layers = [
        block(3, 16),
        block(16, 32, 2),
        nn.MaxPool2d(2),
        block(32, 32, groups=4),
        nn.Flatten(),
        nn.Linear(512, 7),
    ]
    model = repfx.transform(
        randomise(nn.Sequential(*layers).eval()), ["ptq"], target="onnxruntime", example=pictures()
    )
    repfx.calibrate(model, [pictures()])
    path = repfx.lower(
        model, tmp_path / "model.onnx", example=pictures(), target="onnxruntime"
    ).onnx
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = (
        str(tmp_path / "optimized.onnx"),
        3,
    )
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 3 and kinds.count("QGemm") == 1
    assert not {"Conv", "Gemm", "FusedConv", "MatMul"} & set(kinds)


def test_the_batch_is_dynamic_and_size_one_examples_do(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = quantized("onnxruntime")
    repfx.lower(model, path, example=pictures(1), target="onnxruntime")
    for n in (1, 3, 8):
        (got,) = session("onnxruntime", onnx.load(path))((pictures(n),))
        assert difference(model.eval()(pictures(n)), got).sqnr > 30


def test_a_float_model_lowers_too(tmp_path: Path) -> None:
    artifact = repfx.lower(
        repfx.transform(net(), ["fuse"]), tmp_path / "f.onnx", example=pictures()
    )
    assert not artifact.parity.quantizers and artifact.parity.output.relative < 1e-5
    int8 = repfx.lower(quantized("tensorrt"), tmp_path / "q.onnx", example=pictures())
    ops = {n.op_type for n in onnx.load(artifact.onnx).graph.node}
    assert "QuantizeLinear" not in ops and int8.onnx.stat().st_size < artifact.onnx.stat().st_size


@pytest.mark.parametrize(
    ("target", "opset", "kind"),
    [
        ("onnxruntime", 20, onnx.TensorProto.INT8),
        ("onnxruntime", 21, onnx.TensorProto.INT4),
        ("tensorrt", 21, onnx.TensorProto.INT8),
    ],
)
@pytest.mark.parametrize("bits", [4, 2])
def test_narrow_weights_are_int4_where_opset_and_target_have_it(
    bits: int, target: str, opset: int, kind: int, tmp_path: Path
) -> None:
    model = quantized(target, f"ptq(bits=8, weight_bits={bits})")
    artifact = repfx.lower(
        model, tmp_path / "narrow.onnx", example=pictures(), opset=opset, target=target
    )
    assert artifact.parity.different <= 5
    weights = {
        t.name: t
        for t in onnx.load(artifact.onnx).graph.initializer
        if t.name.endswith("weight_quant.codes")
    }
    assert len(weights) == (5 if target == "tensorrt" else 6)  # without the gate
    assert {t.data_type for t in weights.values()} == {kind}
    quant, weight = model.get_submodule("point.weight_quant"), model.get_parameter("point.weight")
    held = onnx.numpy_helper.to_array(weights["point.weight_quant.codes"]).astype("float32")
    assert torch.equal(torch.from_numpy(held), quant.codes(weight))


@pytest.mark.parametrize("opset", [19, 21])
def test_float16_is_all_that_is_not_an_integer(opset: int, tmp_path: Path) -> None:
    model, x = quantized("tensorrt", "ptq(wide=point, wide_bits=32)"), pictures()
    paths = tmp_path / "float32.onnx", tmp_path / "float16.onnx"
    plain, halved = (
        repfx.lower(model, p, example=x, opset=opset, float16=h).parity
        for p, h in zip(paths, (False, True), strict=True)
    )
    assert plain.agrees and halved.agrees and halved.float16
    assert (
        0 < halved.different < 0.01 * halved.codes
    )  # float16's last bit; not the float32 file by mistake
    proto = onnx.load(paths[1])
    assert not [t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    ends = [*proto.graph.input, *proto.graph.output]
    assert {i.type.tensor_type.elem_type for i in ends} == {onnx.TensorProto.FLOAT}
    found = [{f.rule for f in repfx.lint(p) if f.severity in "EW"} for p in paths]
    assert "Q20" in found[0] and "Q20" not in found[1]
    one, other = (session("onnxruntime", p)((x,))[0] for p in paths)
    assert float((one - other).abs().max()) < 0.05 * float(one.abs().max())


class Spread(nn.Module):
    """Repeats a value, and has few codes at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 5, 3, bias=False),
            nn.Linear(5, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.two(torch.relu(self.one(x))))
        return self.head((y * y.mean((2, 3), keepdim=True).expand_as(y)).mean((2, 3)))


@pytest.mark.parametrize("seed", range(4))
def test_float16_of_small_nets(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    model, x = Spread().eval(), torch.randn(2, 3, 8, 8)
    for target in ("tensorrt", "onnxruntime"):
        int8 = repfx.calibrate(repfx.transform(model, ["ptq"], example=x, target=target), [x])
        assert repfx.lower(
            int8, tmp_path / "half.onnx", example=x, target=target, float16=True
        ).parity.agrees


def _without_biases(seed: int) -> nn.Module:
    """Convolutions, depthwise ones among them, activations and averages in random order: (N, 3, 32,
    32) -> (N, 4).
    """
    draw = random.Random(seed)
    channels = draw.choice([8, 16, 20, 36])
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1)]
    for _ in range(5):
        kernel, stride, groups = (
            draw.choice([1, 3, 5]),
            draw.choice([1, 1, 2]),
            draw.choice([1, channels]),
        )
        layers.append(
            nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        )
        layers.append(draw.choice([nn.Identity, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Hardswish])())
        layers += [nn.AvgPool2d(3, 1, 1)] if draw.random() < 0.4 else []
    for m in layers:
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)
    ).eval()


@pytest.mark.parametrize("seed", range(6))
def test_openvino_computes_what_the_file_says(seed: int, tmp_path: Path) -> None:
    """With unsigned codes around a zero point OpenVINO computes zeros for some convolutions without
    a bias.
    """
    torch.manual_seed(seed)
    model, x = _without_biases(seed), torch.randn(4, 3, 32, 32)
    int8 = repfx.calibrate(repfx.transform(model, ["ptq"], example=x, target="openvino"), [x])
    file = repfx.lower(int8, tmp_path / "int8.onnx", example=x, target="openvino").onnx
    assert compare(int8, onnx.load(file), (x,), "openvino").agrees


class Over(nn.Module):
    """Divides by a number that float16 does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("large", torch.tensor([[[1e5]]]))

    def forward(self, x: Tensor) -> Tensor:
        return x.abs() / self.large


def beyond_float16(how: str) -> tuple[nn.Module, set[str]]:
    """A calibrated model with a number that float16 does not hold, and what stays in float32."""
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.SiLU(), nn.Conv2d(6, 5, 1)]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        if how == "large bias":
            model[2].bias[1] = 1e5
        elif how == "large result":
            model[0].weight.mul_(1e6)
            model[2].weight.mul_(1e-5)
        elif how == "small weights":
            model[2].weight.mul_(1e-8)
        elif how == "large constant":
            model.append(Over())
        elif how == "small activations":
            model[0].weight.mul_(1e-8)
            model[0].bias.mul_(1e-8)
            model[2].weight.mul_(1e8)
    int8 = repfx.transform(model, ["ptq"], example=pictures())
    stays = {
        "large bias": {"conv2d_1", "_3", "conv2d_2"},
        "large result": {"conv2d", "_1", "conv2d_1"},
        "large constant": {"truediv"},
        "small weights": {"conv2d_1"},
        "small activations": {"conv2d", "_1", "conv2d_1"},
    }[how]
    return repfx.calibrate(int8, [pictures()]), stays


HOW = ["large bias", "large result", "large constant", "small weights", "small activations"]


@pytest.mark.parametrize("how", HOW)
def test_what_float16_cannot_hold_stays_in_float32(how: str, tmp_path: Path) -> None:
    model, stays = beyond_float16(how)
    plain = repfx.lower(model, tmp_path / "float32.onnx", example=pictures())
    halved = repfx.lower(model, tmp_path / "float16.onnx", example=pictures(), float16=True)
    assert set(halved.float32) == stays
    assert halved.parity.agrees and halved.parity.float16
    # As near to the float model as the float32 file, but for float16's own rounding.
    assert plain.parity.after is not None and halved.parity.after is not None
    assert halved.parity.after.sqnr > min(plain.parity.after.sqnr - 1.5, 50)
    file = onnx.load(halved.onnx)
    index = Index(file)
    assert all(index.dq(layer.x) and index.dq(layer.weight) for layer in index.layers)
    types = [index.type(layer.x) for layer in index.layers]
    wide = sum(name.startswith("conv2d") for name in stays)
    assert types.count(onnx.TensorProto.FLOAT) == wide and len(types) == 3
    # The SiLU is in float32 only if it is named.
    (sigmoid,) = [n for n in index.nodes if n.op_type == "Sigmoid"]
    assert (index.type(sigmoid.output[0]) == onnx.TensorProto.FLOAT) == ("_3" in stays)


class Beyond(nn.Module):
    """What float16 does not hold, in the places where it is easily missed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.norm, self.layer = nn.BatchNorm2d(4), nn.LayerNorm(16)
        scale = {"input": 1e-3, "view": 1e-7, "pair": 2e3, "statistics": 1e3, "twice": 2e5}
        with torch.no_grad():
            self.a.weight.mul_(scale.get(how, 1.0))
            self.a.bias.mul_(scale.get(how, 1.0))
            self.norm.running_var.fill_(1e6)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "input":
            return self.b(self.a(x * 5e4).relu())
        y = self.a(x)
        if self.how == "view":
            y[:, :2].relu_()
            return y
        if self.how == "pair":
            v, m = torch.var_mean(y, (2, 3), keepdim=True)
            return self.b((y - m) / v.sqrt())
        if self.how == "statistics":
            return self.b(self.norm(y.relu()))
        if self.how == "divisor":
            y = y.relu()
            return self.b(y / (y.square().sum(1, keepdim=True) + 1e-12).sqrt())
        if self.how == "whole number":
            return (y * 1e-4 * 100000).relu()
        if self.how == "twice":
            return self.b(self.layer(y) + self.layer(y * 1e-5))
        return self.b(nn.functional.normalize(y.relu(), dim=1))


@pytest.mark.parametrize(
    "how", ["input", "view", "pair", "statistics", "twice", "whole number", "number"]
)
@pytest.mark.parametrize("quantize", [True, False])
def test_float16_in_odd_places(how: str, quantize: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    x = x.abs() * 2e5 if how == "input" else x
    model: nn.Module = Beyond(how).eval()
    if quantize:
        model = repfx.calibrate(repfx.transform(model, ["ptq"], example=x), [x])
    plain = model(x)
    artifact = repfx.lower(model, tmp_path / "half.onnx", example=x, float16=True)
    assert artifact.float32 or (how, quantize) == ("whole number", True)  # merged
    (got,) = session("onnxruntime", onnx.load(artifact.onnx))((x,))
    assert difference(plain, got).sqnr > 30


@pytest.mark.parametrize("quantize", [True, False])
def test_squares_that_become_zero_are_refused(quantize: bool, tmp_path: Path) -> None:
    """Every result fits, but half precision loses what is divided by."""
    x = torch.randn(2, 3, 16, 16)
    model: nn.Module = Beyond("divisor").eval()
    if quantize:
        model = repfx.calibrate(repfx.transform(model, ["ptq"], example=x), [x])
    with pytest.raises(repfx.RepfxError, match=r"does not compute|NaN"):
        repfx.lower(model, tmp_path / "half.onnx", example=x, float16=True)
    assert not list(tmp_path.iterdir())


class Parts(nn.Module):
    """Its own forward looks at the data, so its parts have graphs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if float(x.sum()) > -1e9 else x


@pytest.mark.parametrize("what", ["bias", "weight"])
def test_a_part_that_float16_cannot_hold_is_named(what: str) -> None:
    net = Parts().eval()
    with torch.no_grad():
        getattr(net.second[0], what).copy_(torch.tensor(1e5 if what == "bias" else 1e-9))
    int8 = repfx.calibrate(repfx.transform(net, ["ptq"], example=pictures()), [pictures()])
    with pytest.raises(repfx.InputError, match=r"second\.0.*lower the model in float32"):
        half.constants(int8)


def test_what_cannot_be_lowered(tmp_path: Path) -> None:
    x = pictures()
    model = quantized("tensorrt")
    with pytest.raises(repfx.InputError, match=r"torch.float64: lower the model in float32"):
        repfx.lower(nn.Conv2d(3, 4, 1).double(), tmp_path / "a.onnx", example=x.double())
    with pytest.raises(
        repfx.InputError, match="opset must be a whole number from 19 to 23 with float16, not 18"
    ):
        repfx.lower(model, tmp_path / "a.onnx", example=x, float16=True, opset=18)
    with pytest.raises(repfx.InputError, match="opset must be a whole number from 13 to 23, not 9"):
        repfx.lower(model, tmp_path / "a.onnx", example=x, opset=9)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_lowered_says_why(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    raw = repfx.transform(net(), ["ptq"])
    with pytest.raises(
        repfx.InputError, match=r"7 quantizers are not calibrated \(stem.*run repfx.calibrate"
    ):
        repfx.lower(raw, path, example=pictures())
    with pytest.raises(repfx.InputError, match="rounds activations to 6 bits"):
        repfx.lower(quantized("tensorrt", "ptq(bits=6)"), path, example=pictures())
    with pytest.raises(repfx.InputError, match="is unsigned, which tensorrt does not run"):
        repfx.lower(quantized("onnxruntime"), path, example=pictures())
    with pytest.raises(repfx.InputError, match="does not accept the example"):
        repfx.lower(quantized("tensorrt"), path, example=torch.zeros(2, 5, 8, 8))
    with pytest.raises(repfx.InputError, match="unknown target"):
        repfx.lower(quantized("tensorrt"), path, example=pictures(), target="coreml")
    with pytest.raises(repfx.InputError, match="cannot write"):
        repfx.lower(quantized("tensorrt"), tmp_path / "no" / "folder.onnx", example=pictures())
    with pytest.raises(repfx.InputError, match="cannot write"):
        repfx.lower(
            quantized("tensorrt"), "/sys/model.onnx", example=pictures()
        )  # read-only, for root too
    assert not list(tmp_path.iterdir())


def test_a_net_in_training_form_is_merged_first(tmp_path: Path) -> None:
    x = pictures()
    for spec in ("repq(bits=8)", "repq(bits=8, bn=frozen)"):
        model = repfx.transform(nn.Sequential(block(3, 8), block(8, 8)), [spec], example=x).train()
        model(x)
        with pytest.raises(
            repfx.InputError,
            match=r"0.0.main.conv.weight_quant.* run repfx.transform.*fuse.* first",
        ):
            repfx.lower(model.eval(), tmp_path / "model.onnx", example=x)
        fused = repfx.transform(model, ["fuse"], example=x)
        assert repfx.lower(fused, tmp_path / "model.onnx", example=x).parity.agrees


def test_an_exported_program(tmp_path: Path) -> None:
    x, batch = pictures(), torch.export.Dim("batch")
    model = net()
    fixed, any_batch = (
        torch.export.export(model, (x,), dynamic_shapes=d) for d in (None, ({0: batch},))
    )
    for program in (fixed, any_batch):
        path = repfx.lower(program, tmp_path / "model.onnx", example=x).onnx
        assert difference(model(x[:3]), session("onnxruntime", path)((x[:3],))).relative < 1e-4


class Odd(nn.Module):
    """A convolution and then something that has no place in an ONNX file."""

    def __init__(self, then: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.conv, self.then = nn.Conv2d(3, 4, 3), then

    def forward(self, x: Tensor) -> object:
        return self.then(self.conv(x))


REFUSED = {
    r"outputs of an ONNX file must be tensors, but the model gives 5j": lambda y: (y, 5j),
    r"outputs of an ONNX file must be tensors, but the model gives nan": lambda y: (y, torch.nan),
    r"the model gives no tensor, but \(5, 'a'\)": lambda y: (5, "a"),
    r"cannot export the model: .*No ONNX function found for .*linalg_svd": torch.linalg.svdvals,
    r"cannot export the model: .*data-dependent": lambda y: y if y.sum() > 0 else -y,
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_exported_says_why_in_one_line(said: str, tmp_path: Path) -> None:
    with pytest.raises(repfx.InputError, match=said) as found:
        repfx.lower(Odd(REFUSED[said]).eval(), tmp_path / "model.onnx", example=pictures())
    message = str(found.value)
    assert (
        message.isprintable()
        and len(message) < 500
        and not re.search("step|Next|more information|TORCH_LOGS", message)
    )


BATCHES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # and whether the batch is free
    "a number": (lambda y: y.view(8, -1), False),
    "an integer of a quotient": (lambda y: y.view(int(y.flatten().shape[0] / 3600), -1), False),
    "a decision": (lambda y: y * 2 if y.shape[0] == 8 else y, False),
    "a number of groups": (
        lambda y: F.conv2d(y[None, :, 0], y[:, :1, :1, :1], groups=y.shape[0])[0],
        False,
    ),
    "a size": (lambda y: y.view(y.shape[0], -1), True),
}


@pytest.mark.parametrize("how", BATCHES)
@pytest.mark.parametrize("passes", [None, ["fuse"], ["ptq"]])
def test_a_model_that_fixes_the_batch_gives_a_file_for_that_batch(
    how: str, passes: list[str] | None, tmp_path: Path
) -> None:
    then, free = BATCHES[how]
    x = pictures()
    model: Any = Odd(then).eval()
    if passes is not None:
        model = repfx.transform(model, passes, example=x)
    if passes == ["ptq"]:
        repfx.calibrate(model, [x])
    found = repfx.lower(model, tmp_path / "model.onnx", example=x)
    plain = how == "a decision" and passes is None  # torch.export takes it for a condition
    if not plain:
        assert found.batch == (None if free else 8)
    sizes = onnx.load(found.onnx).graph.input[0].type.tensor_type.shape.dim
    assert sizes[0].dim_value == (found.batch or 0) and sizes[1].dim_value == 3
    (y,) = session("onnxruntime", found.onnx)([x])
    assert difference(model(x), torch.as_tensor(y)).relative < 0.01
    if not free and not plain:
        with pytest.raises((repfx.InputError, repfx.CheckError)):
            repfx.lower(model, tmp_path / "other.onnx", example=x, dynamic=True)
        assert not (tmp_path / "other.onnx").exists()


class Anchored(nn.Module):
    """Detectors return where their anchors are, which depends on the size of the image alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.head(torch.relu(self.conv(x)))
        grid = torch.arange(8.0) + 0.5
        points = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).view(-1, 2)
        return y.flatten(2) * points[:, 0], points, torch.full((64, 1), 2.0)


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime", "openvino"])
def test_constants_among_the_outputs(target: str, tmp_path: Path) -> None:
    net, x = randomise(Anchored().eval()), pictures()
    for passes in (["fuse"], ["ptq"]):
        model = repfx.transform(net, passes, example=x, target=target)
        if passes == ["ptq"]:
            repfx.calibrate(model, [x])
        file = repfx.lower(model, tmp_path / "model.onnx", example=x, target=target).onnx
        found = session("onnxruntime", file)([x])
        assert [tuple(v.shape) for v in found] == [(8, 4, 64), (64, 2), (64, 1)]
        for got, want in zip(found[1:], model(x)[1:], strict=True):
            assert torch.equal(torch.as_tensor(got), want)


@pytest.mark.parametrize("float16", [False, True])
def test_a_batch_of_one_that_is_fixed(float16: bool, tmp_path: Path) -> None:
    x = pictures()[:1]
    model = repfx.transform(Odd(lambda y: y.view(1, 784)).eval(), ["ptq"], example=x)
    options: dict[str, Any] = {"float16": float16, "opset": 19 if float16 else 17}
    found = repfx.lower(repfx.calibrate(model, [x]), tmp_path / "m.onnx", example=x, **options)
    assert found.batch == 1 and found.parity.agrees


@pytest.mark.parametrize("passes", [["fuse"], ["ptq"]])
@pytest.mark.parametrize(
    "then",
    [
        lambda y: (7, y, "a", [None, True, y * 2]),
        lambda y: {"n": y.shape[0], "height": y.shape[2] - 1, "y": y, "twice": (y * 2, 0.5)},
    ],
)
def test_numbers_and_texts_beside_tensors_are_left_out(
    then: Callable[[Tensor], object], passes: list[str], tmp_path: Path
) -> None:
    """As None is. The tensors keep their order."""
    x = pictures()
    model = repfx.transform(Odd(then).eval(), passes, example=x)
    if passes == ["ptq"]:
        repfx.calibrate(model, [x])
    found = repfx.lower(model, tmp_path / "model.onnx", example=x)
    assert found.parity.agrees
    y, twice = session("onnxruntime", found.onnx)([x[:2]])
    assert len(y) == 2 and torch.equal(torch.as_tensor(twice), 2 * torch.as_tensor(y))


def test_nan_in_the_example_or_on_the_way(tmp_path: Path) -> None:
    x = pictures()
    x[0, 0, 0, 0] = torch.nan
    for model in (quantized("tensorrt"), repfx.transform(net(), ["fuse"])):
        with pytest.raises(repfx.InputError, match="the example holds NaN"):
            repfx.lower(model, tmp_path / "model.onnx", example=x)
    model = repfx.transform(Roots().eval(), ["ptq"], example=pictures())
    repfx.calibrate(model, [pictures().abs()])
    with pytest.raises(
        repfx.InputError, match=r"head.input_quant is given NaN, which no code can represent"
    ):
        repfx.lower(model, tmp_path / "model.onnx", example=-pictures().abs())
    assert not list(tmp_path.iterdir())


class Roots(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sqrt(x))


class InPlace(nn.Module):
    """Changes what its convolution gave, through a view that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        y[:, -1:].mul_(2)
        return self.two(y)


def test_a_change_in_place_is_in_the_file(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 9, 9)
    quantized = repfx.transform(InPlace().eval(), ["ptq"], example=x)
    repfx.calibrate(quantized, [x])
    assert repfx.lower(quantized, tmp_path / "int8.onnx", example=x).parity.agrees


def test_a_wrong_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight code off by one must not pass for rounding."""
    lowering = importlib.import_module("repfx.lowering.onnx.lower")
    real = lowering._export

    def off_by_one(*args):
        proto = real(*args)
        weight = next(
            t
            for t in proto.graph.initializer
            if t.name.endswith("stem.0.main.conv.weight_quant.codes")
        )
        values = onnx.numpy_helper.to_array(weight).copy()
        values[0, 0, 1, 1] -= 1
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return proto

    monkeypatch.setattr(lowering, "_export", off_by_one)
    with pytest.raises(
        repfx.CheckError, match="ONNX Runtime does not compute what the model computes"
    ):
        repfx.lower(quantized("tensorrt"), tmp_path / "model.onnx", example=pictures())
    assert not list(tmp_path.iterdir())
