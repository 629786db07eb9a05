"""What the tests of blocks share: layers in one line, and a check that counts what is left where it
runs.

    check(model, maps=1)      fuse: the same outputs, one convolution or linear, nothing else left

Files of tests load it by path: they are no package, and it holds no test.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import repfx
from repfx.testing import assert_same, randomise

X = torch.randn(2, 8, 11, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "neg"}


class Ran(TorchDispatchMode):
    """What one run of a model executes: shapes of the weights it maps with, how often it norms and
    computes, and MACs.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.maps: list[tuple[int, ...]] = []
        self.norms = self.arithmetic = self.macs = 0
        self.last = ["", ""]
        with torch.no_grad(), self:
            self.out = model(x)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            self.maps.append(tuple(args[1].shape))
            self.macs += (args[0] if args[6] else out).numel() * args[1][
                0
            ].numel()  # args[6]: transposed
        elif name in ("mm", "addmm"):
            self.maps.append(tuple(args[-1].shape))
            self.macs += out.numel() * args[-1].shape[0]
        self.norms += "batch_norm" in name
        # after a product of matrices it is the bias of a linear
        self.arithmetic += name.rstrip("_") in ARITHMETIC and self.last != ["mm", "_unsafe_view"]
        self.last = [self.last[1], name]
        return out


def ready(model: nn.Module) -> nn.Module:
    """In float64 and eval, with every number that trains away from its default, layer scales as
    large as the rest.
    """
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(
                    torch.randn(p.shape, dtype=p.dtype) / (p[0].numel() if p.dim() else 1) ** 0.5
                )
    return randomise(model)


def check(
    model: nn.Module, maps: int = 1, norms=0, arithmetic=0, x: Tensor = X, step: int = 1
) -> fx.GraphModule:
    """Equal at odd and even sizes, counted, no dearer, the model untouched; without norms, train
    mode changes nothing.
    """
    model = ready(model)
    before = Ran(model, x)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    result = repfx.transform(model, ["fuse"], example=x)
    for size in (x.shape[2:], [n + step for n in x.shape[2:]]):
        assert_same(model, result, torch.randn(*x.shape[:2], *size, dtype=x.dtype), 1e-12)
    after = Ran(result, x)
    found, wanted = [len(after.maps), after.norms, after.arithmetic], [maps, norms, arithmetic]
    found = [n if w is not None else None for n, w in zip(found, wanted, strict=True)]
    assert found == wanted, f"(maps, norms, arithmetic) are {found}, not {wanted}: {after.maps}"
    assert after.macs <= before.macs, f"{after.macs} multiply-accumulates, {before.macs} before"
    now = model.state_dict()
    assert state.keys() == now.keys() and all(torch.equal(v, now[k]) for k, v in state.items()), (
        "the model has changed"
    )
    assert modes == [m.training for m in model.modules()], "the model's modes have changed"
    if after.norms == 0 and not any(getattr(m, "drop", 0) for m in model.modules()):
        trained = Ran(copy.deepcopy(result).train(), x).out
        assert torch.equal(trained, after.out), "train mode computes something else"
    return result


class Net(nn.Module):
    """Holds parts as attributes and runs a function of them and x."""

    def __init__(self, run, **parts: nn.Module | nn.Parameter | None) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(i=8, o=8, k=3, s=1, p=None, g=1, d=1, bias=False) -> nn.Conv2d:
    """A convolution that keeps the size, unless `p` says otherwise."""
    k = (k, k) if isinstance(k, int) else k
    return nn.Conv2d(i, o, k, s, tuple(d * (n - 1) // 2 for n in k) if p is None else p, d, g, bias)


def conv_bn(
    *args, norm: type[nn.Module] = nn.BatchNorm2d, eps: float = 1e-5, affine: bool = True, **kwargs
) -> nn.Sequential:
    layer = conv(*args, **kwargs)
    return nn.Sequential(layer, norm(layer.out_channels, eps=eps, affine=affine))


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class DropPath(nn.Module):
    def __init__(self, drop: float = 0.2) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        if self.drop == 0.0 or not self.training:
            return x
        random_tensor = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.drop)
        return x * random_tensor.div_(1 - self.drop)
