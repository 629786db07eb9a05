"""Batches: the inputs of a model, and perhaps labels, in any of the usual forms.

    a batch                              the model gets        labels
    tensor (N, ...)                      the tensor
    (tensor,), (tensor, labels, ...)     the tensor            the second entry
    {"name": tensor, ...}                keyword arguments
    ({"name": tensor, ...}, labels)      keyword arguments     the second entry

A list counts as a tuple, because a DataLoader returns lists. Batches are any iterable of such
batches: a list, a tuple, a generator, a DataLoader. A single batch is not accepted, because
iterating over a tensor gives its images one by one. Write [x] instead. A batch without images is
skipped, and if there is no image at all, that is an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import length_hint
from typing import Any

import torch
from torch import Tensor

from repfx.errors import InputError


@dataclass(frozen=True)
class Batch:
    """One batch of length N, with labels or None.

    `inputs`: a tensor (N, ...), or keyword arguments of which at least one is such a tensor."""

    inputs: Tensor | Mapping[str, Any]
    labels: Any = None

    @classmethod
    def of(cls, given: Any) -> Batch:
        """The batch given in one of the forms above. Raises InputError for any other form."""
        if isinstance(given, Batch):
            return given
        inputs, labels = given, None
        if isinstance(given, (tuple, list)) and given:
            inputs, labels = given[0], given[1] if len(given) > 1 else None
        found = cls(inputs, labels)
        if not found.tensors or found.tensors[0].dim() < 1:
            raise InputError(
                "a batch is a tensor (N, ...), a tuple that begins with a tensor or a dict, or a "
                f"dict of tensors by the names of the model's inputs; not {_kind(given)}"
            )
        return found

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors among the inputs."""
        values = self.inputs.values() if isinstance(self.inputs, Mapping) else (self.inputs,)
        return tuple(v for v in values if isinstance(v, Tensor))

    def __len__(self) -> int:
        return len(self.tensors[0])

    @property
    def tensor(self) -> Tensor:
        """The only input of the model. Raises InputError if the batch is a dict."""
        if not isinstance(self.inputs, Tensor):
            raise InputError(
                "this takes models with one input: a batch is a tensor (N, ...) or a tuple that "
                "begins with one, not a dict"
            )
        return self.inputs

    def of_inputs(self, names: Sequence[str]) -> tuple[Tensor, ...]:
        """The tensors for the model's inputs of these names, in their order.

        Raises InputError if one is missing, or if there are several and the batch is not a dict."""
        if not isinstance(self.inputs, Mapping):
            if len(names) > 1:
                raise InputError(
                    f"the model has several inputs: a batch is a dict of {', '.join(names)}, not "
                    f"{_kind(self.inputs)}"
                )
            return (self.inputs,)
        for name in names:
            if not isinstance(self.inputs.get(name), Tensor) or self.inputs[name].dim() < 1:
                here = ", ".join(map(str, self.inputs))
                raise InputError(
                    f"a batch has {here}, but no tensor {name} (N, ...), which the model needs"
                )
        return tuple(self.inputs[name] for name in names)

    def to(self, device: torch.device, copy: bool = False) -> Batch:
        """The batch with its tensors on a device; `copy` always copies them."""

        def moved(value: Any) -> Any:
            return value.to(device, copy=copy) if isinstance(value, Tensor) else value

        if isinstance(self.inputs, Mapping):
            inputs: Any = {name: moved(v) for name, v in self.inputs.items()}
        else:
            inputs = moved(self.inputs)
        return Batch(inputs, moved(self.labels))


class Batches:
    """The batches of an iterable. Each iteration goes through the iterable again.

    `name`: the caller's word for them, used in errors. `finite`: check each image for NaN and
    infinity.

    Raises InputError if `given` is not an iterable of batches. Iterating raises InputError for an
    item that is not a batch, for an image that holds NaN or infinity (with `finite`), and if there
    was no image at all."""

    def __init__(self, given: Any, name: str = "batches", finite: bool = False) -> None:
        single = isinstance(given, (Tensor, Mapping, Batch, str, bytes))
        if single or not isinstance(given, Iterable):
            raise InputError(
                f"{name} must be an iterable of batches: give [x] for a single one; this is "
                f"{_kind(given)}"
            )
        self.given, self.name, self.finite = given, name, finite

    def __iter__(self) -> Iterator[Batch]:
        images = 0
        for one in self.given:
            batch = Batch.of(one)
            if self.finite:
                self._check_finite(batch, images)
            images += len(batch)
            if len(batch):
                yield batch
        if not images:
            raise InputError(f"there is no image in {self.name}: give at least one batch")

    def __length_hint__(self) -> int:
        return length_hint(self.given)

    def first(self, images: int) -> list[Batch]:
        """The batches that cover the first `images` images, or all batches if there are fewer.

        Later batches are not read."""
        found: list[Batch] = []
        for batch in self:
            found.append(batch)
            images -= len(batch)
            if images <= 0:
                break
        return found

    def _check_finite(self, batch: Batch, before: int) -> None:
        for x in batch.tensors:
            if bool(torch.isfinite(x).all()):
                continue
            bad = next(i for i, row in enumerate(x) if not bool(torch.isfinite(row).all()))
            raise InputError(f"image {before + bad} of {self.name} holds NaN or infinity")


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
