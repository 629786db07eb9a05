"""repq(bn=live): a quantized convolution and a real batch norm, which fuse folds into integers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import repfx
from repfx.blocks import DBB, OREPA, ACNet, MobileOne, QARepVGG, RepVGG
from repfx.lowering.runtimes.layers import kernels
from repfx.passes import RepQ
from repfx.quant import quantizers_of
from repfx.testing import assert_same, randomise

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "repvgg": lambda: RepVGG(8, 8, 3, padding=1),
    "qarepvgg, groups": lambda: QARepVGG(8, 8, 3, padding=1, groups=2),
    "qarepvgg, no norm but post": lambda: QARepVGG(8, 8, 3, padding=1, variant="no BN + post"),
    "acnet, stride": lambda: ACNet(8, 8, 3, stride=2, padding=1),
    "orepa": lambda: OREPA(8, 8, 3, padding=1),
    "mobileone": lambda: MobileOne(8, 8, 3, padding=1),
    "dbb": lambda: DBB(8, 8, 3, padding=1),
}


def images() -> Tensor:
    return torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(3)) + 0.2


def net(block: str) -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    last = [nn.Conv2d(8, 8, 3, 2, 1, groups=4), nn.BatchNorm2d(8), nn.ReLU()]
    head = [nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*stem, BLOCKS[block](), nn.ReLU(), *last, *pool, *head)
    randomise(model)
    with torch.no_grad():  # a sign that turns
        model[1].weight[2] = model[6].weight[2] = -0.7
    return model.eval()


def norms(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, _BatchNorm)]


def train(model: Any, x: Tensor, steps: int = 12) -> list[float]:
    optimizer = torch.optim.SGD(model.train().parameters(), 0.02, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), torch.arange(16) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def codes(model: Any) -> dict[str, Tensor]:
    """The integer weights by quantizer, seen in a forward pass."""
    found: dict[str, Tensor] = {}
    hooks = [
        quant.register_forward_pre_hook(
            lambda q, args, name=name: found.update({name: q.codes(args[0]).detach()})
        )
        for name, quant in quantizers_of(model, of_weight=True).items()
    ]
    model(images().double())
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", BLOCKS)
def test_what_was_trained_is_deployed(block: str, bits: int, tmp_path: Path) -> None:
    x = images().double()  # so that rounding errors move no value across a step
    model: Any = repfx.transform(net(block).double(), [RepQ(bits=bits, bn="live")], example=x)
    assert {"1", "6", "11"} <= set(norms(model))
    losses = train(model, x)
    assert sum(losses[-3:]) < sum(losses[:3])
    with torch.no_grad():
        model.get_submodule("1").weight[3] = 0
    fused: Any = repfx.transform(model, ["fuse"], example=x)
    assert not norms(fused)
    assert repfx.verify(model, fused, x).relative < 1e-9
    steps = [m.get_submodule("0.weight_quant").step for m in (model, fused)]
    assert float(steps[1][3]) == float(steps[0][3]) > 0, "no scale is 0, which no file may hold"
    before, after = codes(model), codes(fused)
    assert before.keys() == after.keys() and len(before) == 5
    for name, norm in (("0", "1"), ("5", "6"), ("10", "11")):
        sign = model.get_submodule(norm).weight.sign()
        for key, value in before.items():
            if key == f"{name}.weight_quant":
                turned = value * sign.reshape(-1, *(1,) * (value.dim() - 1))
                assert torch.equal(after[key], turned) and bool(value.any())
    assert not repfx.transform(fused, ["fuse"], example=x).meta["repfx"].merged  # type: ignore[index,union-attr]
    if bits == 8:
        artifact = repfx.lower(fused.float(), tmp_path / "int8.onnx", example=x.float())
        assert artifact.parity is not None and artifact.parity.agrees


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_the_runtimes_run_it_in_integers(target: str, tmp_path: Path) -> None:
    x, counts = images(), []
    for mode in ("live", "running"):
        model: Any = repfx.transform(
            net("qarepvgg, groups"), [RepQ(bn=mode)], example=x, target=target
        )
        train(model, x, 2)
        fused = repfx.transform(model, ["fuse"], example=x, target=target)
        artifact = repfx.lower(fused, tmp_path / f"{mode}.onnx", example=x, target=target)
        assert artifact.parity is not None and artifact.parity.agrees
        counts.append(kernels(target, artifact.onnx).integers)
    assert counts[0] == counts[1] > 2


@pytest.mark.parametrize("block", ["qarepvgg, no norm but post", "orepa"])
def test_in_float_it_trains_as_the_model_itself(block: str) -> None:
    """Without rounding, and with no norm inside: the forward pass and every gradient."""
    x = images().double()
    plain = net(block).double()
    merged: Any = repfx.transform(copy.deepcopy(plain), [RepQ(bits=32, bn="live")], example=x)
    outputs = []
    for model in (plain.train(), merged.train()):
        y = model(x)
        F.cross_entropy(y, torch.arange(16) % 4).backward()
        outputs.append(y)
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    for name, p in plain.named_parameters():
        grad = merged.get_parameter(name).grad
        if p.grad is not None and float(p.grad.abs().max()) > 1e-12:
            torch.testing.assert_close(grad, p.grad, rtol=1e-7, atol=1e-10)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(merged.get_buffer(name), buffer)
    fused = repfx.transform(merged.eval(), ["fuse"], example=x)
    assert_same(merged, fused, x, 1e-9)
    assert not norms(fused)


def test_synchronised_norms_stay_and_fold(tmp_path: Path) -> None:
    x = images()
    model: Any = repfx.transform(net("repvgg"), [RepQ(bn="live")], example=x)
    train(model, x, 3)
    expected = model(x)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in synced.modules()) >= 3
    torch.testing.assert_close(synced(x), expected)
    fused = repfx.transform(synced, ["fuse"], example=x)
    assert not norms(fused) and repfx.verify(synced, fused, x).relative < 1e-5
    repfx.save(model, tmp_path / "live.pt")
    assert_same(model, repfx.load(tmp_path / "live.pt"), x, 0.0)


def test_large_inputs_give_tiny_steps() -> None:
    """Raw values of 16 bits before a norm of large variance: steps far below 1e-7."""
    torch.manual_seed(0)
    x = torch.randint(0, 65536, (8, 3, 16, 16)).float()
    stem = [nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8, momentum=None), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    plain = nn.Sequential(*stem, *head).train()
    plain(x)
    model: Any = repfx.transform(plain.eval(), [RepQ(bn="live")], example=x).train()
    model(x)
    fused: Any = repfx.transform(model.eval(), ["fuse"], example=x)
    assert 0 < float(fused.get_submodule("0.weight_quant").step.min()) < 1e-7
    assert repfx.verify(model, fused, x).sqnr > 80


def test_one_transform_folds_all_norms() -> None:
    x = images()
    model = repfx.transform(net("repvgg"), ["repq(bn=live)", "fuse"], example=x)
    assert not norms(model)


def test_a_norm_over_tokens_does_not_fold() -> None:
    """BatchNorm1d after a linear layer on (N, L, C) norms over L, and here L = C."""
    torch.manual_seed(0)
    x = torch.randn(5, 8, 6)
    plain = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    randomise(plain)
    model: Any = repfx.transform(plain.eval(), [RepQ(bn="live")], example=x).train()
    model(x).square().mean().backward()
    fused = repfx.transform(model.eval(), ["fuse"], example=x)
    assert norms(fused) == ["1"] and repfx.verify(model, fused, x).relative < 1e-5


class Skip(nn.Module):
    """Another layer reads what comes before the norm; and a norm without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.own = nn.BatchNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.own(self.b(torch.relu(self.norm(y)))) + y


