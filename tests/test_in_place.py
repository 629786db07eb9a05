"""Changes in place and shared memory: what a data-flow graph hides, and a merge must not
disturb."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.utils._pytree import tree_leaves

import repfx
from repfx.calibration.ranges import _activations
from repfx.graph.view import GraphView
from repfx.quant import FakeQuant, Grid
from repfx.testing import assert_same, random_block, randomise


class Parts(nn.Module):
    """A convolution, a norm, activations in place and dropout, run by a function of them."""

    def __init__(self, run) -> None:
        super().__init__()
        self.run = run
        self.conv, self.norm, self.act = (
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
        )
        self.point, self.drop = nn.Conv2d(4, 4, 1, bias=False), nn.Dropout()

    def forward(self, *xs: Tensor) -> Tensor:
        return self.run(self, *xs)


class One(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Two(Parts):
    """Two inputs: no example can be guessed, so nothing but the graph itself can be right."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.run(self, x, z)


def x() -> Tensor:
    return torch.randn(2, 4, 9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def discarded_module(m, x, z=0):
    y = m.conv(x)
    m.act(y)
    return m.norm(y) * (z + 1)


def discarded_method(m, x, z=0):
    y = m.conv(x)
    y.relu_()
    return m.norm(y) * (z + 1)


def discarded_function(m, x, z=0):
    y = m.conv(x)
    torch.relu_(y)
    return m.norm(y) * (z + 1)


def through_dropout(m, x, z=0):
    x = x.tanh()
    a = m.conv(x)
    r = m.act(m.drop(x))
    return m.norm(a).tanh() + r + z


def through_a_slice(m, x, z=0):
    x = x.tanh()
    a = m.conv(x)
    p = x[:, :2].mul_(3)
    return m.norm(a).tanh() + p.mean() + z


def augmented_alias(m, x, z=0.5):
    h = m.conv(x)
    skip = h
    h += z
    return m.norm(h) * skip


def changed_between_branches(m, x, z=0):
    y = torch.relu(x)
    a = m.conv(y)
    y += 1
    return a + m.point(y) + z


def written_to_an_output(m, x, z=0):
    p = m.point(x)
    t = torch.add(m.conv(x), 1, out=p)
    return m.norm(t).relu() + m.point(p) + z


def weight_read_elsewhere(m, x, z=0):
    return m.norm(m.conv(x)).relu() + F.conv2d(x, m.conv.weight, padding=1) + m.conv.bias.sum() + z


RUNS = [
    discarded_module,
    discarded_method,
    discarded_function,
    through_dropout,
    through_a_slice,
    augmented_alias,
    changed_between_branches,
    written_to_an_output,
    weight_read_elsewhere,
]


@torch.no_grad()
@pytest.mark.parametrize("run", RUNS, ids=lambda f: f.__name__)
def test_equal_with_and_without_an_example(run) -> None:
    one = randomise(One(run).double().eval())
    want = one(x())
    assert torch.allclose(repfx.transform(one, ["fuse"]).eval()(x()), want, rtol=0, atol=1e-12)
    two = randomise(Two(run).double().eval())
    want = two(x(), x())
    assert torch.allclose(repfx.transform(two, ["fuse"]).eval()(x(), x()), want, rtol=0, atol=1e-11)


def test_the_usual_in_place_idioms_still_merge() -> None:
    def residual(m, x):
        y = m.norm(m.conv(x))
        y += m.point(x)
        y += x
        return m.act(y)

    model = randomise(One(residual).double().eval())
    result = repfx.transform(model, ["fuse"])
    assert_same(model, result, x(), 1e-12)
    assert sum(isinstance(m, nn.Conv2d) for m in result.modules()) == 1


def test_shared_quantizers_do_not_span_a_change() -> None:
    def two_readers(m, x):
        y = torch.relu(x)
        a = m.conv(y)
        y += 5
        return a + torch.relu(m.point(y))

    model = One(two_readers).eval()
    quantized = repfx.transform(model, ["ptq"])
    repfx.calibrate(quantized, [x().float()])
    assert repfx.verify(model, quantized, x().float()).sqnr > 30


def test_a_forward_that_writes_to_buffers_does_not_change_the_model() -> None:
    class Counting(One):
        def __init__(self) -> None:
            super().__init__(None)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.norm(self.conv(x))

    model = Counting().eval()
    repfx.transform(model, ["fuse"])
    assert float(model.calls) == 0


def test_dropout_before_a_layer_survives() -> None:
    model = One(lambda m, x: m.norm(m.conv(m.drop(torch.relu(x))))).double().eval()
    result = repfx.transform(model, ["fuse"])
    assert len(result.meta["repfx"].merged) == 1
    result.train()
    assert not torch.equal(result(x()), result(x()))


def test_integer_pictures() -> None:
    model = randomise(One(lambda m, x: m.norm(m.point(x / 255.0))).eval())
    picture = torch.randint(0, 255, (2, 4, 9, 9), dtype=torch.uint8)
    result = repfx.transform(model, ["fuse"], example=picture)
    assert_same(model, result, (picture,), 1e-6)
    assert len(result.meta["repfx"].merged) == 1


def in_place(model: nn.Module) -> list[str]:
    """The names of the activations that `calibrate` runs in place, seen while it does."""
    found: list[str] = []

    def batches():
        found.extend(name for name, m in model.named_modules() if getattr(m, "inplace", False))
        yield x().float()

    before = {m: m.inplace for m in model.modules() if hasattr(m, "inplace")}
    repfx.calibrate(model, batches())
    assert before == {m: m.inplace for m in model.modules() if hasattr(m, "inplace")}
    return found


def act_of(run: Callable[..., Tensor], **others: nn.Module) -> nn.Module:
    """A quantized net whose `act` is not in place."""
    net = One(run).eval()
    net.act = nn.ReLU()
    for name, module in others.items():
        setattr(net, name, module)
    return repfx.transform(randomise(net), ["ptq"])


def test_calibration_runs_activations_in_place() -> None:
    assert in_place(act_of(lambda m, x: m.point(m.act(m.conv(x))))) == ["act"]
    assert in_place(act_of(lambda m, x: m.point(m.act(m.conv(x) + x)))) == ["act"]
    twice = act_of(lambda m, x: m.act(m.point(m.act(m.conv(x)))))
    assert in_place(twice) == ["act"]


@fx.wrap
def interpolate(x: Tensor) -> Tensor:
    """Not what PyTorch calls so: gives back what it is given."""
    return x


class Keeps(nn.Module):
    """Code that nobody has read; it calls an activation of the net on what it keeps."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(x) if bool(x.sum() > -1e9) else x


def test_calibration_leaves_what_others_read() -> None:
    def twice(m, x):
        y = m.conv(x)
        return m.point(m.act(y)) + y

    assert in_place(act_of(twice)) == []
    assert in_place(act_of(lambda m, x: m.point(m.act(x)))) == []  # the input is the caller's
    assert (
        in_place(act_of(lambda m, x: m.point(m.act(m.conv.bias.reshape(1, -1, 1, 1))) + m.conv(x)))
        == []
    )

    def through_a_view(m, x):
        y = m.conv(x)
        return m.point(m.act(y.view(y.shape))) + y

    assert in_place(act_of(through_a_view)) == []
    assert (
        in_place(act_of(lambda m, x: m.point(m.act(m.conv(x))) + m.act(x))) == []
    )  # of one call it may not
    assert in_place(act_of(lambda m, x: m.act(x) + m.point(m.act(m.conv(x))))) == []

    def through_a_quantizer(m, x):
        y = m.conv(x)
        return m.point(m.act(m.quant(y))) + y

    assert in_place(act_of(through_a_quantizer, quant=FakeQuant(Grid(8)))) == []

    act = nn.ReLU()
    shared = act_of(lambda m, x: m.keeps(m.point(m.act(m.conv(x)))), act=act, keeps=Keeps(act))
    assert in_place(shared) == []

    def through_its_namesake(m, x):
        y = m.conv(x)
        return m.point(m.act(interpolate(y))) + y

    assert in_place(act_of(through_its_namesake)) == []

    def through_parallel_code(m, x):
        y = m.conv(x)
        return m.point(m.act(m.parallel(y))) + y

    assert in_place(act_of(through_parallel_code, parallel=nn.DataParallel(nn.Dropout()))) == []

    def through_an_operator(m, x):
        y = m.conv(x)
        return m.point(m.act(torch.ops.aten.type_as.default(y, y))) + y

    assert in_place(act_of(through_an_operator)) == []

    def through_einsum(m, x):
        y = m.conv(x)
        return m.point(m.act(torch.einsum("nchw->ncwh", y))).transpose(2, 3) + y

    assert in_place(act_of(through_einsum)) == []

    act, patched = nn.ReLU(), nn.Upsample(scale_factor=1)
    patched.__dict__["forward"] = lambda x: x
    assert (
        in_place(act_of(lambda m, x: m.point(m.act(m.conv(x))) + m.patched(x), patched=patched))
        == []
    )

    layer = nn.TransformerEncoderLayer(4, 1, 8, activation=act)
    shared = act_of(
        lambda m, x: m.layer(m.point(m.act(m.conv(x))).flatten(2).permute(2, 0, 1)),
        act=act,
        layer=layer,
    )
    assert in_place(shared) == []

    hooked = act_of(lambda m, x: m.point(m.act(m.norm(m.conv(x)) + x)))
    seen: list[Tensor] = []
    hooked.get_submodule("act").register_forward_pre_hook(lambda m, given: seen.append(given[0]))
    assert in_place(hooked) == [] and float(seen[0].min()) < 0
    hooked = act_of(lambda m, x: m.point(m.act(m.pool(m.conv(x)))), pool=nn.MaxPool2d(2))
    hooked.get_submodule("pool").register_forward_hook(lambda m, given, gives: seen.append(gives))
    assert in_place(hooked) == [] and float(seen[-1].min()) < 0


def test_calibration_leaves_what_untraced_code_calls() -> None:
    class Reaches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = One(lambda m, x: m.point(m.act(m.conv(x))))
            self.body.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.body.act(y) - y if float(y.mean()) > -1e9 else y

    assert in_place(repfx.transform(Reaches().eval(), ["ptq"])) == []

    class Hides(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.acts = [act]

        def forward(self, x: Tensor) -> Tensor:
            return x + self.acts[0](x) if bool(x.sum() > -1e9) else x

    act = nn.ReLU()
    kept = Hides(act)
    assert (
        in_place(act_of(lambda m, x: m.keeps(m.point(m.act(m.conv(x)))), act=act, keeps=kept)) == []
    )

    handle = nn.modules.module.register_module_forward_hook(lambda m, given, gives: None)
    try:
        assert in_place(act_of(lambda m, x: m.point(m.act(m.conv(x))))) == []
    finally:
        handle.remove()


def test_calibration_that_fails_puts_activations_back() -> None:
    model = act_of(lambda m, x: m.point(m.act(m.conv(x))))
    with pytest.raises(repfx.InputError):
        repfx.calibrate(model, [x().float(), torch.zeros(1, 3, 5, 5)])
    assert not any(getattr(m, "inplace", False) for m in model.modules())


def sprinkled(model: fx.GraphModule, given: tuple[Tensor, ...], seed: int) -> fx.GraphModule:
    """Gives one reader in three of every value an activation of it instead."""
    draw = random.Random(seed)
    ShapeProp(model).propagate(*(t.clone() for t in given))
    for node in list(model.graph.nodes):
        value = node.meta.get("tensor_meta")
        if isinstance(value, TensorMetadata) and value.dtype.is_floating_point:
            for reader in [u for u in node.users if u.op != "output" and draw.random() < 1 / 3]:
                name = f"act_{node.name}_{reader.name}"
                model.add_submodule(name, nn.LeakyReLU(0.5))
                with model.graph.inserting_before(reader):
                    reader.replace_input_with(node, model.graph.call_module(name, (node,)))
    model.recompile()
    return model


@torch.no_grad()
def test_random_graphs_give_the_same_with_activations_in_place() -> None:
    some = every = 0
    for seed in range(200):
        print(f"seed {seed}")  # shown when a graph fails: random_block(seed) makes it again
        block, inputs = random_block(seed, nonlinear=True)
        try:
            model = repfx.transform(block, [], example=inputs).eval()
        except repfx.InputError as error:
            assert "no convolution" in str(error)
            continue
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        model = sprinkled(model, given, seed)
        want = [t.clone() for t in tree_leaves(model(*(t.clone() for t in given)))]
        activations = _activations(GraphView(model))
        some += len(activations)
        every += sum(getattr(m, "inplace", True) is False for m in model.modules())
        for activation in activations:
            activation.inplace = True
        got = tree_leaves(model(*(t.clone() for t in given)))
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert 100 < some < every / 2
