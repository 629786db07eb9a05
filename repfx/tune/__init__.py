"""What takes a model and data: calibration and training. It knows no graph surgery, only the quantizers in the model."""

from repfx.tune.biases import correct_biases
from repfx.tune.calibrate import calibrate
from repfx.tune.data import Images
from repfx.tune.fit import fit
from repfx.tune.history import Epoch, History
from repfx.tune.pairs import Pairs
from repfx.tune.pictures import Pictures
from repfx.tune.recipe import PRESETS
from repfx.tune.reconstruct import reconstruct
from repfx.tune.regularise import CustomL2
from repfx.tune.sensitivity import Sensitivity, sensitivity
from repfx.tune.statistics import match_statistics
from repfx.tune.tasks import Classification, SuperResolution, Task

__all__ = [
    "PRESETS",
    "Classification",
    "CustomL2",
    "Epoch",
    "History",
    "Images",
    "Pairs",
    "Pictures",
    "Sensitivity",
    "SuperResolution",
    "Task",
    "calibrate",
    "correct_biases",
    "fit",
    "match_statistics",
    "reconstruct",
    "sensitivity",
]
