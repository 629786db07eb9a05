"""The report: its numbers are the model's, its page is one inert file, its warnings name what was
done to the layer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.blocks import QARepVGG, RepVGG
from repfx.quant import FakeQuant
from repfx.reporting import measure
from repfx.reporting.numbers import Spread
from repfx.reporting.spreads import Tally
from repfx.testing import randomise

CHROMIUM = Path("/usr/bin/chromium")


def net(block: type[nn.Module] = RepVGG) -> nn.Module:
    layers = [
        m
        for i, o, s in ((3, 16, 1), (16, 16, 1), (16, 24, 2))
        for m in (block(i, o, 3, s, 1), nn.ReLU())
    ]
    return randomise(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)).eval()
    )


def batches(n: int = 2) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return [
        (torch.randn(8, 3, 12, 12, generator=draw), torch.randint(0, 5, (8,), generator=draw))
        for _ in range(n)
    ]


def test_the_numbers_are_those_of_the_model() -> None:
    model, data = net(), batches()
    found = measure(model, data)
    deployed = repfx.calibrate(repfx.transform(model, ["ptq"], example=data[0][0]), data)
    x = torch.cat([b[0] for b in data])
    written, merged, int8 = found.forms
    assert (written.convs, merged.convs, int8.convs) == (7, 4, 4)
    assert (
        written.params == sum(p.numel() for p in model.parameters()) > merged.params == int8.params
    )
    assert merged.size == 4 * merged.params and int8.size < 0.3 * merged.size
    assert merged.macs == 12 * 12 * (16 * 27 + 16 * 144) + 6 * 6 * 24 * 144 + 24 * 5
    assert int8.sqnr == pytest.approx(repfx.verify(model, deployed, x).sqnr, abs=1e-3)
    with torch.no_grad():
        right = model(x).argmax(1) == torch.cat([b[1] for b in data])
    assert written.top1 == pytest.approx(100 * right.float().mean().item())
    assert [r.becomes for r in found.regions] == [
        "conv 3x3, 3 → 16",
        "conv 3x3, 16 → 16",
        "conv 3x3, 16 → 24, stride 2",
    ]
    layer = found.layers[1]
    weight = repfx.transform(model, ["fuse"], example=x).get_parameter("2.main.conv.weight")
    assert (layer.weight.low, layer.weight.std) == pytest.approx(
        (float(weight.min()), float(weight.std(correction=0)))
    )
    assert {b.name for b in layer.branches} == {"2.main.conv", "2.point.conv"} and len(
        layer.norms
    ) == 3
    with torch.no_grad():
        inside = model[:2](x)
    assert layer.input is not None and layer.input.values.std == pytest.approx(
        float(inside.std(correction=0)), rel=1e-4
    )
    assert (
        layer.input.values.high == pytest.approx(float(inside.max()), rel=1e-4)
        and layer.input.clipped == 0
    )
    assert (
        layer.input.channels == 16 and 0.3 < layer.input.used <= 0.51
    )  # of a signed grid, after ReLU


def test_errors_alone_and_together() -> None:
    model, data = net(), batches(1)
    x = data[0][0]
    found = measure(model, data)
    deployed = repfx.calibrate(repfx.transform(model, ["ptq"], example=x), data)
    merged = repfx.transform(model, ["fuse"], example=x)
    quant = {n: m for n, m in deployed.named_modules() if isinstance(m, FakeQuant)}
    conv = merged.get_submodule("2.main.conv")
    with torch.no_grad():
        given = torch.relu(merged.get_submodule("0.main.conv")(x))
        exact = conv(given)
        weight = quant["2.main.conv.weight_quant"](conv.weight)
        alone = torch.conv2d(quant["2.main.conv.input_quant"](given), weight, conv.bias, 1, 1)
        seen: list[Tensor] = []
        quant["4.main.conv.input_quant"].register_forward_pre_hook(
            lambda m, args: seen.append(args[0])
        )
        deployed(x)
    want = 10 * torch.log10(exact.square().sum() / (exact - alone).square().sum()).item()
    assert found.layers[1].alone == pytest.approx(want, abs=1e-3)
    assert found.layers[0].alone == pytest.approx(found.layers[0].together)
    after = (
        10
        * torch.log10(exact.relu().square().sum() / (exact.relu() - seen[0]).square().sum()).item()
    )
    together = found.layers[1].together
    assert together is not None and abs(together - after) < 3 and together < found.layers[1].alone


def spoiled(what: str) -> nn.Module:
    model = net()
    with torch.no_grad():
        if what == "input":  # one channel of what layer 2 reads is far larger
            for norm in (m for m in model[0].modules() if isinstance(m, nn.BatchNorm2d)):
                norm.weight[3] *= 60
        elif what == "weight":
            norm = next(m for m in model[2].modules() if isinstance(m, nn.BatchNorm2d))
            norm.weight[5] *= 60
            norm.running_var[5] = 1e-4
    return model


@pytest.mark.parametrize(("what", "text"), [("input", "its input"), ("weight", "its weight")])
def test_a_spoiled_layer_is_named_with_a_cure(what: str, text: str) -> None:
    told = [
        w
        for w in measure(spoiled(what), batches()).warnings
        if w.layer == "2.main.conv" and text in w.what
    ]
    assert len(told) == 1 and "on 1 of 16 channels" in told[0].what and "qprep" in told[0].cure
    assert not any("channels" in w.what for w in measure(net(), batches()).warnings)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


class Hostile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("</script><img src=x onerror=alert(1)>", RepVGG(3, 8, 3, 1, 1))
        self.add_module("relu", nn.ReLU())
        self.add_module("<b>&amp;", nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        for m in self.children():
            x = m(x)
        return x


def test_the_page_is_one_inert_file(tmp_path: Path) -> None:
    page, numbers = tmp_path / "report.html", tmp_path / "numbers.json"
    found = repfx.report(
        randomise(Hostile().eval()),
        page,
        data=[torch.randn(2, 3, 8, 8)],
        titles=["<i>title</i>"],
        json=numbers,
    )
    parsed = Page(page.read_text())
    tags = {t for t, _ in parsed.tags}
    assert not tags & {"img", "iframe", "link", "i", "b", "object", "embed"}
    assert [a for _, a in parsed.tags if "src" in a or any(k.startswith("on") for k in a)] == []
    assert all(a["href"].startswith("#") for t, a in parsed.tags if t == "a" and a["href"])
    policy = next(a["content"] for t, a in parsed.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'")
    assert any("<img src=x onerror=alert(1)>" in text for text in parsed.text), "shown as text"
    charts = [a for _, a in parsed.tags if "chart" in (a.get("class") or "")]
    assert len(charts) >= 10 and all(
        a["role"] == "img" and len(a["aria-label"] or "") > 20 for a in charts
    )
    told = json.loads(numbers.read_text())
    assert (
        told["format"] == "repfx.report 1"
        and len(told["models"][0]["layers"]) == len(found[0].layers) == 2
    )
    assert page.stat().st_size < 15e6


def test_without_data_the_weights_are_there(tmp_path: Path) -> None:
    (found,) = repfx.report(net(), tmp_path / "report.html", example=torch.randn(1, 3, 12, 12))
    assert all(
        x.input is None and x.alone is None and x.weight.std > 0 and x.weight_sqnr > 20
        for x in found.layers
    )
    assert (
        "No data was given" in (tmp_path / "report.html").read_text()
        and found.forms[2].sqnr is None
    )


def test_two_models_side_by_side(tmp_path: Path) -> None:
    both = repfx.report(
        net(),
        tmp_path / "report.html",
        data=batches(),
        against=net(QARepVGG),
        titles=["before", "after"],
    )
    text = (tmp_path / "report.html").read_text()
    assert (
        [b.title for b in both] == ["before", "after"]
        and "before, merged" in text
        and "after, merged" in text
    )


def test_each_pass_has_its_form() -> None:
    found = measure(net(), batches(1), passes=["qarep", "ptq(bits=6)"])
    assert [f.name for f in found.forms] == ["as written", "after qarep", "merged", "INT6"]
    assert (
        found.forms[1].convs == found.forms[0].convs
        and found.forms[1].sqnr > 90 > found.forms[3].sqnr
    )


def test_each_region_has_its_program() -> None:
    found = measure(net(), batches(1))
    for region in found.regions:
        assert (
            re.search(r"main.conv.weight|main\.conv\.weight", region.program)
            and "return (" in region.program
        )
        compile(region.program, "program", "exec")


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(3, 8, 3, padding=1, padding_mode="reflect"), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.two(torch.relu(self.one(x)).transpose(1, 2))
        return {"logits": y.mean(1), "tokens": 100 * y}


def test_other_shapes() -> None:
    x = torch.randn(6, 3, 10)
    found = measure(
        Tokens().eval(), [(x, torch.zeros(6, dtype=torch.long))], passes=["ptq", "qprep"]
    )
    one, two = found.layers
    assert (one.macs, two.macs) == (10 * 8 * 9, 10 * 4 * 8) and found.forms[
        0
    ].macs == one.macs + two.macs
    assert (
        one.input is not None
        and two.input is not None
        and (one.input.channels, two.input.channels) == (3, 8)
    )
    assert (
        one.alone is not None
        and two.together is not None
        and found.forms[2].params == found.forms[1].params
    )
    assert all(f.top1 is None for f in found.forms), "which of the outputs would it be of"
    assert found.forms[2].sqnr is not None and found.forms[2].sqnr > 20


def test_the_weights_are_those_that_are_deployed() -> None:
    model, data = net(), batches(1)
    fine, coarse, kept = (
        measure(model, data, passes=[f"ptq({options})"]).layers
        for options in ("", "weight_bits=4", "weight_bits=4, wide='2.main.conv'")
    )
    assert coarse[1].weight_sqnr + 15 < fine[1].weight_sqnr == kept[1].weight_sqnr
    assert kept[0].weight_sqnr == coarse[0].weight_sqnr and coarse[0].weight_used <= 1


def test_bad_input(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 12, 12)
    with pytest.raises(repfx.InputError, match="needs the float model"):
        repfx.report(repfx.transform(net(), ["ptq"], example=x), tmp_path / "a.html", data=[x])
    with pytest.raises(repfx.InputError, match="no image in data"):
        repfx.report(net(), tmp_path / "a.html", data=[])
    with pytest.raises(repfx.InputError, match="cannot write"):
        repfx.report(net(), tmp_path / "no" / "a.html", data=[x])
    with pytest.raises(repfx.InputError, match="NaN"):
        repfx.report(net(), tmp_path / "a.html", data=[x * float("nan")])
    for data, text in (
        ([{"x": x}], "begins with one"),
        (5, "iterable"),
        ([(x, torch.zeros(1))], "2 inputs but 1 labels"),
    ):
        with pytest.raises(repfx.InputError, match=text):
            repfx.report(net(), tmp_path / "a.html", data=data)
    for passes in (["fuse"], ["repq"]):
        with pytest.raises(repfx.InputError, match="one quantizes, such as ptq"):
            repfx.report(net(), tmp_path / "a.html", data=[x], passes=passes)
    with pytest.raises(repfx.InputError, match="titles must name 2 models"):
        repfx.report(net(), tmp_path / "a.html", against=net(), titles=["one"])
    assert not list(tmp_path.iterdir())


def near(value: float, rel: float = 1e-4, tiny: float = 1e-5) -> Any:
    return pytest.approx(value, rel=rel, abs=tiny)


def check(told: Spread | None, values: Tensor) -> None:
    v = values.detach().double()
    assert told is not None
    assert (told.low, told.high) == (near(float(v.min())), near(float(v.max())))
    assert (told.mean, told.std) == (near(float(v.mean())), near(float(v.std(correction=0))))
    assert (told.quantiles[0], told.quantiles[-1]) == (told.low, told.high)
    ordered = v.flatten().sort().values
    assert told.quantiles == pytest.approx(sorted(told.quantiles))
    if len(ordered) <= 101:
        assert told.quantiles == pytest.approx(ordered.tolist(), rel=1e-5)


@pytest.mark.parametrize("block", [RepVGG, QARepVGG])
def test_branches_and_betas(block: type[nn.Module]) -> None:
    model = net(block)
    modules = dict(model.named_modules())
    found = measure(model, example=torch.randn(1, 3, 12, 12)).layers
    assert [len(layer.branches) for layer in found] == [2, 2, 2, 0]
    for layer in found:
        for branch in layer.branches:
            conv = modules[branch.name]
            assert isinstance(conv, nn.Conv2d)
            check(branch.weight, conv.weight)
        for norm in layer.norms:
            given = modules[norm.name]
            assert isinstance(given, nn.BatchNorm2d)
            beta = given.bias.detach()
            want = (float(beta.min()), float(beta.median()), float(beta.max()))
            assert (norm.beta.low, norm.beta.median, norm.beta.high) == near(want)
            assert len(set(want)) == 3


def test_what_each_branch_puts_out() -> None:
    model, data = net(), batches()
    found = measure(model, data).layers
    modules = dict(model.named_modules())
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.setdefault(name, []).append(output)

    for name, module in modules.items():
        module.register_forward_hook(keep(name))
    with torch.no_grad():
        for x, _ in data:
            model(x)
    names = [["0.main.norm", "0.point.norm"], ["2.main.norm", "2.point.norm", "2.skip"]]
    names += [["4.main.norm", "4.point.norm"], []]
    assert [[o.name for o in layer.operands or ()] for layer in found] == names
    for layer in found:
        for operand in layer.operands or ():
            check(operand.values, torch.cat(seen[operand.name]))
    # The bare identity of QARepVGG adds the block's input.
    model = net(QARepVGG)
    added = {o.name: o.values for o in measure(model, data).layers[1].operands or ()}
    with torch.no_grad():
        inside = torch.cat([model[:2](x) for x, _ in data])
    assert set(added) == {"1", "2.main.norm", "2.point.conv"}
    check(added["1"], inside)


class InPlace(nn.Module):
    """Adds into the branch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y += self.two(x)
        return torch.relu_(y)


