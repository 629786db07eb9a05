"""Gates: layers that compute a few numbers an image, by which a whole map is multiplied.

x * sigmoid(conv(relu(conv(mean(x)))))      squeeze-and-excitation

Such a layer reads and writes one number a channel, so integers save no traffic there. TensorRT for
RTX also needs more kernels for them: one to round the mean, and one to scale each output."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import fx

from repfx.algebra import Geometry
from repfx.graph.traits import Trait
from repfx.graph.view import GraphView

WHY = "it computes a gate from one number a channel, which takes more kernels in integers"


def gate_layers(view: GraphView, layers: Mapping[fx.Node, Geometry]) -> set[fx.Node]:
    """Those of the layers that only lead into products with larger values.

    `layers` maps the output of each to its geometry. A gate's layer has one position in its output.
    None is found where the shapes are unknown."""
    inside: set[fx.Node] = set()
    for node in reversed(view.nodes):
        readers = [reader for reader in node.users if not view.is_size(reader)]
        geometry = layers.get(node, getattr(view.ops[node], "own", None))
        if not readers or (geometry is not None and not _has_one_position(node, geometry)):
            continue
        if all(reader in inside or _widens(view, reader, node) for reader in readers):
            inside.add(node)
    return inside.intersection(layers)


def _widens(view: GraphView, reader: fx.Node, value: fx.Node) -> bool:
    """Whether the reader multiplies the value with a larger one."""
    small, large = _shape(value), _shape(reader)
    return Trait.PRODUCT in view.traits(reader) and 0 < prod(small) < prod(large)


def _has_one_position(layer: fx.Node, geometry: Geometry) -> bool:
    shape = _shape(layer)
    return prod(shape[1:-1] if geometry.channel_axis == -1 else shape[2:]) == 1


def _shape(value: fx.Node) -> tuple[int, ...]:
    """Of its value on the example; one entry of 0 where it is unknown."""
    shape: tuple[int, ...] | None = value.meta.get("shape")
    return (0, 0, 0) if shape is None else shape
