"""Opsets 13 to 17: the same numbers in the operators of the time, under the same names, or a word
on what has no form.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import repfx
from repfx.lowering.lint.findings import lint
from repfx.lowering.onnx import older
from repfx.lowering.runtimes.layers import kernels
from repfx.lowering.runtimes.run import session

OLD = range(13, 18)


class Everything(nn.Module):
    """What changed between opset 13 and 18: axes, parts of shapes and of values, paddings, young
    operators.
    """

    layers = 3

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3),
            nn.LayerNorm(8),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat(F.hardswish(self.one(x)).chunk(3, 1)[::-1], 1)
        y = self.two(F.pad(F.mish(y), (1, 1, 2, 0), mode="reflect"))
        y = self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = F.interpolate(y, scale_factor=2.0) - y.amax((2, 3), keepdim=True)
        y = F.normalize(y.reshape(y.shape[0], 2, 4, -1).transpose(1, 2).flatten(1, 2), dim=1)
        return self.head(y.mean(2))


def made(target: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net, x = Everything().eval(), torch.randn(2, 3, 16, 16)
    return repfx.calibrate(repfx.transform(net, ["ptq"], example=x, target=target), [x]), x


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    model, x = made("tensorrt")
    path = tmp_path_factory.mktemp("opsets") / "18.onnx"
    return onnx.load(repfx.lower(model, path, example=x, opset=18, dynamic=True).onnx)


def rewritten(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    older.to_opset(copied, opset)
    onnx.checker.check_model(copied, full_check=True)
    assert copied.opset_import[0].version == opset
    return copied


@pytest.mark.parametrize("opset", OLD)
def test_the_same_numbers_under_the_same_names(opset: int, written: onnx.ModelProto) -> None:
    found = rewritten(written, opset)
    names = [{o for n in p.graph.node for o in n.output} for p in (written, found)]
    assert names[0] <= names[1]
    for size in (16, 23):
        x = torch.randn(3, 3, size, size + 2)
        for optimize in (False, True):
            before, after = (session("onnxruntime", p, optimize)((x,))[0] for p in (written, found))
            assert torch.allclose(before, after, atol=1e-5), optimize
    kinds = {n.op_type for n in found.graph.node}
    assert ("LayerNormalization" in kinds, "HardSwish" in kinds, "Mish" in kinds) == (
        opset >= 17,
        opset >= 14,
        False,
    )


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime", "openvino"])
def test_a_quantized_net_in_opset_13(target: str, tmp_path: Path) -> None:
    model, x = made(target)
    artifact = repfx.lower(model, tmp_path / "13.onnx", example=x, target=target, opset=13)
    assert artifact.parity.quantizers and artifact.parity.agrees
    proto = onnx.load(artifact.onnx)
    assert (proto.opset_import[0].version, proto.ir_version) == (13, 7)
    assert not [f for f in lint(proto, target) if f.severity in "EW"]
    if target == "onnxruntime":
        assert kernels(target, artifact.onnx).integers == Everything.layers


def graph(
    kind: str, *constants: Any, shape: Any = (2, 3, 4, 5), outputs: int = 1, **attrs: Any
) -> onnx.ModelProto:
    """One operator of opset 18 on an input and constants; where a constant is a name, on a further
    input.
    """
    tensors = [
        numpy_helper.from_array(c, f"c{i}")
        for i, c in enumerate(constants)
        if isinstance(c, np.ndarray)
    ]
    inputs = [c if isinstance(c, str) else f"c{i}" for i, c in enumerate(constants)]
    infos = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    infos += [
        helper.make_tensor_value_info(i, TensorProto.INT64, [2]) for i in inputs if i == "more"
    ]
    made = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(kind, ["x", *inputs], made, name="op", **attrs)
    draft = helper.make_graph(
        [node], "g", infos, [helper.make_empty_tensor_value_info(m) for m in made], tensors
    )
    model = helper.make_model(draft, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


ONES = np.ones(5, np.float32)
KEPT = {
    "all axes": graph("ReduceMean"),
    "axes": graph("ReduceL2", ints(1, -1), keepdims=0),
    "axes that are given": graph("ReduceMax", ints(2), noop_with_empty_axes=1),
    "equal parts": graph("Split", axis=3, num_outputs=5, outputs=5),
    "unequal parts": graph("Split", axis=-1, num_outputs=3, outputs=3),
    "sizes": graph("Split", ints(1, 2), axis=1, outputs=2),
    "pads of some axes": graph("Pad", ints(1, 0, 2, -1), np.array(7, np.float32), ints(-1, 1)),
    "pads of all": graph("Pad", ints(0, 0, 1, 1, 0, 0, 1, 1), mode="edge"),
    "the shape": graph("Shape"),
    "its end": graph("Shape", start=-2),
    "its start": graph("Shape", end=1),
    "a reshape": graph("Reshape", ints(2, -1), allowzero=1),
    "a norm without a bias": graph("LayerNormalization", ONES, epsilon=0.1),
    "a norm along two axes": graph(
        "LayerNormalization", np.ones((4, 5), np.float32), np.ones((4, 5), np.float32), axis=2
    ),
    "a resize": graph("Resize", "", np.array([1, 1, 2, 2], np.float32), mode="linear", antialias=0),
}


@pytest.mark.parametrize("opset", OLD)
@pytest.mark.parametrize("kind", KEPT)
def test_one_operator(kind: str, opset: int) -> None:
    found, x = rewritten(KEPT[kind], opset), torch.randn(2, 3, 4, 5)
    before, after = (session("onnxruntime", p)((x,)) for p in (KEPT[kind], found))
    assert len(before) == len(after)
    assert all(
        a.shape == b.shape and torch.allclose(a, b, atol=1e-6)
        for a, b in zip(before, after, strict=True)
    )


INNER = helper.make_graph(
    [], "inner", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
)
REFUSED = {
    "Col2Im came with opset 18 and has no form in opset 17 (op)": graph(
        "Col2Im", ints(4, 4), ints(2, 2), shape=(1, 4, 9)
    ),
    "Resize with antialias=1 has no form": graph(
        "Resize", "", np.ones(4, np.float32), mode="linear", antialias=1
    ),
    "Reshape with allowzero=1 has no form": graph("Reshape", ints(0, 5), allowzero=1, shape=(0, 5)),
    "ReduceMean with a computed input 1": graph("ReduceMean", "more"),
    "ReduceMean with noop_with_empty_axes=1": graph("ReduceMean", noop_with_empty_axes=1),
    "Split along a dynamic dimension": graph(
        "Split", axis=0, num_outputs=2, outputs=2, shape=("n", 3)
    ),
    "LayerNormalization with more than one output": graph("LayerNormalization", ONES, outputs=2),
    "If with a graph inside it": graph("If", then_branch=INNER, else_branch=INNER),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_has_no_form_is_named(said: str) -> None:
    opset = 17 if "17" in said else 13
    with pytest.raises(repfx.InputError, match=re.escape(said)):
        older.to_opset(REFUSED[said], opset)


def test_what_cannot_be_lowered_to_an_opset_leaves_no_file(tmp_path: Path) -> None:
    class Sample(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.grid_sample(x, x.permute(0, 2, 3, 1)[..., :2], align_corners=False)

    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), Sample()).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(
        repfx.InputError, match="GridSample came with opset 16 and has no form in opset 13"
    ):
        repfx.lower(net, tmp_path / "13.onnx", example=x, opset=13)
    assert not list(tmp_path.iterdir())


def test_the_file_format_is_that_of_the_opset() -> None:
    found = {}
    for opset in range(13, 24):
        model = graph("Relu")
        model.opset_import[0].version = opset
        older.to_opset(model, opset)
        found[opset] = model.ir_version
    assert found == {
        13: 7,
        14: 7,
        **dict.fromkeys(range(15, 19), 8),
        19: 9,
        20: 9,
        21: 10,
        22: 10,
        23: 11,
    }
