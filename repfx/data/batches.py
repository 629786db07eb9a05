"""Batches: what a model is shown, in whatever form people have it.

    a batch                              the model is given    labels
    tensor (N, ...)                      the tensor
    (tensor,), (tensor, labels, ...)     the tensor            the second entry
    {"name": tensor, ...}                keyword arguments
    ({"name": tensor, ...}, labels)      keyword arguments     the second entry

A list counts as a tuple, as a DataLoader gives lists. Batches are any iterable of these: a list, a
tuple, a generator, a DataLoader. A single one is not, because going through a tensor gives its
images one by one: [x] says what is meant. A batch of no images is left out; no image at all is an
error."""

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
    """One batch: `inputs`, a tensor (N, ...) or keyword arguments with at least one, and labels or
    None. Its length is N.
    """

    inputs: Tensor | Mapping[str, Any]
    labels: Any = None

    @classmethod
    def of(cls, given: Any) -> Batch:
        """The batch in one of the forms above. Raises InputError for any other."""
        if isinstance(given, Batch):
            return given
        inputs, labels = given, None
        if isinstance(given, (tuple, list)) and given:
            inputs, labels = given[0], given[1] if len(given) > 1 else None
        found = cls(inputs, labels)
        if not found.tensors or found.tensors[0].dim() < 1:
            raise InputError(
                "a batch is a tensor (N, ...), a tuple or a dict: a tuple begins with a tensor or "
                f"a dict, a dict has tensors by the names of the model's inputs; not {_kind(given)}"
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
        """The one tensor that the model is given. Raises InputError for a dict."""
        if not isinstance(self.inputs, Tensor):
            raise InputError(
                "this takes models of one input: a batch is a tensor (N, ...) or a tuple that "
                "begins with one, not a dict"
            )
        return self.inputs

    def of_inputs(self, names: Sequence[str]) -> tuple[Tensor, ...]:
        """A tensor for each of the model's inputs. Raises InputError where one is missing, or where
        several are wanted and the batch does not name them.
        """
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
                    f"a batch has {here}, but no {name} (N, ...), which the model reads"
                )
        return tuple(self.inputs[name] for name in names)

    def to(self, device: torch.device, copy: bool = False) -> Batch:
        """The batch with its tensors on a device; as copies, for a model that writes into them."""

        def moved(value: Any) -> Any:
            return value.to(device, copy=copy) if isinstance(value, Tensor) else value

        if isinstance(self.inputs, Mapping):
            inputs: Any = {name: moved(v) for name, v in self.inputs.items()}
        else:
            inputs = moved(self.inputs)
        return Batch(inputs, moved(self.labels))


class Batches:
    """The batches of an iterable; each walk over them walks over it again. `name`: what the caller
    calls it. `finite`: whether each image is looked at for NaN and infinity.

    Raises InputError for what is no iterable of batches, and, on the walk, for what is no batch, an
    image that holds NaN or infinity, and where there was no image."""

    def __init__(self, given: Any, name: str = "batches", finite: bool = False) -> None:
        single = isinstance(given, (Tensor, Mapping, Batch, str, bytes))
        if single or not isinstance(given, Iterable):
            raise InputError(
                f"{name} is an iterable of batches: give [x] for a single one; this is "
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
        """As many batches as hold the first so many images, or all where there are fewer; no more
        are read.
        """
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