def test_an_addition_in_place() -> None:
    model, (x, _) = randomise(InPlace().eval()), batches(1)[0]
    (layer,) = measure(model, [x]).layers
    added = {o.name: o.values for o in layer.operands or ()}
    check(added["one"], model.one(x))
    check(added["two"], model.two(x))


def test_outputs_before_the_activation_function_and_their_errors() -> None:
    model, data = net(), batches()
    x = torch.cat([b[0] for b in data])
    found = measure(model, data).layers
    merged = repfx.transform(model, ["fuse"], example=x)
    deployed = repfx.calibrate(repfx.transform(model, ["ptq"], example=x), data)
    with torch.no_grad():
        outputs = []
        for i, stop in enumerate((1, 3, 5, 9)):
            outputs.append(model[:stop](x))
            check(found[i].output, outputs[-1])
        last = merged.get_submodule("8")
        quant = {n: m for n, m in deployed.named_modules() if isinstance(m, FakeQuant)}
        weight = quant["8.weight_quant"](last.weight)
        rounded = nn.functional.linear(quant["8.input_quant"](model[:8](x)), weight, last.bias)
        alone = float((rounded - outputs[-1]).square().mean())
        together = float((deployed(x) - outputs[-1]).square().mean())
    assert (found[3].mse_alone, found[3].mse_together) == (
        near(alone, 1e-3, 0),
        near(together, 1e-3, 0),
    )
    for layer, y in zip(found, outputs, strict=True):
        power = float(y.double().square().mean())
        for mse, sqnr in ((layer.mse_alone, layer.alone), (layer.mse_together, layer.together)):
            assert sqnr is not None and mse == near(power / 10 ** (sqnr / 10), 1e-4, 0)


