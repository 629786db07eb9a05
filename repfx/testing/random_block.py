"""Random blocks of operators from every family; the same seed gives the same block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from repfx.testing import bends, borders, channels, convolutions, motifs, operands, python
from repfx.testing.plan import LARGEST, SMALLEST, Draft, Recipe, Unfit

FAMILIES = (convolutions, operands, channels, borders, bends, motifs, python)
RECIPES: dict[str, Recipe] = {
    name: recipe for family in FAMILIES for name, recipe in family.RECIPES.items()
}
TRIES = 60


class RandomBlock(nn.Module):
    """A random graph of operators on values (N, channels, ...), by default images.

    `plan` lists (operator, positions of its inputs); position 0 is the input, and entry i has
    position i + 1. A motif has several entries with one name.
    """

    def __init__(
        self, plan: list[tuple[str, tuple[int, ...]]], layers: list[nn.Module], out: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.plan, self.out = plan, out
        self.layers = nn.ModuleDict({f"op{i}": m for i, m in enumerate(layers, start=1)})

    def forward(self, x: Tensor) -> Any:
        values: list[Any] = [x]
        for (_, inputs), layer in zip(self.plan, self.layers.values(), strict=True):
            values.append(layer(*(values[j] for j in inputs)))
        results = tuple(values[j] for j in self.out)
        return results[0] if len(results) == 1 else results

    @property
    def operators(self) -> set[str]:
        return {name for name, _ in self.plan}

    def operator_at(self, path: str) -> str:
        """The operator that a node or module of this name belongs to, or ""."""
        parts = path.split(".")
        position = parts[1].removeprefix("op") if len(parts) > 1 else ""
        return self.plan[int(position) - 1][0] if position.isdigit() else ""

    def describe(self) -> str:
        """The plan, one line per operator."""
        lines = [
            f"{i:3d} = {name}{list(inputs)}: {layer!r}"
            for i, ((name, inputs), layer) in enumerate(
                zip(self.plan, self.layers.values(), strict=True), start=1
            )
        ]
        return "\n".join([*lines, f"return {list(self.out)}"])


def random_block(
    seed: int, nonlinear: bool = True, size: int = 13, *, axes: int = 2
) -> tuple[RandomBlock, Tensor]:
    """A random block in float64 with random parameters and statistics, and an input for it.

    With `nonlinear` it may contain activations, products and norms of the input. It may change its
    values in place, but never its input, and may have several outputs. `size` is about the size of
    the input along each axis; `axes` is the number of spatial axes, 1 to 3."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for attempt in range(TRIES):
            draft = Draft(seed + (attempt << 32), nonlinear, size, axes)
            _fill(draft)
            if not draft.plan:
                continue
            block, x = (
                RandomBlock(draft.plan, draft.layers, _outputs(draft)).double().eval(),
                draft.values[0],
            )
            if _is_fit(block, x):
                return block, x
    raise RuntimeError(f"no block for seed {seed}")


def _fill(draft: Draft) -> None:
    usable = {
        name: r
        for name, r in RECIPES.items()
        if draft.axes in r.axes and (draft.nonlinear or not r.bent)
    }
    names, weights = list(usable), [r.weight for r in usable.values()]
    wanted = draft.rng.randint(3, 13)
    for _ in range(10 * wanted):
        if len(draft.plan) >= wanted:
            break
        draft.operator = draft.rng.choices(names, weights)[0]
        try:
            usable[draft.operator].draw(draft, draft.pick())
        except Unfit:
            continue


def _outputs(draft: Draft) -> tuple[int, ...]:
    """Mostly the last value; sometimes one more, or all values that nothing reads."""
    tensors = [i for i, v in enumerate(draft.values) if i and isinstance(v, Tensor)]
    read = {i for _, inputs in draft.plan for i in inputs}
    unread = tuple(i for i in tensors if i not in read) or (tensors[-1],)
    return draft.one(
        (tensors[-1],),
        (tensors[-1],),
        (tensors[-1],),
        (tensors[-1], draft.rng.choice(tensors)),
        unread,
    )


@torch.no_grad()
def _is_fit(block: RandomBlock, x: Tensor) -> bool:
    """Whether no output vanishes or explodes, and the block does not change its input."""
    kept = x.clone()
    results = tree_leaves(block(x))
    return all(SMALLEST <= float(v.abs().max()) <= LARGEST for v in results) and torch.equal(
        x, kept
    )
