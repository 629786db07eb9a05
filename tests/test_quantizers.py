"""Quantizers: what a pass gets from it, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import repfx
from repfx.graph.functional import value_of
from repfx.passes import IntegerLayer, Pass, Promise, Ptq, Quantizers, Result, Rounding, Stage, Work
from repfx.placement.quantizers import FLOAT
from repfx.quant import quantizers_of

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Fork(nn.Module):
    """Two layers read one value; their sum goes through a pool into the last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x)) * torch.sigmoid(self.b(x))
        return self.head(y.mean((2, 3)))


@dataclass(frozen=True)
class Some(Pass):
    """Rounds every layer, those in `narrow` to 4 bits and those in `plain` not."""

    name: ClassVar[str] = "some"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    promises: ClassVar[frozenset[Promise]] = frozenset({Promise.NAMES})

    narrow: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    how: Rounding = field(default_factory=Rounding)

    def run(self, work: Work) -> Result:
        view = work.view()
        layers = []
        for node in view.nodes:
            if found := view.layer(node):
                low, off = found.path in self.narrow, found.path in self.plain
                bits = FLOAT if off else 4 if low else 8
                own = view.ops[node].own  # type: ignore[union-attr]
                assert own is not None
                layers.append(IntegerLayer(node, found.x, found.path, own, bits, bits))
        quantizers = Quantizers(work, view, layers, self.how)
        walked = []
        for layer in quantizers:
            walked.append(layer.path)
            found = view.layer(layer.node)
            assert found is not None
            weight, bias = (value_of(ref, layer.node) for ref in (found.weight, found.bias))
            assert weight is not None
            rounded = quantizers.weight(layer, weight, view.tensor(found.weight))
            assert (rounded is weight) == (layer.path in self.plain)
            assert quantizers.runs_in_integers(layer) == (layer.path not in self.plain)
            quantizers.put(layer, quantizers.input(layer), rounded, bias)
        assert walked == ["a", "b", "head"]
        return Result(self.name, declined=quantizers.declined, inserted=tuple(work.inserted))


def rounded(**options: object) -> tuple[nn.Module, fx.GraphModule]:
    torch.manual_seed(0)
    net = Fork().eval()
    return net, repfx.transform(net, [Some(**options)], example=X)  # type: ignore[arg-type]


def test_layers_share_the_quantizer_of_what_they_read() -> None:
    net, model = rounded()
    assert set(quantizers_of(model)) == {
        "a.input_quant",
        "a.weight_quant",
        "b.weight_quant",
        "mean.input_quant",  # the average pool between two layers
        "head.input_quant",
        "head.weight_quant",
    }
    calls = [str(n.target) for n in model.graph.nodes if n.op == "call_module"]
    assert calls.count("a.input_quant") == 1
    assert 25 < repfx.verify(net, repfx.calibrate(model, [X]), X).sqnr < 60
    assert set(net.state_dict()) < set(model.state_dict())


def test_a_value_takes_the_most_bits_that_a_reader_wants() -> None:
    for one, other in (("a", "b"), ("b", "a")):
        quants = quantizers_of(rounded(narrow=(one,))[1])
        assert quants[f"{one}.weight_quant"].grid.bits == 4
        assert quants[f"{other}.weight_quant"].grid.bits == 8
        assert quants["a.input_quant"].grid.bits == 8
    narrow = quantizers_of(rounded(narrow=("a", "b"))[1])
    assert narrow["a.input_quant"].grid.bits == 4


def test_a_float_layer_stays_as_it_is_and_is_walked() -> None:
    model = rounded(plain=("a",))[1]
    assert set(quantizers_of(model)) == {
        "b.input_quant",
        "b.weight_quant",
        "mean.input_quant",
        "head.input_quant",
        "head.weight_quant",
    }
    reads = {str(n.args[0]) for n in model.graph.nodes if n.name.startswith("conv2d")}
    assert reads == {"x", "b_input_quant"}
    assert not quantizers_of(rounded(plain=("a", "b", "head"))[1])


