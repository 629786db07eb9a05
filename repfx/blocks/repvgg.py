"""RepVGG (Ding et al., 2021) and QARepVGG (Chu et al., 2022): three branches of one input.

    RepVGG:        y = B[Ck x] + B[C1 x] + B[x]
    QARepVGG (S4): y = B[ B[Ck x] + C1 x + x ]

If each branch has its own batch norm, their variances can drift apart, and the merged kernel loses
precision in 8 bits. QARepVGG has batch norms on fewer branches, and one on the sum. The identity
branch exists if in == out, the stride is 1 and sizes are kept."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from repfx.blocks.frame import Block, ConvNorm, Frame


class RepVGG(Block):
    """y = B[Ck x] + B[C1 x] + B[x].

    (N, in, H, W) -> (N, out, H', W'), as nn.Conv2d with these arguments."""

    kernel: ClassVar[str] = "main.conv.weight"
    shift: ClassVar[str] = "main.norm.bias"

    def build(self, frame: Frame) -> None:
        self.main, self.point = ConvNorm(frame), ConvNorm(frame, 1)
        self.skip = nn.BatchNorm2d(frame.outputs) if frame.holds_identity else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.main(x) + self.point(x)
        return y if self.skip is None else y + self.skip(x)


class Norms(NamedTuple):
    """Where a variant has batch norms: on the branches, and (`post`) after the sum."""

    main: bool
    point: bool
    skip: bool
    post: bool


VARIANTS = {
    "S0": Norms(True, True, True, post=False),
    "Eq6": Norms(True, True, True, post=False),
    "S1": Norms(True, True, True, post=False),
    "S2": Norms(True, True, False, post=False),
    "S3": Norms(True, False, False, post=False),
    "S4": Norms(True, False, False, post=True),
    "all BN + post": Norms(True, True, True, post=True),
    "no BN + post": Norms(False, False, False, post=True),
    "BN excl. Id + post": Norms(True, True, False, post=True),
}


class QARepVGG(Block):
    """y = B[B[Ck x] + C1 x + x] (variant S4).

    (N, in, H, W) -> (N, out, H', W'), as nn.Conv2d with these arguments. `variant` names a row of
    the paper's ablation. S0, Eq6 and S1 have the same structure and differ in their weight decay:

        S0, Eq6, S1   B[Ck x] + B[C1 x] + B[x]    all BN + post        B[B[Ck x] + B[C1 x] + B[x]]
        S2            B[Ck x] + B[C1 x] + x       no BN + post         B[Ck x + C1 x + x]
        S3            B[Ck x] + C1 x + x          BN excl. Id + post   B[B[Ck x] + B[C1 x] + x]
        S4            B[B[Ck x] + C1 x + x]

    Raises ValueError for any other variant.
    """

    kernel: ClassVar[str] = "main.conv.weight"
    shift: ClassVar[str] = "norm.bias"

    def build(self, frame: Frame, variant: str = "S4") -> None:
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}; choose one of: {', '.join(VARIANTS)}")
        norms = VARIANTS[variant]
        # `norm` is the last batch norm that the main branch goes through: that of the sum, or, if
        # there is no post norm, that of the branch itself.
        self.post = norms.post
        self.main = ConvNorm(frame, norm=norms.main and norms.post)
        self.point = ConvNorm(frame, 1, norm=norms.point)
        self.skip = (
            (nn.BatchNorm2d(frame.outputs) if norms.skip else nn.Identity())
            if frame.holds_identity
            else None
        )
        self.norm = nn.BatchNorm2d(frame.outputs)

    def forward(self, x: Tensor) -> Tensor:
        others = self.point(x) if self.skip is None else self.point(x) + self.skip(x)
        inner = self.main(x) + others if self.post else self.main(x)
        y: Tensor = self.norm(inner) if self.post else self.norm(inner) + others
        return y
