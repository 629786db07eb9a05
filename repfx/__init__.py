"""repfx merges the re-parameterizable parts of a CNN into convolutions, quantizes and lowers it.

`import repfx` loads only this file and the errors. The package behind a public function is imported
when the function is first used, so merging a model does not wait for onnx, and `lint` does not
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
    from repfx.ladder import Quantized, quantize
    from repfx.lowering import Artifact, Finding, lower
    from repfx.lowering.lint.findings import lint
    from repfx.reporting import Numbers
    from repfx.rewrite.difference import Difference
    from repfx.rewrite.inspection import Inspection, inspect
    from repfx.training import History, fit
else:
    # The module each name comes from. A test compares this table with the imports above.
    _HOMES = {
        "repfx.api": ("Report", "report", "transform", "verify"),
        "repfx.calibration": ("calibrate", "reconstruct", "sensitivity"),
        "repfx.files.store": ("load", "save"),
        "repfx.ladder": ("Quantized", "quantize"),
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
        """Imports a public name from its module, or one of the packages, and keeps it here."""
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
    "Quantized",
    "RepfxError",
    "Report",
    "calibrate",
    "fit",
    "inspect",
    "lint",
    "load",
    "lower",
    "quantize",
    "reconstruct",
    "report",
    "save",
    "sensitivity",
    "transform",
    "verify",
]
