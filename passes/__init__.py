"""The passes of repfx, one per file. Importing this package registers them."""

if __name__ != "repfx.passes":
    raise ImportError(f"import repfx.passes, not {__name__}")

from repfx.passes.bnfold import BnFold
from repfx.passes.expand import Expand
from repfx.passes.fuse import Fuse
from repfx.passes.ptq import Ptq
from repfx.passes.qarep import QARep
from repfx.passes.qprep import QPRep
from repfx.passes.repq import RepQ
from repfx.placement.quantizers import IntegerLayer, Quantizers, Rounding
from repfx.rewrite.contract import Pass, Promise, Stage
from repfx.rewrite.results import Result
from repfx.rewrite.work import Work

__all__ = [
    "BnFold",
    "Expand",
    "Fuse",
    "IntegerLayer",
    "Pass",
    "Promise",
    "Ptq",
    "QARep",
    "QPRep",
    "Quantizers",
    "RepQ",
    "Result",
    "Rounding",
    "Stage",
    "Work",
]
