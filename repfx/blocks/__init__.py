"""Trainable re-parameterizable blocks: replacements for nn.Conv2d that merge into one.

Each block takes the arguments of nn.Conv2d and is affine, without an activation. In eval mode it
equals ONE convolution with exactly that kernel size, stride, zero padding, dilation and groups, and
with a bias, at every input size.

Two class attributes of a block name parameters: `kernel`, (out, in / groups, kh, kw), and `shift`,
(out,). The merged convolution has the weight `scale[o] * kernel + rest` and the bias
`scale'[o] * shift + rest'`. No scale is zero, and the weight does not depend on `shift`.

In the equations, Ck is a k x k convolution, B a batch norm, and dw means depthwise."""

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
