"""capture: traces a private copy of a module, GraphModule or exported program.

The parts of the copy that can be traced are GraphModules. The copy has the names, values and modes
of the model, and shares its storage until `Captured.separate`. Before anything is rewritten, it is
checked against the model on an example:

    module M --trace--> graph G;   if G(example) != M(example), the children of M are tried
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from repfx.capture.assemble import graph_module
from repfx.capture.canonical import canonical
from repfx.capture.copying import Copy, alias, unwrapped
from repfx.capture.exported import from_exported
from repfx.capture.normalise import normalise
from repfx.capture.owned import DEPLOYED, in_eval_mode, is_eval_only
from repfx.capture.recorder import Untraceable
from repfx.capture.running import (
    Noting,
    agree,
    describe,
    guess_example,
    in_order,
    larger,
    one_more,
    others,
    run_eval,
)
from repfx.capture.structures import tensors_in
from repfx.capture.tracer import BRANCHES, KNOWN, Tracer, first_line, is_leaf, is_mode
from repfx.errors import Declined, InputError
from repfx.graph.effects import is_foreign
from repfx.graph.guards import facts_of, holds, is_guard
from repfx.graph.modes import TrainOnly
from repfx.graph.traits import Trait
from repfx.graph.vocabulary import kind_of
from repfx.quant import quantizers_of
from repfx.tolerances import TRACED, TRACED_WIDE


@dataclass
class Known:
    """What a capture found out about modules, by path, and another of the same model need not.

    `alike`: whether the training branch of a module computes what its eval branch computes.
    `refused`: why there is no graph of a module. `eval_graphs`: which ones have a graph for eval
    mode."""

    alike: dict[str, bool] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    eval_graphs: set[str] = field(default_factory=set)

    def inside(self, path: str) -> dict[str, bool]:
        """`alike` with the paths that modules have inside the one of this path."""
        return {
            name.removeprefix(path).strip("."): alike
            for name, alike in self.alike.items()
            if not path or f"{name}.".startswith(f"{path}.")
        }

    def note(self, path: str, found: dict[str, bool]) -> None:
        """Adds what was found out inside the module of this path."""
        self.alike |= {f"{path}.{name}".strip("."): alike for name, alike in found.items()}


@dataclass
class Captured:
    """A captured model, with the example that it was checked on and that example's output.

    `model` is a GraphModule. If its forward cannot be traced, it is an object of the model's own
    class with GraphModules inside.
    """

    model: nn.Module
    declined: list[Declined] = field(default_factory=list)
    example: tuple[Any, ...] | None = None  # the input of the whole model, given or guessed
    expected: Any = None  # the output on the example
    given: bool = False  # whether the user gave the example
    sure: bool = False  # whether its number of dimensions is certain: given by the user, or images
    enter_opaque: bool = True
    deploy: bool = False  # whether the result is for eval mode
    idle: set[nn.Module] = field(default_factory=set)  # graphs that never run on the example
    known: Known = field(default_factory=Known)
    again: bool = False  # whether an earlier capture of the same model checked the facts
    copy: Copy = field(default_factory=lambda: Copy(nn.Module(), set()))

    @property
    def facts(self) -> list[str]:
        """What the graphs take for granted about the sizes of their inputs."""
        found = [fact for _, module in graphs(self.model) for fact in facts_of(module.graph)]
        deployed = [path for _, m in graphs(self.model) for path in m.__dict__.get(DEPLOYED, ())]
        return found + [f"eval mode: {p or 'the model'} differs in training" for p in deployed]

    def separate(self) -> None:
        """Gives `model` its own storage, so writing into it cannot change the original model."""
        self.copy.separate(self.model)


def capture(
    model: Any,
    example: tuple[Any, ...] | None = None,
    enter_opaque: bool = True,
    deploy: bool = False,
    known: Known | None = None,
) -> Captured:
    """Traces a private copy of the model as in eval mode, but keeps the mode of each module.

    With `enter_opaque`, the children of a module that cannot be traced are traced one by one. With
    `deploy`, a module that does something else in training may lose that. `known` is what an
    earlier capture of the same model found out.

    `example` is the tuple of positional arguments of the forward. Without one, an image or a batch
    of features is guessed from the first layer. Raises InputError if `model` is not a model, has no
    Python forward or no weights, holds NaN or infinity, or does not accept the given example."""
    model = _accepted(model)
    twin = alias(model)
    skeleton = twin.model
    given = example is not None
    if example is None:
        example, expected = guess_example(skeleton)
    else:
        try:
            expected = run_eval(skeleton, example)
        except Exception as error:
            raise InputError(
                f"the model does not accept the example {describe(example)}: {error}"
            ) from error
    # For a model of linear layers, the guess (N, C) might be wrong: it could be (N, tokens, C).
    # A guessed image always has the right number of dimensions.
    sure = given or (example is not None and example[0].dim() > 2)
    captured = Captured(
        skeleton,
        [],
        example,
        expected,
        given,
        sure,
        enter_opaque=enter_opaque,
        deploy=deploy,
        known=known or Known(),
        again=known is not None,
        copy=twin,
    )
    captured.model = _capture(skeleton, "", example, expected, captured)
    return captured


def _accepted(model: Any) -> nn.Module:
    """The module to trace. Raises InputError if there is none, or it has no usable weights."""
    if isinstance(model, torch.export.ExportedProgram):
        model = from_exported(model)
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"a model is an nn.Module, a GraphModule or an ExportedProgram, not a {type(model)}"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "a scripted module has no Python forward to trace: pass the module it was made from"
        )
    tensors = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(t) for t in tensors):
        raise InputError("the model has lazy layers without weights: run it once on an example")
    if any(t.is_meta for t in tensors):
        raise InputError("the model is on the meta device: it has no weights yet")
    _refuse_non_finite(model)
    return model


def graphs(model: nn.Module) -> Iterator[tuple[str, fx.GraphModule]]:
    """The GraphModules of a captured model with their paths: the model itself, or its parts."""
    if isinstance(model, TrainOnly):
        return  # nothing of it is deployed
    if isinstance(model, fx.GraphModule) and not is_eval_only(model):
        yield "", model
    for name, child in model.named_children():
        for path, module in graphs(child):
            yield f"{name}.{path}".rstrip("."), module


def is_read_inside(model: nn.Module, path: str) -> bool:
    """Whether a graph around this one computes something from what it returns.

    This is how a head with a graph of its own for eval mode reads its last layers. What they return
    is no output of the model, and no other part that would quantize it reads it."""
    atoms = path.split(".")
    for i in reversed(range(len(atoms))):
        outer, name = model.get_submodule(".".join(atoms[:i])), ".".join(atoms[i:])
        if isinstance(outer, fx.GraphModule):
            calls = [n for n in outer.graph.nodes if n.op == "call_module" and n.target == name]
            if calls:
                users = [user for call in calls for user in call.users]
                return all(user.op not in ("output", "call_module") for user in users)
    return False


def _capture(
    module: nn.Module, path: str, example: tuple[Any, ...] | None, expected: Any, captured: Captured
) -> nn.Module:
    if isinstance(module, fx.GraphModule) and not (example is not None and _has_leaves(module)):
        normalise(module.graph)
        module.recompile()
        if example is not None:
            run_eval(Noting(module, captured.sure, captured.given), example)
        return canonical(module)
    mark = len(captured.declined)
    reason = captured.known.refused.get(path, "")
    if not reason:
        reason = "its forward cannot be run without an example: pass one that it accepts"
        for given in () if example is None else others(example):
            found = _attempt(module, path, given, example, expected, captured)
            if not isinstance(found, str):
                return found
            reason = found
    captured.known.refused[path] = reason
    where, cure = path or "the model", "its children are transformed on their own"
    captured.declined.append(Declined(where, reason, cure))
    swaps = _children(module, path, example, captured)
    if not _agrees(module, example, expected):
        _undo(swaps)
        captured.declined[mark:] = [
            Declined(
                where, reason, "it uses the inside of its children, so they are not changed either"
            )
        ]
    elif BRANCHES in reason:
        return _eval_graph(module, path, example, expected, captured)
    return module


def _has_leaves(graph: fx.GraphModule) -> bool:
    """Whether it calls modules of unknown classes, which its tracer left whole."""
    called = (n for n in graph.graph.nodes if n.op == "call_module")
    return any(is_foreign(graph.get_submodule(str(n.target))) for n in called)


def _attempt(
    module: nn.Module, path: str, given: Any, example: Any, expected: Any, captured: Captured
) -> fx.GraphModule | str:
    """The graph that was traced on `given` and agrees on the example, or the reason for none.

    If it is right for one size only, larger images are tried too: a model may hold what it made for
    the size that it saw last."""
    known = captured.known.inside(path)
    try:
        traced = _trace(module, given, captured.deploy, known)
    except Exception as error:  # its forward can raise anything
        if str(error) == BRANCHES:
            captured.known.note(path, known)
        return f"its forward cannot be traced: {first_line(error)}"
    captured.known.note(path, known)
    if _binding(traced[1]):
        try:
            free = _trace(module, larger(given), captured.deploy, known)
        except Exception:  # it takes images of one size only
            free = traced
        if _binding(free[1]) < _binding(traced[1]):
            found = _finished(module, path, free, example, expected, captured)
            if not isinstance(found, str):
                return found
    return _finished(module, path, traced, example, expected, captured)


def _binding(graph: fx.Graph) -> int:
    """How many facts a graph rests on, without those that `Noting` may waive."""
    return sum(is_guard(n) and n.args[1] != "!=" for n in graph.nodes)


def _finished(
    module: nn.Module,
    path: str,
    traced: tuple[Tracer, fx.Graph],
    example: Any,
    expected: Any,
    captured: Captured,
) -> fx.GraphModule | str:
    """The traced graph as a module, with what is inside opaque modules captured, if it agrees."""
    mark, swaps = len(captured.declined), []
    tracer, graph = traced
    try:
        normalise(graph)
        result = graph_module(module, graph, tracer)
        swaps = _inside_opaque(result, path, tracer.opaque, example, captured)
        noting = Noting(result, captured.sure, captured.given)
        if _agrees(noting, example, expected):
            noting.waive(module, example)
            if not captured.again:
                _check_lists(module, result, example, expected)
                _pin(module, result, tracer, example)
            return canonical(result)
        reason = "the traced graph does not compute what its forward computes"
    except Exception as error:
        reason = f"its forward cannot be traced: {first_line(error)}"
    _undo(swaps)
    del captured.declined[mark:]
    return reason


def _pin(
    module: nn.Module, result: fx.GraphModule, tracer: Tracer, example: tuple[Any, ...]
) -> None:
    """Adds sizes of the inputs to the facts, unless the graph is right for other ones too.

    Some of Python's own functions, such as range(size), take a size without asking for it. Raises
    Untraceable if that happened to an input that has no size of its own."""
    if not tracer.recorder.measured:
        return
    shapes = {n: n.meta["shape"] for n in result.graph.nodes if n.op == "placeholder" and n.meta}
    shapes = {n: shape for n, shape in shapes.items() if shape}
    fixed: list[tuple[fx.Node, int]] = []
    sizes = (larger(example, double) for double in (False, True))
    tried = ((given, _right_for(module, result, given)) for given in sizes)
    given, right = next((found for found in tried if found[1] is not None), (example, None))
    hidden = len(shapes) < len(tensors_in(example))
    if right is False and hidden and not _refuses(result, given):
        raise Untraceable("it uses a size of a tensor in a list or dict as a number")
    if not right:
        fixed += [(n, axis) for n, shape in shapes.items() for axis in range(2, len(shape))]
    tensors = [i for i, v in enumerate(example) if isinstance(v, Tensor)]
    for node, i in zip(shapes, tensors, strict=False):
        varied = tracer.recorder.shapes[node][0] != shapes[node][0]
        longer = (*example[:i], torch.cat([example[i], example[i][:1]]), *example[i + 1 :])
        if not varied and _right_for(module, result, longer) is False:
            fixed.append((node, 0))
    for node, axis in fixed:
        with result.graph.inserting_after(max(shapes)):
            measured = result.graph.call_method("size", (node, axis))
        with result.graph.inserting_after(measured):
            words = f"{node.name}.size({axis}) == {shapes[node][axis]}"
            args = (measured, "==", shapes[node][axis], words)
            result.graph.call_function(holds, args)
    result.recompile()


def _check_lists(
    module: nn.Module, result: fx.GraphModule, example: tuple[Any, ...], expected: Any
) -> None:
    """Raises Untraceable if a list may have any length, as that of the boxes in each image.

    The graph has the operators of one length, and refuses another. Lists of features, one from each
    layer, have one length: the end of a longer one is not read."""
    given = one_more(example)
    if given is None:
        return
    try:
        found = run_eval(module, given)
    except Exception:  # its lists have one length
        return
    if not agree(found, expected) and _refuses(result, given):
        raise Untraceable("it takes a list that may have another length")


def _right_for(module: nn.Module, result: nn.Module, given: tuple[Any, ...]) -> bool | None:
    """Whether a graph computes what the module does; None if the module does not take this input.

    A graph that refuses the input, because of a fact, is not right for it."""
    try:
        want = run_eval(module, given)
    except Exception:  # its forward can raise anything
        return None
    return _agrees(result, given, want)


def _refuses(graph: nn.Module, given: tuple[Any, ...]) -> bool:
    """Whether a graph refuses an input because of a fact it rests on."""
    try:
        run_eval(graph, given)
    except InputError:
        return True
    except Exception:  # it does not fit this input
        return False
    return False


def _trace(
    module: nn.Module, example: tuple[Any, ...], deploy: bool, known: dict[str, bool]
) -> tuple[Tracer, fx.Graph]:
    """Traces a module and returns its graph.

    If a module inside branches on self.training, its training branch is taken, provided that this
    branch computes the same as the eval branch in eval mode. Then one graph is right in both modes.
    `known` says for which modules it does, and grows."""
    while True:
        training = frozenset(path for path, alike in known.items() if alike)
        tracer = Tracer(training=training, deploy=deploy)
        failed: Exception | None = None
        try:
            graph = tracer.trace(module, example)
        except Exception as error:  # anything the forward raises, maybe because of its branch
            failed = error
        known |= dict.fromkeys(tracer.unlike, False)
        unknown = tracer.branching - set(known)
        if "" in unknown:
            known[""] = _one_function(module, example)
        if str(failed) == BRANCHES and not known[""]:
            break  # nothing inside changes that
        branching = {path: module.get_submodule(path) for path in unknown - {""}}
        seen = _record(module, list(branching.values()), example) if branching else {}
        known |= {path: _one_function(m, _inputs(seen, m)) for path, m in branching.items()}
        if not any(known[path] for path in unknown):
            break
    if failed is not None:
        raise failed
    return tracer, graph


def _one_function(module: nn.Module, inputs: tuple[Any, ...] | None) -> bool:
    """Whether the training branch of a module computes in eval mode what its eval branch computes.

    Tested with the module's parameters and with random ones, on the inputs and on larger inputs
    with larger values. The test runs in float64, where rounding cannot hide a difference, or in the
    module's own precision if it does not run in float64."""
    if inputs is None:
        return False
    wide = tuple(
        v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs
    )
    for give, tolerance in ((wide, TRACED_WIDE), (inputs, TRACED)):
        try:
            twin = copy.deepcopy(module)
            twin = twin.double() if give is wide else twin
            graph = (tracer := Tracer(training=frozenset({""}))).trace(twin, give)
            want = run_eval(twin, give)
        except Exception:  # it does not run in float64, or the branch cannot be traced
            continue
        try:
            if any(_is_random(n) for n in graph.nodes):
                return False
            traced = graph_module(twin, graph, tracer)
            if not agree(run_eval(traced, give), want, tolerance):
                return False
            return all(_agree_elsewhere(twin, traced, give, seed, tolerance) for seed in range(3))
        except Exception:  # the branch does not run
            return False
    return False


