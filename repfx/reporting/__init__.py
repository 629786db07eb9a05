"""Reports, as a page and as numbers: what repfx did to a model and what quantization costs."""

from repfx.reporting.measurement import measure
from repfx.reporting.numbers import Numbers, as_json

__all__ = ["Numbers", "as_json", "measure"]
