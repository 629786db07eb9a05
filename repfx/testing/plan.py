"""Draft: a plan being built. Operators are drawn, run at once, and kept if their value fits."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from repfx.testing.checks import randomise
from repfx.testing.layers import Call

T = TypeVar("T")
LARGEST, SMALLEST, CHANNELS, POSITIONS = 1e3, 1e-2, 16, 900


class Unfit(Exception):
    """Raised for an operator that does not fit the values of the plan."""


class Draft:
    """A plan being built.

    `values[0]` is the input; `plan[i]` and `layers[i]` computed `values[i + 1]`. `operator` is the
    name of the operator that is being drawn.
    """

    def __init__(self, seed: int, nonlinear: bool, size: int, axes: int) -> None:
        self.rng = random.Random(seed)
        self.nonlinear, self.axes, self.operator = nonlinear, axes, ""
        sizes = [
            (size, size + 1, size - 1)[i] if axes < 3 else (size + 1) // 2 + i for i in range(axes)
        ]
        channels = self.rng.choice([2, 3, 4, 4, 6, 6, 8])
        self.values: list[Any] = [torch.randn(2, channels, *sizes, dtype=torch.float64)]
        self.plan: list[tuple[str, tuple[int, ...]]] = []
        self.layers: list[nn.Module] = []

    def shape(self, a: int) -> torch.Size:
        shape: torch.Size = self.values[a].shape
        return shape

    def channels(self, a: int) -> int:
        return self.shape(a)[1]

    def odds(self, probability: float) -> bool:
        return self.rng.random() < probability

    def one(self, *choices: T) -> T:
        return self.rng.choice(choices)

    def do(self, *choices: Callable[[], int]) -> int:
        """Calls one of the choices, at random."""
        return self.rng.choice(choices)()

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0.5, 1.5)."""
        return torch.rand(shape, dtype=torch.float64) + 0.5

    def pick(self) -> int:
        """A value to continue with: mostly the last one, else one of the last four."""
        tensors = [i for i, v in enumerate(self.values) if isinstance(v, Tensor)]
        return tensors[-1] if self.odds(0.65) else self.rng.choice(tensors[-4:])

    def like(self, a: int, spatial: bool = False) -> list[int]:
        """The values with the same shape as `a`, or with the same spatial shape."""
        first = 2 if spatial else 0
        return [
            i
            for i, v in enumerate(self.values)
            if isinstance(v, Tensor) and v.shape[first:] == self.shape(a)[first:]
        ]

    def add(self, layer: nn.Module, *inputs: int) -> int:
        """Appends an operator and returns the position of its value.

        Raises Unfit if later operators could not use the value.
        """
        if layer not in self.layers:
            randomise(layer, self.rng.randrange(1 << 31)).double().eval()
        try:
            with torch.no_grad():
                value = layer(*(self.values[i] for i in inputs))
        except (RuntimeError, ValueError, IndexError) as error:
            raise Unfit(str(error)) from error
        if isinstance(value, Tensor):
            self._require_fit(value)
        self.plan.append((self.operator, inputs))
        self.layers.append(layer)
        self.values.append(value)
        return len(self.plan)

    def call(self, text: str, function: Any, *inputs: int, tensor: Tensor | None = None) -> int:
        """Appends a function of values, and of its own tensor if one is given."""
        kind = self.one("parameter", "parameter", "buffer", "attribute")
        return self.add(Call(text, function, tensor, kind), *inputs)

    def is_own(self, a: int) -> bool:
        """Whether the value can be changed in place without changing the caller's input."""
        own, given = (self.values[i].untyped_storage().data_ptr() for i in (a, 0))
        return bool(own != given)

    def _require_fit(self, value: Tensor) -> None:
        sizes = value.shape[2:]
        channels = value.shape[1] if value.numel() else 0
        if (
            value.dim() != self.axes + 2
            or not 0 < channels <= CHANNELS
            or min(sizes) < 3
            or sizes.numel() > POSITIONS
        ):
            raise Unfit(f"its shape is {tuple(value.shape)}")
        if not SMALLEST <= float(value.abs().max()) <= LARGEST:
            raise Unfit("it vanishes or explodes")


class Recipe(NamedTuple):
    """How to draw an operator.

    `draw` appends it to a draft and returns the position of its value. `weight` is its frequency,
    `axes` are the numbers of axes it takes, and `bent` says that it is not linear.
    """

    draw: Callable[[Draft, int], int]
    weight: float = 1.0
    axes: tuple[int, ...] = (1, 2, 3)
    bent: bool = False
