"""Random nets made of the parts of deployed CNNs, (N, 3, H, W) -> (N, classes)."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repfx.testing.checks import randomise

ACTS: tuple[Callable[[], nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Identity),
    *(lambda: nn.LeakyReLU(0.1), lambda: nn.Hardtanh(-1.0, 2.0)),
)


class Layer(nn.Sequential):
    """A convolution, perhaps with a batch norm and an activation.

    The convolution may be grouped, depthwise, dilated or strided.
    """

    def __init__(
        self, draw: random.Random, inputs: int, outputs: int, stride: int = 1, act: bool = True
    ) -> None:
        kernel, dilation = draw.choice([1, 1, 3, 3, 3, 5]), draw.choice([1, 1, 1, 2])
        groups = draw.choice([1, 1, 1, 2, inputs]) if inputs == outputs and inputs % 2 == 0 else 1
        pad, norm = dilation * (kernel // 2), draw.random() < 0.6
        conv = nn.Conv2d(
            inputs,
            outputs,
            kernel,
            stride,
            pad,
            dilation,
            groups,
            bias=not norm and draw.random() < 0.7,
        )
        layers = [
            conv,
            *([nn.BatchNorm2d(outputs)] if norm else []),
            *([draw.choice(ACTS)()] if act else []),
        ]
        super().__init__(*layers)


class Skip(nn.Module):
    """x + f(x), with an activation after the sum."""

    def __init__(self, draw: random.Random, c: int) -> None:
        super().__init__()
        self.body, self.act = (
            nn.Sequential(Layer(draw, c, c), Layer(draw, c, c, act=False)),
            draw.choice(ACTS)(),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(x + self.body(x))
        return y


class Joined(nn.Module):
    """Branches of one value, concatenated, then perhaps a norm or a pool, then a layer."""

    def __init__(self, draw: random.Random, c: int) -> None:
        super().__init__()
        widths = [draw.choice([4, 6, 8]) for _ in range(draw.choice([2, 3]))]
        self.branches = nn.ModuleList(Layer(draw, c, w) for w in widths)
        self.own, self.how = (
            draw.random() < 0.5,
            draw.choice(["conv", "conv", "max", "average", "norm", "again"]),
        )
        total = sum(widths) + c * self.own
        self.norm, self.act = nn.BatchNorm2d(total), draw.choice(ACTS)()
        self.last = Layer(draw, total + widths[0] * (self.how == "again"), c)

    def forward(self, x: Tensor) -> Tensor:
        values = [branch(x) for branch in self.branches]
        y = torch.cat([*([x] if self.own else []), *values], 1)
        if self.how == "max":
            y = F.max_pool2d(y, 3, 1, 1)
        if self.how == "average":
            y = F.avg_pool2d(y, 3, 1, 1)
        if self.how == "norm":
            y = self.act(self.norm(y))
        if self.how == "again":
            y = torch.cat([y, values[0]], 1)
        out: Tensor = self.last(y)
        return out


class Halves(nn.Module):
    """As in C2f: splits a value, puts one half through steps, and concatenates all results."""

    def __init__(self, draw: random.Random, c: int) -> None:
        super().__init__()
        self.first = Layer(draw, c, c)
        self.steps = nn.ModuleList(Layer(draw, c // 2, c // 2) for _ in range(draw.choice([1, 2])))
        self.last, self.skip = Layer(draw, c + len(self.steps) * (c // 2), c), draw.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        values = list(self.first(x).chunk(2, 1))
        for step in self.steps:
            values.append(values[-1] + step(values[-1]) if self.skip else step(values[-1]))
        y: Tensor = self.last(torch.cat(values, 1))
        return y


class Gate(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, draw: random.Random, c: int) -> None:
        super().__init__()
        self.down, self.up, self.act = (
            nn.Conv2d(c, 4, 1),
            nn.Conv2d(4, c, 1),
            draw.choice([nn.ReLU, nn.SiLU])(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(self.act(self.down(x.mean((2, 3), keepdim=True)))))


class Neck(nn.Module):
    """Downsampling, then a nearest resize or pixel shuffle, concatenated with the input."""

    def __init__(self, draw: random.Random, c: int) -> None:
        super().__init__()
        self.shuffles = draw.random() < 0.5
        self.down, self.deep = Layer(draw, c, c, 2), Layer(draw, c, 4 * c if self.shuffles else c)
        self.last = Layer(draw, 2 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.deep(self.down(x))
        y = F.pixel_shuffle(y, 2) if self.shuffles else F.interpolate(y, scale_factor=2.0)
        out: Tensor = self.last(torch.cat([x, y], 1))
        return out


def random_net(seed: int, size: int = 16, batch: int = 4) -> tuple[nn.Module, Tensor]:
    """A random net in float32 and eval mode, and an input for it; the same for the same seed.

    Its batch norms have the statistics of that input.
    """
    draw = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        c = draw.choice([8, 12, 16])
        kinds: list[Callable[[random.Random, int], nn.Module]] = [
            Skip,
            Joined,
            Halves,
            Gate,
            Neck,
            lambda d, c: Layer(d, c, c),
            lambda d, c: nn.AvgPool2d(3, 1, 1),
        ]
        body = [draw.choice(kinds)(draw, c) for _ in range(draw.randint(2, 5))]
        ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 5)]
        net, x = nn.Sequential(Layer(draw, 3, c), *body, *ends), torch.randn(batch, 3, size, size)
        randomise(net, seed)
        settle(net, x)
    return net.eval(), x


def settle(net: nn.Module, x: Tensor) -> None:
    """Sets the batch norms to the statistics of this batch, so that values do not explode."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [m.momentum for m in norms]
    for m in norms:
        m.momentum = None
        m.reset_running_stats()
    with torch.no_grad():
        net.train()(x)
    for m, momentum in zip(norms, kept, strict=True):
        m.momentum = momentum
    net.eval()