class Twice(nn.Module):
    """One convolution with a norm of its own after each call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.one, self.two = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.one(self.b(torch.relu(self.a(x)))))
        return self.two(self.b(y))


@pytest.mark.parametrize("kind", [Skip, Twice])
def test_what_cannot_fold_stays(kind: type[nn.Module]) -> None:
    x = images()
    torch.manual_seed(0)
    model: Any = repfx.transform(kind().eval(), [RepQ(bn="live")], example=x)
    y = model.train()(x)
    y.square().mean().backward()
    fused = repfx.transform(model.eval(), ["fuse"], example=x)
    assert repfx.verify(model, fused, x).relative < 1e-4
    assert norms(fused)


def test_what_live_needs() -> None:
    x = images()
    with pytest.raises(repfx.InputError, match="folds only into weights with one scale per"):
        repfx.transform(net("repvgg"), [RepQ(bn="live", per_channel=False)], example=x)
    with pytest.raises(repfx.InputError, match=r"unknown bn 'alive'.*live"):
        RepQ(bn="alive")


def test_the_model_given_is_left_alone() -> None:
    x = images()
    model: Any = repfx.transform(net("orepa"), [RepQ(bn="live")], example=x)
    train(model, x, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    repfx.transform(model, ["fuse"], example=x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
