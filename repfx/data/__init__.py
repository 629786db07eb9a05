"""Data: batches of any common form, and data sets from folders, zips and array files of images."""

from repfx.data.batches import Batch, Batches
from repfx.data.boxes import Boxes
from repfx.data.folders import Images
from repfx.data.images import Pictures
from repfx.data.preprocessing import Preprocessing
from repfx.data.super_resolution import Pairs

__all__ = ["Batch", "Batches", "Boxes", "Images", "Pairs", "Pictures", "Preprocessing"]
