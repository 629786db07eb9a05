"""A plan in the making: operators are drawn, run on the example at once, and kept where their value
is fit for more.
"""

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
    """An operator that does not go with the values there are."""


class Draft:
    """`values[0]` is the input; `plan[i]` and `layers[i]` gave `values[i + 1]`. `operator` is what
    is being drawn.
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
        """Draws one of the ways to go on, and goes it."""
        return self.rng.choice(choices)()

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0.5, 1.5)."""
        return torch.rand(shape, dtype=torch.float64) + 0.5

    def pick(self) -> int:
        """A value to go on with: mostly the last, and of the ones before it those of late."""
        tensors = [i for i, v in enumerate(self.values) if isinstance(v, Tensor)]
        return tensors[-1] if self.odds(0.65) else self.rng.choice(tensors[-4:])

    def like(self, a: int, spatial: bool = False) -> list[int]:
        """The values of a's shape, or of its spatial shape."""
        first = 2 if spatial else 0
        return [
            i
            for i, v in enumerate(self.values)
            if isinstance(v, Tensor) and v.shape[first:] == self.shape(a)[first:]
        ]

    def add(self, layer: nn.Module, *inputs: int) -> int:
        """Appends an operator; the position of its value. Raises Unfit where its value is not one
        to go on with.
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
        """Appends a function of values, and of a tensor of its own."""
        kind = self.one("parameter", "parameter", "buffer", "attribute")
        return self.add(Call(text, function, tensor, kind), *inputs)

    def is_own(self, a: int) -> bool:
        """Whether a change of the value in place leaves the caller's input as it is."""
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
    """How an operator is drawn on a value: the position of what it gives. `bent` ones are not
    linear.
    """

    draw: Callable[[Draft, int], int]
    weight: float = 1.0
    axes: tuple[int, ...] = (1, 2, 3)
    bent: bool = False
