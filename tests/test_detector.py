"""A detector as they are shipped: a backbone of blocks, a neck that joins scales, a head whose
control flow depends on the data. The first two merge; the head stays as it is, and the report says
why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.blocks import RepVGG
from repfx.testing import assert_same, randomise


class ConvAct(nn.Module):
    def __init__(self, i: int, o: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class Block(nn.Module):
    def __init__(self, i: int, o: int, s: int = 1) -> None:
        super().__init__()
        self.rep, self.act = RepVGG(i, o, 3, s, 1), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.rep(x))


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Block(3, 8, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(Block(i, o, 2), *(Block(o, o) for _ in range(2)))
            for i, o in ((8, 16), (16, 24), (24, 32))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x, found = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


class Neck(nn.Module):
    """PAN: down from the coarsest scale, then up again."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 32), c: int = 16) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(ConvAct(w, c) for w in widths)
        self.top_down = nn.ModuleList(Block(2 * c, c) for _ in range(2))
        self.down = nn.ModuleList(ConvAct(c, c, 3, 2) for _ in range(2))
        self.bottom_up = nn.ModuleList(Block(2 * c, c) for _ in range(2))
        self.up = nn.ConvTranspose2d(c, c, 2, 2, bias=False)
        self.up_bn = nn.BatchNorm2d(c)

    def forward(self, scales: list[Tensor]) -> list[Tensor]:
        p3, p4, p5 = (layer(x) for layer, x in zip(self.lateral, scales, strict=True))
        p4 = self.top_down[0](torch.cat([F.interpolate(p5, scale_factor=2.0), p4], 1))
        p3 = self.top_down[1](torch.cat([self.up_bn(self.up(p4)), p3], 1))
        p4 = self.bottom_up[0](torch.cat([self.down[0](p3), p4], 1))
        p5 = self.bottom_up[1](torch.cat([self.down[1](p4), p5], 1))
        return [p3, p4, p5]


class Head(nn.Module):
    """Scores and boxes of each place; those that score, sorted. In training: the raw maps."""

    def __init__(self, c: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.cls, self.box = nn.Conv2d(c, classes, 1), nn.Conv2d(c, 4, 1)

    def forward(self, scales: list[Tensor]) -> list[Tensor]:
        raw = [torch.cat([self.cls(x), self.box(x)], 1) for x in scales]
        if self.training:
            return raw
        flat = torch.cat([r.flatten(2) for r in raw], 2).transpose(1, 2)
        results = []
        for image in flat:
            scores, labels = image[:, :3].sigmoid().max(1)
            keep = scores > 0.5
            if not keep.any():
                results.append(image.new_zeros(0, 6))
                continue
            rows = torch.cat([scores[keep, None], labels[keep, None], image[keep, 3:]], 1)
            results.append(rows[rows[:, 0].argsort(descending=True)])
        return results


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = Backbone(), Neck(), Head()

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.head(self.neck(self.backbone(x)))


def detector() -> Detector:
    torch.manual_seed(1)
    found = Detector().double().eval()
    randomise(found)
    return found


def picture(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_backbone_and_neck_merge_and_the_head_stays() -> None:
    model = detector()
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    result = repfx.transform(model, ["fuse"], example=picture(64, 96))
    for size in ((64, 96), (96, 64), (32, 32)):
        assert_same(model, result, picture(*size), 1e-11)
    assert sum(len(rows) for rows in result(picture(64, 96))) > 0
    report = result.meta["repfx"]
    # 10 blocks of the backbone, 4 of the neck, 5 conv + norm and one transposed convolution + norm
    assert len(report.merged) == 20
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.modules())
    convs = {n for n, m in result.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))}
    assert len(convs) == 22 and {"head.cls", "head.box"} <= convs
    why = {d.where: d.reason for d in report.declined}
    assert "cannot be traced" in why["head"]
    for name in ("head.cls.weight", "head.cls.bias", "head.box.weight", "head.box.bias"):
        assert torch.equal(result.state_dict()[name], kept[name])
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_it_trains_on() -> None:
    """In training the model answers with the raw maps, and so does the result."""
    model = detector()
    result = repfx.transform(model, ["fuse"], example=picture(64, 64))
    frozen = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model.train()
    for norm in frozen:
        norm.eval()
    result.train()
    for want, got in zip(model(picture(64, 64)), result(picture(64, 64)), strict=True):
        assert want.shape[1] == 7
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_inspect_says_what_becomes_of_it() -> None:
    seen = repfx.inspect(detector(), example=picture(64, 64))
    regions = {r.name: r for r in seen.regions if r.merged}
    block = regions["backbone.stages.0.1.rep"]
    assert sorted(block.ops) == sorted(["conv 3x3", "bn", "conv 1x1", "bn", "bn", "add", "add"])
    assert block.merged == "conv 3x3, 16 → 16"
    assert (block.macs_before, block.macs_after) == (10 * 256, 9 * 256)
    assert (block.params_before, block.params_after) == (10 * 256 + 3 * 4 * 16, 9 * 256 + 16)
    up = regions["neck.up"]
    assert up.merged == "transposed conv 2x2, 16 → 16, stride 2" and up.ops == (
        "transposed conv 2x2",
        "bn",
    )
    text = str(seen)
    assert "20 blocks merge" in text and "cannot be traced" in text


@pytest.mark.zoo
@pytest.mark.parametrize(
    "name", ["repvgg_a0", "mobileone_s0", "fastvit_t8", "repghostnet_100", "resnet18"]
)
def test_an_exported_program_merges_as_its_module_does(name: str) -> None:
    import timm

    model, x = randomise(timm.create_model(name).eval()), torch.randn(2, 3, 64, 64)
    reports = []
    for given in (model, torch.export.export(model, (x,))):
        result = repfx.transform(given, ["fuse"], example=x)
        assert_same(model, result, x, 1e-5)
        reports.append(
            sorted(
                (m.macs_before, m.macs_after, m.params_before, m.params_after)
                for m in result.meta["repfx"].merged
            )
        )
    assert reports[0] == reports[1] and len(reports[0]) >= 20
