"""Preprocessing: every option against the same written by hand, and a record that stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset

import repfx
from repfx.cli.inputs import images, preprocessing, real_input, usual_shape
from repfx.data import Images, Pictures, Preprocessing
from repfx.data.preprocessing import preprocessing_of
from repfx.graph.inputs import note_preprocessing, noted_preprocessing

HOW = Preprocessing((24, 32), "crop", 0.75, (10.0, 20.0, 30.0), (2.0, 3.0, 4.0), "BGR", 255.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(6):
        pixels = random.integers(0, 256, (40 + 2 * i, 60, 3), dtype=np.uint8)
        (made / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(made / "ab"[i % 2] / f"{i}.png")
    return made


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def by_hand(path: Path) -> torch.Tensor:
    """HOW, step by step: shorter side to size / crop, centre, BGR, 0..255."""
    picture = Image.open(path).convert("RGB")
    scale = max(24 / picture.height, 32 / picture.width) / 0.75
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    left, top = (picture.width - 32) // 2, (picture.height - 24) // 2
    pixels = np.asarray(picture.crop((left, top, left + 32, top + 24)), dtype=np.float32)
    return torch.from_numpy((pixels[..., ::-1] - [10, 20, 30]) / [2, 3, 4]).permute(2, 0, 1).float()


def test_every_option_against_the_same_by_hand(folder: Path) -> None:
    found = images(folder, HOW)
    want = [by_hand(p) for p in sorted(folder.rglob("*.png"))]
    for x, y in zip(found, want, strict=True):
        assert torch.allclose(x, y, atol=1e-5)
    labelled = Pictures(folder, preprocessing=HOW)
    assert all(torch.equal(a[0], b) for a, b in zip(labelled, found, strict=True))


def test_the_usual_one_is_that_of_torchvision() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    how = Preprocessing(None)
    x = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (how.mean, how.std))
    assert torch.allclose(how(pixels), (x - mean) / std)


def test_a_letterbox_has_the_mean_colour_around_it(folder: Path) -> None:
    how = Preprocessing((64, 32), "letterbox", order="BGR", peak=255, mean=(1, 2, 3), std=(1, 1, 1))
    x = images(folder, how)[0]
    rows = x.abs().sum((0, 2)) > 0
    assert x.shape == (3, 64, 32) and int(rows.sum()) == round(40 * 32 / 60)
    assert rows[21:42].all()  # in the middle


def test_gray_images_have_one_channel(folder: Path) -> None:
    x = images(folder, Preprocessing(16, mean=(0.5,), std=(0.25,)))[0]
    assert x.shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mean": (0.5,)}, "1 and 3"),
        ({"mean": (0.5, 0.5), "std": (1, 1)}, "2 and 2"),
        ({"std": (1, 0, 1)}, "std is above 0"),
        ({"mean": (float("nan"), 0, 0)}, "mean is a number"),
        ({"size": 0}, "size is"),
        ({"size": (1, 2, 3)}, "size is"),
        ({"fit": "stretch"}, "unknown fit"),
        ({"order": "GRB"}, "unknown order"),
        ({"crop": 0.0}, "crop is a share"),
        ({"crop": 1.5}, "crop is a share"),
        ({"crop": 0.5, "fit": "letterbox"}, "crop is for fit=crop"),
        ({"peak": 0.0}, "peak is"),
        ({"peak": float("inf")}, "peak is"),
    ],
)
def test_wrong_values_are_errors(options: dict[str, Any], words: str) -> None:
    with pytest.raises(repfx.InputError, match=words):
        Preprocessing(**options)


def test_it_is_found_behind_loaders_and_subsets(folder: Path) -> None:
    found = images(folder, HOW)
    for data in (found, DataLoader(found, 2), DataLoader(Subset(found, [0, 1]), 2)):
        assert preprocessing_of(data) == HOW
    assert preprocessing_of([torch.zeros(2, 3, 4, 4)]) is None


def test_other_code_around_a_data_set_is_not_trusted(folder: Path) -> None:
    class Flipped(torch.utils.data.Dataset[torch.Tensor]):
        def __init__(self, dataset: Images) -> None:
            self.dataset = dataset

        def __getitem__(self, i: int) -> torch.Tensor:
            return self.dataset[i].flip(0)

    found = images(folder, HOW)
    assert preprocessing_of(Flipped(found)) is None
    assert preprocessing_of(DataLoader(found, 2, collate_fn=torch.stack)) is None


def test_a_record_of_another_size_is_forgotten() -> None:
    made = repfx.transform(net(), ["ptq"])
    note_preprocessing(made, HOW)
    repfx.calibrate(made, [torch.randn(2, 3, 24, 32)])
    assert noted_preprocessing(made) == HOW
    repfx.calibrate(made, [torch.randn(2, 3, 20, 20)])
    assert noted_preprocessing(made) is None


def test_a_file_of_another_size_says_so(tmp_path: Path) -> None:
    made = repfx.transform(net(), [])
    note_preprocessing(made, HOW)
    repfx.lower(made, tmp_path / "a.onnx", example=torch.randn(2, 3, 40, 48))
    (entry,) = onnx.load(tmp_path / "a.onnx").metadata_props
    assert json.loads(entry.value)["size"] == [40, 48]
    assert noted_preprocessing(made) == HOW


def test_augmented_images_are_no_letterboxes(folder: Path) -> None:
    with pytest.raises(repfx.InputError, match="fit=crop"):
        Pictures(folder, preprocessing=Preprocessing(16, fit="letterbox"), augment=True)


def test_an_array_has_none(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 3, 8, 8), np.float32))
    assert Images(tmp_path / "a.npy").preprocessing is None


@pytest.mark.parametrize("way", ["calibrate", "reconstruct", "quantize"])
def test_it_is_recorded_saved_loaded_and_written(way: str, folder: Path, tmp_path: Path) -> None:
    data = DataLoader(images(folder, HOW), 2)
    if way == "quantize":
        made: nn.Module = repfx.quantize(net(), data, budget=100.0).model
    else:
        made = repfx.transform(net(), ["ptq"])
        repfx.calibrate(made, data) if way == "calibrate" else repfx.reconstruct(
            made, data, iterations=1
        )
    assert noted_preprocessing(made) == HOW
    assert noted_preprocessing(repfx.transform(made, ["fuse"])) == HOW
    repfx.save(made, tmp_path / "net.pt")
    again = repfx.load(tmp_path / "net.pt")
    assert noted_preprocessing(again) == HOW
    repfx.lower(again, tmp_path / "net.onnx", example=torch.randn(2, 3, 24, 32))
    (entry,) = onnx.load(tmp_path / "net.onnx").metadata_props
    assert entry.key == "repfx.preprocessing"
    assert Preprocessing.read(json.loads(entry.value)) == HOW


def test_fit_records_it(folder: Path) -> None:
    made = repfx.transform(nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1)), [])
    note_preprocessing(made, HOW)
    note_preprocessing(made, None)  # data without a record
    assert noted_preprocessing(made) == HOW
    classes = repfx.transform(net(), [])
    data = Pictures(folder, preprocessing=Preprocessing((24, 32)))
    repfx.fit(classes, "classification", data, epochs=1, batch=3)
    assert noted_preprocessing(classes) == Preprocessing((24, 32))


def test_a_strange_record_in_a_file_is_an_error(tmp_path: Path) -> None:
    made = repfx.transform(net(), [], example=torch.randn(1, 3, 8, 8))
    made.meta["repfx_preprocessing"] = {"size": 3, "fit": "import os"}
    repfx.save(made, tmp_path / "a.pt")
    with pytest.raises(repfx.InputError, match="damaged"):
        repfx.load(tmp_path / "a.pt")


def test_the_commands_take_the_record_unless_told_otherwise(folder: Path) -> None:
    made = repfx.transform(net(), [])
    assert preprocessing(made, size=None, mean=None) == Preprocessing()
    note_preprocessing(made, HOW)
    assert preprocessing(made, size=None, mean=None, crop=None) == HOW
    told = preprocessing(made, size="8x9", mean="1,2,3", order="RGB")
    assert (told.size, told.mean, told.order, told.peak) == ((8, 9), (1.0, 2.0, 3.0), "RGB", 255.0)
    assert usual_shape(made) == "3,24,32"
    x = real_input(folder, None, noted_preprocessing(made))
    assert torch.equal(x, torch.stack(list(images(folder, HOW))))
    assert real_input(folder, "3,10,12", noted_preprocessing(made)).shape == (6, 3, 10, 12)
    with pytest.raises(repfx.InputError, match="3,HEIGHT,WIDTH"):
        real_input(folder, "1,10,12", HOW)
