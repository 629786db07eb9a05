"""expand: any convolution becomes a block to train with, computes the same, and fuses back into one
convolution.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, fx, nn

import repfx
from repfx.blocks import BLOCKS, MobileOne, RepVGG
from repfx.passes import Expand
from repfx.rewrite.as_kernel import lift
from repfx.testing import assert_same, randomise

# in, out, kernel, stride, padding, dilation, groups
SHAPES = {
    "3x3": (4, 6, 3, 1, 1, 1, 1),
    "3x3 same": (4, 4, 3, 1, 1, 1, 1),
    "stride 2": (4, 8, 3, 2, 1, 1, 2),
    "depthwise": (6, 6, 3, 1, 1, 1, 6),
    "5x5": (4, 4, 5, 2, 2, 1, 1),
    "dilated": (4, 6, 3, 1, 2, 2, 1),
    "no padding": (4, 6, 3, 1, 0, 1, 1),
    "1x1": (6, 4, 1, 1, 0, 1, 1),
    "oblong": (4, 4, (3, 5), (2, 1), (1, 2), 1, 1),
}
ODD_ONES = {
    "ecb": {"5x5", "1x1", "oblong"},
    "repmixer": set(SHAPES) - {"depthwise"},
    "largekernel": set(),
}
X = torch.randn(2, 6, 13, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def net(shape: str, norm: bool) -> tuple[nn.Module, Tensor]:
    i, o, k, s, p, d, g = SHAPES[shape]
    conv = nn.Conv2d(i, o, k, s, p, d, g, bias=not norm)
    return randomise(
        nn.Sequential(conv, nn.BatchNorm2d(o) if norm else nn.Identity(), nn.ReLU()).double().eval()
    ), X[:, :i]


def convs(model: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back(block: str, shape: str) -> None:
    model, x = net(shape, norm=len(shape) % 2 == 0)
    wide = repfx.transform(model, [Expand(block=block)], example=x)
    declined = wide.meta["repfx"].declined
    if declined:
        assert shape in ODD_ONES[block], declined
        assert f"no {block} block" in declined[0].reason
        return
    assert shape not in ODD_ONES.get(block, ())
    assert_same(model, wide, x, 1e-12)
    narrow = repfx.transform(wide, ["fuse"], example=x)
    assert_same(model, narrow, x, 1e-12)
    assert (convs(narrow), norms(narrow)) == (1, 0)
    merged = next(m for m in narrow.modules() if isinstance(m, nn.Conv2d))
    given = model[0]
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    ):
        assert getattr(merged, name) == getattr(given, name), name

    # One step of training reaches every branch, and what is fused then is what was trained.
    before = [p.detach().clone() for p in wide.parameters()]
    wide.train()
    optimiser = torch.optim.SGD(wide.parameters(), 0.1)
    (wide(x) * torch.randn_like(wide(x))).sum().backward()
    optimiser.step()
    moved = sum(not torch.equal(a, b) for a, b in zip(before, wide.parameters(), strict=True))
    assert moved >= len(before) - 1  # a parameter may stand before a batch norm that undoes it
    wide.eval()
    trained = repfx.transform(wide, ["fuse"], example=x)
    assert_same(wide, trained, x, 1e-12)
    assert repfx.verify(model, trained, x).relative > 1e-3


@pytest.mark.zoo
@pytest.mark.parametrize("block", ["acnet", "dbb", "orepa"])
def test_a_resnet(block: str) -> None:
    import timm

    model = randomise(timm.create_model("test_resnet").double().eval())
    n = convs(model)
    x = torch.randn(1, 3, 33, 40, dtype=torch.float64)
    wide = repfx.transform(model, [f"expand(block={block})"], example=x)
    narrow = repfx.transform(wide, ["fuse"], example=x)
    assert n == convs(narrow) > 10
    assert norms(narrow) == 0
    assert len(wide.meta["repfx"].results[0].inserted) == n
    # OREPA's weights, and some of DBB's, are computed: no layer holds them
    assert convs(wide) == {"acnet": 3 * n, "dbb": 3 * n, "orepa": 0}[block]
    for other in (wide, narrow):
        assert_same(model, other, x, 1e-12)
    both = repfx.transform(
        model, ["fuse", f"expand(block={block}, layers='layer2.*', kernel=3)"], example=x
    )
    assert_same(model, both, x, 1e-12)


def test_what_is_asked_for_is_what_is_expanded() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.ReLU(),
    )

    def chosen(**options: object) -> tuple[str, ...]:
        return repfx.transform(model, [Expand(**options)]).meta["repfx"].results[0].inserted

    assert chosen() == ("0", "2", "4")
    assert chosen(kernel=3) == ("0", "2")
    assert chosen(kernel=(1, 1)) == ("4",)
    assert chosen(stride=2) == ("0",)
    assert chosen(groups=8) == ("2",)
    assert chosen(layers="[24]") == ("2", "4")
    nothing = repfx.transform(model, ["expand(kernel=7)"]).meta["repfx"]
    assert "no convolution matches the given kernel" in nothing.declined[0].reason


def test_reset_starts_anew_and_own_blocks_go_in() -> None:
    model, x = net("3x3 same", norm=True)
    fresh = repfx.transform(model, [Expand(block="acnet", init="reset")], example=x)
    assert repfx.verify(model, fresh, x).relative > 1e-2
    assert convs(repfx.transform(fresh, ["fuse"], example=x)) == 1
    four = repfx.transform(model, [Expand(block=partial(MobileOne, branches=4))], example=x)
    assert_same(model, four, x, 1e-12)
    assert convs(four) > convs(repfx.transform(model, ["expand(block=mobileone)"], example=x))


def test_single_precision_and_modes() -> None:
    model, x = net("3x3 same", norm=True)
    model, x = model.float(), x.float()
    model[1].eval()
    model.train()
    wide = repfx.transform(model, ["expand(block=dbb)"], example=x)
    assert all(p.dtype == torch.float32 for p in wide.parameters())
    assert all(m.training for m in wide.modules())
    assert_same(model, wide, x, 2e-5)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.same = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 2, padding="same")
        self.mirror = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(
            self.mirror(torch.relu(self.same(torch.relu(self.conv(torch.relu(self.conv(x)))))))
        )


def test_declined_and_refused() -> None:
    result = repfx.transform(Shared().eval(), ["expand(block=repvgg)"])
    reasons = {d.where: d.reason for d in result.meta["repfx"].declined}
    assert "called more than once" in reasons["conv"]
    assert "pads its sides by different amounts, or not with zeros" in reasons["same"]
    assert "pads its sides by different amounts, or not with zeros" in reasons["mirror"]
    with pytest.raises(repfx.InputError, match="unknown block 'acnot'; choose one of: acnet, dbb"):
        repfx.transform(Shared(), ["expand(block=acnot)"])
    with pytest.raises(
        repfx.InputError, match="unknown init 'keep'; choose one of: preserve, reset"
    ):
        repfx.transform(Shared(), ["expand(init=keep)"])
    with pytest.raises(repfx.InputError, match="is not a convolution of the requested shape"):
        repfx.transform(
            nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1)), [Expand(block=lambda **a: Wrong(**a))]
        )


class Adjacent(nn.Module):
    """Convolutions that read each other with nothing between, by module and by function, one of
    them twice read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.weight, self.other = (
            nn.Parameter(torch.randn(8, 8, 3, 3)),
            nn.Parameter(torch.randn(8, 8, 3, 3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x))
        return torch.conv2d(torch.conv2d(y, self.weight, padding=1), self.other, padding=1) + y


ADJACENT = {
    "two": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)),
    "three, with norms": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 8, 3, groups=2),
    ),
    "before a block": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), RepVGG(8, 8, 3, 1, 1), nn.Conv2d(8, 4, 3)
    ),
    "functions": Adjacent,
}


