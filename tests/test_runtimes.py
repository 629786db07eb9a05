"""What the runtimes on a CPU compute: the file's numbers, in the session that is deployed, on every
instruction set.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.lowering.onnx.biases import IntegerBias, RoundedBias
from repfx.lowering.onnx.check import reference
from repfx.lowering.onnx.parity import Parity, as_deployed, compare
from repfx.lowering.runtimes.isa import Isa, chosen, isas, running
from repfx.lowering.runtimes.layers import kernels
from repfx.testing.random_net import random_net

RUNTIMES = ("openvino", "onnxruntime")


def made(
    net: nn.Module, x: Tensor, target: str, path: Path, spec: str = "ptq"
) -> tuple[nn.Module, Path]:
    int8 = repfx.calibrate(repfx.transform(net.eval(), [spec], example=x, target=target), [x])
    artifact = repfx.lower(int8, path / "int8.onnx", example=x, target=target)
    assert artifact.there is not None and artifact.there.agrees
    return int8, artifact.onnx


def deployed(int8: nn.Module, file: Path, x: Tensor, target: str, isa: Isa | None = None) -> Parity:
    runtime = target.partition("-")[0]
    run = as_deployed if isa is None else isa.run
    return compare(reference(int8, target), onnx.load(file), (x,), runtime, run=run)


def has_vnni(runtime: str) -> bool:
    """Whether the runtime, in this process, multiplies bytes without overflow."""
    able, told = torch.cpu.get_capabilities(), os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    stopped = runtime == "openvino" and told in ("SSE41", "AVX", "AVX2", "AVX512_CORE")
    return (able["avx512_vnni"] or able["avx_vnni"]) and not stopped


class Adversary(nn.Module):
    """Weights at the end of their range, neighbours of one sign, on inputs at the end of theirs."""

    def __init__(self, signed: bool) -> None:
        super().__init__()
        self.signed = signed
        self.one, self.two, self.three = (
            nn.Conv2d(8, 16, 3, padding=1),
            nn.Conv2d(16, 16, 1),
            nn.Linear(16, 8),
        )
        with torch.no_grad():
            for m in (self.one, self.two, self.three):
                m.weight.copy_(m.weight.sign() * (0.9 + 0.1 * torch.rand_like(m.weight)))
                m.weight[0], m.weight[1] = m.weight[0].abs(), -m.weight[1].abs()

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x if self.signed else x.abs())
        y = self.two(F.hardtanh(y, -40.0, 40.0) if self.signed else F.relu6(y))
        return self.three((y if self.signed else F.relu(y)).mean((2, 3)))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_sums_that_16_bits_do_not_hold(runtime: str, signed: bool, tmp_path: Path) -> None:
    """Right on each instruction set; full-range weights are wrong on those without VNNI, which
    shows that it is a test.
    """
    torch.manual_seed(0)
    net, x = Adversary(signed), torch.randn(2, 8, 9, 9).clamp(-1, 1).sign()
    for target in (runtime, f"{runtime}-vnni"):
        if target != runtime and not has_vnni(runtime):
            with pytest.raises(repfx.CheckError, match="does not compute what the model computes"):
                made(net, x, target, tmp_path)
            continue
        int8, file = made(net, x, target, tmp_path)
        for isa in isas(runtime):
            found = deployed(int8, file, x, target, isa)
            vnni = (
                target == runtime
                or "VNNI" in isa.name
                or isa.name in ("AVX512_CORE_BF16", "AVX512_CORE_FP16")
            )
            vnni |= isa.name in (
                "AVX512_CORE_AMX",
                "SSE4.2 (emulated)",
            )  # which adds in 32 bits too
            assert found.agrees == vnni, f"{target} on {isa.name}: {found}"
            assert found.sqnr > 100 or not vnni


def test_what_targets_promise_of_weights() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=8),
    )
    reach = {}
    for target in ("tensorrt", "openvino", "openvino-vnni", "onnxruntime", "onnxruntime-vnni"):
        for spec in ("ptq", "repq(bn=frozen)"):
            model = repfx.transform(
                net.eval(), [spec], target=target, example=torch.randn(2, 3, 9, 9)
            )
            layers = [m for m in model.modules() if hasattr(m, "of_weight") and m.of_weight]
            reach[target, spec] = [m.grid.high for m in layers]
    # Each channel of a depthwise layer adds no neighbours. That with two outputs a channel does,
    # and in OpenVINO it crashes on SSE4.1.
    reduced = {"openvino": [64, 127], "onnxruntime": [64, 127, 64]}
    for (target, spec), found in reach.items():
        assert found == reduced.get(target, [127] * 3), (target, spec)


def test_a_model_for_vnni_is_not_written_for_all(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 9, 9)
    int8 = repfx.transform(nn.Conv2d(3, 8, 3).eval(), ["ptq"], example=x, target="openvino-vnni")
    repfx.calibrate(int8, [x])
    with pytest.raises(
        repfx.InputError, match=r"weight_quant.* beyond 64.*without VNNI.*target='openvino-vnni'"
    ):
        repfx.lower(int8, tmp_path / "int8.onnx", example=x, target="openvino")


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("seed", range(0, 24, 2))
def test_random_nets(seed: int, runtime: str, tmp_path: Path) -> None:
    net, x = random_net(seed + (runtime == "openvino"))
    int8, file = made(
        net, x, runtime, tmp_path
    )  # raises where a code is wrong in the deployed session
    found = deployed(int8, file, x, runtime)
    assert found.before is not None and found.after is not None
    assert found.after.sqnr > found.before.sqnr - 1, found


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_instruction_set(runtime: str, tmp_path: Path) -> None:
    net, x = random_net(11)
    int8, file = made(net, x, runtime, tmp_path)
    for isa in isas(runtime):
        if isa.name != "SSE41":  # where OpenVINO has no nearest resize, in float neither
            assert deployed(int8, file, x, runtime, isa).agrees, isa.name


def test_names_of_instruction_sets() -> None:
    assert "AVX2" in running() or "AVX512" in running()
    names = [isa.name for isa in isas("openvino")]
    assert names[0] == "SSE41" and chosen("openvino", "all") == isas("openvino")
    assert [isa.name for isa in chosen("openvino", "AVX2,SSE41")] == ["AVX2", "SSE41"]
    with pytest.raises(repfx.InputError, match=r"unknown instruction set 'AVX9'.*SSE41"):
        chosen("openvino", "AVX9")


INTERRUPTED = """
import gc, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from repfx.lowering.runtimes.layers import kernels
from repfx.lowering.runtimes.run import session, write_ir

