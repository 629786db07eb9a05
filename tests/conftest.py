"""What every test shares: one torch thread count, and timm on a CPU build of torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import repfx  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import zoo

zoo.declare_missing_operators()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
