"""Training: the loop, its tasks, its recipe and its checkpoints."""

from repfx.training.fitting import fit
from repfx.training.history import Epoch, History
from repfx.training.recipe import PRESETS
from repfx.training.regularise import CustomL2
from repfx.training.tasks import Classification, SuperResolution, Task

__all__ = [
    "PRESETS",
    "Classification",
    "CustomL2",
    "Epoch",
    "History",
    "SuperResolution",
    "Task",
    "fit",
]