a, b = session("openvino", sys.argv[1]), session("openvino", sys.argv[1])
kernels("openvino", sys.argv[1])
write_ir(sys.argv[1], sys.argv[1] + ".xml")
del a  # in the order in which they were made
gc.collect()
del b
gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_after_openvino_has_run_is_no_segmentation_fault(tmp_path: Path) -> None:
    net = repfx.transform(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), [])
    repfx.lower(net, tmp_path / "net.onnx", example=torch.randn(1, 3, 8, 8))
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "net.onnx")]
    env = {**os.environ, "PYTHONPATH": str(Path(repfx.__file__).parent.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "interrupted"), done.stderr


def test_a_process_that_fails_says_why() -> None:
    proto = onnx.ModelProto()
    with pytest.raises(repfx.CheckError, match="onnxruntime on here does not run the file: "):
        Isa("here").run("onnxruntime", [proto], [torch.zeros(1)])


@pytest.mark.parametrize("tiny", [0.0, 1e-9, 1e-7])
def test_biases_that_products_cannot_reach(tiny: float, tmp_path: Path) -> None:
    """Channels whose weights are tiny or zero: 32 bits hold no bias of 0.5 in steps of 1e-10, and
    zeros have no step.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    x = 20 * torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        net[2].weight[:4] *= tiny
        net[2].bias[:4] = torch.tensor([0.5, -0.3, 0.123, 0.01])
    int8, file = made(net, x, "onnxruntime", tmp_path)
    found = deployed(int8, file, x, "onnxruntime")
    fused = repfx.verify(net, int8, x)
    assert found.after is not None and found.after.sqnr > fused.sqnr - 0.5 and found.sqnr > 100
    held = [m for m in reference(int8, "onnxruntime").modules() if isinstance(m, IntegerBias)]
    assert float((held[1]() - net[2].bias).detach().abs().max()) < 1e-3
    assert (
        kernels("onnxruntime", file).integers == 2
    )  # all but the last, whose output is the model's


class Behind(nn.Module):
    """Convolutions behind what runtimes do on integers: a pad, a max pool, a permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        pads, pools, turns = self.layers[0], self.layers[1], self.layers[2]
        x = pads(F.pad(F.relu(self.first(x)), (0, 1, 0, 1)))
        x = pools(F.max_pool2d(F.relu(x), 2, 1))
        return self.head(F.relu(turns(F.relu(x).permute(0, 1, 3, 2))))


def test_biases_behind_pads_and_pools_are_integers_too(tmp_path: Path) -> None:
    """The runtime rounds them; a comparison with others finds values that are off by one."""
    torch.manual_seed(0)
    net, x = Behind(), torch.randn(16, 3, 40, 40)
    with torch.no_grad():  # products are coarse beside a step of the output
        for layer in net.layers:
            layer.weight.mul_(20)  # type: ignore[operator]
    int8, file = made(net, x, "onnxruntime", tmp_path)
    held = [m for m in reference(int8, "onnxruntime").modules() if isinstance(m, IntegerBias)]
    assert len(held) == 5
    found = deployed(int8, file, x, "onnxruntime")
    assert found.agrees and found.sqnr > 60


class Tokens(nn.Module):
    """Linear layers between convolutions: of rows, and of tokens of a fixed number of images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        for layer, shape in zip(self.layers, [(-1, 8), (16, -1, 8)], strict=True):
            tokens = layer(y.permute(0, 2, 3, 1).reshape(shape))
            y = tokens.view(16, 38, 38, 8).permute(0, 3, 1, 2)
        return self.head(y)


def test_biases_of_linear_layers_are_what_the_runtime_rounds_them_to(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Tokens(), torch.randn(16, 3, 40, 40)
    with torch.no_grad():
        for layer in net.layers:
            layer.weight.mul_(20)  # type: ignore[operator]
    int8, file = made(net, x, "onnxruntime", tmp_path)
    held = [m for m in reference(int8, "onnxruntime").modules() if isinstance(m, RoundedBias)]
    assert len(held) == 2
    for bias, layer in zip(held, net.layers, strict=True):
        assert not torch.equal(bias(), layer.bias)  # type: ignore[arg-type]
        torch.testing.assert_close(bias(), layer.bias, rtol=0, atol=0.02)
    found = deployed(int8, file, x, "onnxruntime")
    assert found.agrees and found.sqnr > 60
    assert kernels("onnxruntime", file).integers == 3  # all but the head


class Islands(nn.Module):
    """A layer in float between integers: a transposed convolution, and what `wide` leaves."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.one, self.up, self.two = (
            nn.Conv2d(3, 8, 3),
            nn.ConvTranspose2d(8, 8, 2, 2, bias=bias),
            nn.Conv2d(8, 8, 3),
        )
        self.wide, self.three, self.last = (
            nn.Conv2d(8, 8, 3, bias=bias),
            nn.Conv2d(8, 8, 3),
            nn.Conv2d(8, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.two(F.relu(self.up(F.relu(self.one(x))))))
        return self.last(F.relu(self.three(F.relu(self.wide(y)))))


@pytest.mark.parametrize("bias", [True, False])
def test_layers_in_float_stay_in_float(bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Islands(bias), torch.randn(4, 3, 12, 12)
    with torch.no_grad():  # one scale for all channels would lose the small ones
        net.up.weight *= torch.logspace(-2, 0, 8)[None, :, None, None]
        net.wide.weight *= torch.logspace(-2, 0, 8)[:, None, None, None]
    int8, file = made(net, x, "onnxruntime", tmp_path, "ptq(wide=wide, wide_bits=32)")
    found = deployed(int8, file, x, "onnxruntime")
    assert found.agrees and found.sqnr > 60 and kernels("onnxruntime", file).integers == 3


def test_float16_files_keep_their_biases(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    x = torch.randn(4, 3, 12, 12)
    int8 = repfx.calibrate(repfx.transform(net, ["ptq"], example=x, target="onnxruntime"), [x])
    parity = repfx.lower(
        int8, tmp_path / "half.onnx", example=x, target="onnxruntime", float16=True
    ).parity
    assert parity.agrees and parity.sqnr > 45


class Padded(nn.Module):
    """A padded average, and with `both` a layer, of a signed value, perhaps `joined`."""

    def __init__(self, both: bool, joined: bool) -> None:
        super().__init__()
        self.a, self.b, self.both, self.joined = (
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(3, 4, 1),
            both,
            joined,
        )
        self.one, self.two = (
            nn.Conv2d(8 if joined else 4, 8, 3, padding=1),
            nn.Conv2d(8 if joined else 4, 8, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = (
            torch.cat([torch.tanh(self.a(x)), self.b(x)], 1)
            if self.joined
            else torch.tanh(self.a(x))
        )
        z = F.relu(self.two(F.avg_pool2d(y, 3, 1, 1)))
        return z + F.relu(self.one(F.max_pool2d(y, 3, 1, 1))) if self.both else z


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_padded_averages_of_signed_values(both: bool, joined: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Padded(both, joined), torch.randn(2, 3, 9, 9)
    int8, file = made(net, x, "openvino", tmp_path)
    assert deployed(int8, file, x, "openvino").sqnr > 40


class Pooled(nn.Module):
    """A signed value goes through a pool to convolutions whose outputs are concatenated: CSP
    stages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.leaky_relu(self.stem(x), 0.1), 2)
        return torch.cat([self.a(y).chunk(2, 1)[0], F.leaky_relu(self.b(y), 0.1)], 1)


def test_a_pool_before_what_is_concatenated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Pooled(), torch.randn(4, 3, 18, 18)
    int8, file = made(net, x, "openvino", tmp_path)
    assert deployed(int8, file, x, "openvino").sqnr > 100


def reordered(y: Tensor, how: str) -> Tensor:
    if how == "shuffle":
        return y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
    if how == "reshape":
        return y.flatten(2).unflatten(2, (27, 3))
    return (
        F.interpolate(y, scale_factor=2.0)
        if how == "resize"
        else torch.cat([y, y], 2)
        if how == "rows"
        else y[:, 2:]
    )


@pytest.mark.parametrize("how", ["shuffle", "reshape", "resize", "rows", "part"])
def test_concatenations_that_are_moved(how: str, tmp_path: Path) -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.last = nn.Conv2d(6 if how == "part" else 8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(reordered(torch.cat([F.silu(self.a(x)), self.b(x)], 1), how))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    int8, file = made(Moved(), x, "openvino", tmp_path)
    assert deployed(int8, file, x, "openvino").sqnr > 100


def test_grouped_3d_convolutions_of_signed_values(tmp_path: Path) -> None:
    """OpenVINO halves their weights on CPUs without VNNI: they stay in float, and the report says
    so.
    """
    x = torch.randn(2, 4, 6, 6, 6)
    net = nn.Sequential(
        nn.Conv3d(4, 8, 1), nn.Conv3d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv3d(8, 8, 3, groups=2)
    ).eval()
    for spec in ("ptq", "repq(bn=frozen)"):
        model: Any = repfx.transform(net, [spec], example=x, target="openvino")
        declined = [d for d in model.meta["repfx"].declined if "halves the weights" in d.reason]
        assert [d.where for d in declined] == ["1"] and "openvino-vnni" in declined[0].cure
        assert sum(hasattr(m, "of_weight") and m.of_weight for m in model.modules()) == 2
        full: Any = repfx.transform(net, [spec], example=x, target="openvino-vnni")
        assert not [d for d in full.meta["repfx"].declined if "halves the weights" in d.reason]


class Grouped(nn.Module):
    """A grouped convolution with this many channels in and out of a group."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, groups * inputs, 3, padding=1)
        self.grouped = nn.Conv2d(groups * inputs, groups * outputs, 3, padding=1, groups=groups)
        self.last = nn.Conv2d(groups * outputs, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.grouped(F.leaky_relu(self.stem(x)))))


UNFIT = [(2, 6, 6), (4, 2, 4), (8, 1, 2), (4, 4, 6)]
FIT = [(2, 12, 12), (3, 4, 4), (6, 1, 1), (1, 6, 6)]


@pytest.mark.parametrize("shape", [*UNFIT, *FIT])
def test_grouped_convolutions_on_old_processors(
    shape: tuple[int, int, int], tmp_path: Path
) -> None:
    """On SSE4.1 the integer kernels write past the groups, unless 4 divides their channels."""
    torch.manual_seed(0)
    net, x = Grouped(*shape).eval(), torch.randn(2, 3, 9, 9)
    int8, file = made(net, x, "openvino", tmp_path)
    declined = [d.where for d in int8.meta["repfx"].declined if "4 does not divide" in d.reason]
    assert declined == (["grouped"] if shape in UNFIT else [])
    oldest = next(isa for isa in isas("openvino") if isa.name == "SSE41")
    assert deployed(int8, file, x, "openvino", oldest).agrees
    full: Any = repfx.transform(net, ["ptq"], example=x, target="openvino-vnni")
    assert not full.meta["repfx"].declined


class Beside(nn.Module):
    """A layer in float and a concatenation read the output of a convolution."""

    def __init__(self, bias: str) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 12, 3, bias=bias != "none"), nn.Conv2d(12, 12, 1)
        self.deep, self.last = nn.Conv2d(12, 12, 1), nn.Conv2d(24, 8, 1)
        if self.stem.bias is not None and bias == "zeros":
            nn.init.zeros_(self.stem.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.last(torch.cat([y, self.deep(torch.relu(self.wide(y)))], 1))


@pytest.mark.parametrize("bias", ["none", "zeros", "some"])
def test_a_scale_is_not_lost_beside_a_layer_in_float(bias: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Beside(bias), torch.randn(2, 3, 16, 16)
    int8, file = made(net, x, "openvino", tmp_path, "ptq(wide=wide, wide_bits=32)")
    assert deployed(int8, file, x, "openvino").sqnr > 100


def test_an_emulator_on_which_numpy_does_not_start_is_not_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer builds of numpy do not start on every old processor that qemu emulates."""
    qemu = tmp_path / "qemu-x86_64"
    qemu.write_text('#!/bin/sh\n[ "$2" = Haswell ] || exit 132\nexec true\n')
    qemu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert [isa.name for isa in isas("onnxruntime")] == ["AVX2 (emulated)"]


class Skips(nn.Module):
    """A strided 1x1 convolution of a value that a concatenation reads, too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.down = nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 1, 2)
        self.last = nn.Conv2d(2 * width, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y = torch.relu(self.down(x))
        y = nn.functional.interpolate(y, size=x.shape[-2:])
        return self.last(torch.cat([x, y], 1))


class Residual(nn.Module):
    """A strided 1x1 convolution on the skip of a block, as in ResNet and RegNet."""

    def __init__(self, width: int, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        out = 24 if width % 16 else 32
        self.first, self.down = nn.Conv2d(3, width, 1), nn.Conv2d(width, out, 1, 2)
        self.into, self.mid = nn.Conv2d(width, out, 1), nn.Conv2d(out, out, 3, 2, 1)
        self.out, self.last = nn.Conv2d(out, out, 1), nn.Conv2d(out, 8, 3, padding=1)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y = self.out(torch.relu(self.mid(torch.relu(self.into(x)))))
        y = y + self.down(x)
        return self.last(torch.relu(y + self.down(torch.relu(-x.flip(3))) if self.shared else y))


def kernel_sizes(file: Path) -> list[list[int]]:
    return [
        list(next(a.ints for a in n.attribute if a.name == "kernel_shape"))
        for n in onnx.load(file).graph.node
        if n.op_type == "Conv"
    ]


def assert_steady(int8: nn.Module, file: Path, x: Tensor) -> None:
    """Right, and the same in each of several runs: threads that race differ now and then."""
    for isa in (i for i in isas("openvino") if i.name in ("SSE41", "AVX2", "AVX512_CORE")):
        if isa.name != "SSE41" or "Resize" not in {n.op_type for n in onnx.load(file).graph.node}:
            found = deployed(int8, file, x, "openvino", isa)
            assert found.agrees, (isa, found)
            runs = [y for (y,) in isa.run_all("openvino", [(onnx.load(file), (x,))] * 8)]
            assert all(torch.equal(y, runs[0]) for y in runs), isa


@pytest.mark.parametrize("width", [8, 16, 24])
def test_a_strided_1x1_convolution_inside_a_concatenation(width: int, tmp_path: Path) -> None:
    """OpenVINO's threads race for its pixels on AVX2, so it gets another tap, of zeros."""
    net, x = Skips(width), torch.randn(4, 3, 17, 16, generator=torch.Generator().manual_seed(0))
    int8, file = made(net, x, "openvino", tmp_path)
    assert kernel_sizes(file) == [[1, 1], [1, 2] if width % 16 else [1, 1], [3, 3]]
    assert_steady(int8, file, x)


@pytest.mark.parametrize("width", [8, 12, 152, 16])
def test_a_strided_1x1_convolution_on_a_skip(width: int, tmp_path: Path) -> None:
    net, x = Residual(width), torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    int8, file = made(net, x, "openvino", tmp_path)
    assert kernel_sizes(file).count([1, 2]) == (width % 16 > 0)
    assert_steady(int8, file, x)


class Bottleneck(nn.Module):
    """ResNet as first published: only strided 1x1 convolutions read the input of a stage."""

    def __init__(self, signed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.down = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 1, 2)
        self.into, self.mid = nn.Conv2d(16, 16, 1, 2), nn.Conv2d(16, 32, 3, padding=1)
        self.last, self.signed = nn.Conv2d(32, 8, 1), signed

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x if self.signed else torch.relu(x)
        return self.last(torch.relu(self.mid(torch.relu(self.into(x))) + self.down(x)))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("target", ["openvino", "openvino-vnni"])
def test_openvino_does_not_move_a_stride(target: str, signed: bool, tmp_path: Path) -> None:
    """It would run the layers in float."""
    if target != "openvino" and not has_vnni("openvino"):
        pytest.skip("this CPU has no VNNI")
    _, file = made(Bottleneck(signed), torch.randn(2, 3, 19, 19), target, tmp_path)
    found = kernels("openvino", file)
    assert (found.integers, found.layers) == (5, 5), found
    assert kernel_sizes(file) == [[3, 3], [1, 2], [3, 3], [1, 2], [1, 1]]


def test_a_strided_1x1_convolution_that_runs_twice(tmp_path: Path) -> None:
    net, x = Residual(12, shared=True), torch.randn(2, 3, 12, 12)
    int8, file = made(net, x, "openvino", tmp_path)
    assert kernel_sizes(file).count([1, 2]) == 2
    assert_steady(int8, file, x)
