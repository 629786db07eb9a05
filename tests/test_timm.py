"""The public zoo, with random statistics: counts of timm's own reparameterize_model or better, and
nothing changed.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import fx, nn

import repfx
from repfx.graph.view import GraphView
from repfx.rewrite.difference import difference
from repfx.rewrite.merge_regions import plan_merges
from repfx.testing import assert_same, randomise

pytestmark = pytest.mark.zoo

REPARAMETERIZABLE = [
    "repvgg_a0",
    "repvgg_b1g4",
    "mobileone_s0",
    "mobileone_s4",
    "fastvit_t8",
    "fastvit_sa12",
    "repvit_m1",
    "repghostnet_100",
]
PLAIN = [
    *(
        "resnet18",
        "resnet26d",
        "resnet50",
        "resnext50_32x4d",
        "seresnet50",
        "res2net50_26w_4s",
        "skresnet18",
        "resnetv2_50",
    ),
    *(
        "densenet121",
        "dpn68",
        "dla34",
        "darknet53",
        "cspresnet50",
        "vgg11_bn",
        "vovnet39a",
        "ese_vovnet19b_dw",
        "selecsls42",
    ),
    *(
        "efficientnet_b0",
        "tf_efficientnet_b0",
        "efficientnetv2_rw_t",
        "mnasnet_100",
        "tinynet_e",
        "lcnet_050",
        "rexnet_100",
    ),
    *(
        "mobilenetv2_100",
        "mobilenetv3_small_100",
        "mobilenetv4_conv_small",
        "regnetx_002",
        "regnety_002",
        "gernet_s",
    ),
    *(
        "convnext_atto",
        "inception_v3",
        "xception41",
        "hrnet_w18_small",
        "ghostnet_100",
        "mixnet_s",
        "edgenext_xx_small",
    ),
]
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name).eval())


def count(model: nn.Module, *kinds: type) -> int:
    return sum(isinstance(m, kinds) for m in model.modules())


def adds(model: nn.Module) -> int:
    return sum(
        n.op == "call_function" and "add" in getattr(n.target, "__name__", "")
        for n in model.graph.nodes
    )


def picture(dtype: torch.dtype = torch.float32, size: int = 64) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("name", REPARAMETERIZABLE)
def test_counts_and_errors(name: str) -> None:
    model = make(name)
    keys = {k: v.clone() for k, v in model.state_dict().items()}
    result = repfx.transform(model, ["fuse"])
    theirs = reparameterize_model(model)
    assert count(result, nn.Conv2d) <= count(theirs, nn.Conv2d)
    assert count(result, *NORMS) <= count(theirs, *NORMS)
    if not adds(fx.symbolic_trace(theirs)):
        assert not adds(result)
    report = result.meta["repfx"]
    assert all(m.error <= 1e-12 and m.macs_after <= m.macs_before for m in report.merged)
    assert_same(
        model, result, picture(), 1e-5
    )  # whole nets amplify; the regions themselves are checked below
    assert all(torch.equal(v, keys[k]) for k, v in model.state_dict().items())
    assert not repfx.transform(result, ["fuse"]).meta["repfx"].merged
    double = model.double()
    assert_same(double, repfx.transform(double, ["fuse"]), picture(torch.float64), 1e-12)


@pytest.mark.parametrize("name", REPARAMETERIZABLE)
def test_single_precision_region_by_region(name: str) -> None:
    """Each merged layer in float32 is as near to the float64 one as its region in float32 is, on
    what the region sees.
    """
    before = repfx.transform(make(name), []).eval()
    after = repfx.transform(before, ["fuse"]).eval()
    exact = repfx.transform(copy.deepcopy(before).double(), ["fuse"]).eval()
    paths = {m.ops[-1]: m.into for m in after.meta["repfx"].merged}
    layers = {sink: after.get_submodule(path) for sink, path in paths.items()}
    view = GraphView(before)
    regions = {view.name(m.region.sink): m.region for m in plan_merges(view).merges}
    values: dict[fx.Node, torch.Tensor] = {}

    class Values(fx.Interpreter):
        def run_node(self, n: fx.Node):
            result = super().run_node(n)
            if isinstance(result, torch.Tensor):
                values[n] = result.clone()  # what follows may change it in place
            return result

    with torch.no_grad():
        Values(before).run(picture())
        seen = 0
        for sink, region in regions.items():
            if sink in layers:
                seen += 1
                x = values[region.source]
                truth = exact.get_submodule(paths[sink])(x.double())
                limit = max(2e-6, 1.5 * difference(truth, values[region.sink]).relative)
                assert difference(truth, layers[sink](x)).relative <= limit, sink
    assert seen >= 0.9 * len(layers)  # a few are found on a second look, when others have merged


@pytest.mark.parametrize("name", PLAIN)
def test_plain_nets_compute_the_same_and_cost_no_more(name: str) -> None:
    model = make(name).double()
    result = repfx.transform(model, ["fuse"])
    report = result.meta["repfx"]
    assert report.merged and all(m.macs_after <= m.macs_before for m in report.merged)
    assert count(result, nn.Conv2d) <= count(model, nn.Conv2d)
    size = 96 if name in ("inception_v3", "vgg11_bn") else 64
    assert max(m.error for m in report.merged) <= 1e-12
    assert_same(
        model, result, picture(torch.float64, size), 1e-7
    )  # some nets amplify a last bit a million times


def test_names_of_a_zoo_model_survive() -> None:
    model = make("resnet18")
    result = repfx.transform(model, ["fuse"])
    gone = {k for k in model.state_dict() if k not in result.state_dict()}
    assert all(".bn" in k or k.startswith("bn") or "downsample.1" in k for k in gone)
    new = {k for k in result.state_dict() if k not in model.state_dict()}
    assert all(k.endswith(".bias") for k in new)
    assert_same(model, copy.deepcopy(result), picture(), 1e-5)
