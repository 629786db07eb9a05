"""What every test shares: a seed, a process's share of the cores, timm on a CPU build of torch, and
training on the CPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import repfx  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))  # some tests use the nets of others

from repfx.data.vision import torchvision

torchvision()

os.environ["ACCELERATE_USE_CPU"] = "true"  # where there is a GPU as well: test_cuda is for it

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    threads = max(1, torch.get_num_threads() // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the commands that tests run


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
