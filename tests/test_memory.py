"""Freed memory is kept during long work, and given back afterwards; a deadline is seen in time."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest
import torch

import repfx
from repfx.deadline import check_time, within
from repfx.errors import OutOfTime
from repfx.memory import memory_kept


def faults(times: int = 20, count: int = 2**24) -> int:
    """Page faults of buffers that are made and freed again, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.zeros(count, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_buffers_are_not_mapped_anew_inside() -> None:
    size = 2**26  # beyond the largest buffer that glibc keeps by itself
    with memory_kept():
        faults(5, size)
        inside = faults(10, size)
    assert inside < 10 * size / 4096 / 10
    assert faults(10, size) > 5 * inside


def test_memory_goes_back_at_the_end() -> None:
    before = resident()
    with memory_kept(), memory_kept():
        held = [torch.ones(2**22) for _ in range(16)]
        del held
        assert resident() - before > 100 * 2**20
    assert resident() - before < 50 * 2**20


def test_a_deadline_is_seen_and_an_earlier_one_holds() -> None:
    with within(100.0), within(0.01), pytest.raises(OutOfTime):
        time.sleep(0.02)
        check_time()
    with within(0.01), within(100.0), pytest.raises(OutOfTime):
        time.sleep(0.02)
        check_time()
    check_time()  # outside there is none


@pytest.mark.parametrize("what", ["calibrate", "bias", "sensitivity", "reconstruct"])
def test_all_long_work_stops_at_its_deadline(what: str) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))
    made, data = repfx.transform(net, ["ptq"]), [torch.randn(4, 3, 12, 12)] * 3
    repfx.calibrate(made, data)
    state = {k: v.clone() for k, v in made.state_dict().items()}
    with within(0.0), pytest.raises(OutOfTime):
        if what in ("calibrate", "bias"):
            repfx.calibrate(made, data, bias=what == "bias")
        elif what == "sensitivity":
            repfx.sensitivity(made, data)
        else:
            repfx.reconstruct(made, data, iterations=2)
    assert all(torch.equal(v, state[k]) for k, v in made.state_dict().items())


def test_a_block_that_is_not_finished_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))
    data = [torch.randn(4, 3, 12, 12)]
    made = repfx.calibrate(repfx.transform(net, ["ptq"]), data)
    state = {k: v.clone() for k, v in made.state_dict().items()}
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise OutOfTime("now")

    monkeypatch.setattr("repfx.calibration.blockwise.check_time", count)
    with pytest.raises(OutOfTime):
        repfx.reconstruct(made, data, iterations=50)
    weights = [k for k in state if k.endswith("weight") or k.endswith("bias")]
    assert len(weights) == 4 and all(torch.equal(made.state_dict()[k], state[k]) for k in weights)
