"""The pass contract: specs, order, and promises that the runner holds a pass to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import repfx
from repfx.blocks import RepVGG
from repfx.passes import BnFold, Fuse, Ptq
from repfx.rewrite.contract import REGISTRY, Pass, Promise, Stage, resolve
from repfx.rewrite.results import Result
from repfx.rewrite.work import Work


def test_names_specs_and_objects_mix_and_run_by_stage() -> None:
    assert resolve(["ptq(bits=4, weights=mse)", BnFold()]) == [
        BnFold(),
        Fuse(),
        Ptq(bits=4, weights="mse"),
    ]
    assert resolve(["fuse", "bnfold"]) == [BnFold(), Fuse()]
    assert resolve([]) == []


@pytest.mark.parametrize(
    ("passes", "text"),
    [
        ("fuse", "passes is a list"),
        (None, "passes is a list"),
        ([3], "a pass is a name, a spec or a configured pass"),
        (["fuse("], "a pass is written name or name"),
        (["ptq(bits)"], "unknown option of ptq 'bits'; choose one of"),
        (["ptq(weights=best)"], "unknown method for weights 'best'"),
    ],
)
def test_bad_passes(passes: object, text: str) -> None:
    with pytest.raises(repfx.InputError, match=text):
        resolve(passes)


def test_a_pass_that_loses_a_name_is_told() -> None:
    @dataclass(frozen=True)
    class Loser(Pass):
        name: ClassVar[str] = "loser"
        stage: ClassVar[Stage] = Stage.MERGE
        promises: ClassVar[frozenset[Promise]] = frozenset({Promise.NAMES})

        def run(self, work: Work) -> Result:
            return work.merge(self.name)

    with pytest.raises(
        repfx.CheckError, match=r"pass 'loser' promised that every key .* stays, but lost .*norm"
    ):
        repfx.transform(nn.Sequential(RepVGG(3, 4, 3, padding=1)), [Loser()])


def test_what_is_required_comes_along_and_first(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Late(Pass):
        name: ClassVar[str] = "late"
        stage: ClassVar[Stage] = Stage.QUANTIZE
        requires: ClassVar[tuple[str, ...]] = ("ptq",)

        def run(self, work: Work) -> Result:
            return Result(self.name)

    @dataclass(frozen=True)
    class Later(Late):
        name: ClassVar[str] = "later"
        requires: ClassVar[tuple[str, ...]] = ("late", "nowhere")

    assert [p.name for p in resolve([Late()])] == ["fuse", "ptq", "late"]
    assert [p.name for p in resolve([Late(), "ptq(bits=6)"])] == ["fuse", "ptq", "late"]
    (ptq,) = [p for p in resolve([Late(), "ptq(bits=6)"]) if isinstance(p, Ptq)]
    assert ptq.bits == 6
    monkeypatch.setitem(REGISTRY, "late", Late)
    with pytest.raises(repfx.InputError, match="unknown pass 'nowhere'"):
        resolve([Later()])


def test_a_pass_that_says_too_little_is_told() -> None:
    class Bare(Pass):
        name: ClassVar[str] = "bare"
        stage: ClassVar[Stage] = Stage.MERGE

        def run(self, work: Work) -> Result:
            return None  # type: ignore[return-value]

    class Nameless(Bare):
        name = None  # type: ignore[assignment]

    class Late(Bare):
        stage = 9  # type: ignore[assignment]

    with pytest.raises(repfx.InputError, match="the pass Bare is not a dataclass"):
        resolve([Bare()])
    for kind in (Nameless, Late):
        with pytest.raises(
            repfx.InputError, match=rf"{kind.__name__} must define `name`.*Stage\.MERGE"
        ):
            resolve([dataclass(frozen=True)(kind)()])
    with pytest.raises(repfx.CheckError, match="pass 'bare' must return a Result, not None"):
        repfx.transform(nn.Sequential(nn.Conv2d(3, 3, 1)), [dataclass(frozen=True)(Bare)()])


SCALE = torch.tensor([[[2.0]], [[3.0]], [[5.0]], [[7.0]]])


class Holder(nn.Module):
    """Tensors of every kind that a forward may read: parameters (one tied, one in a list too), a
    buffer, plain attributes, and a global one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 1)
        self.again = nn.Conv2d(4, 4, 1)
        self.again.weight = self.last.weight
        self.register_buffer("shift", torch.randn(4, 1, 1))
        self.plain = torch.randn(4, 1, 1)
        self.listed = [self.last.weight, torch.randn(4, 1, 1)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)) * SCALE + self.shift + self.plain + self.listed[1]
        return self.again(self.last(y.relu()))