def test_how_weights_are_rounded() -> None:
    grids = quantizers_of(rounded(how=Rounding(per_channel=False, learned=True))[1])
    assert all(q.learned and q.scale.dim() == 0 for q in grids.values())
    scales = {
        kind: quantizers_of(rounded(how=Rounding(weights=kind), narrow=("a",))[1])["a.weight_quant"]
        for kind in ("max", "mse", "mae")
    }
    assert scales["max"].scale.shape == (4,)
    assert bool((scales["max"].scale > scales["mse"].scale).any())
    with pytest.raises(repfx.InputError, match="unknown method for weights 'least'; choose one of"):
        Rounding(weights="least")


def test_repq_can_leave_its_ends_in_float() -> None:
    torch.manual_seed(0)
    a, b, c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
    net = nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c)
    model = repfx.transform(net.eval(), ["repq(ends=32)"], example=X)
    assert set(quantizers_of(model)) == {"2.input_quant", "2.weight_quant"}
    model.train()(X)
    deployed = repfx.transform(model.eval(), ["fuse"], example=X)
    assert set(quantizers_of(deployed)) == set(quantizers_of(model))
    assert repfx.verify(model, deployed, X).relative < 1e-6


class Skip(nn.Module):
    """A convolution around which its input goes, as in super-resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


class Sliced(nn.Module):
    """Pixels of every other row and column become channels (space to depth)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(12, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.a(torch.cat(parts, 1))


BYTES = torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 255
BYTES[0, 0, 0, 0] = 1


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
@pytest.mark.parametrize("make", [Skip, Sliced])
def test_an_unsigned_input_has_every_step_of_its_image(
    make: type[nn.Module], target: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = make().eval()
    model = repfx.transform(net, ["ptq(unsigned=x)"], example=BYTES, target=target)
    repfx.calibrate(model, [BYTES])
    first = quantizers_of(model)["a.input_quant"]
    assert first.grid.signed == (target == "tensorrt")  # it has no unsigned INT8
    if target != "tensorrt":
        torch.testing.assert_close(first(BYTES), BYTES, rtol=0, atol=1e-7)
        signed = repfx.transform(net, ["ptq"], example=BYTES, target=target)
        repfx.calibrate(signed, [BYTES])
        gain = repfx.verify(net, model, BYTES).sqnr - repfx.verify(net, signed, BYTES).sqnr
        assert gain > 0.5
    repfx.save(model, tmp_path / "unsigned.pt")
    again = repfx.load(tmp_path / "unsigned.pt")
    assert quantizers_of(again)["a.input_quant"].grid == first.grid
    repfx.lower(again, tmp_path / "unsigned.onnx", example=BYTES, target=target)  # compares codes


@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize("reload", [False, True])
def test_an_unsigned_input_with_a_negative_number_is_an_error(
    method: str, reload: bool, tmp_path: Path
) -> None:
    model: nn.Module = repfx.transform(
        Skip().eval(), [Ptq(unsigned="*")], example=X, target="onnxruntime"
    )
    if reload:
        repfx.save(model, tmp_path / "unsigned.pt")
        model = repfx.load(tmp_path / "unsigned.pt")
    with pytest.raises(repfx.InputError, match="never negative, with `unsigned`, but has -"):
        repfx.calibrate(model, [BYTES, X], method=method)
    assert not any(q.calibrated for q in quantizers_of(model, of_weight=False).values())


def test_an_unsigned_input_that_is_not_there_is_an_error() -> None:
    with pytest.raises(repfx.InputError, match=r"unknown input 'image'; choose one of: x$"):
        repfx.transform(Skip().eval(), ["ptq(unsigned=image)"], example=X)


class Doubtful(nn.Module):
    """Its own code looks at data, so it stays as it is, and what it calls is traced on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x - 1) if float(x.sum()) > -1e9 else x


def test_an_unsigned_input_is_one_of_the_whole_model() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), Doubtful()).eval()
    model = repfx.transform(net, [Ptq(unsigned="*")], example=BYTES, target="onnxruntime")
    grids = {path: q.grid for path, q in quantizers_of(model, of_weight=False).items()}
    assert not grids["0.input_quant"].signed
    others = [g.signed for path, g in grids.items() if path != "0.input_quant"]
    assert others and all(others)
    assert repfx.quantize(net, [BYTES], target="onnxruntime").rung.score is not None
    with pytest.raises(repfx.InputError, match="unsigned: the model is not one graph"):
        repfx.transform(Doubtful().eval(), ["ptq(unsigned=x)"], example=BYTES)
