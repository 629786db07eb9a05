"""Help for testing passes: random nets to rewrite, and assertions that outputs did not change."""

from repfx.testing.checks import assert_same, assert_same_elsewhere, randomise
from repfx.testing.layers import Scale, Shift
from repfx.testing.random_block import RandomBlock, random_block

__all__ = [
    "RandomBlock",
    "Scale",
    "Shift",
    "assert_same",
    "assert_same_elsewhere",
    "random_block",
    "randomise",
]
