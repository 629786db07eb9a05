"""Trainable re-parameterizable blocks: drop-ins for nn.Conv2d that equal one in eval mode.

Each takes the arguments of nn.Conv2d and is affine, without an activation: it equals ONE
convolution of exactly that kernel size, stride, zero padding, dilation and groups, with a bias, at
every input size. Two class attributes name parameters: `kernel`, (out, in / groups, kh, kw), and
`shift`, (out,); the merged convolution is `scale[o] * kernel + rest` and `scale'[o] * shift +
rest'`, no scale zero, and its weight does not depend on `shift`. In the equations, Ck is a k x k
convolution, B a batch norm, dw depthwise."""

from torch import nn

from repfx.blocks.acnet import ACNet
from repfx.blocks.dbb import DBB
from repfx.blocks.ecb import ECB
from repfx.blocks.largekernel import LargeKernel
from repfx.blocks.mobileone import MobileOne, RepMixer
from repfx.blocks.orepa import OREPA
from repfx.blocks.repvgg import QARepVGG, RepVGG

BLOCKS: dict[str, type[nn.Module]] = {
    "repvgg": RepVGG,
    "qarepvgg": QARepVGG,
    "acnet": ACNet,
    "dbb": DBB,
    "orepa": OREPA,
    "mobileone": MobileOne,
    "ecb": ECB,
    "repmixer": RepMixer,
    "largekernel": LargeKernel,
}

__all__ = [
    "BLOCKS",
    "DBB",
    "ECB",
    "OREPA",
    "ACNet",
    "LargeKernel",
    "MobileOne",
    "QARepVGG",
    "RepMixer",
    "RepVGG",
]