def test_ranges_of_samples_and_channels() -> None:
    model, data = net(), batches()
    found = measure(model, data).layers
    with torch.no_grad():
        inside = [torch.cat([model[:stop](b[0]) for b in data]) for stop in (0, 2, 4, 8)]
    for layer, x in zip(found, inside, strict=True):
        assert layer.input is not None
        axes = tuple(range(2, x.dim()))
        check(layer.input.samples, x.abs().amax((1, *axes)))
        check(layer.input.tops, x.abs().amax((0, *axes)))
        assert len(layer.input.samples.quantiles) == 16
        assert len(layer.input.tops.quantiles) == x.shape[1]


@pytest.mark.parametrize("bits", [8, 4])
def test_the_clip_experiment(bits: int) -> None:
    model, data = spoiled("input"), batches()
    found = measure(model, data, passes=[f"ptq(bits={bits})"]).layers
    with torch.no_grad():
        inside = [torch.cat([model[:stop](b[0]) for b in data]) for stop in (0, 2, 4, 8)]
    high = 2 ** (bits - 1) - 1
    for layer, x in zip(found, inside, strict=True):
        assert layer.input is not None and layer.input.clip is not None
        clip, want = layer.input.clip, []
        for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
            step = share * x.abs().max() / high
            error = x - (x / step).round().clamp(-high - 1, high) * step
            want.append(float(10 * torch.log10(x.square().sum() / error.square().sum())))
        assert clip.shares == (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
        assert clip.sqnr == pytest.approx(want, abs=0.02)
        assert clip.best == clip.shares[clip.sqnr.index(max(clip.sqnr))]
        assert clip.gain == pytest.approx(max(want) - want[0], abs=0.03)
    gains = [layer.input.clip.gain for layer in found if layer.input and layer.input.clip]
    assert len(gains) == 4 and (min(gains) == 0) == (bits == 8) and max(gains) > 0.1


def test_zeros_are_not_clipped() -> None:
    x = batches(1)[0][0]
    dead = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    nn.init.constant_(dead[0].bias, -1000.0)
    one, two = measure(dead, [x]).layers
    assert one.input is not None and one.input.clip is not None
    assert two.input is not None and two.input.clip is None


@pytest.mark.parametrize("what", ["nothing", "input", "weight", "values"])
def test_verdicts_follow_from_the_warnings(what: str) -> None:
    model, data = spoiled(what), batches()
    if what == "values":
        data[0][0][3, 1, 5, 5] = 100.0
    found = measure(model, data)
    by_layer = {x.name: x for x in found.layers}
    one, two = by_layer["0.main.conv"], by_layer["2.main.conv"]
    assert one.c1 and one.c2 and two.c1 and two.c2
    # What spoils the input of a layer is in the weight of the layer before it.
    assert (one.c1.holds, one.c2.holds) == (what != "input", what != "values")
    assert (two.c1.holds, two.c2.holds) == (what != "weight", what not in ("input", "values"))
    for layer in found.layers:
        for condition in (layer.c1, layer.c2):
            assert condition is not None and condition.holds == (condition.because == "")
            told = [
                w for w in found.warnings if w.layer == layer.name and w.what in condition.because
            ]
            assert condition.holds != any(told) and all(w.cure in condition.cure for w in told)
    blind = measure(model, example=data[0][0]).layers
    assert [x.c1 for x in blind] == [x.c1 for x in found.layers]
    assert all(x.c2 is None for x in blind)


def test_charts_tables_and_ratios(tmp_path: Path) -> None:
    page, numbers = tmp_path / "report.html", tmp_path / "numbers.json"
    given = {"titles": ["A", "B"], "json": numbers}
    a, b = repfx.report(spoiled("input"), page, data=batches(), against=net(QARepVGG), **given)
    told = json.loads(numbers.read_text())
    for row, x, y in zip(told["ratios"], a.layers, b.layers, strict=True):
        assert row["layer"] == x.name and row["against"] == y.name
        assert row["alone"] == near(x.mse_alone / y.mse_alone)
        assert row["together"] == near(x.mse_together / y.mse_together)
    layer = told["models"][0]["layers"][1]
    assert layer["input"]["clip"]["sqnr"] == near(a.layers[1].input.clip.sqnr)
    assert layer["operands"][0]["values"]["mean"] == near(a.layers[1].operands[0].values.mean)
    assert layer["norms"][0]["beta"]["high"] == near(a.layers[1].norms[0].beta.high)
    assert layer["c2"]["holds"] is False and "1 of 16 channels" in layer["c2"]["because"]
    drawn = figures(page)
    new = {"kernels", "betas", "operands", "outputs", "mse", "ratios", "samples", "tops", "clips"}
    assert new | {"gain"} <= set(drawn)
    assert drawn["ratios"]["data"][1]["y"] == near([r["alone"] for r in told["ratios"]])
    assert drawn["mse"]["data"][0]["y"] == near([x.mse_together for x in a.layers])
    assert drawn["mse"]["layout"]["yaxis"]["type"] == "log"
    text = "".join(Page(page.read_text()).text)
    assert "does not hold, because it spends the range of its input on 1 of 16 channels" in text

    alone = tmp_path / "alone.html"
    (blind,) = repfx.report(net(), alone, example=torch.randn(1, 3, 12, 12), json=numbers)
    assert json.loads(numbers.read_text())["ratios"] == []
    assert new & set(figures(alone)) == {"kernels", "betas"} and "gain" not in figures(alone)
    for layer in blind.layers:
        measured = (layer.operands, layer.output, layer.mse_alone, layer.mse_together, layer.c2)
        assert measured == (None,) * 5


def figures(page: Path) -> dict[str, Any]:
    found = re.search(r'id="figures">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    drawn: dict[str, Any] = json.loads(found[1])
    return drawn


@pytest.mark.parametrize("size", [16, 64])
def test_a_sample_is_not_one_column(size: int) -> None:
    """Whatever the width of a picture is. Here each column has a value of its own."""
    x = torch.arange(size).expand(4, 8, size, size).float()
    tally = Tally()
    tally.add(x)
    tally.add(x + 1)
    check(tally.spread(), torch.cat([x, x + 1]))
    assert len(set(tally.spread().quantiles)) > size / 2
    assert tally.spread().median == pytest.approx(size / 2, abs=1)


@pytest.mark.skipif(
    "REPFX_BROWSER" not in os.environ,
    reason="a real browser: REPFX_BROWSER=1, chromium, playwright",
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser(scheme: str, width: int, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    page = tmp_path / "report.html"
    repfx.report(net(), page, data=batches(), against=net(QARepVGG), titles=["RepVGG", "QARepVGG"])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        view = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        ).new_page()
        said: list[str] = []
        asked: list[str] = []
        view.on("console", lambda m: said.append(m.text))
        view.on("pageerror", lambda e: said.append(str(e)))
        view.on("request", lambda r: asked.append(r.url))
        view.goto(f"file://{page}")
        for key in view.evaluate("[...document.querySelectorAll('.chart')].map(c => c.id)"):
            view.locator(f"#{key}").scroll_into_view_if_needed()
            view.locator(f"#{key}.drawn").wait_for()
        assert (
            not said and [u for u in asked if not u.startswith(("file:", "blob:", "data:"))] == []
        )
        assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
        table = view.locator("#blocks-0")
        cells = lambda: table.locator("tbody td:nth-child(5)").all_inner_texts()  # noqa: E731
        table.locator("th button", has_text="after").first.click()
        up = [float(c.replace(",", "")) for c in cells()]
        table.locator("th button", has_text="after").first.click()
        down = [float(c.replace(",", "")) for c in cells()]
        assert up == sorted(up) and down == up[::-1] and len(set(up)) > 1
        view.fill("input.filter >> nth=0", "stride 2")
        assert table.locator("tbody tr:visible").count() == 1
        view.fill("input.filter >> nth=0", "")
        view.locator("#blocks-0 .open").first.click()
        assert view.locator("details.region[open]").count() == 1
        view.evaluate("document.querySelectorAll('details.region').forEach(d => d.open = false)")
        graph = view.locator("#graph-before-0")
        graph.scroll_into_view_if_needed()
        place = graph.evaluate(
            """g => { const t = g._fullData[1], i = t.customdata.findIndex(r => r >= 0),
            {xaxis: x, yaxis: y} = g._fullLayout, b = g.getBoundingClientRect();
            return [b.x + x._offset + x.d2p(t.x[i]), b.y + y._offset + y.d2p(t.y[i])]; }"""
        )
        view.mouse.move(*place)
        view.wait_for_timeout(200)
        view.mouse.click(*place)
        view.wait_for_timeout(300)
        assert view.locator("details.region[open]").count() == 1
        before = view.evaluate("getComputedStyle(document.body).backgroundColor")
        view.click("#theme")
        assert view.evaluate("getComputedStyle(document.body).backgroundColor") != before
        assert not said
        browser.close()
