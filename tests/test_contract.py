"""The pass contract: specs, order, and promises that the runner holds a pass to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import nn

import repfx
from repfx.blocks import RepVGG
from repfx.passes import BnFold, Fuse, Ptq
from repfx.rewrite.contract import REGISTRY, Pass, Promise, Result, Stage, resolve
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
        repfx.CheckError, match=r"pass 'loser' promised that every key .* stays, and lost .*norm"
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

    with pytest.raises(repfx.InputError, match="the pass Bare is no dataclass"):
        resolve([Bare()])
    for kind in (Nameless, Late):
        with pytest.raises(
            repfx.InputError, match=rf"{kind.__name__} has to say its name.*Stage\.MERGE"
        ):
            resolve([dataclass(frozen=True)(kind)()])
    with pytest.raises(repfx.CheckError, match="pass 'bare' gave None and not a Result"):
        repfx.transform(nn.Sequential(nn.Conv2d(3, 3, 1)), [dataclass(frozen=True)(Bare)()])