def _is_random(node: fx.Node) -> bool:
    """Whether it draws random numbers in eval mode, too. A dropout may ask for the mode."""
    if not kind_of(node).traits & (Trait.RANDOM | Trait.UNSET):
        return False
    return not any(is_mode(n) for n in node.all_input_nodes)


def _agree_elsewhere(
    module: nn.Module, traced: nn.Module, inputs: tuple[Any, ...], seed: int, tolerance: float
) -> bool:
    """Whether two forwards of the same parameters agree on other inputs and random parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.is_floating_point():
                p.copy_(torch.randn(p.shape, generator=generator, device="cpu") * 0.7)

    def other(v: Any) -> Any:
        if not isinstance(v, Tensor) or not v.is_floating_point():
            return v
        sizes = [*v.shape[:2], *(n + 3 * seed for n in v.shape[2:])]
        return (torch.randn(sizes, generator=generator, device="cpu") * 30**seed).to(v)

    given = tuple(map(other, inputs))
    try:
        want = run_eval(module, given)
    except Exception:  # a size that the module does not accept
        given = tuple(v if not isinstance(v, Tensor) else v * 30**seed for v in inputs)
        want = run_eval(module, given)
    return agree(run_eval(traced, given), want, tolerance)


Swap = tuple[nn.Module, str, nn.Module]


def _undo(swaps: list[Swap]) -> None:
    for holder, name, child in reversed(swaps):
        holder._modules[name] = child


def _agrees(module: nn.Module, example: tuple[Any, ...] | None, expected: Any) -> bool:
    """Whether the module gives the expected output on the example. True if there is none."""
    if example is None:
        return True
    try:
        return agree(run_eval(module, example), expected)
    except Exception:  # it does not even run, because a child that it looked into is replaced
        return False


def _inside_opaque(
    result: fx.GraphModule, path: str, opaque: dict[str, Declined], example: Any, captured: Captured
) -> list[Swap]:
    """Captures the children of each leaf that cannot be traced.

    Their example is what they get when the whole module runs."""
    swaps: list[Swap] = []
    seen = (
        _record(result, [result.get_submodule(name) for name in opaque], example) if opaque else {}
    )
    for name, why in opaque.items():
        leaf = result.get_submodule(name)
        full = f"{path}.{name}".lstrip(".")
        captured.declined.append(
            Declined(full, why.reason, "its children are transformed on their own")
        )
        inputs = _inputs(seen, leaf)
        expected = None if inputs is None else seen[id(leaf)].output(leaf)
        mine = _children(leaf, full, inputs, captured)
        if not _agrees(leaf, inputs, expected):
            _undo(mine)
            continue
        swaps += mine
        made = leaf
        if why.reason == BRANCHES:
            made = _eval_graph(leaf, full, inputs, expected, captured)
        if made is not leaf:
            parent = result.get_submodule(name.rpartition(".")[0])
            parent._modules[name.rpartition(".")[2]] = made
            swaps.append((parent, name.rpartition(".")[2], leaf))
    return swaps


def _eval_graph(
    module: nn.Module, path: str, example: Any, expected: Any, captured: Captured
) -> nn.Module:
    """A module that branches on self.training, with a graph of its forward in eval mode.

    Its children are captured already. In training its own forward runs. If it cannot be traced in
    eval mode either, it is returned as it is."""
    if captured.again and path not in captured.known.eval_graphs:
        return module
    for given in () if example is None else others(example):
        try:
            tracer = Tracer(eval_only=True)
            graph = tracer.trace(module, given)
            normalise(graph)
            if tracer.modes or tracer.parts or tracer.plain_norms:
                return module
            made = in_eval_mode(module, graph, tracer.inputs)
            noting = Noting(made, captured.sure, captured.given)
            if _agrees(noting, example, expected):
                noting.waive(module, example)
                if not captured.again:
                    _check_lists(module, made, example, expected)
                    _pin(module, made, tracer, example)
                captured.known.eval_graphs.add(path)
                return made
        except Exception:  # its forward can raise anything
            continue
    return module


def _children(
    module: nn.Module, path: str, example: tuple[Any, ...] | None, captured: Captured
) -> list[Swap]:
    """Replaces each child that can be traced by its graph, and returns what was replaced.

    Containers, such as a ModuleList, are entered. A child that is never called on this example, as
    that for another kind of prompt, is traced on a guess."""
    parts, seen = _called_parts(module, example) if captured.enter_opaque else ([], {})
    done: dict[int, nn.Module] = {}
    swaps: list[Swap] = []
    for holder, name, child in parts:
        full = ".".join(p for p in (path, _path_in(module, child)) if p)
        if id(child) not in done:
            called = seen.get(id(child))
            call = called or _guessed(child)
            done[id(child)] = child  # if it is called in a way that no graph can follow
            if call and (called or example is None or _has_no_facts(child, call.inputs)):
                given, output = call.inputs, call.output(child)
                done[id(child)] = _capture(child, full, given, output, captured)
            elif not called:
                swaps += _children(child, full, None, captured)
            if example is not None and not called:
                captured.idle |= {graph for _, graph in graphs(done[id(child)])}
        if done[id(child)] is not child:
            holder._modules[name] = done[id(child)]
            swaps.append((holder, name, child))
    return swaps


Part = tuple[nn.Module, str, nn.Module]


@dataclass
class Call:
    """The first call of a module while another one runs: its arguments, and what it returned."""

    inputs: tuple[Any, ...]
    returned: list[Any] = field(default_factory=list)

    def output(self, module: nn.Module) -> Any:
        """What the module returns for these inputs."""
        return self.returned[0] if self.returned else run_eval(module, self.inputs)


def _inputs(seen: dict[int, Call], module: nn.Module) -> tuple[Any, ...] | None:
    return seen[id(module)].inputs if id(module) in seen else None


def _guessed(module: nn.Module) -> Call | None:
    example, output = guess_example(module)
    return None if example is None else Call(example, [output])


def _called_parts(
    module: nn.Module, example: tuple[Any, ...] | None
) -> tuple[list[Part], dict[int, Call]]:
    """The outermost modules inside that are called, with their holders, names and calls.

    A model may walk over its own Sequential: then the parts are what is inside that. Modules that
    never run are parts without inputs."""
    found: list[Part] = []
    seen: dict[int, Call] = {}
    runs: set[int] = set()
    todo = list(_parts(module))
    while todo:
        now = _record(module, [child for _, _, child in todo], example, runs)
        seen |= now
        inner: list[Part] = []
        for part in todo:
            enters = id(part[2]) not in now and any(id(m) in runs for m in part[2].modules())
            inner += list(_parts(part[2])) if enters else []
            found += [] if enters else [part]
        todo = inner
    return found, seen


def _has_no_facts(module: nn.Module, example: tuple[Any, ...]) -> bool:
    """Whether its graph takes any input, not only those of the example's size."""
    try:
        return not _binding(_trace(module, example, deploy=False, known={})[1])
    except Exception:  # its forward can raise anything
        return False


