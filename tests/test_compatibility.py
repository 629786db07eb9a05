"""What version 0.1.0 wrote still works: its files load and mean the same, its runs go on."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import repfx
from repfx.quant import quantizers_of

SAVED = Path(__file__).parent / "data" / "saved-0.1.0"
KEYS: dict[str, list[str]] = json.loads((SAVED / "keys.json").read_text())
OUTPUTS = load_file(SAVED / "outputs.safetensors")
X, LABELS = OUTPUTS["x"], OUTPUTS["labels"]


def keys(model: torch.nn.Module) -> list[str]:
    """The keys that 0.1.0 had. It learned the scales themselves, without a ratio to them."""
    return sorted(key for key in model.state_dict() if not key.endswith("log_ratio"))


@pytest.mark.parametrize("name", [name for name in KEYS if name != "fit"])
def test_a_saved_model_gives_what_it_gave(name: str, tmp_path: Path) -> None:
    model = repfx.load(SAVED / f"{name}.pt")
    assert keys(model) == sorted(KEYS[name])
    assert model.training == (name in ("repq-train", "repq-untrained", "repq-estimate"))
    repfx.save(model, tmp_path / "again.pt")
    for found in (model, repfx.load(tmp_path / "again.pt")):
        with torch.no_grad():
            y = copy.deepcopy(found)(X.clone())
        assert torch.allclose(y, OUTPUTS[name], rtol=1e-5, atol=1e-6)


def test_quantizers_that_were_off_are_off() -> None:
    on, off = (repfx.load(SAVED / f"{n}.pt") for n in ("ptq-calibrated", "ptq-weights-in-float"))
    assert on.state_dict().keys() == off.state_dict().keys()
    assert not torch.allclose(on(X), off(X), atol=1e-2)


def test_an_average_that_began_too_early_has_no_steps() -> None:
    model = repfx.load(SAVED / "ptq.pt")
    average = torch.optim.swa_utils.AveragedModel(
        model, avg_fn=lambda a, b, n: 0.9 * a + 0.1 * b, use_buffers=True
    )
    average.update_parameters(model)
    repfx.calibrate(model, [X])
    average.update_parameters(model)
    other = repfx.load(SAVED / "ptq.pt")
    other.load_state_dict(average.module.state_dict())
    assert not any(q.calibrated for q in quantizers_of(other, of_weight=False).values())
    other.load_state_dict(model.state_dict())
    assert all(q.calibrated for q in quantizers_of(other).values())


def test_a_saved_model_is_input_again() -> None:
    trained = repfx.load(SAVED / "repq-eval.pt")
    deployed = repfx.transform(trained, ["fuse"], example=X)
    assert repfx.verify(trained, deployed, X).relative < 1e-5
    learned = repfx.load(SAVED / "qprep.pt")
    folded = repfx.transform(learned, ["fuse"], example=X)
    assert repfx.verify(learned, folded, X).relative < 1e-5
    raw, merged = repfx.load(SAVED / "ptq.pt"), repfx.load(SAVED / "fuse.pt")
    assert 25 < repfx.verify(merged, repfx.calibrate(raw, [X]), X).sqnr < 60


def test_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    path = shutil.copy(SAVED / "fit.ck", tmp_path / "fit.ck")
    model = repfx.load(SAVED / "fit.pt")
    assert keys(model) == sorted(KEYS["fit"])
    history = repfx.fit(
        model,
        "classification",
        (X, LABELS),
        epochs=3,
        batch=2,
        lr=0.05,
        ema=0.5,
        checkpoint=path,
        progress=False,
        device="cpu",
    )
    assert history.resumed == 2 and len(history) == 3
    # 0.1.0 learned the steps of quantizers in another way, so the last epoch is not what it was.
    off = float((model.eval()(X) - OUTPUTS["fit"]).detach().abs().max())
    assert 0 < off < float(OUTPUTS["fit"].abs().max())


def test_a_state_dict_with_learned_scales_still_loads() -> None:
    model = repfx.load(SAVED / "repq-eval.pt")
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("log_ratio")}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 if name.endswith("log_ratio") else 1)
    model.load_state_dict(state)
    assert torch.allclose(model(X), OUTPUTS["repq-eval"], rtol=1e-5, atol=1e-6)


def test_reconstruction_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    path = shutil.copy(SAVED / "reconstruct.ck", tmp_path / "reconstruct.ck")
    same = {"iterations": 3, "batch": 2, "rounding": "adaround", "drop": 0.5, "checkpoint": path}
    same |= {"loss": "mae", "stage": 1.0}  # the defaults of 0.1.0
    with pytest.raises(repfx.InputError, match="a checkpoint of another run"):
        repfx.reconstruct(repfx.load(SAVED / "qprep.pt"), [X + 1], **same)
    model = repfx.reconstruct(repfx.load(SAVED / "qprep.pt"), [X], **same)
    assert torch.allclose(model(X), OUTPUTS["reconstruct"], rtol=1e-4, atol=1e-5)
