"""quantize: the best INT8 net for a budget of accuracy and time, judged on images held out."""

from repfx.ladder.climb import quantize
from repfx.ladder.results import Quantized, Rung, Score

__all__ = ["Quantized", "Rung", "Score", "quantize"]
