"""Whatever is raised inside load, load_packed and calibrate, wherever: the model is what it was, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lsquant
from helpers.checkpoint import VARIED, trained
from helpers.convert import Tied, assert_same_state, images, net, ready
from helpers.interrupts import anatomy, assert_as_before, everywhere_inside
from lsquant import Recipe, UsageError
from lsquant._util.errors import DamagedFile
from lsquant._util.tensors import write_tensors
from lsquant.nn import quantizers


def float_model() -> nn.Module:
    model = net()
    model[1].eval()  # a mode of its own
    model[0].register_forward_hook(lambda *_: None)
    return model


def prepared() -> nn.Module:
    lsquant.prepare(model := float_model(), Recipe(6, None))
    return model


def calibrated() -> nn.Module:
    return ready(float_model(), Recipe(3, 5), images())


def other_method() -> nn.Module:
    """Its weights are not contiguous, one of its buffers is NaN, and it has a switched off quantizer."""
    model = ready(float_model(), VARIED, images()).to(memory_format=torch.channels_last)
    model.register_buffer("extra", torch.full((3,), torch.nan), persistent=False)
    next(q for _, q in quantizers(model)).enabled = False
    return model


STARTS = {"float": float_model, "prepared": prepared, "calibrated": calibrated, "varied": other_method}


@pytest.mark.parametrize("kind", ["load", "load_packed"])
@pytest.mark.parametrize("start", STARTS)
def test_an_error_anywhere_in_load_leaves_the_model(start: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    (lsquant.save if kind == "load" else lsquant.export_packed)(trained(), path)
    load = getattr(lsquant, kind)
    load(STARTS[start](), path)  # nothing is imported any more
    everywhere_inside(STARTS[start], lambda model: load(model, path), points=20)
    model = load(STARTS[start](), path)
    assert_same_state(load(model, path), load(net(), path).state_dict())


@pytest.mark.parametrize("weights", [None, "mse"])
def test_an_error_anywhere_in_calibrate_leaves_the_model(weights: Any) -> None:
    batches = [images(2), images(3)]
    everywhere_inside(
        calibrated, lambda model: lsquant.calibrate(model, batches, weights=weights, again=True), points=30
    )


def test_an_error_while_steps_are_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step of calibrate: half of the quantizers have theirs."""
    model, seen = calibrated(), []
    before = anatomy(model)
    adopt = lsquant.Quantizer.adopt

    def failing(self: lsquant.Quantizer, other: lsquant.Quantizer) -> None:
        adopt(self, other)
        seen.append(self)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(lsquant.Quantizer, "adopt", failing)
    with pytest.raises(KeyboardInterrupt):
        lsquant.calibrate(model, [images() * 5], again=True)
    assert_as_before(model, before)


# ---- files that do not fit, found out late ----


def rewritten(path: Path, change: Any) -> None:
    """Change the tensors of a saved file, with a checksum that fits."""
    with safe_open(str(path), "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    write_tensors(path, tensors, metadata)


def one_more_step(tensors: dict[str, torch.Tensor]) -> None:
    tensors["5.input_quantizer.step"] = torch.ones(2)


def other_bits(tensors: dict[str, torch.Tensor]) -> None:
    tensors["5.input_quantizer.bounds"] = torch.tensor([-8, 7], dtype=torch.int32)


def no_count(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["5.weight_quantizer.count"]


def no_weight_quantizer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("5.weight_quantizer.")]:
        del tensors[name]


def too_many_counts(tensors: dict[str, torch.Tensor]) -> None:
    tensors["5.weight_quantizer.count"] = torch.ones(3, dtype=torch.int64)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    "change, says",
    [
        (one_more_step, r"quantizer '5\.input_quantizer': size mismatch"),
        (other_bits, r"quantizer '5\.input_quantizer': the state has the codes -8 to 7 \(4 bit\), the model 0 to 31"),
        (no_count, r"5\.weight_quantizer\.count"),
        (no_weight_quantizer, r"the file lacks 5\.weight_quantizer\.step"),
        (too_many_counts, r"5\.weight_quantizer\.count"),
    ],
)
def test_a_file_that_does_not_fit(change: Any, says: str, start: str, tmp_path: Path) -> None:
    lsquant.save(trained(), tmp_path / "m")
    rewritten(tmp_path / "m", change)
    model = STARTS[start]()
    before = anatomy(model)
    with pytest.raises((UsageError, DamagedFile), match=says) as caught:
        lsquant.load(model, tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert_as_before(model, before)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = ready(Tied(), Recipe(4, 4), torch.randn(9, 4))
    lsquant.save(model, tmp_path / "m")
    rewritten(tmp_path / "m", lambda tensors: tensors.update({"one.input_quantizer.step": torch.ones(2)}))
    other = Tied()
    before = anatomy(other)
    with pytest.raises(UsageError, match="size mismatch"):
        lsquant.load(other, tmp_path / "m")
    assert_as_before(other, before)
    assert other.one.weight is other.two.weight


def test_expanded_buffers_and_shared_memory_cost_nothing(tmp_path: Path) -> None:
    """Tensors that cannot be written to: they are left alone."""
    lsquant.save(trained(), tmp_path / "m")
    rewritten(tmp_path / "m", no_count)
    model = net()
    model.register_buffer("wide", torch.ones(1).expand(4), persistent=False)
    before = anatomy(model)
    with pytest.raises(UsageError, match="count"):
        lsquant.load(model, tmp_path / "m")
    assert_as_before(model, before)


def test_a_float_file_is_refused_as_before(tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / "f")
    model = calibrated()
    before = anatomy(model)
    with pytest.raises(UsageError, match=r"not written by lsquant\.save"):
        lsquant.load(model, tmp_path / "f")
    assert_as_before(model, before)


@pytest.mark.parametrize("call", ["calibrate", "prepare"])
def test_buffers_that_a_forward_pass_writes_to(call: str) -> None:
    """A counter, which goes on in eval mode: after an error it is what it was."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            x = self.layer(x)
            if x.shape[0] > 2:
                raise RuntimeError("too many")
            return x

    model = Counting()
    few, many = torch.rand(2, 4), torch.rand(3, 4)
    if call == "calibrate":
        lsquant.prepare(model, Recipe(4, 4))
    before = anatomy(model)
    with pytest.raises(UsageError, match="too many"):
        lsquant.calibrate(model, [few, many]) if call == "calibrate" else lsquant.prepare(model, Recipe(4, 4), many)
    assert_as_before(model, before)
