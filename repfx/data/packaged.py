"""Data sets that come with a Python package, by name. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from repfx.errors import MissingPart

Labelled = tuple[Tensor, Tensor]


def digits(seed: int = 0) -> tuple[Labelled, Labelled]:
    """scikit-learn's 1 797 handwritten digits: (training set, test set), a quarter for the test.

    Each is (images (N, 1, 8, 8) in -1..1, labels (N,))."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingPart(
            "the handwritten digits come with scikit-learn: pip install repfx[demo]"
        ) from error
    data = load_digits()
    x = (data.images / 8.0 - 1.0).astype(np.float32)[:, None]
    a, b, of_a, of_b = train_test_split(
        x, data.target, test_size=0.25, random_state=seed, stratify=data.target
    )
    return (torch.from_numpy(a), torch.tensor(of_a, device="cpu")), (
        torch.from_numpy(b),
        torch.tensor(of_b, device="cpu"),
    )


PACKAGED: dict[str, Callable[[], tuple[Labelled, Labelled]]] = {"digits": digits}
