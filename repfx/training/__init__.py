"""Training: the loop, its tasks, its recipe and its checkpoints."""

from repfx.training.detection import Boxed, Detection
from repfx.training.fitting import fit
from repfx.training.history import Epoch, History
from repfx.training.recipe import PRESETS
from repfx.training.regularise import CustomL2
from repfx.training.tasks import Classification, SuperResolution, Task

__all__ = [
    "PRESETS",
    "Boxed",
    "Classification",
    "CustomL2",
    "Detection",
    "Epoch",
    "History",
    "SuperResolution",
    "Task",
    "fit",
]