class Forked(nn.Module):
    """A forward that cannot be traced, so that its child is the graph, and its list stays."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Holder()
        self.listed = [self.inner.last.weight, torch.randn(4, 1, 1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x if x.sum() > 0 else -x) + self.listed[1]


def tensors_of(module: nn.Module) -> list[Tensor]:
    found: list[Tensor] = []
    for m in module.modules():
        found += [*m._parameters.values(), *m._buffers.values()]  # type: ignore[list-item]
        found += [v for v in vars(m).values() if isinstance(v, Tensor)]
        found += [v for v in vars(m).get("listed", ()) if isinstance(v, Tensor)]
    return [t for t in found if t is not None]


def in_place(t: Tensor) -> None:
    with torch.no_grad():
        t.mul_(0).sub_(1)


def through_data(t: Tensor) -> None:
    t.data.fill_(-1)


def through_numpy(t: Tensor) -> None:
    t.detach().numpy()[...] = -1


def through_storage(t: Tensor) -> None:
    storage: Any = t.untyped_storage()
    storage.fill_(1)


@dataclass(frozen=True)
class Vandal(Pass):
    """Writes into every tensor that it finds, on a way that `found` names."""

    name: ClassVar[str] = "vandal"
    stage: ClassVar[Stage] = Stage.MERGE

    write: Callable[[Tensor], None] = in_place
    found: str = "module"

    def run(self, work: Work) -> Result:
        result = Result(self.name)
        roots: list[nn.Module] = []
        if self.found == "module":
            roots = [work.module]
        elif self.found == "view":
            roots = list(work.view().modules.values())
        else:  # the operators that a merge asks about

            def keep(ops: Any) -> bool:
                roots.extend(op.x.graph.owning_module for op in ops if hasattr(op, "x"))
                return False

            result = work.merge(self.name, keep)
        for tensor in {id(t): t for root in roots for t in tensors_of(root)}.values():
            self.write(tensor)
        return result


WRITES = [in_place, through_data, through_numpy, through_storage]


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [Holder, Forked])
@pytest.mark.parametrize("found", ["module", "view", "ops"])
@pytest.mark.parametrize("first", [[], ["fuse"]])
def test_what_a_pass_writes_never_reaches_the_given_model(
    write: Callable[[Tensor], None], kind: type[nn.Module], found: str, first: list[str]
) -> None:
    model, x = kind().eval(), torch.randn(2, 3, 8, 8).abs()
    kept = [t.clone() for t in tensors_of(model)]
    scale, before = SCALE.clone(), model(x)
    result = repfx.transform(model, [*first, Vandal(write, found)], example=x)
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors_of(model), strict=True))
    assert torch.equal(SCALE, scale) and torch.equal(model(x), before)
    if found != "ops":
        assert not torch.equal(result.eval()(x), before)  # it did write
    theirs = {t.untyped_storage().data_ptr() for t in [*tensors_of(model), SCALE]}
    assert not any(t.untyped_storage().data_ptr() in theirs for t in tensors_of(result))


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_nor_does_it_reach_a_graph_module_or_an_exported_program(
    write: Callable[[Tensor], None],
) -> None:
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(Holder().eval(), (x,))
    for model in (fx.symbolic_trace(Holder().eval()), program):
        held: Any = model
        tensors = [*held.state_dict.values()] if model is program else tensors_of(held)
        kept = [t.clone() for t in tensors]
        repfx.transform(model, [Vandal(write)], example=x)
        assert all(torch.equal(a, b) for a, b in zip(kept, tensors, strict=True))


def test_tied_tensors_stay_tied_and_fuse_copies_no_weight_that_it_only_reads() -> None:
    model = Holder().eval()
    result = repfx.transform(model, [Vandal()], example=torch.randn(1, 3, 8, 8))
    assert result.last.weight is result.again.weight

    @dataclass(frozen=True)
    class Reader(Pass):
        name: ClassVar[str] = "reader"
        stage: ClassVar[Stage] = Stage.MERGE

        def run(self, work: Work) -> Result:
            done = work.merge(self.name)
            shared.append(work._module.get_parameter("last.weight").data_ptr())
            return done

    shared: list[int] = []
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    plain.last = nn.Conv2d(4, 4, 1)
    result = repfx.transform(plain, [Reader()], example=torch.randn(1, 3, 8, 8))
    assert shared == [plain.last.weight.data_ptr()]
    assert result.get_parameter("last.weight").data_ptr() != shared[0]


@dataclass(frozen=True)
class Breaker(Pass):
    """Promises that merged regions stay, and does something else to them."""

    name: ClassVar[str] = "breaker"
    stage: ClassVar[Stage] = Stage.MERGE
    promises: ClassVar[frozenset[Promise]] = frozenset({Promise.REGIONS})

    how: str = "scale"

    def run(self, work: Work) -> Result:
        done = work.merge(self.name)
        if self.how == "nothing":
            return done
        module = work.module
        layer: Any = module.get_submodule(done.merged[0].into)
        if self.how == "scale":
            layer.weight.data.mul_(1.01)
        elif self.how == "shape":
            layer.stride = (2, 2)
        elif self.how == "kernel":
            layer.weight = nn.Parameter(layer.weight[:, :1])
        elif self.how == "read":
            assert layer.weight.sum() != 0
        return done


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("scale", "the output on the example changed: max abs"),
        ("shape", "outputs of different shapes"),
        ("kernel", "the model no longer runs"),
    ],
)
@pytest.mark.parametrize("opaque", [False, True])
def test_a_pass_that_changes_a_region_is_told(how: str, text: str, opaque: bool) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = RepVGG(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x if x.sum() > 0 else -x)

    model = Outer() if opaque else nn.Sequential(RepVGG(3, 4, 3, padding=1))
    x = torch.randn(2, 3, 8, 8)
    told = rf"pass 'breaker' promised that each merged region computes what it did, but {text}"
    with pytest.raises(repfx.CheckError, match=told):
        repfx.transform(model, [Breaker(how)], example=x)
    for fine in ("nothing", "read"):
        assert len(repfx.transform(model, [Breaker(fine)], example=x).meta["repfx"].merged) == 1


def test_a_merge_whose_proof_fails_names_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from repfx.rewrite import work

    right = work.kernel_of
    monkeypatch.setattr(work, "kernel_of", lambda *args: right(*args).scaled(2))
    with pytest.raises(
        repfx.CheckError, match=r"pass 'fuse': the merge of .* differs from the original"
    ):
        repfx.transform(nn.Sequential(RepVGG(3, 4, 3, padding=1)), ["fuse"])


def test_the_constants_of_an_exported_forward_come_along() -> None:
    model, x = Holder().eval(), torch.randn(2, 3, 8, 8)
    result = repfx.transform(torch.export.export(model, (x,)), ["fuse"], example=x)
    assert repfx.verify(model, result, x).relative < 1e-5
