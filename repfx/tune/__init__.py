"""What takes a model and data: calibration. It knows no graph surgery, only the quantizers in the model."""

from repfx.tune.calibrate import calibrate

__all__ = ["calibrate"]
