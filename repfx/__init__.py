"""repfx: finds every re-parameterizable part of a CNN, merges it into one convolution, quantizes
and lowers it.

`import repfx` loads nothing but this file and the errors. A function's room is imported the first
time the function is asked for, so that merging a model does not wait for onnx, and `lint` does not
wait for torch.fx.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from repfx.errors import CheckError, Declined, InputError, MissingPart, RepfxError

__version__ = "0.2.0"

if TYPE_CHECKING:
    from repfx import blocks as blocks
    from repfx import calibration as calibration
    from repfx import passes as passes
    from repfx import testing as testing
    from repfx import training as training
    from repfx.api import Report, report, transform, verify
    from repfx.calibration import calibrate, reconstruct, sensitivity
    from repfx.files.store import load, save
    from repfx.lowering import Artifact, Finding, lower
    from repfx.lowering.lint.findings import lint
    from repfx.reporting import Numbers
    from repfx.rewrite.difference import Difference
    from repfx.rewrite.inspection import Inspection, inspect
    from repfx.training import History, fit
else:
    # where each name comes from; a test compares it with the imports above
    _HOMES = {
        "repfx.api": ("Report", "report", "transform", "verify"),
        "repfx.calibration": ("calibrate", "reconstruct", "sensitivity"),
        "repfx.files.store": ("load", "save"),
        "repfx.lowering": ("Artifact", "Finding", "lower"),
        "repfx.lowering.lint.findings": ("lint",),
        "repfx.reporting": ("Numbers",),
        "repfx.rewrite.difference": ("Difference",),
        "repfx.rewrite.inspection": ("Inspection", "inspect"),
        "repfx.training": ("History", "fit"),
    }
    _HOME = {name: home for home, names in _HOMES.items() for name in names}
    _ROOMS = ("blocks", "calibration", "passes", "testing", "training")

    def __getattr__(name):
        """Imports the room of a public name, or a room by its own name, and keeps what it found."""
        if name in _HOME:
            found = getattr(import_module(_HOME[name]), name)
        elif name in _ROOMS:
            found = import_module(f"repfx.{name}")
        else:
            raise AttributeError(f"module 'repfx' has no attribute {name!r}")
        globals()[name] = found
        return found

    def __dir__():
        return sorted({*globals(), *__all__, *_ROOMS})


__all__ = [
    "Artifact",
    "CheckError",
    "Declined",
    "Difference",
    "Finding",
    "History",
    "InputError",
    "Inspection",
    "MissingPart",
    "Numbers",
    "RepfxError",
    "Report",
    "calibrate",
    "fit",
    "inspect",
    "lint",
    "load",
    "lower",
    "reconstruct",
    "report",
    "save",
    "sensitivity",
    "transform",
    "verify",
]
