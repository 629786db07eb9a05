"""Free sizes: a file that computes what the model computes at any height and width, or a word on
what is fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.lowering.runtimes.run import session
from repfx.rewrite.difference import difference


class Net(nn.Module):
    """A U: a stride, a resize to a size that is read, a concatenation, a gate, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, 2, 1),
            nn.Conv2d(16, 8, 3),
        )
        self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.stem(x))
        y = F.interpolate(torch.relu(self.down(x)), size=x.shape[2:])
        y = torch.relu(self.up(torch.cat([x, y], 1)))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return y, self.head(y.flatten(2).mean(2))


def dims(path: Path) -> list[list[str | int]]:
    found = onnx.load(path).graph
    return [
        [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in (*found.input, *found.output)
    ]


def test_height_and_width_are_free(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 3, 16, 16)
    model: Any = repfx.calibrate(
        repfx.transform(net, ["ptq"], example=x, target="onnxruntime"), [x]
    )
    path = repfx.lower(
        model, tmp_path / "m.onnx", example=x, target="onnxruntime", dynamic=True
    ).onnx
    inputs, maps, scores = dims(path)
    assert inputs == ["batch", 3, "height", "width"] and scores == ["batch", 5]
    assert "height" in str(maps[2]) and "width" in str(maps[3])
    run = session("onnxruntime", path)
    for shape in ((2, 3, 16, 16), (1, 3, 9, 20), (3, 3, 31, 12)):
        x = torch.randn(shape)
        want, got = model(x), run((x,))
        assert [w.shape for w in want] == [g.shape for g in got]
        assert all(difference(w, g).sqnr > 30 for w, g in zip(want, got, strict=True))


def test_they_are_fixed_by_default(tmp_path: Path) -> None:
    path = repfx.lower(
        Fixed(torch.flatten).eval(), tmp_path / "m.onnx", example=torch.randn(2, 3, 16, 16)
    ).onnx
    assert dims(path) == [["batch", 3, 16, 16], ["batch", 5]]


class Pair(nn.Module):
    def __init__(self, join: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.join = nn.Conv2d(3, 4, 1), nn.Conv1d(3, 4, 1), join

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.join(self.a(x), self.b(y) if y.dim() == 3 else self.a(y))


def test_inputs_share_the_names_of_what_is_one_size(tmp_path: Path) -> None:
    x, y, z = torch.randn(2, 3, 8, 9), torch.randn(2, 3, 8, 9), torch.randn(2, 3, 7)
    for join, other, names in (
        (torch.add, y, ["height", "width"]),
        (lambda a, b: (a, b), y, ["height_2", "width_2"]),
        (lambda a, b: (a, b), z, ["length"]),
    ):
        path = repfx.lower(
            Pair(join).eval(), tmp_path / "m.onnx", example=(x, other), dynamic=True
        ).onnx
        assert dims(path)[:2] == [["batch", 3, "height", "width"], ["batch", 3, *names]]


class Fixed(nn.Module):
    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head, self.then = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 256, 5), then

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(x.flatten(1)) if self.then is torch.flatten else self.then(x)


FIXED = {
    r"fixes height and width; it takes \(2, 3, 16, 16\) and nothing larger": torch.flatten,
    r"the model fixes the width of its input x at 16": lambda y: y + torch.ones(16),
    r"for inputs of \(1, 3, 80, 80\) .*different shapes": lambda y: F.adaptive_avg_pool2d(y, 4),
    r"for inputs of \(1, 3, 80, 80\) .* does not compute what the model computes": lambda y: (
        y if y.shape[2] < 40 else -y
    ),
    r"for inputs of \(1, 3, 17, 19\) .* does not compute what the model computes": lambda y: (
        y if y.shape[2] % 2 == 0 else -y
    ),
}


@pytest.mark.parametrize("said", FIXED)
def test_a_model_that_fixes_sizes_says_which(said: str, tmp_path: Path) -> None:
    model, x = Fixed(FIXED[said]).eval(), torch.randn(2, 3, 16, 16)
    with pytest.raises(
        (repfx.InputError, repfx.CheckError), match=f"{said}.*: lower it without dynamic"
    ):
        repfx.lower(model, tmp_path / "m.onnx", example=x, dynamic=True)
    assert not list(tmp_path.iterdir())


def test_sizes_that_the_model_itself_refuses_are_its_own_limit(tmp_path: Path) -> None:
    model = Fixed(lambda y: y.reshape(y.shape[0], 4, y.shape[2] // 8, 8, -1).amax(3)).eval()
    path = repfx.lower(
        model, tmp_path / "m.onnx", example=torch.randn(2, 3, 16, 16), dynamic=True
    ).onnx
    x = torch.randn(1, 3, 24, 40)
    assert difference(model(x), session("onnxruntime", path)((x,))[0]).relative < 1e-5


def test_a_size_of_one_cannot_be_free(tmp_path: Path) -> None:
    with pytest.raises(
        repfx.InputError,
        match="the height of input 1 is 1 in the example; to be dynamic it has to be larger",
    ):
        repfx.lower(
            nn.Conv2d(3, 4, 1).eval(),
            tmp_path / "m.onnx",
            example=torch.randn(2, 3, 1, 9),
            dynamic=True,
        )
