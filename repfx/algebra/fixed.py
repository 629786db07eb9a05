"""Fixed: constants that the algebra adds to the expression of a merged weight."""

from __future__ import annotations

from torch import Tensor, nn


class Fixed(nn.Module):
    """Constants such as the ones of an identity, or the 1/9 of a 3x3 average pool.

    They are not weights of the model: they are not trained, and not in the state_dict."""

    def add(self, value: Tensor) -> str:
        """Stores a tensor and returns the name of its buffer."""
        name = f"value_{len(self._buffers)}"
        self.register_buffer(name, value, persistent=False)
        return name
