"""Links: which inputs each output of a map may read, if these are not the blocks of plain groups.

Inputs and outputs have labels, and an output reads only inputs with its own label. Slices,
concatenations and shuffles of channels between two convolutions make such maps:

    a depthwise map:         inputs 0 1 2 3    outputs 0 1 2 3
    its second half:         inputs 0 1 2 3    outputs 2 3
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd

# For each output channel, the channel it is taken from, or -1 for a channel of zeros.
Rows = tuple[int, ...]


@dataclass(frozen=True)
class Links:
    """One label per channel of the `inputs` and `outputs`, numbered by first appearance."""

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
        """The largest number of groups of a convolution that has room for these links.

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

    @cached_property
    def columns(self) -> tuple[Rows, ...]:
        """The inputs that each output may read, in order, and -1 up to the largest number of them.

        >>> Links((0, 1, 1), (1, 0)).columns
        ((1, 2), (0, -1))
        """
        members: dict[int, list[int]] = {}
        for i, label in enumerate(self.inputs):
            members.setdefault(label, []).append(i)
        width = max(1, *(len(members.get(label, ())) for label in self.outputs))
        rows = {
            label: tuple(found + [-1] * (width - len(found)))
            for label in set(self.outputs)
            for found in (members.get(label, []),)
        }
        return tuple(rows[label] for label in self.outputs)

    @property
    def width(self) -> int:
        """The largest number of inputs that an output may read, at least 1."""
        return len(self.columns[0])

    @property
    def blocks(self) -> list[tuple[list[int], list[int]]]:
        """The outputs and the inputs of each label that has outputs.

        A label without inputs is given input 0, for which its columns hold zero."""
        found: dict[int, tuple[list[int], list[int]]] = {v: ([], []) for v in self.outputs}
        for o, label in enumerate(self.outputs):
            found[label][0].append(o)
        for i, label in enumerate(self.inputs):
            if label in found:
                found[label][1].append(i)
        return [(outs, inputs or [0]) for outs, inputs in found.values()]

    def joined(self, outer: Links) -> tuple[Links, Links]:
        """Both with common labels, for `outer(self(x))`: labels that meet in the middle are one."""
        same = _joined(zip(self.outputs, outer.inputs, strict=True))
        sides = [(0, self.inputs), (0, self.outputs), (1, outer.outputs)]
        found = [[same((side, v)) for v in row] for side, row in sides]
        order = dict.fromkeys([*found[0], *found[2], *found[1]])
        numbers = {v: n for n, v in enumerate(order)}
        inputs, middle, outputs = (tuple(numbers[v] for v in row) for row in found)
        return Links(inputs, middle), Links(middle, outputs)

    def then(self, outer: Links) -> Links:
        """The links of `outer(self(x))`."""
        first, last = self.joined(outer)
        return Links(first.inputs, last.outputs)

    def plus(self, other: Links) -> Links:
        """The links of `self(x) + other(x)`."""
        pairs = [
            *zip(self.inputs, other.inputs, strict=True),
            *zip(self.outputs, other.outputs, strict=True),
        ]
        same = _joined(pairs)
        return _numbered([same((0, v)) for v in self.inputs], [same((0, v)) for v in self.outputs])

    def moved(self, rows: Rows) -> Links:
        """The links whose output channels are those of `rows`."""
        labels = [
            ("none", at) if row < 0 else ("row", self.outputs[row]) for at, row in enumerate(rows)
        ]
        return _numbered([("row", v) for v in self.inputs], labels)


def _joined(pairs: object) -> Callable[[tuple[int, int]], tuple[int, int]]:
    """Joins the labels of each pair (left, right) into one, by union-find.

    Returns a function from (side, label) to the label that stands for all joined with it."""
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
