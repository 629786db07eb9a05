"""Reports: what repfx did to a model and what quantization costs it, as one page and as numbers."""

from repfx.report.measure import measure
from repfx.report.numbers import Numbers, as_json

__all__ = ["Numbers", "as_json", "measure"]
