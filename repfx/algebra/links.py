"""Links: which inputs each output of a map may read, where that is not the plain blocks of a
grouped convolution.

Inputs and outputs carry labels; an output reads only inputs of its own label. Slices,
concatenations and shuffles of channels make such maps on the way from one convolution to the next:

    labels of depthwise:     inputs 0 1 2 3    outputs 0 1 2 3
    its second half:         inputs 0 1 2 3    outputs 2 3
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

Rows = tuple[
    int, ...
]  # for each output channel the channel it is taken from, -1 for a channel of zeros


@dataclass(frozen=True)
class Links:
    """`inputs` and `outputs`: one label a channel, numbered by first appearance."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @staticmethod
    def regular(inputs: int, outputs: int, groups: int) -> Links:
        """The links of a grouped convolution."""
        wide, high = inputs // groups, outputs // groups
        return Links(
            tuple(i // wide for i in range(inputs)), tuple(o // high for o in range(outputs))
        )

    @property
    def groups(self) -> int:
        """The most groups of a convolution that holds these links.

        >>> Links((0, 1, 2, 3), (2, 3)).groups, Links((0, 1, 2, 3), (1, 0, 3, 2)).groups
        (1, 2)
        """
        inputs, outputs = len(self.inputs), len(self.outputs)
        most = gcd(inputs, outputs)
        for groups in range(most, 1, -1):
            if most % groups == 0:
                blocks: dict[int, int] = {}
                places = [(label, i * groups // inputs) for i, label in enumerate(self.inputs)]
                places += [(label, o * groups // outputs) for o, label in enumerate(self.outputs)]
                if all(blocks.setdefault(label, block) == block for label, block in places):
                    return groups
        return 1

    def then(self, outer: Links) -> Links:
        """The links of `outer(self(x))`: labels that meet in the middle are one."""
        same = _joined(zip(self.outputs, outer.inputs, strict=True))
        return _numbered([same((0, v)) for v in self.inputs], [same((1, v)) for v in outer.outputs])

    def plus(self, other: Links) -> Links:
        """The links of `self(x) + other(x)`."""
        pairs = [
            *zip(self.inputs, other.inputs, strict=True),
            *zip(self.outputs, other.outputs, strict=True),
        ]
        same = _joined(pairs)
        return _numbered([same((0, v)) for v in self.inputs], [same((0, v)) for v in self.outputs])

    def moved(self, rows: Rows) -> Links:
        """The links with output channels taken from `rows`."""
        labels = [
            ("none", at) if row < 0 else ("row", self.outputs[row]) for at, row in enumerate(rows)
        ]
        return _numbered([("row", v) for v in self.inputs], labels)


def _joined(pairs: object) -> Callable[[tuple[int, int]], tuple[int, int]]:
    """Union-find over labels (side, label): what each stands for once the pairs of (left, right)
    are one.
    """
    parent: dict[tuple[int, int], tuple[int, int]] = {}

    def root(v: tuple[int, int]) -> tuple[int, int]:
        while parent.get(v, v) != v:
            parent[v] = parent.get(parent[v], parent[v])
            v = parent[v]
        return v

    for left, right in pairs:  # type: ignore[attr-defined]
        a, b = root((0, left)), root((1, right))
        if a != b:
            parent[b] = a
    return root


def _numbered(inputs: Sequence[object], outputs: Sequence[object]) -> Links:
    numbers: dict[object, int] = {}
    for label in (*inputs, *outputs):
        numbers.setdefault(label, len(numbers))
    return Links(tuple(numbers[v] for v in inputs), tuple(numbers[v] for v in outputs))
