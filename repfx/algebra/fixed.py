"""Fixed: the tensors that the algebra itself brings into the program of a weight."""

from __future__ import annotations

from torch import Tensor, nn


class Fixed(nn.Module):
    """Such as the ones of an identity, or the ninths of a pool. They are no weights of the model:
    they are not trained, and no key of the state_dict is theirs."""

    def add(self, value: Tensor) -> str:
        """Keeps a tensor and returns the name it has here."""
        name = f"value_{len(self._buffers)}"
        self.register_buffer(name, value, persistent=False)
        return name
