"""Trainable re-parameterizable blocks as plain modules."""

from repfx.blocks.repvgg import RepVGGBlock

__all__ = ["RepVGGBlock"]