@pytest.mark.parametrize("init", ["preserve", "reset"])
@pytest.mark.parametrize("kind", ADJACENT)
def test_convolutions_with_nothing_between(kind: str, init: str) -> None:
    model, x = randomise(ADJACENT[kind]().double().eval()), X[:, :3]
    wide = repfx.transform(model, [Expand(init=init)], example=x)
    assert len(wide.meta["repfx"].results[0].inserted) == {"two": 2, "three, with norms": 3}.get(
        kind, 4
    )
    assert not any(
        isinstance(m, fx.GraphModule) for m in wide.children()
    )  # the graph around them is the only one
    if init == "preserve":
        assert_same(model, wide, x, 1e-12)
    assert_same(wide, repfx.transform(wide, ["fuse"], example=x), x, 1e-12)


class Wrong(nn.Conv2d):
    kernel, shift = "weight", "bias"

    def __init__(self, **arguments: object) -> None:
        super().__init__(**{**arguments, "stride": 1})


def test_lift_reads_the_convolution_of_a_module() -> None:
    block = randomise(BLOCKS["acnet"](4, 6, 3, stride=2, padding=1).double().eval())
    x = X[:, :4]
    assert torch.allclose(lift(block)(x), block(x), rtol=0, atol=1e-12)
    with pytest.raises(repfx.InputError, match="not linear between one input and one output"):
        lift(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()))
    with pytest.raises(
        repfx.InputError, match="not one convolution: conv 1x1 '0' has a bias and conv 3x3 '1' pads"
    ):
        lift(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)))
