"""Lint: every rule finds its fault and nothing else, clean files are clean, and odd files do not
crash it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import repfx
from repfx.blocks import RepVGG
from repfx.lowering.lint.findings import RULES, Finding, explain, lint
from repfx.lowering.lint.rulebook import REGISTRY, RUNTIMES
from repfx.lowering.runtimes.layers import kernels
from repfx.testing import randomise

Array = Any
lint_module = sys.modules[
    "repfx.lowering.lint.findings"
]  # `repfx.lowering.lint.findings` is the function


class Draft:
    """Writes a graph node by node. Every method returns the name of what it makes."""

    def __init__(self, opset: int = 20) -> None:
        self.opset = opset
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.inputs: list[Any] = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 8, 8])
        ]

    def const(self, value: Array, dtype: Any = np.float32) -> str:
        name = f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, **attrs: Any) -> str:
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}_out"], name=name, **attrs))
        return f"{name}_out"

    def fq(
        self,
        x: str,
        scale: Array = 0.1,
        back: Array = None,
        zero: Array = 0,
        dtype: Any = np.int8,
        **attrs: Any,
    ) -> str:
        s, z = self.const(scale), self.const(zero, dtype)
        codes = self.op("QuantizeLinear", x, s, z, **attrs)
        return self.op(
            "DequantizeLinear", codes, s if back is None else self.const(back), z, **attrs
        )

    def codes(self, shape: Sequence[int], axis: int | None = 0, **attrs: Any) -> str:
        """An integer constant and its DQ, a scale a channel along the axis, or one scale."""
        n = () if axis is None else (shape[axis],)
        scale, zero = self.const(np.full(n, 0.01)), self.const(np.zeros(n), np.int8)
        given = {} if axis is None or self.opset < 13 else {"axis": axis}
        return self.op(
            "DequantizeLinear", self.const(np.ones(shape), np.int8), scale, zero, **given, **attrs
        )

    def conv(
        self,
        x: str,
        out: int = 8,
        kernel: int = 1,
        axis: int | None = 0,
        inputs: int = 8,
        group: int = 1,
    ) -> str:
        """A quantized convolution; `x` must be from a DQ."""
        w = self.codes((out, inputs // group, kernel, kernel), axis)
        return self.op("Conv", x, w, self.const(np.ones(out)), pads=[kernel // 2] * 4, group=group)

    def branch(self, x: str, body: Callable[[Draft, str], str]) -> str:
        """An If on a constant, both of whose branches read `x` from around it."""
        graphs = []
        for name in ("yes", "no"):
            inner = Draft(self.opset)
            y = body(inner, x)
            for n in inner.nodes:
                n.output[:] = [f"{name}_{o}" for o in n.output]
                n.input[:] = [i if i == x else f"{name}_{i}" for i in n.input]
            for t in inner.tensors:
                t.name = f"{name}_{t.name}"
            graphs.append(
                helper.make_graph(
                    inner.nodes,
                    name,
                    [],
                    [helper.make_empty_tensor_value_info(f"{name}_{y}")],
                    inner.tensors,
                )
            )
        return self.op(
            "If", self.const(True, np.bool_), then_branch=graphs[0], else_branch=graphs[1]
        )

    def gemm(self, x: str) -> str:
        return self.op("Gemm", self.op("Flatten", x), self.const(np.ones((4, 512))), transB=1)

    def model(self, *outputs: str) -> onnx.ModelProto:
        infos = [helper.make_empty_tensor_value_info(o) for o in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, infos, self.tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])


def clean() -> onnx.ModelProto:
    """A residual block, pools, a grouped and a depthwise convolution, a concat and a head, as
    TensorRT wants them.
    """
    d = Draft()
    x = d.fq(d.op("Relu", d.conv(d.fq("x"), kernel=3)))
    y = d.fq(d.op("Relu", d.conv(x)))
    y = d.op("Relu", d.op("Add", d.conv(y), x))
    y = d.op("MaxPool", d.fq(y), kernel_shape=[2, 2], strides=[2, 2])
    y = d.op("Concat", *(d.fq(d.op("Relu", d.conv(y, group=g)), 0.3) for g in (2, 8)), axis=1)
    y = d.op("Flatten", d.fq(d.op("GlobalAveragePool", y)))
    w = d.op("Transpose", d.codes((5, 16)), perm=[1, 0])
    return d.model(d.op("Add", d.op("MatMul", y, w), d.const(np.ones(5))))


CASES: dict[str, Callable[[], onnx.ModelProto]] = {}
FOUND: dict[str, str] = {}  # how bad TensorRT, ONNX Runtime and OpenVINO find it
TARGETS = ("tensorrt", "onnxruntime", "openvino", "rtx")


def breaks(
    name: str, found: str
) -> Callable[[Callable[[], onnx.ModelProto]], Callable[[], onnx.ModelProto]]:
    def enter(make: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
        CASES[f"{name} {make.__name__}"], FOUND[f"{name} {make.__name__}"] = make, found
        return make

    return enter


@breaks("Q00", "EEEE")
def float_model() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.gemm("x"))


@breaks("Q00", "EEEE")
def quantized_inside_an_if() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.branch("x", lambda inner, x: inner.conv(inner.fq(x))))


@breaks("Q01", "E..E")
def zero_point_of_three() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.conv(d.fq("x", zero=3)))


@breaks("Q02", "E..E")
def uint8() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.conv(d.fq("x", dtype=np.uint8)))


@breaks("Q02", "EWWE")
def computed_zero_point() -> onnx.ModelProto:
    d = Draft()
    d.inputs.append(helper.make_tensor_value_info("z", TensorProto.INT8, []))
    s = d.const(0.1)
    return d.model(d.conv(d.op("DequantizeLinear", d.op("QuantizeLinear", "x", s, "z"), s, "z")))


@breaks("Q02", "EWWE")
def int16() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.conv(d.fq("x", dtype=np.int16)))


@breaks("Q03", "W...")
def no_zero_point() -> onnx.ModelProto:
    d = Draft()
    s = d.const(0.1)
    return d.model(d.conv(d.op("DequantizeLinear", d.op("QuantizeLinear", "x", s), s)))


@breaks("Q04", "EEEE")
def negative_scale() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.conv(d.fq("x", -0.1)))


@breaks("Q04", "W..W")
def scale_of_shape_one() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.conv(d.fq("x", [0.1], zero=[0])))


@breaks("Q04", "EWWE")
def computed_scale() -> onnx.ModelProto:
    d = Draft()
    d.inputs.append(helper.make_tensor_value_info("s", TensorProto.FLOAT, []))
    z = d.const(0, np.int8)
    return d.model(d.conv(d.op("DequantizeLinear", d.op("QuantizeLinear", "x", "s", z), "s", z)))


@breaks("Q05", "EW.W")
def activation_by_channel() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.conv(d.fq("x", [0.1] * 8, zero=[0] * 8, axis=1)))


@breaks("Q06", "EWWW")
def conv_along_its_inputs() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.conv(d.fq("x"), axis=1))


@breaks("Q06", "EEWW")
def transposed_linear_along_its_inputs() -> onnx.ModelProto:
    d = Draft()
    w = d.op("Transpose", d.codes((5, 8), axis=1), perm=[1, 0])
    return d.model(d.op("MatMul", d.fq("x"), w))


@breaks("Q06", "W.WW")
def transposed_conv_by_channel() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.op("ConvTranspose", d.fq("x"), d.codes((8, 4, 2, 2))))


@breaks("Q06", "E..W")
def transposed_conv_by_output_channel() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.op("ConvTranspose", d.fq("x"), d.codes((8, 4, 2, 2), axis=1)))


@breaks("Q07", "EEEI")
def channels_in_opset_12() -> onnx.ModelProto:
    d = Draft(12)
    return d.model(d.conv(d.fq("x")))


@breaks("Q07", "I...")
def opset_21() -> onnx.ModelProto:
    d = Draft(21)
    return d.model(d.conv(d.fq("x")))


@breaks("Q08", "E..E")
def int32_bias() -> onnx.ModelProto:
    d = Draft()
    bias = d.op(
        "DequantizeLinear",
        d.const([1] * 8, np.int32),
        d.const([0.1] * 8),
        d.const([0] * 8, np.int32),
        axis=0,
    )
    return d.model(d.op("Conv", d.fq("x"), d.codes((8, 8, 1, 1)), bias))


@breaks("Q09", "E..I")
def clip_before_dq() -> onnx.ModelProto:
    d = Draft()
    s, z = d.const(0.1), d.const(0, np.int8)
    codes = d.op(
        "Clip", d.op("QuantizeLinear", "x", s, z), d.const(-127, np.int8), d.const(127, np.int8)
    )
    return d.model(d.conv(d.op("DequantizeLinear", codes, s, z)))


@breaks("Q09", "E..E")
def transposed_codes() -> onnx.ModelProto:
    d = Draft()
    w = d.op("Transpose", d.const(np.ones((8, 5)), np.int8))
    return d.model(
        d.op("MatMul", d.fq("x"), d.op("DequantizeLinear", d.op("Transpose", w), d.const(0.1)))
    )


@breaks("Q10", "EWWW")
def float_weight() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.gemm(d.fq("x")))


@breaks("Q10", "EWWW")
def float_activation() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.conv(d.op("Relu", d.fq("x"))))


@breaks("Q10", "E.WW")
def float_weight_of_a_transposed_convolution() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.op("ConvTranspose", d.fq("x"), d.const(np.ones((8, 4, 2, 2)))))


@breaks("Q10", "EWWW")
def float_weight_behind_an_if() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.gemm(d.fq(d.branch("x", lambda inner, x: inner.op("Relu", x)))))


@breaks("Q10", ".WW.")
def a_cast_between_dq_and_the_layer() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.conv(d.op("Cast", d.fq("x"), to=onnx.TensorProto.FLOAT)))


@breaks("Q11", "W...")
def q_before_relu() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.op("Relu", d.fq(d.conv(d.fq("x")))))


@breaks("Q11", "W...")
def q_between_batch_norm_and_relu() -> onnx.ModelProto:
    d = Draft()
    norm = d.op("BatchNormalization", d.conv(d.fq("x")), *(d.const(np.ones(8)) for _ in range(4)))
    return d.model(d.op("Relu", d.fq(norm)))


@breaks("Q12", "IIII")
def lone_batch_norm() -> onnx.ModelProto:
    d = Draft()
    norm = d.op("BatchNormalization", "x", *(d.const(np.ones(8)) for _ in range(4)))
    return d.model(d.conv(d.fq(norm)))


@breaks("Q13", "W...")
def skip_in_float() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.op("Add", d.conv(d.fq("x")), "x"))


@breaks("Q13", "W...")
def conv_branch_quantized() -> onnx.ModelProto:
    d = Draft()
    x = d.fq("x")
    return d.model(d.op("Add", d.fq(d.conv(x)), x))


@breaks("Q14", "WWWI")
def two_convs_summed() -> onnx.ModelProto:
    d = Draft()
    x = d.fq("x")
    norm = d.op("BatchNormalization", d.conv(x), *(d.const(np.ones(8)) for _ in range(4)))
    return d.model(d.op("Relu", d.op("Add", norm, d.conv(x, kernel=3))))


@breaks("Q14", "WWWI")
def two_convs_summed_behind_a_cast() -> onnx.ModelProto:
    d = Draft()
    same = d.op("Cast", "x", to=TensorProto.FLOAT)
    return d.model(d.op("Relu", d.op("Add", d.conv(d.fq("x"), kernel=3), d.conv(d.fq(same)))))


@breaks("Q15", "IIII")
def two_scales() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.conv(d.fq("x", 0.1)), d.conv(d.fq("x", 0.2)))


@breaks("Q16", "WWWW")
def concat_of_two_scales() -> onnx.ModelProto:
    d = Draft()
    y = d.op("Relu", d.conv(d.fq("x")))
    return d.model(d.conv(d.op("Concat", d.fq("x"), d.fq(y, 0.3), axis=1), inputs=16))


@breaks("Q16", "W...")
def concat_of_two_scales_quantized_again() -> onnx.ModelProto:
    d = Draft()
    y = d.op("Relu", d.conv(d.fq("x")))
    return d.model(d.conv(d.fq(d.op("Concat", d.fq("x"), d.fq(y, 0.3), axis=1)), inputs=16))


@breaks("Q16", ".W..")
def concat_of_one_scale() -> onnx.ModelProto:
    d = Draft()
    x = d.fq("x")
    return d.model(d.conv(d.op("Concat", x, x, axis=1), inputs=16))


@breaks("Q16", "W...")
def concat_half_quantized() -> onnx.ModelProto:
    d = Draft()
    x = d.fq("x")
    return d.model(d.op("Concat", x, d.op("Relu", d.conv(x)), axis=1))


@breaks("Q17", "W...")
def average_in_float() -> onnx.ModelProto:
    d = Draft()
    y = d.op("ReduceMean", d.op("Relu", d.conv(d.fq("x"))), d.const([2, 3], np.int64), keepdims=1)
    return d.model(d.conv(d.fq(y)))


@breaks("Q17", "W...")
def max_pool_quantized_again() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.conv(d.fq(d.op("MaxPool", d.fq("x"), kernel_shape=[2, 2]))))


@breaks("Q17", "W...")
def max_pool_in_float() -> onnx.ModelProto:
    d = Draft()
    y = d.op("MaxPool", "x", kernel_shape=[2, 2])
    return d.model(d.conv(d.fq(y)), d.op("Sigmoid", y))


@breaks("Q18", "WWWI")
def quantized_twice() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.conv(d.fq(d.op("Identity", d.fq("x")), 0.2)))


@breaks("Q19", "W...")
def two_channels_a_group() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.conv(d.fq("x"), group=4))


@breaks("Q20", "W...")
def float_head() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.gemm(d.op("Relu", d.conv(d.fq("x")))))


@breaks("Q21", "W...")
def output_quantized() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.fq(d.conv(d.fq("x"))))


@breaks("Q22", "E.WE")
def microsoft() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.op("QGemm", d.conv(d.fq("x")), domain="com.microsoft"))


@breaks("Q22", "E.WE")
def convolution_of_integers() -> onnx.ModelProto:
    d = Draft()
    codes = d.op("QuantizeLinear", d.conv(d.fq("x")), d.const(0.1), d.const(0, np.int8))
    return d.model(d.op("ConvInteger", codes, d.const(np.ones((8, 8, 1, 1)), np.int8)))


@breaks("Q22", "E..E")
def convolution_of_codes() -> onnx.ModelProto:
    d = Draft()
    s, z = d.const(0.1), d.const(0, np.int8)
    y = d.op(
        "QLinearConv",
        d.op("QuantizeLinear", "x", s, z),
        s,
        z,
        d.const(np.ones((8, 8, 1, 1)), np.int8),
        s,
        z,
        s,
        z,
    )
    return d.model(d.op("Relu", d.op("DequantizeLinear", y, s, z)))


@breaks("Q24", "I..I")
def dynamic_batch() -> onnx.ModelProto:
    d = Draft()
    d.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, 8, 8])]
    return d.model(d.conv(d.fq("x")))


@breaks("Q25", "EEEE")
def scale_changes() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.conv(d.fq("x", 0.1, back=0.2)))


@breaks("Q27", "E..E")
def int4_convolution() -> onnx.ModelProto:
    d = Draft(21)
    codes = helper.make_tensor("w4", TensorProto.INT4, (8, 8, 1, 1), [1] * 64)
    d.tensors.append(codes)
    w = d.op("DequantizeLinear", "w4", d.const(np.full(8, 0.01)), axis=0)
    return d.model(d.op("Conv", d.fq("x"), w))


@breaks("Q27", "W..W")
def int4_product() -> onnx.ModelProto:
    d = Draft(21)
    d.tensors.append(helper.make_tensor("w4", TensorProto.INT4, (512, 4), [1] * 2048))
    w = d.op("DequantizeLinear", "w4", d.const(np.full(4, 0.01)), axis=1)
    return d.model(d.op("MatMul", d.op("Flatten", d.fq("x")), w))


@breaks("Q26", ".W..")
def conv_before_sigmoid() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.conv(d.fq(d.op("Sigmoid", d.conv(d.fq("x"))))))


@breaks("Q26", ".W..")
def relu_before_signed_codes() -> onnx.ModelProto:
    d = Draft()
    return d.model(d.conv(d.fq(d.op("Relu", d.conv(d.fq("x"))))))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_a_rule_finds_its_fault_alone(case: str, target: str) -> None:
    letter = FOUND[case][TARGETS.index(target)].strip(".")
    found = lint(CASES[case](), target)
    # most cases have convolutions as TensorRT wants them
    own = [f for f in found if case[:3] == "Q26" or f.rule != "Q26"]
    if case[:3] == "Q27":  # int4 needs opset 21
        own = [f for f in own if f.rule != "Q07"]
    assert {(f.severity, f.rule) for f in own} == ({(letter, case[:3])} if letter else set()), (
        "\n".join(map(str, found))
    )
    for f in found:
        assert f.node and f.message and f.cure
        assert str(f).startswith(f"{f.severity} {f.rule} ") and "\n" not in str(f)
        assert target in ("tensorrt", "rtx") or not re.search(
            "TensorRT|parser|engine|builder|profile", str(f)
        ), f


def test_every_rule_has_a_case_for_each_of_its_targets() -> None:
    assert {case[:3] for case in CASES} == set(RULES)
    for name, (severity, description) in RULES.items():
        letters = [FOUND[case] for case in CASES if case[:3] == name]
        assert set(severity) == {
            t for i, t in enumerate(TARGETS) if any(found[i] != "." for found in letters)
        }, name
        assert set(severity.values()) <= set("EWI") and description
    assert RULES["Q08"][0] == {"tensorrt": "E", "rtx": "E"} and "bias" in RULES["Q08"][1]


def test_the_page_of_rules_is_the_rules() -> None:
    page = (Path(__file__).parent.parent / "docs" / "lint.md").read_text().splitlines()
    rows = [
        f"| {name} | {r.description} | {r.cure} | "
        f"{' | '.join(r.severity.get(t, '-') for t in RUNTIMES)} | {r.seen} |"
        for name, r in sorted(REGISTRY.items())
    ]
    assert [line for line in page if line.startswith("| Q")] == rows


def test_a_rule_is_explained() -> None:
    said = explain("Q04")
    assert "E for tensorrt" in said and "dies of a computed one" in said
    with pytest.raises(repfx.InputError, match="unknown rule 'Q99'; choose one of: Q00"):
        explain("Q99")


def test_an_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(
        repfx.InputError,
        match="unknown target 'coreml'; choose one of: onnxruntime, openvino, rtx, tensorrt",
    ):
        lint(clean(), "coreml")


def test_what_makes_an_output_need_not_give_codes() -> None:
    d = Draft()
    x = d.fq("x")
    assert lint(d.model(d.conv(x), d.op("Relu", d.conv(x))), "onnxruntime") == []


def test_onnxruntime_runs_in_float_what_q26_says(tmp_path: Path) -> None:
    """A convolution before a ReLU, one code type at a time: in integers only where rounding does
    the ReLU.
    """
    for dtype, zero in ((np.int8, 0), (np.int8, -128), (np.uint8, 128), (np.uint8, 0)):
        d = Draft()
        y = d.fq(d.op("Relu", d.conv(d.fq("x", dtype=dtype, zero=zero))), dtype=dtype, zero=zero)
        model = d.model(d.op("Reshape", y, d.const([1, 512], np.int64)))
        model.graph.output[0].CopyFrom(
            helper.make_tensor_value_info(model.graph.output[0].name, TensorProto.FLOAT, [1, 512])
        )
        model.ir_version = 9
        onnx.save(model, tmp_path / "m.onnx")
        in_float = kernels("onnxruntime", tmp_path / "m.onnx").floats
        assert [f.node for f in lint(model, "onnxruntime") if f.rule == "Q26"] == list(in_float), (
            dtype,
            zero,
        )


def test_a_clean_file_is_clean(tmp_path: Path) -> None:
    model = clean()
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info(model.graph.output[0].name, TensorProto.FLOAT, [1, 5])
    )
    onnx.checker.check_model(model, full_check=True)
    assert lint(model) == []
    onnx.save(model, tmp_path / "m.onnx")
    assert lint(tmp_path / "m.onnx") == lint(str(tmp_path / "m.onnx")) == []


def test_constants_are_initializers_or_nodes() -> None:
    for make in (
        clean,
        CASES["Q08 int32_bias"],
        CASES["Q06 conv_along_its_inputs"],
        CASES["Q04 negative_scale"],
    ):
        model = make()
        nodes = [
            helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer
        ]
        want = lint(model)
        del model.graph.initializer[:]
        for node in reversed(nodes):
            model.graph.node.insert(0, node)
        assert lint(model) == want


def test_findings_are_sorted_by_severity() -> None:
    d = Draft(21)
    y = d.op("Relu", d.fq(d.conv(d.fq("x", zero=3))))
    found = lint(d.model(d.fq(y, -1.0)))
    order = [("EWI".index(f.severity), f.rule) for f in found]
    assert order == sorted(order) and [f.rule for f in found] == ["Q01", "Q04", "Q11", "Q21", "Q07"]


def test_bad_input_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(repfx.InputError, match="does not exist"):
        lint(tmp_path / "no.onnx")
    with pytest.raises(repfx.InputError, match="is not a file"):
        lint(tmp_path)
    for name, content in {"text": b"hello, this is text", "empty": b"", "zeros": bytes(64)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(repfx.InputError, match="is not an ONNX"):
            lint(tmp_path / name)
    onnx.save(
        clean(),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    assert lint(tmp_path / "m.onnx") == []
    with pytest.raises(repfx.InputError, match=r"lacks its weights, which are in weights\.bin"):
        lint(onnx.load(tmp_path / "m.onnx", load_external_data=False))
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(repfx.InputError, match=r"keeps c0 in weights\.bin, which is not beside it"):
        lint(tmp_path / "m.onnx")


def test_q_dq_in_subgraphs_are_not_said_to_be_missing() -> None:
    (found,) = lint(CASES["Q00 quantized_inside_an_if"]())
    assert found.severity == "E" and "inside If; subgraphs are not read" in found.message


def test_scales_of_a_scalar_are_a_finding() -> None:
    d = Draft()
    scale, zero = d.const(np.ones(8)), d.const(np.zeros(8), np.int8)
    w = d.op("DequantizeLinear", d.const(1, np.int8), scale, zero, axis=0)
    found = lint(d.model(d.op("Conv", d.fq("x"), w)))
    assert ("Q04", "8 scales for axis 0 of a tensor of shape ()") in {
        (f.rule, f.message) for f in found
    }


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("Conv", "group", "four"),
        ("DequantizeLinear", "axis", 0.5),
        ("ReduceMean", "axes", 2),
        ("Transpose", "perm", [0.5]),
    ],
)
def test_an_attribute_of_another_type_names_its_node(kind: str, name: str, value: Any) -> None:
    d = Draft()
    w = d.op("Transpose", d.codes((8, 8)), perm=[1, 0])
    d.op("MatMul", d.fq("x"), w)
    y = d.op("ReduceMean", d.op("Relu", d.conv(d.fq("x"))), axes=[2, 3])
    model = d.model(d.conv(d.fq(y)))
    (node, *_) = (n for n in model.graph.node if n.op_type == kind)
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
    with pytest.raises(
        repfx.InputError,
        match=rf"the model is malformed; Q\d\d .*{name} of {node.name} \({kind}\) is ",
    ):
        lint(model)


def test_a_rule_that_fails_is_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lint_module.Index, "one_scale", lambda *_: 1 // 0)
    with pytest.raises(
        repfx.InputError, match=r"malformed; Q\d\d \(.*cannot be checked: integer division"
    ):
        lint(clean())


def test_a_dimension_of_minus_one_is_dynamic() -> None:
    d = Draft()
    d.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [-1, 8, 8, 8])]
    assert [f.rule for f in lint(d.model(d.conv(d.fq("x"))))] == ["Q24"]


def test_odd_graphs_do_not_crash() -> None:
    """Cycles, absent inputs, unknown operators, no types, wrong axes."""
    kinds = (
        "QuantizeLinear DequantizeLinear Conv ConvTranspose Gemm MatMul Add Concat "
        "BatchNormalization MaxPool ReduceMean"
    )
    for kind in (*kinds.split(), "Identity", "Constant", "Unheard"):
        for inputs in (
            [],
            [""],
            ["x"],
            ["y"],
            ["x", "y"],
            ["c", "c"],
            ["x", "c", "c"],
            ["c", "x", "", "c"],
        ):
            nodes = [
                helper.make_node(kind, inputs, ["y"], axis=7),
                helper.make_node("DequantizeLinear", ["y", "c"], ["z"]),
            ]
            constant = numpy_helper.from_array(np.ones((2, 2), np.float32), "c")
            info = [helper.make_empty_tensor_value_info("x")]
            graph = helper.make_graph(
                nodes, "odd", info, [helper.make_empty_tensor_value_info("z")], [constant]
            )
            assert all(isinstance(f, Finding) for f in lint(helper.make_model(graph)))


def lowered(model: nn.Module, tmp_path: Path) -> list[Finding]:
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = repfx.calibrate(repfx.transform(randomise(model.eval()), ["ptq"]), [x])
    return lint(repfx.lower(model, tmp_path / "m.onnx", example=x).onnx)


def test_our_own_file_is_clean(tmp_path: Path) -> None:
    layers = (
        m
        for i, o, g in ((3, 8, 1), (8, 16, 2), (16, 16, 16))
        for m in (RepVGG(i, o, 3, 1, 1, groups=g), nn.ReLU())
    )
    net = nn.Sequential(*layers, nn.Conv2d(16, 4, 1))
    found = lowered(net, tmp_path)
    assert [f.rule for f in found] == ["Q24"], "\n".join(map(str, found))


def test_our_own_residual_file_is_clean(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(RepVGG(3, 8, 3, 1, 1), nn.ReLU())
            self.body = nn.Sequential(RepVGG(8, 8, 3, 1, 1), nn.ReLU(), RepVGG(8, 8, 3, 1, 1))
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = torch.relu(x + self.body(x))
            return self.head(torch.cat([x, torch.max_pool2d(x, 3, 1, 1)], 1).mean((2, 3)))

    found = lowered(Net(), tmp_path)
    assert all(f.severity == "I" for f in found), "\n".join(map(str, found))


def test_what_onnxruntime_quantizes(tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    reader: Any = quantization.CalibrationDataReader

    class Data(reader):
        def __init__(self) -> None:
            self.left = [
                {"x": np.random.default_rng(i).standard_normal((1, 8, 8, 8), np.float32)}
                for i in range(2)
            ]

        def get_next(self) -> dict[str, Any] | None:
            return self.left.pop() if self.left else None

    d = Draft()
    y = d.op("Relu", d.op("Conv", "x", d.const(np.ones((8, 8, 3, 3))), d.const(np.ones(8))))
    model = d.model(d.op("Conv", y, d.const(np.ones((4, 8, 1, 1))), d.const(np.ones(4))))
    model.ir_version = 10
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "float.onnx")
    quantization.quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Data(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    found = lint(tmp_path / "int8.onnx")
    assert {"Q01", "Q02", "Q08", "Q21"} <= {f.rule for f in found}, "\n".join(map(str, found))
