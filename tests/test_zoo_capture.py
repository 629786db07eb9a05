"""The study of many libraries: its list, its measures, and one model through all of its stages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_capture
import zoo_operators
from torch import nn
from zoo_models import LIBRARIES, Entry, entries


def test_the_list_is_long_and_names_each_model_once() -> None:
    keys = [e.key for e in entries()]
    assert len(keys) >= 400
    assert len(set(keys)) == len(keys)
    assert {e.library for e in entries()} == set(LIBRARIES)


@pytest.mark.zoo
def test_a_model_goes_through_every_stage(tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = []
    entry = next(e for e in entries() if e.key == "timm/test_efficientnet")
    zoo_capture.Trial(entry, sent.append).run(tmp_path)
    row: dict[str, Any] = {"library": "timm", "name": entry.name}
    for part in sent:
        row |= part
    assert "failure" not in row
    assert row["stage"] == "done" and row["capture"] == "whole"
    assert row["batch_norms"][0] > 0 and row["batch_norms"][1] == 0
    assert row["error"] < 1e-9 and row["batch"] < 1e-4 and row["precision"] == "float64"
    assert row["parity"][0] > 0 and row["lint"] == {}
    assert zoo_capture.fine(json.loads(json.dumps(row)))
    assert "| timm | 1 | 1 | 0 | 0 | 1 of 1 | 1 of 1 |" in zoo_capture.markdown([row])


def test_a_failure_is_told_and_the_later_stages_are_left_out(tmp_path: Path) -> None:
    def build(_: Entry) -> tuple[nn.Module, tuple[Any, ...]]:
        raise KeyError("no such model")

    sent: list[dict[str, Any]] = []
    zoo_capture.Trial(Entry("timm", "none", 8, build), sent.append).run(tmp_path)
    failure = next(part["failure"] for part in sent if "failure" in part)
    assert failure["stage"] == "build" and failure["kind"] == "KeyError" and not failure["clear"]
    assert [part["stage"] for part in sent if "stage" in part] == ["build", "done"]


def test_outputs_are_compared_leaf_by_leaf() -> None:
    x = torch.tensor([1.0, -4.0])
    found = zoo_capture.compare({"a": x, "b": [torch.arange(2)]}, {"a": x + 1, "b": [x.long()]})
    assert found == {"error": 0.25, "discrete": [1, 1]}
    assert zoo_capture.compare((x, None), (x,))["error"] == math.inf
    assert zoo_capture.compare(x, x[:1])["error"] == math.inf
    assert zoo_capture.compare(x, x * torch.nan)["error"] == math.inf


def test_statistics_and_layer_scales_are_made_to_matter() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.gamma = nn.Parameter(torch.full((4, 1, 1), 1e-6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gamma * self.norm(self.conv(x))

    model = Scaled().eval()
    assert not zoo_capture.randomise(model, (torch.randn(2, 3, 4, 4),))
    assert model.gamma.min() >= 0.1
    assert model.norm.running_var.std() > 0.05 and model.norm.running_mean.abs().min() > 0
    # A net that overflows: the statistics follow the activations.
    model.conv.weight.data *= 1e9
    assert zoo_capture.randomise(model, (torch.randn(2, 3, 4, 4),))
    assert model(torch.randn(2, 3, 4, 4)).abs().max() < 1e3


def test_operators_of_torchvision() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
    kept = zoo_operators.nms(boxes, torch.tensor([0.5, 0.9, 0.3]), 0.5)
    assert kept.tolist() == [1, 2]
    x, weight, bias = torch.randn(2, 4, 9, 9), torch.randn(6, 2, 3, 3), torch.randn(6)
    more = (2, 2, 1, 1, 1, 1, 2, 1, True)
    still, full = torch.zeros(2, 18, 5, 5), torch.ones(2, 9, 5, 5)
    given = zoo_operators.deform_conv2d(x, weight, still, full, bias, *more)
    right = nn.functional.conv2d(x, weight, bias, 2, 1, 1, 2)
    assert torch.allclose(given, right, atol=1e-5)
    moved = zoo_operators.deform_conv2d(x, weight, still + 1, full, bias, *more)
    right = nn.functional.conv2d(x.roll((-1, -1), (2, 3)), weight, bias, 2, 1, 1, 2)
    assert torch.allclose(moved[:, :, 1:-1, 1:-1], right[:, :, 1:-1, 1:-1], atol=1e-5)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [2, -1])
def test_cells_of_boxes(ratio: int, aligned: bool) -> None:
    """On a plane, the mean of a cell is the value at its centre; outside of the image it is 0."""
    rows, columns = torch.arange(20.0)[:, None], torch.arange(16.0)
    plane = torch.stack([rows + 0 * columns, 3 * columns - rows])
    images = torch.stack([plane, 2 * plane])
    boxes = torch.tensor([[1.0, 8, 4, 40, 60], [0, 12, 12, 30, 20], [0, 200, 4, 240, 40]])
    found = zoo_operators.roi_align(images, boxes, 0.25, 4, 3, ratio, aligned)
    for box, cells in zip(boxes[:2], found, strict=False):
        left, top, right, bottom = (box[1:] / 4 - aligned / 2).tolist()
        y = top + (torch.arange(4) + 0.5)[:, None] * (bottom - top) / 4
        x = left + (torch.arange(3) + 0.5) * (right - left) / 3
        right_values = torch.stack([y + 0 * x, 3 * x - y]) * (1 + box[0])
        assert torch.allclose(cells, right_values, atol=1e-4)
    assert not found[2].any()