def _parts(module: nn.Module) -> Iterator[Part]:
    for name, child in module._modules.items():
        if child is None or is_leaf(child):
            continue
        if type(child).forward is nn.Module.forward or isinstance(
            child, (nn.ModuleList, nn.ModuleDict)
        ):
            yield from _parts(child)
        else:
            yield module, name, child


def _path_in(module: nn.Module, child: nn.Module) -> str:
    return next((name for name, m in module.named_modules() if m is child), "")


def _record(
    module: nn.Module,
    children: list[nn.Module],
    example: tuple[Any, ...] | None,
    runs: set[int] | None = None,
) -> dict[int, Call]:
    """The first call of each child, by id, with the arguments in the order of its forward.

    Children that are called with arguments that have no such order are left out. Adds to `runs` the
    ids of all modules inside that run and have parameters of their own: one activation without any
    may be part of many modules."""
    seen: dict[int, Call] = {}
    if example is None:
        return seen
    first: set[int] = set()
    random = torch.get_rng_state()

    def note(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = in_order(child, args, kwargs)
        if given is not None and id(child) not in seen:
            seen[id(child)] = Call(tree_map_only(Tensor, lambda t: t.clone(), given))
            # Alone, the child would draw other numbers if some were drawn before.
            first.update({id(child)} if torch.equal(random, torch.get_rng_state()) else ())

    def note_output(child: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if id(child) in first and all(isinstance(v, KNOWN) for v in tree_leaves(result)):
            seen[id(child)].returned.append(tree_map_only(Tensor, lambda t: t.clone(), result))
        first.discard(id(child))

    hooks = [child.register_forward_pre_hook(note, with_kwargs=True) for child in children]
    hooks += [child.register_forward_hook(note_output, with_kwargs=True) for child in children]
    if runs is not None:
        inside = [m for m in module.modules() if m is not module and m._parameters]
        hooks += [m.register_forward_pre_hook(lambda m, _: runs.add(id(m))) for m in inside]
    try:
        run_eval(module, example)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _refuse_non_finite(model: nn.Module) -> None:
    # Quantizers without a scale have an infinite one.
    unset = {id(q.scale) for q in quantizers_of(model).values() if not q.calibrated}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or tensor.is_meta or math.isfinite(tensor.detach().sum()):
            continue  # if the sum is finite, so are the terms
        if id(tensor) not in unset and not torch.isfinite(tensor).all():
            raise InputError(f"{name} holds NaN or infinity")
