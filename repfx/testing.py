"""For tests of passes, here and in other projects: random nets to rewrite, and the assertion that nothing changed."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repfx.api import verify
from repfx.rewrite.prove import TOLERANCE


class RandomBlock(nn.Module):
    """A random graph of operators on images (N, channels, H, W); `plan` lists (operator, inputs) by position."""

    def __init__(self, plan: list[tuple[str, tuple[int, ...]]], layers: dict[int, nn.Module], out: tuple[int, ...]) -> None:
        super().__init__()
        self.plan, self.out = plan, out
        self.layers = nn.ModuleDict({f"op{i}": m for i, m in layers.items()})

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for i, (op, inputs) in enumerate(self.plan, start=1):
            values.append(_apply(op, [values[j] for j in inputs], dict(self.layers.items()).get(f"op{i}")))
        results = tuple(values[j] for j in self.out)
        return results[0] if len(results) == 1 else results


class Scale(nn.Module):
    """x * weight, weight of a shape with one entry a channel."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Shift(Scale):
    """x + weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight + x


_BINARY = ("add", "add", "add", "sub", "alpha", "iadd", "mul")
_UNARY = ("conv", "conv", "conv", "conv", "bn", "bn", "scale", "shift", "neg", "half", "pool", "pad", "crop", "drop")
_BENT = ("relu", "sigmoid", "norm", "gate")


def random_block(seed: int, nonlinear: bool = True, size: int = 13) -> tuple[RandomBlock, Tensor]:
    """A random net in float64 with every parameter and statistic away from its default, and an input it accepts.

    With `nonlinear` it may hold activations, products, norms on batch statistics and several outputs.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rng.choice([2, 4, 6]), size, size + 1, generator=generator, dtype=torch.float64)
    plan: list[tuple[str, tuple[int, ...]]] = []
    layers: dict[int, nn.Module] = {}
    values = [x]
    wanted = rng.randint(3, 14)
    for _ in range(20 * wanted):
        if len(plan) == wanted:
            break
        names = (*_UNARY, *_BINARY, *(_BENT if nonlinear else ()))
        op = rng.choice(names)
        if op == "mul" and not nonlinear:
            continue
        a = rng.choice(range(max(0, len(values) - 4), len(values)))
        if op in _BINARY:
            same = [j for j in range(len(values)) if values[j].shape == values[a].shape]
            inputs: tuple[int, ...] = (a, rng.choice(same))
        else:
            inputs = (a,)
        # Now and then a layer is called again on another value.
        again = [layers[i] for i, (o, _) in enumerate(plan, 1) if o == op and i in layers and _fits(layers[i], values[a])]
        layer = rng.choice(again) if again and rng.random() < 0.15 else _layer(op, values[a], rng)
        if layer is not None:
            layer.double().eval()
        try:
            with torch.no_grad():
                value = _apply(op, [values[j].clone() for j in inputs], layer)
        except RuntimeError:
            continue
        if value.numel() == 0 or min(value.shape[2:]) < 3 or value.abs().max() > 1e4:
            continue
        plan.append((op, inputs))
        values.append(value)
        if layer is not None:
            layers[len(plan)] = layer
    outputs = (len(plan),) if rng.random() < 0.8 else (len(plan), rng.randrange(1, len(plan) + 1))
    block = RandomBlock(plan, layers, outputs).double().eval()
    randomise(block, seed)
    return block, x


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every batch norm statistics and weights away from their defaults, in place, so that no test is vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for name, low, high in (("running_mean", -0.5, 0.5), ("running_var", 0.5, 2.0), ("weight", 0.5, 1.5)):
                    tensor = getattr(m, name)
                    if tensor is not None:
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
                if m.bias is not None:
                    m.bias.copy_(torch.randn(m.bias.shape, generator=generator) * 0.3)
    return model


def assert_same(before: Any, after: Any, x: Any, tolerance: float | None = None) -> None:
    """Asserts that two models give one output on x, to `tolerance` or that of its dtype (largest over largest)."""
    first = x[0] if isinstance(x, tuple) else x
    limit = TOLERANCE[first.dtype] if tolerance is None else tolerance
    off = verify(before, after, x)
    assert off.relative <= limit, f"outputs differ: {off}, more than {limit:.0e}"


def _fits(layer: nn.Module, x: Tensor) -> bool:
    wanted = getattr(layer, "in_channels", getattr(layer, "num_features", None))
    return wanted is None or wanted == x.shape[1]


def _layer(op: str, x: Tensor, rng: random.Random) -> nn.Module | None:
    channels = x.shape[1]
    if op == "conv":
        out = rng.choice([2, 4, 6, channels, channels])
        groups = rng.choice([g for g in (1, 1, 2, channels) if channels % g == 0 and out % g == 0])
        kernel = (rng.choice([1, 1, 2, 3, 3, 5]), rng.choice([1, 3]))
        if rng.random() < 0.6:
            kernel = (kernel[0], kernel[0])
        stride = rng.choice([1, 1, 1, 2])
        dilation = rng.choice([1, 1, 1, 2])
        same = tuple(d * (k - 1) // 2 for k, d in zip(kernel, (dilation, dilation), strict=True))
        padding: Any = rng.choice([0, same, same, same, 1])
        mode: Any = rng.choice(["zeros"] * 8 + ["reflect", "circular", "replicate"])
        if stride == 1 and rng.random() < 0.1:
            padding = "same"
        return nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, rng.random() < 0.4, mode)
    if op == "bn":
        return nn.BatchNorm2d(channels, affine=rng.random() < 0.8, eps=rng.choice([1e-5, 1e-3]))
    if op == "norm":
        return nn.BatchNorm2d(channels, track_running_stats=False)
    if op in ("scale", "shift"):
        shape = rng.choice([(channels, 1, 1), (1, channels, 1, 1), (1,), ()])
        weight = torch.rand(shape, dtype=torch.float64) + 0.5
        return Scale(weight) if op == "scale" else Shift(weight)
    if op == "pool":
        side = rng.choice([2, 3])
        return nn.AvgPool2d(side, rng.choice([1, 2]), rng.choice([0, side // 2]), count_include_pad=rng.random() < 0.7)
    if op == "drop":
        return nn.Dropout(0.5)
    return None


def _apply(op: str, v: list[Tensor], layer: nn.Module | None) -> Tensor:
    if layer is not None:
        return layer(v[0])
    functions: dict[str, Any] = {
        "add": lambda: v[0] + v[1],
        "sub": lambda: v[0] - v[1],
        "alpha": lambda: torch.add(v[0], v[1], alpha=0.5),
        "iadd": lambda: v[0].add(v[1]),
        "mul": lambda: v[0] * v[1],
        "neg": lambda: -v[0],
        "half": lambda: v[0] / 2,
        "pad": lambda: F.pad(v[0], (1, 1, 0, 1)),
        "crop": lambda: F.pad(v[0], (-1, 0, 0, -1)),
        "relu": lambda: F.relu(v[0]),
        "sigmoid": lambda: torch.sigmoid(v[0]),
        "gate": lambda: v[0] * torch.sigmoid(v[0].mean((2, 3), keepdim=True)),
    }
    return functions[op]()
