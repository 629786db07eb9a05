"""The blocks: each equals one convolution, at the borders too; names its kernel and shift; learns;
traces; refuses.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx import blocks
from repfx.blocks import (
    BLOCKS,
    DBB,
    ECB,
    OREPA,
    ACNet,
    LargeKernel,
    MobileOne,
    QARepVGG,
    RepMixer,
    RepVGG,
)
from repfx.blocks.frame import Frame, pair

TOLERANCE = 1e-11
Part = tuple[Tensor, Tensor]  # weight and bias of a convolution
EYE = torch.eye(4, dtype=torch.float64)[:, :, None, None]
DELTA, DEPTHWISE_DELTA = (F.pad(k, (1, 1, 1, 1)) for k in (EYE, torch.ones_like(EYE[:, :1])))
SOBEL, LAPLACIAN = torch.tensor(
    [[[1.0, 2, 1], [0, 0, 0], [-1, -2, -1]], [[0, 1, 0], [1, -4, 1], [0, 1, 0]]]
).double()

# in, out, kernel, stride, padding, dilation, groups
Shape = tuple[Any, ...]
PLAIN, STRIDED, DILATED, MIXER = (
    (4, 4, 3, 1, 1, 1, 1),
    (4, 6, 3, 2, 1, 1, 2),
    (4, 4, 3, 1, (1, 2), (1, 2), 4),
    (4, 4, 3, 1, 1, 1, 4),
)
DEPTHWISE: list[Shape] = [
    MIXER,
    (4, 4, (3, 5), 1, (1, 2), 1, 4),
    (4, 4, 3, 1, (2, 1), (2, 1), 4),
    (4, 4, 1, 1, 0, 1, 4),
]
GRID: list[Shape] = [
    PLAIN,
    STRIDED,
    DILATED,
    *DEPTHWISE,
    (4, 6, 3, 1, 1, 1, 1),
    (4, 4, 3, 1, 0, 1, 1),
    (4, 4, 3, (1, 2), (2, 3), 1, 2),
    (4, 4, 3, 1, 2, 2, 1),
    (4, 6, (3, 5), (2, 1), (1, 0), 1, 2),
    (4, 4, (4, 2), (1, 2), (1, 0), (1, 2), 1),
    (4, 4, (1, 3), 1, (0, 1), 1, 1),
    (4, 4, 7, 2, 2, 1, 4),
    (4, 6, 1, 1, 0, 1, 2),
    (4, 4, 1, 2, 1, 1, 1),
]
NORMED = {"S0": "310", "Eq6": "310", "S1": "310", "S2": "31", "S3": "3", "S4": "3+"}
NORMED |= {"all BN + post": "310+", "no BN + post": "+", "BN excl. Id + post": "31+"}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "qarepvgg": [{"variant": v} for v in NORMED],
    "dbb": [{}, {"internal": 8}],
    "mobileone": [{}, {"branches": 3}],
    "ecb": [{}, {"expand": 1, "identity": True}],
    "repmixer": [{"layer_scale": 0.5}, {"layer_scale": 0.5, "branches": 2}],
    "largekernel": [{}, {"outer": True, "small": [(1, 1), ((1, 2), 1)]}],
}


def cases(shapes: list[Shape]) -> list[Any]:
    """Every block with every set of options at the shapes it can have."""
    return [
        pytest.param(name, shape, options, id=f"{name} {shape} {options or ''}")
        for name in BLOCKS
        for shape in (DEPTHWISE if name == "repmixer" else shapes)
        for options in OPTIONS.get(name, [{}])
        if (name != "ecb" or shape[2] == 3)
        and ("small" not in options or min(pair("", shape[2])) >= 2)
    ]


def scatter(block: nn.Module) -> nn.Module:
    """Every parameter and statistic far from its start, in place, in float64."""
    with torch.no_grad():
        for name, tensor in block.double().state_dict().items():
            if "var" in name or (tensor.ndim == 1 and "weight" in name):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.5)
    return block


def made(name: str, shape: Shape, options: dict[str, Any]) -> nn.Module:
    return scatter(BLOCKS[name](*shape, **options)).eval()


def pictures(channels: int, *size: int) -> Tensor:
    return torch.randn(2, channels, *size, dtype=torch.float64)


@torch.no_grad()
def response(block: nn.Module, shape: Shape) -> Part:
    """The convolution a block is, far from the borders: its value at zero, and what each impulse at
    s n + d t - p adds.
    """
    inputs, outputs, kernel, stride, padding, dilation, groups = shape
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (
        pair("", v, 0) for v in (kernel, stride, padding, dilation)
    )
    size, n = 40, (20 // sh, 20 // sw)
    images = torch.zeros(
        1 + inputs * kh * kw, inputs, size, size, dtype=torch.float64
    )  # the first stays zero
    for at, (i, t, u) in enumerate(
        ((i, t, u) for i in range(inputs) for t in range(kh) for u in range(kw)), 1
    ):
        images[at, i, sh * n[0] + dh * t - ph, sw * n[1] + dw * u - pw] = 1
    zero, *moved = block(images)[:, :, n[0], n[1]]
    dense = (torch.stack(moved) - zero).unflatten(0, (inputs, kh, kw)).permute(3, 0, 1, 2)
    step = inputs // groups
    return torch.stack(
        [row[o // (outputs // groups) * step :][:step] for o, row in enumerate(dense)]
    ), zero


@pytest.mark.parametrize(("name", "shape", "options"), cases(GRID))
def test_it_is_one_convolution(name: str, shape: Shape, options: dict[str, Any]) -> None:
    block, plain = made(name, shape, options), nn.Conv2d(*shape).double()
    weight, bias = response(block, shape)
    assert (
        weight.shape == plain.weight.shape
        and weight.abs().amax() > 0.05
        and bias.abs().amax() > 1e-3
    )
    for size in [(9, 12), (12, 13), (7, 8)]:
        x = pictures(shape[0], *size)
        y = block(x)
        assert y.shape == plain(x).shape
        assert (y - F.conv2d(x, weight, bias, *shape[3:])).abs().amax() <= TOLERANCE * max(
            1, y.abs().amax()
        )


@pytest.mark.parametrize(("name", "shape", "options"), cases([PLAIN, STRIDED, DILATED]))
def test_kernel_and_shift_name_parameters(name: str, shape: Shape, options: dict[str, Any]) -> None:
    block = made(name, shape, options)
    kernel, shift = (
        block.get_parameter(getattr(BLOCKS[name], which)) for which in ("kernel", "shift")
    )

    def pushed(parameter: Tensor, change: Tensor) -> Part:
        with torch.no_grad():
            parameter += change
        return response(block, shape)

    (weight, bias), by = response(block, shape), torch.rand_like(kernel) + 0.5
    assert kernel.shape == weight.shape and shift.shape == bias.shape
    new_weight, new_bias = pushed(kernel, by)
    scale = (new_weight - weight) / by  # one number an output channel
    assert (scale - scale[:, :1, :1, :1]).abs().amax() <= TOLERANCE and scale.abs().amin() > 1e-3
    last_weight, last_bias = pushed(shift, torch.ones_like(shift))
    step = last_bias - new_bias
    assert torch.allclose(last_weight, new_weight, 0, TOLERANCE) and step.abs().amin() > 1e-3
    moved = (
        pushed(shift, F.one_hot(torch.tensor(0), len(shift)))[1] - last_bias
    )  # one alone moves its own bias alone
    assert (moved[0] - step[0]).abs() <= TOLERANCE and moved[1:].abs().amax() <= TOLERANCE


@pytest.mark.parametrize(("name", "shape", "options"), cases([PLAIN, STRIDED, DILATED]))
@pytest.mark.parametrize("training", [True, False])
def test_every_parameter_learns(
    name: str, shape: Shape, options: dict[str, Any], training: bool
) -> None:
    """From the start it is given; called twice before one backward, as a shared block is."""
    block = BLOCKS[name](*shape, **options).double().train(training)
    x = pictures(shape[0], 9, 8)
    sum((y * torch.randn_like(y)).sum() for y in (block(x), block(x + 1))).backward()
    for path, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), path
        if not (
            training and path.endswith("bias")
        ):  # batch statistics take out any shift before them
            assert parameter.grad.abs().amax() > 1e-9, path


@pytest.mark.parametrize(("name", "shape", "options"), cases([PLAIN, STRIDED, DILATED]))
def test_it_traces_with_its_parameters(name: str, shape: Shape, options: dict[str, Any]) -> None:
    tracer = fx.Tracer()
    tracer.proxy_buffer_attributes = True
    block = made(name, shape, options)
    twin = copy.deepcopy(block)
    traced = fx.GraphModule(twin, tracer.trace(twin))
    scatter(block)  # traced from other numbers: none of them may be in the graph
    assert not traced.load_state_dict(block.state_dict(), strict=False).unexpected_keys
    x = pictures(shape[0], 8, 9)
    assert torch.equal(traced.eval()(x), block.eval()(x))
    assert torch.equal(traced.train()(x), block.train()(x))


def norm(bn: nn.BatchNorm2d, weight: Tensor, bias: Tensor | float = 0.0) -> Part:
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    return weight * scale[:, None, None, None], bn.bias + (bias - bn.running_mean) * scale


def total(*parts: Any) -> Part:
    return sum(p[0] for p in parts), sum(p[1] for p in parts)


def then(outer: Tensor, weight: Tensor, bias: Tensor | None = None) -> Part:
    """A k x k after a 1x1 with a bias."""
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return torch.einsum("omhw,mi->oihw", outer, weight[:, :, 0, 0]), outer.sum((2, 3)) @ bias


def branch(m: Any, size: int = 3, delta: Tensor = DELTA) -> Part:
    """Of an identity with a norm, or of a kernel with zeros between its taps and around it, with a
    norm or without.
    """
    if isinstance(m, nn.BatchNorm2d):
        return norm(m, delta)
    (kh, kw), (dh, dw) = m.conv.kernel_size, m.conv.dilation
    kernel = m.conv.weight.new_zeros(*m.conv.weight.shape[:2], size, size)
    top, left = (size - dh * (kh - 1)) // 2, (size - dw * (kw - 1)) // 2
    kernel[:, :, top : size - top : dh, left : size - left : dw] = m.conv.weight
    return (
        norm(m.norm, kernel)
        if isinstance(m.norm, nn.BatchNorm2d)
        else (kernel, torch.zeros(len(kernel)))
    )


def parallel(b: nn.Module, paths: str, delta: Tensor = DELTA) -> Part:
    return total(*(branch(b.get_submodule(path), 3, delta) for path in paths.split()))


def repmixer(b: Any) -> Part:
    weight, bias = parallel(b.mixer, "main others.0 others.1", DEPTHWISE_DELTA)
    less, lower = norm(b.norm, DEPTHWISE_DELTA)
    return DEPTHWISE_DELTA + b.scale[:, None] * (weight - less), b.scale.flatten() * (bias - lower)


def qarepvgg(b: Any, normed: str) -> Part:
    """`normed` says which of 3x3, 1x1 and identity has a norm, and with "+" the sum."""
    assert sum(isinstance(m, nn.BatchNorm2d) for m in b.modules()) == len(normed)
    skip = norm(b.skip, DELTA) if "0" in normed else (DELTA, torch.zeros(4))
    if "+" in normed:
        return norm(b.norm, *total(branch(b.main), branch(b.point), skip))
    return total(norm(b.norm, b.main.conv.weight), branch(b.point), skip)


def dbb(b: Any) -> Part:
    flat = norm(b.before_average.norm, b.before_average.conv.weight)
    deep = norm(b.before_deep.norm, b.before_deep.conv.weight + EYE)
    average = norm(b.average_norm, *then(EYE.expand(-1, -1, 3, 3) / 9, *flat))
    return total(
        branch(b.main), branch(b.point), average, norm(b.deep_norm, *then(b.deep.weight, *deep))
    )


def ecb(b: Any) -> Part:
    masks = zip(b.edges, (SOBEL, SOBEL.T, LAPLACIAN), strict=True)
    edges = [
        total(then(EYE * edge.scale * mask, edge.point.weight), (0, edge.bias))
        for edge, mask in masks
    ]
    deep = total(then(b.deep.weight, b.point.weight, b.point.bias), (0, b.deep.bias))
    return total((b.main.weight + DELTA, b.main.bias), deep, *edges)


def orepa(b: Any) -> Part:
    at = torch.pi * (torch.arange(3) + 0.5) / 3
    waves = torch.stack(
        [torch.outer((u * at).cos(), (v * at).cos()) for u, v in [(0, 1), (0, 2), (1, 0), (1, 1)]]
    )
    assert torch.allclose(b.prior, waves[:, None].double(), 0, 1e-6)
    deep, _ = then(b.deep[0], b.deep_point[0, :, :, None, None] + EYE)
    separable = torch.einsum("oie,iehw->oihw", b.depthwise_point[0], b.depthwise[0])
    average, point = b.average_point.expand(-1, -1, 3, 3) / 9, F.pad(b.point, (1, 1, 1, 1))
    weights = [b.full, deep, average, b.prior_point * b.prior, point, separable]
    return norm(b.norm, sum(s * w for s, w in zip(b.scales, weights, strict=True)))


EQUATIONS: list[tuple[Any, ...]] = [
    ("repvgg", parallel, {}, "main point skip"),
    ("acnet", parallel, {}, "main column row"),
    ("mobileone", parallel, {"branches": 2}, "main others.0 others.1 others.2"),
    ("repmixer", repmixer, {}),
    (
        "largekernel",
        lambda b: norm(b.norm, *total(*(branch(m, 7) for m in (b.main, *b.small)))),
        {"outer": True},
    ),
    ("dbb", dbb, {}),
    ("ecb", ecb, {"identity": True}),
    ("orepa", orepa, {}),
    *(("qarepvgg", qarepvgg, {"variant": v}, normed) for v, normed in NORMED.items()),
]


@pytest.mark.parametrize("case", EQUATIONS, ids=lambda case: f"{case[0]} {case[2]}")
@torch.no_grad()
def test_its_equation(case: tuple[Any, ...]) -> None:
    name, equation, options, *more = case
    shape = {"repmixer": MIXER, "largekernel": (4, 4, 7, 1, 3)}.get(name, PLAIN)
    block, x = made(name, shape, options), pictures(4, 9, 10)
    y = F.conv2d(x, *equation(block, *more), padding=shape[4], groups=4 if shape is MIXER else 1)
    assert torch.allclose(block(x), y, 0, TOLERANCE)


def test_training_pads_dbb_with_the_running_shift() -> None:
    """And normalises with the batch; a second call, which moves the statistics, leaves the
    gradients of the first.
    """
    block: Any = scatter(DBB(4, 4, 3, padding=1)).before_average.train()
    y = block(pictures(4, 6, 7))
    shift = norm(block.norm, block.conv.weight)[1]
    assert torch.allclose(y[:, :, 0], shift[None, :, None].expand(2, 4, 9), 0, TOLERANCE)
    assert torch.allclose(y[:, :, 1:-1, 1:-1].mean((0, 2, 3)), block.norm.bias, 0, TOLERANCE)
    want = -18 * block.norm.running_mean / (block.norm.running_var + block.norm.eps).sqrt()
    block(pictures(4, 6, 7))
    assert torch.allclose(
        torch.autograd.grad(y[:, :, 0].sum(), block.norm.weight)[0], want, 0, TOLERANCE
    )


REFUSED = [
    (lambda: RepVGG(4, 6, 3, groups=4), "groups=4 must divide in_channels=4 and out_channels=6"),
    (
        lambda: ACNet(4, 4, (3, 3, 3)),
        r"kernel_size must be an int or a pair of ints, not \(3, 3, 3\)",
    ),
    (
        lambda: OREPA(4, 4, 3, padding="same"),
        "padding must be an int or a pair of ints, not 'same'",
    ),
    (lambda: OREPA(4, 4, 3, padding=-1), "padding must be at least 0"),
    (lambda: OREPA(4, 4, 3, expand=0), "expand=0 must be at least 1"),
    (
        lambda: QARepVGG(4, 4, 3, variant="S5"),
        "unknown variant 'S5'; choose one of: S0, Eq6, S1, S2, S3, S4, all BN",
    ),
    (lambda: DBB(4, 4, 3, groups=2, internal=5), "groups=2 must divide internal=5"),
    (lambda: MobileOne(4, 4, 3, branches=0), "branches=0 must be at least 1"),
    (lambda: ECB(4, 4, 5), r"ECB is 3x3, as its edge filters are; kernel_size is \(5, 5\)"),
    (
        lambda: RepMixer(4, 4, 3, padding=1),
        "RepMixer is depthwise: in_channels=4, out_channels=4, groups=1",
    ),
    (lambda: RepMixer(4, 4, 3, 2, 1, groups=4), "RepMixer adds its input: stride must be 1"),
    (
        lambda: LargeKernel(4, 4, 7, small=[(3, 4)]),
        r"a branch spans \(9, 9\) taps, more than the kernel's \(7, 7\)",
    ),
]


@pytest.mark.parametrize(("build", "reason"), REFUSED)
def test_what_no_block_can_be_is_refused(build: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build()


def test_names_and_structure() -> None:
    assert {c.__name__ for c in BLOCKS.values()} == set(blocks.__all__) - {"BLOCKS"}
    assert all(name == c.__name__.lower() for name, c in BLOCKS.items())
    assert QARepVGG(4, 4, 3, padding=1).post and RepMixer(4, 4, 3, 1, 1, 1, 4).scale[0].item() == 1
    assert (
        Frame.of(4, 4, 3, 1, 1).holds_identity and not Frame.of(4, 4, 2, 1, 1, 2).holds_identity
    )  # no centre tap
    assert Frame.of(4, 4, 4).margins((1, 1)) == [(-1, -2), (-1, -2)]
    even = OREPA(4, 4, 4)
    assert torch.autograd.grad(even.weight()[:, :, 1, 1].sum(), even.point)[0].all()
    for size, kernels in (
        (31, [(5, 1), (9, 2), (3, 4), (3, 5), (3, 7)]),
        (7, [(5, 1), (3, 2), (3, 3)]),
        (3, [(1, 1)]),
    ):
        assert [
            (m.conv.kernel_size[0], m.conv.dilation[0]) for m in LargeKernel(4, 4, size).small
        ] == kernels
    acnet, depthwise = ACNet(4, 4, (3, 5)), DBB(4, 4, 3, groups=4)
    assert (acnet.column.conv.kernel_size, acnet.row.conv.kernel_size) == ((3, 1), (1, 5))
    assert depthwise.point is None and depthwise.deep.in_channels == 8
    assert (
        not DBB(4, 4, 3).before_deep.conv.weight.any() and not OREPA(4, 4, 3).deep_point.any()
    )  # identities at first
