"""repq: training on the merged weight is the training of the block, the deployed weight is the one
trained, to the bit.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import repfx
from repfx.algebra import Fixed, Geometry, KernelNorm, Moments
from repfx.algebra.norm import MODES
from repfx.blocks import BLOCKS, QARepVGG, RepVGG
from repfx.passes import RepQ
from repfx.quant import FakeQuant, Grid
from repfx.testing import assert_same, random_block, randomise

PADS_WITH_RUNNING = {
    "dbb"
}  # its training form pads with running statistics while it normalises by the batch's


def net(block: str, stride: int = 1, dtype: torch.dtype = torch.float64) -> nn.Module:
    groups = 4 if block == "repmixer" else 1
    make = BLOCKS[block](4, 4, 3, stride, 1, groups=groups)
    parts = [
        make,
        nn.ReLU(),
        nn.Conv2d(4, 6, 1),
        nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    ]
    return randomise(nn.Sequential(*parts).to(dtype).eval())


def pictures(dtype: torch.dtype = torch.float64, n: int = 16) -> Tensor:
    return torch.randn(n, 4, 9, 10, dtype=dtype, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("block", sorted(set(BLOCKS) - PADS_WITH_RUNNING))
def test_batch_mode_without_rounding_is_the_multi_branch_training(block: str) -> None:
    model, x = net(block, stride=2 if block not in ("repmixer",) else 1), pictures()
    merged = repfx.transform(model, [RepQ(bits=32, bn="batch")], example=x)
    assert_same(model, merged, x, 1e-12)
    model, merged = copy.deepcopy(model).train(), merged.train()
    want, got = model(x), merged(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    toward = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(9))
    (want * toward).sum().backward()
    (got * toward).sum().backward()
    mine = dict(merged.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            mine[name].grad, p.grad, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(
            merged.state_dict().get(name, buffer), buffer, rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_trains_and_deploys_what_it_trained(
    block: str, mode: str, tmp_path: Path
) -> None:
    bits = {"batch": 4, "sampled": 4}.get(mode, 8)
    model, x = net(block, dtype=torch.float32), pictures(torch.float32)
    trained = repfx.transform(model, [RepQ(bits=bits, bn=mode)], example=x)
    assert set(model.state_dict()) <= set(trained.state_dict())
    y = torch.arange(16) % 5
    optimiser = torch.optim.SGD(trained.train().parameters(), 0.02, momentum=0.9)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(trained(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert min(losses[-3:]) < losses[0]

    seen: dict[str, Tensor] = {}
    for name, m in trained.named_modules():
        if isinstance(m, FakeQuant) and m.of_weight:
            m.register_forward_hook(
                lambda m, given, out, n=name: seen.update({n: m.codes(given[0]).detach().clone()})
            )
    with torch.no_grad():
        trained(x)  # the last step's forward, in training mode
    last = dict(seen)
    for m in trained.modules():
        m._forward_hooks.clear()
    fused = repfx.transform(trained.eval(), ["fuse"], example=x)
    assert_same(trained, fused, x, 0.0)
    assert not any(isinstance(m, (nn.BatchNorm2d, KernelNorm, Moments)) for m in fused.modules())
    quantizers = {
        n: m for n, m in fused.named_modules() if isinstance(m, FakeQuant) and m.of_weight
    }
    # TensorRT's depthwise convolution of four channels stays in float.
    assert len(quantizers) == len(last) == (2 if block == "repmixer" else 3)
    for node in fused.graph.nodes:
        if node.op == "call_module" and node.target in quantizers and mode in ("running", "frozen"):
            weight = fused.get_parameter(str(node.args[0].target))
            assert torch.equal(quantizers[node.target].codes(weight), last[node.target]), (
                node.target
            )
    if mode == "running":
        assert repfx.lower(fused, tmp_path / "int8.onnx", example=x).parity.agrees


class Branching(nn.Module):
    """A head that returns features in training and scores in eval mode.

    What it calls has graphs of its own, inside the graph of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(block_of(8) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        found = [branch(x) for branch in self.branches]
        return found if self.training else torch.cat(found, 1).sigmoid()


def block_of(inputs: int) -> nn.Sequential:
    return nn.Sequential(
        RepVGG(inputs, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    )


@pytest.mark.parametrize("mode", MODES)
def test_parts_with_graphs_of_their_own_are_fused_after_training(mode: str) -> None:
    model, x = randomise(nn.Sequential(block_of(4), Branching()).eval()), pictures(torch.float32)
    trained = repfx.transform(model, [RepQ(bn=mode)], example=x)
    repfx.calibrate(trained, [x])
    sum(y.square().mean() for y in trained.train()(x)).backward()
    torch.optim.SGD(trained.parameters(), 0.02).step()
    fused = repfx.transform(trained.eval(), ["fuse"], example=x)
    assert_same(trained, fused, x, 0.0 if mode != "live" else 1e-5)
    assert not any(isinstance(m, (nn.BatchNorm2d, KernelNorm, Moments)) for m in fused.modules())


def test_the_given_order_of_an_optimiser_by_name_still_fits() -> None:
    model, x = net("repvgg", dtype=torch.float32), pictures(torch.float32)
    before = [n for n, _ in model.named_parameters()]
    trained = repfx.transform(model, ["repq"], example=x)
    after = dict(trained.named_parameters())
    assert set(before) <= set(after)
    assert all(
        after[n].shape == p.shape and after[n].requires_grad for n, p in model.named_parameters()
    )
    extra = set(after) - set(before)
    assert extra and all(n.endswith("_quant.log_ratio") for n in extra)
    trained.load_state_dict(model.state_dict(), strict=False)
    again = repfx.transform(trained, ["fuse"], example=x)
    plain = repfx.transform(model, ["fuse"], example=x)
    ours, theirs = (
        again.get_parameter("0.main.conv.weight"),
        plain.get_parameter("0.main.conv.weight"),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_tap_mean_is_exact_and_estimate_is_right_on_white_input() -> None:
    x = pictures() + 0.7
    for g in (
        Geometry.conv(4, 6, (3, 3), (2, 2), (1, 1)),
        Geometry.conv(4, 6, (3, 2), (1, 2), (2, 0), 2),
    ):
        norm = KernelNorm(nn.BatchNorm2d(6).double(), g, "running").train()
        weight = torch.randn(6, 4 // g.groups, *(a.taps for a in g.axes), dtype=torch.float64)
        scale, shift = norm(Moments(True, True).train()(x), weight)
        u = F.conv2d(
            x, weight, None, [a.stride for a in g.axes], [a.before for a in g.axes], groups=g.groups
        )
        torch.testing.assert_close(shift / scale, -u.mean((0, 2, 3)), rtol=1e-10, atol=1e-12)
    flat = torch.randn(4, 4000, dtype=torch.float64)
    flat = torch.linalg.solve_triangular(
        torch.linalg.cholesky(flat.cov()), flat - flat.mean(1, keepdim=True), upper=False
    )
    white = flat.reshape(1, 4, 40, 100)
    point = Geometry.conv(4, 6, (1, 1))
    weight = torch.randn(6, 4, 1, 1, dtype=torch.float64)
    seen = Moments(True, True).train()(white)
    exact = KernelNorm(nn.BatchNorm2d(6).double(), point, "batch").train()(seen, weight)
    for mode in ("estimate", "estimate_paper"):
        guess = KernelNorm(nn.BatchNorm2d(6).double(), point, mode).train()(seen, weight)
        torch.testing.assert_close(
            guess[0], exact[0], rtol=2e-4, atol=0
        )  # 3999 against 4000 in the covariance
        torch.testing.assert_close(guess[1], exact[1], rtol=2e-4, atol=1e-10)


@pytest.mark.parametrize("whole", [False, True])
def test_the_variance_is_that_of_what_the_kernel_gives(whole: bool) -> None:
    x = pictures(n=96) + 0.7
    weight = torch.randn(6, 2, 3, 2, dtype=torch.float64)
    g = Geometry.conv(4, 6, (3, 2), (1, 2), (2, 0), 2)
    u = F.conv2d(x, weight, None, (1, 2), (2, 0), groups=2)
    seen = Moments(True, True, whole).train()(x)
    some = Moments(True, True, whole, sample=8).train()(x)
    assert torch.equal(some[0], x[::8]) and torch.equal(some[1], seen[1])
    # A few values are no sample.
    assert torch.equal(Moments(True, True, sample=8).train()(x[:20])[0], x[:20])
    assert len(Moments(True, True, sample=8).train()(x[:40])[0]) == 14
    assert seen[0].is_contiguous(memory_format=torch.channels_last) == whole and torch.equal(
        seen[0], x
    )
    kept = KernelNorm(nn.BatchNorm2d(6).double(), g, "running").measure(seen, weight, None)[2]
    torch.testing.assert_close(kept, u.var((0, 2, 3)), rtol=1e-10, atol=0)
    part = (u[::8] - u.mean((0, 2, 3), keepdim=True)).square().mean((0, 2, 3))
    var = KernelNorm(nn.BatchNorm2d(6).double(), g, "sampled").measure(some, weight, None)[1]
    torch.testing.assert_close(var, part, rtol=1e-10, atol=0)


@pytest.mark.parametrize("grid", [Grid(4, axis=0), Grid(3, signed=False), Grid(8, full=True)])
def test_the_learned_step_has_the_gradient_of_lsq(grid: Grid) -> None:
    v = torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    scale = (
        torch.full((3,), 0.21, dtype=torch.float64)
        if grid.axis == 0
        else torch.tensor(0.21, dtype=torch.float64)
    )
    quant = FakeQuant(grid, scale, learned=True).double().train()
    quant.set_scale(scale)
    out = quant(v)
    torch.testing.assert_close(out, grid.quantize(v, scale))
    toward = torch.randn_like(v)
    (out * toward).sum().backward()
    u = v.detach() / 0.21
    inside = (u > grid.low) & (u < grid.high)
    step = torch.where(inside, u.round() - u, u.clamp(grid.low, grid.high))
    want = (toward * step).sum(1) if grid.axis == 0 else (toward * step).sum()
    torch.testing.assert_close(quant.log_ratio.grad, 0.21 * want)  # s dL/ds
    torch.testing.assert_close(v.grad, toward * inside)
    torch.testing.assert_close(grid.quantize(out.detach(), scale), out.detach())  # idempotent


def test_random_graphs_train_merged() -> None:
    """Regions of any kind: float training on the merged weight equals the graph's own, in eval, and
    deploys.
    """
    merged = 0
    for seed in range(40):
        block, x = random_block(seed, nonlinear=True)
        if not any(
            getattr(m, "weight", None) is not None and m.weight.dim() > 2 for m in block.modules()
        ):
            continue
        trained = repfx.transform(block, [RepQ(bits=32)], example=x)
        assert_same(block, trained, x, 1e-9)
        fused = repfx.transform(trained, ["fuse"], example=x)
        assert_same(block, fused, x, 1e-9)
        merged += len(fused.meta["repfx"].merged) > 0
    assert merged >= 20


class Topped(nn.Module):
    """A random block, its last output through ReLU and an average to five classes."""

    def __init__(self, block: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.block = block
        self.head = nn.Linear(self.top(x).shape[1], 5).to(x.dtype)

    def top(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return torch.relu(y[-1] if isinstance(y, (tuple, list)) else y).flatten(2).mean(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.top(x))


def test_random_regions_train_and_deploy(tmp_path: Path) -> None:
    """A dozen regions that nobody has named: the loss falls; eval, fused and ONNX Runtime's outputs
    are the same.
    """
    tried = 0
    for seed in range(200):
        block, one = random_block(seed, nonlinear=False)
        x = torch.randn(16, *one.shape[1:], generator=torch.Generator().manual_seed(seed))
        try:
            model = Topped(block.float(), x).eval()
            model(x).square().sum().backward()
            fits = tried < 12 and model.top(x).shape[0] == 16
        except (
            RuntimeError
        ):  # it holds a constant of another batch, or changes what its own gradient needs
            fits = False
        if not fits:
            continue
        trained = repfx.transform(model, ["repq"], example=x)
        if not any(isinstance(m, KernelNorm) for m in trained.modules()):
            continue
        tried += 1
        print("seed", seed)
        optimiser = torch.optim.SGD(trained.train().parameters(), 0.01, momentum=0.9)
        losses = []
        for _ in range(15):
            loss = F.cross_entropy(trained(x), torch.arange(16) % 5)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        assert sum(losses[-3:]) < sum(losses[:3]), losses
        fused = repfx.transform(trained.eval(), ["fuse"], example=x)
        assert_same(trained, fused, x, 0.0)
        assert not any(isinstance(m, KernelNorm) for m in fused.modules())
        parity = repfx.lower(fused, tmp_path / "int8.onnx", example=x).parity
        assert parity.agrees, parity
    assert tried == 12


def test_first_and_last_layer_and_bad_options() -> None:
    model, x = net("acnet", dtype=torch.float32), pictures(torch.float32)
    trained = repfx.transform(model, ["repq(bits=2, weight_bits=4)"], example=x)
    bits = [m.grid.bits for m in trained.modules() if isinstance(m, FakeQuant)]
    assert sorted(bits) == [2, 4, 8, 8, 8, 8, 8]  # the average before the last layer takes its bits
    low = repfx.transform(model, ["repq(bits=4, ends=None, per_channel=False)"], example=x)
    grids = [m.grid for m in low.modules() if isinstance(m, FakeQuant)]
    assert {g.bits for g in grids} == {4} and all(g.axis is None for g in grids)
    for spec, text in (
        ("repq(bits=0)", "bits must be an integer from 1 to 16, not 0"),
        ("repq(bn=nearly)", "unknown bn 'nearly'; choose one of: batch, estimate, estimate_paper"),
        ("repq(bits=32, weight_bits=8)", "bits=32 trains in float"),
    ):
        with pytest.raises(repfx.InputError, match=text):
            repfx.transform(model, [spec], example=x)


@pytest.mark.parametrize("mode", ["running", "estimate"])
def test_it_is_saved_compiled_and_trained_on(mode: str, tmp_path: Path) -> None:
    model, x = net("repvgg", dtype=torch.float32), pictures(torch.float32)
    trained = repfx.transform(model, [RepQ(bn=mode)], example=x).train()
    trained(x)
    repfx.save(trained, tmp_path / "trained.pt")
    again = repfx.load(tmp_path / "trained.pt")
    assert_same(trained, again, x, 0.0)
    assert_same(
        repfx.transform(trained, ["fuse"], example=x),
        repfx.transform(again, ["fuse"], example=x),
        x,
        0.0,
    )
    compiled = torch.compile(copy.deepcopy(trained), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), again.train()(x), rtol=1e-4, atol=1e-4)


def test_a_module_is_a_layer_whatever_its_name(tmp_path: Path) -> None:
    """The algebra's own tensors are told apart by what holds them, in a saved file too."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.my_constant = BLOCKS["repvgg"](4, 4, 3, 1, 1)
            self.fixed = BLOCKS["repvgg"](4, 4, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.fixed(self.my_constant(x).relu())

    model, x = randomise(Net().eval()), pictures(torch.float32)
    trained = repfx.transform(model, ["repq"], example=x)
    repfx.save(trained, tmp_path / "trained.pt")
    for given in (trained, repfx.load(tmp_path / "trained.pt")):
        fused = repfx.transform(given, ["fuse"], example=x)
        layers = {n for n, m in fused.named_modules() if isinstance(m, nn.Conv2d)}
        assert layers == {"my_constant.main.conv", "fixed.main.conv"}
        merged = fused.meta["repfx"].merged
        assert [m.params_before for m in merged] == [4 * 4 * 9 + 4 * 4] * 2
        assert not any(isinstance(m, Fixed) for m in fused.modules())


UPWARD: dict[str, list[nn.Module]] = {
    "norm": [nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)],
    "norm, same size": [nn.ConvTranspose2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4)],
    "norm, stride": [nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4)],
    "point": [nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), nn.Conv2d(4, 4, 1)],
    "alone": [nn.ConvTranspose2d(3, 4, 3)],
}


@pytest.mark.parametrize("kind", UPWARD)
@pytest.mark.parametrize("mode", ["running", "live"])
def test_transposed_convolutions_stay_as_they_are(kind: str, mode: str) -> None:
    """As in a U-Net: no merged weight may be called as that of an ordinary convolution."""
    torch.manual_seed(0)
    around = nn.Conv2d(3, 3, 1), nn.ReLU(), *copy.deepcopy(UPWARD[kind]), nn.ReLU()
    model = randomise(nn.Sequential(*around, nn.Conv2d(4, 2, 1))).double().eval()
    x = torch.randn(2, 3, 9, 10, dtype=torch.float64)
    for bits in (32, 8):
        trained: Any = repfx.transform(model, [RepQ(bits=bits, bn=mode)], example=x)
        if bits == 32:
            assert_same(model, trained, x, 1e-9)
        train = trained.train()(x)
        assert train.shape == model(x).shape
        train.square().mean().backward()
        fused = repfx.transform(trained.eval(), ["fuse"], example=x)
        assert_same(trained, fused, x, 1e-9)
        assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == 0


@pytest.mark.parametrize("seed", [74, 77, 207, 832, 996])
def test_regions_that_share_a_layer(seed: int) -> None:
    """Graphs that once could not be trained: overlapping regions, and transposed ones."""
    block, x = random_block(
        seed, nonlinear=seed % 3 > 0, axes=3 if seed == 77 or seed == 207 else 2
    )
    trained: Any = repfx.transform(block.eval(), [RepQ(bits=32)], example=x)
    assert_same(block, trained, x, 1e-9)
    repfx.transform(block, ["repq"], example=x).train()(x)  # type: ignore[operator]


class Masked(nn.Module):
    """A parametrization that keeps a weight's zeros."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.rand_like(weight) > 0.5).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


@pytest.mark.parametrize("bn", ["running", "live"])
@pytest.mark.parametrize("how", ["prune", "parametrize"])
@pytest.mark.parametrize("block", [RepVGG(4, 6, 3, 2, 1), QARepVGG(4, 6, 3, 2, 1)])
def test_pruned_weights_stay_pruned(block: nn.Module, how: str, bn: str) -> None:
    torch.manual_seed(0)
    model = randomise(nn.Sequential(copy.deepcopy(block), nn.ReLU(), nn.Conv2d(6, 3, 1)).double())
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 4]
    for conv in convs:
        if how == "prune":
            prune.random_unstructured(conv, "weight", 0.5)
        else:
            nn.utils.parametrize.register_parametrization(conv, "weight", Masked(conv.weight))
    x = torch.randn(16, 4, 8, 8, dtype=torch.float64)
    zeros = {conv.kernel_size[0]: conv.weight == 0 for conv in convs}
    both = zeros[3].clone()
    both[:, :, 1, 1] &= zeros[1][:, :, 0, 0]
    trained: Any = repfx.transform(model, [RepQ(bn=bn)], example=x).train()
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        trained(x).square().mean().backward()
        optimizer.step()
    fused = repfx.transform(trained.eval(), ["fuse"], example=x)
    assert repfx.verify(trained, fused, x).relative < 1e-12
    (weight,) = [p for p in fused.parameters() if p.shape == both.shape]
    assert torch.equal(weight[both], torch.zeros_like(weight[both])) and int(both.sum()) > 50
    assert float((weight[~both] != 0).double().mean()) > 0.9  # the rest rounds to 0


def test_float_training_learns_as_batch_norm_does() -> None:
    with pytest.warns(UserWarning, match="variance has no gradient; leave bn out"):
        repfx.transform(RepVGG(4, 4, 3, 1, 1), ["repq(bits=32, bn=running)"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = repfx.transform(RepVGG(4, 4, 3, 1, 1), ["repq(bits=32)"])
        assert {m.mode for m in found.modules() if isinstance(m, KernelNorm)} == {"sampled"}
        found = repfx.transform(RepVGG(4, 4, 3, 1, 1), ["repq"])
        assert {m.mode for m in found.modules() if isinstance(m, KernelNorm)} == {"running"}


@pytest.mark.parametrize("spec", ["running", "batch", "estimate", "sampled", "live"])
def test_a_compiled_model_trains_as_the_model_does(spec: str) -> None:
    """As one graph, with the same losses, steps and statistics."""
    torch.manual_seed(0)
    block = QARepVGG(4, 8, 3, 1, 1) if spec == "live" else RepVGG(4, 8, 3, 2, 1)
    # In float64, because a rounding that differs once in float32 sends training another way.
    x, y = torch.randn(8, 4, 8, 8, dtype=torch.float64), torch.arange(8) % 3
    net = nn.Sequential(block, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    net = net.double()
    plain: Any = repfx.transform(net, [RepQ(bits=4, bn=spec)], example=x)
    repfx.calibrate(plain, [x]).train()
    other = copy.deepcopy(plain)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for model, run in ((plain, plain), (other, compiled)):
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(run(x), y).backward()
            optimizer.step()
    want = plain.state_dict()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, want[name], rtol=1e-9, atol=1e-10)
