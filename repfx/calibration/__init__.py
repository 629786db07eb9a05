"""After training: ranges from data, bias correction, learned rounding, sensitivity of layers.

Nothing here changes a graph, except that the first scales decide which optional quantizers stay."""

from repfx.calibration.biases import correct_biases
from repfx.calibration.ranges import calibrate
from repfx.calibration.reconstruction import reconstruct
from repfx.calibration.sensitivities import Sensitivity, sensitivity
from repfx.calibration.statistics import match_statistics

__all__ = [
    "Sensitivity",
    "calibrate",
    "correct_biases",
    "match_statistics",
    "reconstruct",
    "sensitivity",
]
