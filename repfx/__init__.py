"""repfx: finds every re-parameterizable part of a CNN, merges it into one convolution, quantizes
and lowers it.
"""

from repfx.api import (
    Artifact,
    Difference,
    Finding,
    History,
    Inspection,
    Numbers,
    Report,
    calibrate,
    fit,
    inspect,
    lint,
    load,
    lower,
    reconstruct,
    report,
    save,
    sensitivity,
    transform,
    verify,
)
from repfx.errors import CheckError, Declined, InputError, MissingPart, RepfxError

__version__ = "0.1.0"

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
