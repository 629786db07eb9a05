"""Runs a model on an example without side effects, guesses an example, and compares outputs."""

from __future__ import annotations

import contextlib
import inspect
import io
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from repfx.capture.structures import CONTAINERS, Contents, has_contents, leaves, tensors_in
from repfx.graph.guards import is_guard
from repfx.graph.holders import TABLES
from repfx.graph.run_node import Interpreter
from repfx.quant import unset_is_fine
from repfx.tolerances import TRACED


class Noting(nn.Module):
    """Runs a GraphModule and stores the dtype and shape of each value in its node's `meta`.

    The rank is stored too if the rank of the input is `sure`. `given`: the user gave the input.

    A graph may have been traced on another size because a size is special to the model: what it
    holds is of this size. If the graph is right for that size too, `waive` drops the condition."""

    def __init__(self, graph_module: fx.GraphModule, sure: bool, given: bool = True) -> None:
        super().__init__()
        self.graph_module, self.sure, self.given = graph_module, sure, given
        self.notes = True
        self.waived: set[fx.Node] = set()
        self.special: set[tuple[fx.Node, int, int]] = set()  # guards: a size, and what it is not

    def waive(self, module: nn.Module, example: tuple[Any, ...]) -> None:
        """Drops the conditions that a size is not a certain one, where the graph is right for that
        size too: on the example, or on one made for it."""
        self.notes = False  # the shapes are those of the example
        for node, size, other in sorted(self.special, key=lambda s: s[0].name):
            if node in self.waived or not 0 < other <= 4 * size:
                continue
            before, right = set(self.waived), False
            with contextlib.suppress(Exception):  # the module may refuse this size, or the graph
                given = _with_size(example, node.args[0], size, other)
                right = agree(run_eval(self, given), run_eval(module, given))
            if not right:
                self.waived = before
        for node in self.waived:
            self.graph_module.graph.erase_node(node)
        if self.waived:
            self.graph_module.recompile()

    def forward(self, *args: Any) -> Any:
        waived, special, notes = self.waived, self.special, self.notes

        class Shapes(Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                if is_guard(n) and n.args[1] == "!=":
                    left, _, right, _ = self.fetch_args_kwargs_from_env(n)[0]
                    if left == right:
                        waived.add(n)
                        return None
                    if type(left) is type(right) is int:
                        special.add((n, left, right))
                result = super().run_node(n)
                if isinstance(result, Tensor) and notes:
                    n.meta["dtype"], n.meta["shape"] = result.dtype, tuple(result.shape)
                    n.meta["contiguous"] = result.is_contiguous()
                    n.meta["guessed"] = n.op == "placeholder" and not given
                    if sure:
                        n.meta["rank"] = result.dim()
                return result

        sure, given = self.sure, self.given
        inputs = getattr(self.graph_module, "graph_inputs", None)
        return Shapes(self.graph_module).run(*(inputs(args, {}) if inputs else args))


_SIZES = (64, 224, 32, 28, 16, 8, 12, 96, 128, 256, 299, 384)  # of images, the likely ones first


def guess_example(model: nn.Module) -> tuple[tuple[Any, ...] | None, Any]:
    """A random image or batch of features that the model accepts, and its output; or None, None.

    A model with several inputs may take that many images."""
    required = [p for p in parameters_of(model) if p.default is p.empty]
    if not required:
        return None, None
    generator = torch.Generator().manual_seed(0)
    tried: set[tuple[int, ...]] = set()
    for like, shape in _shapes(model):
        # Several shapes: the first layer in the module tree need not be the first one called.
        if shape in tried or len(tried) > 24:
            continue
        tried.add(shape)
        given = tuple(
            torch.randn(shape, generator=generator, device="cpu").to(like) for _ in required
        )
        try:
            return given, run_eval(model, given)
        except Exception:  # a wrong guess; try the next one
            continue
    return None, None


def _shapes(model: nn.Module) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Shapes of inputs that the model may accept, from its layers, then from its bare kernels."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            continue
        if isinstance(module, nn.Linear):
            yield weight, (2, module.in_features)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            axes = len(module.kernel_size)
            for size in _SIZES if axes == 2 else (32, 16, 64):
                yield weight, (2, module.in_channels, *(size,) * axes)
    for p in model.parameters():
        if p.is_floating_point() and p.dim() in (3, 4, 5):
            for channels in dict.fromkeys((p.shape[1], p.shape[0])):
                yield p, (2, channels, *(32,) * (p.dim() - 2))


def parameters_of(module: nn.Module) -> list[inspect.Parameter]:
    try:
        found = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return []
    return [p for p in found if p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL]


def in_order(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """The arguments of a call in the order of the forward, with its defaults where none is given.

    None if some have no place in that order."""
    if not kwargs:
        return args
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError:
        return None
    given: list[Any] = []
    last = max(i for i, name in enumerate(bound.signature.parameters) if name in bound.arguments)
    for p in list(bound.signature.parameters.values())[: last + 1]:
        value = bound.arguments.get(p.name, p.default)
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            given.append(value)
        elif p.kind is p.VAR_POSITIONAL:
            given += bound.arguments.get(p.name, ())
        elif bound.arguments.get(p.name) and value is not p.default:
            return None
    return tuple(given)


def as_args(example: Any, model: Any = None) -> tuple[Any, ...] | None:
    """The arguments of a call, in the order of the model's forward.

    A dict whose keys are names of arguments stands for these; any other dict is one argument."""
    if example is None or isinstance(example, tuple):
        return example
    if isinstance(example, dict) and isinstance(model, nn.Module):
        given = in_order(model, (), example) if example else None
        if given is not None:
            return given
    return (example,)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps fx from printing a traceback of generated code next to the exception it raises.

    Quantizers that are not calibrated yet do not warn."""
    with contextlib.redirect_stderr(io.StringIO()), unset_is_fine():
        yield


def run_eval(model: nn.Module, example: tuple[Any, ...]) -> Any:
    """The output in eval mode, without side effects. The inputs stay what they are."""
    given = tree_map_only(Tensor, lambda t: t.clone(), example)  # and new lists and dicts
    with undone(model), quiet():
        for m in plain_modules(model):
            m.__dict__["training"] = False
        return model(*given)


def plain_modules(model: nn.Module) -> list[nn.Module]:
    """All modules but scripted ones, whose state is not in Python."""
    return [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]


def _as_written() -> contextlib.AbstractContextManager[Any]:
    """Makes compiled modules run their own Python."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


class Attributes:
    """The attributes and buffers of modules, and what is in the lists and dicts among them."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept = [(m, m.__dict__.copy(), m._buffers.copy()) for m in modules]
        self._contents = [
            Contents(value)
            for _, attributes, _ in self._kept
            for name, value in attributes.items()
            if type(value) in CONTAINERS and name not in TABLES and has_contents(value)
        ]

    def restore(self) -> None:
        for m, attributes, held in self._kept:
            m.__dict__.clear()
            m.__dict__.update(attributes)
            m._buffers.clear()
            m._buffers.update(held)
        for contents in self._contents:
            contents.restore()


class PythonRandom:
    """The states of the random generators of Python and, if it is loaded, of numpy."""

    def __init__(self) -> None:
        self._numpy = sys.modules.get("numpy.random")
        self._python = random.getstate()
        self._state = self._numpy.get_state() if self._numpy is not None else None

    def drawn(self) -> bool:
        """Whether a random number was drawn since."""
        now = PythonRandom()
        if now._python != self._python or now._state is None or self._state is None:
            return now._python != self._python
        (_, ours, *rest), (_, theirs, *other) = self._state, now._state
        return bool(rest != other or ours.tobytes() != theirs.tobytes())

    def restore(self) -> None:
        random.setstate(self._python)
        if self._numpy is not None and self._state is not None:
            self._numpy.set_state(self._state)


@contextlib.contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Afterwards modes, attributes, buffers and the random states are what they were before."""
    kept, drawn = Attributes(plain_modules(model)), PythonRandom()
    buffers = [
        (b, None if b.is_inference() else b._version, b.clone())
        for b in model.buffers()
        if not b.is_meta
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _as_written():
            yield
    finally:
        kept.restore()
        drawn.restore()
        with torch.no_grad():
            for b, version, value in buffers:
                if version is None:
                    with torch.inference_mode():
                        b.copy_(value)
                elif b._version != version:
                    b.copy_(value)


def agree(a: Any, b: Any, tolerance: float = TRACED) -> bool:
    """Whether outputs are equal up to rounding, relative to the largest value of each tensor."""
    flat_a, flat_b = leaves(a), leaves(b)
    if len(flat_a) != len(flat_b):
        return False
    for x, y in zip(flat_a, flat_b, strict=True):
        if isinstance(x, Tensor) != isinstance(y, Tensor):
            return False
        if isinstance(x, Tensor):
            if x.shape != y.shape or not _near(x.double(), y.double(), tolerance):
                return False
        elif x != y:
            return False
    return True


def _near(x: Tensor, y: Tensor, tolerance: float) -> bool:
    largest = float(y.nan_to_num(0, 0, 0).abs().max()) if y.numel() else 0.0
    return torch.allclose(x, y, rtol=tolerance, atol=tolerance * max(largest, 1e-6), equal_nan=True)


def describe(example: tuple[Any, ...]) -> str:
    return ", ".join(str(tuple(e.shape)) if isinstance(e, Tensor) else repr(e) for e in example)


def others(example: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The example with other values: first for one image more, then for as many.

    A graph that was traced on these and agrees on the example has baked in neither the values nor
    the number of images."""
    batches = {t.shape[0] if t.dim() else 0 for t in tensors_in(example)}

    def changed(t: Tensor) -> Tensor:
        return t * 0.97 if t.is_floating_point() else t.clone()

    def longer(t: Tensor) -> Tensor:
        return torch.cat([changed(t), t[:1]])

    if len(batches) == 1 and batches != {0}:
        yield tree_map_only(Tensor, longer, example)
    yield tree_map_only(Tensor, changed, example)


def one_more(example: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The example with one image more, also in lists with an entry for each image.

    None if there is no list, or there are some of several lengths."""
    lengths = {len(v) for v in example if isinstance(v, (list, tuple))} - {0}

    def longer(value: Any, n: int) -> Any:
        if isinstance(value, (list, tuple)) and len(value) == n:
            return type(value)([*value, value[-1]]) if type(value) in (list, tuple) else value
        if isinstance(value, dict):
            return {k: longer(v, n) for k, v in value.items()}
        batch = isinstance(value, Tensor) and value.dim() and value.shape[0] == n
        return torch.cat([value, value[-1:]]) if batch else value

    n = next(iter(sorted(lengths)), None)
    return None if n is None or len(lengths) > 1 else tuple(longer(v, n) for v in example)


def larger(example: tuple[Any, ...], double: bool = False) -> tuple[Any, ...]:
    """The example with larger images, (N, C, ...) with 32 pixels more along each axis.

    `double`, or where that is less: with twice as many. Small features stay small."""

    def grown(t: Tensor) -> Tensor:
        more = [n if double else min(n, 32) for n in reversed(t.shape[2:])]
        sides = [v for n in more for v in (0, n)]
        return nn.functional.pad(t, sides) if t.dim() > 2 and t.is_floating_point() else t

    return tuple(tree_map_only(Tensor, grown, list(example)))


def _with_size(example: tuple[Any, ...], node: Any, size: int, other: int) -> tuple[Any, ...]:
    """The example, changed so that what had this size has another one."""
    batch = isinstance(node, fx.Node) and node.target == "size" and node.args[1] == 0

    def resized(t: Tensor) -> Tensor:
        if batch:
            return t[torch.arange(other) % len(t)] if t.dim() else t
        if t.dim() < 3 or not t.is_floating_point():
            return t
        sizes = [round(n * other / size) for n in t.shape[2:]]
        return nn.functional.interpolate(t, size=sizes)

    return tuple(tree_map_only(Tensor, resized, list(example)))
