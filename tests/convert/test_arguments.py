"""Arguments of another type: an error of lsquant's that says what was given, never one of Python's or PyTorch's."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lsquant
from lsquant import LsquantError, Quantizer, QuantSpec, Recipe, UsageError

X = torch.rand(8, 6)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def prepared() -> nn.Module:
    model = network()
    lsquant.prepare(model, Recipe(4, 4))
    lsquant.calibrate(model, [X])
    return model


OF_A_MODEL: dict[str, Callable[[Any], Any]] = {
    "prepare": lambda m: lsquant.prepare(m, Recipe(4, 4)),
    "calibrate": lambda m: lsquant.calibrate(m, [X]),
    "revert": lsquant.revert,
    "save": lambda m: lsquant.save(m, "never"),
    "export_packed": lambda m: lsquant.export_packed(m, "never"),
    "export_onnx": lambda m: lsquant.export_onnx(m, "never", X),
    "to_integer": lsquant.to_integer,
    "check": lsquant.check,
    "sensitivity": lambda m: lsquant.sensitivity(m, [X], nn.functional.mse_loss),
    "param_groups": lambda m: lsquant.param_groups(m, lr=0.1),
    "quantizers": lambda m: list(lsquant.quantizers(m)),
    "integer_weights": lsquant.integer_weights,
    "resolved_recipe": lsquant.resolved_recipe,
    "disabled": lambda m: lsquant.disabled(m).__enter__(),
    "with_names": lambda m: Recipe(4, 4).with_names(m),
    "verify": lambda m: lsquant.verify(m, "never", [X]),
}


@pytest.mark.parametrize("model", [None, "model", 3, [network]], ids=["none", "text", "number", "list"])
@pytest.mark.parametrize("call", OF_A_MODEL)
def test_what_is_no_model(call: str, model: Any) -> None:
    with pytest.raises(UsageError, match="the model is"):
        OF_A_MODEL[call](model)


@pytest.mark.parametrize("model", [None, "model"])
@pytest.mark.parametrize("call", ["load", "load_packed"])
def test_what_is_no_model_to_load_into(call: str, model: Any, prepared: nn.Module, tmp_path: Path) -> None:
    lsquant.save(prepared, tmp_path / "load")
    lsquant.export_packed(prepared, tmp_path / "load_packed")
    with pytest.raises(UsageError, match="the model is"):
        getattr(lsquant, call)(model, tmp_path / call)


OF_A_PATH: dict[str, Callable[[nn.Module, Any], Any]] = {
    "load": lambda m, p: lsquant.load(copy.deepcopy(m), p),
    "load_packed": lambda m, p: lsquant.load_packed(copy.deepcopy(m), p),
    "read_packed": lambda m, p: lsquant.read_packed(p),
    "save": lambda m, p: lsquant.save(m, p),
    "export_packed": lambda m, p: lsquant.export_packed(m, p),
    "verify": lambda m, p: lsquant.verify(m, p, [X]),
    "onnx_session": lambda m, p: lsquant.onnx_session(p),
    "export_onnx": lambda m, p: lsquant.export_onnx(m, p, X),
    "write_report": lambda m, p: lsquant.write_report(m, p),
}


@pytest.mark.parametrize("path", [None, 3, b"file", "nul\0", "long" * 1500, "", "."], ids=lambda p: repr(p)[:9])
@pytest.mark.parametrize("call", OF_A_PATH)
def test_what_is_no_path(call: str, path: Any, prepared: nn.Module, tmp_path: Path, monkeypatch: Any) -> None:
    if "onnx" in call:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LsquantError):
        OF_A_PATH[call](prepared, path)
    assert not os.listdir(tmp_path)


OTHERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "no batches": (lambda m: lsquant.calibrate(m, None), "batches is a NoneType"),  # type: ignore[arg-type]
    "a number of batches": (lambda m: lsquant.check(m, None, 3), "batches is a int"),  # type: ignore[arg-type]
    "a word for a number": (lambda m: lsquant.calibrate(m, [X], max_batches="3"), "max_batches='3'"),  # type: ignore[arg-type]
    "half a batch": (lambda m: lsquant.calibrate(m, [X], max_batches=2.5), "max_batches=2.5"),  # type: ignore[arg-type]
    "a word for yes": (lambda m: lsquant.calibrate(m, [X], again="no"), "again='no'"),  # type: ignore[arg-type]
    "no function": (lambda m: lsquant.calibrate(m, [X], forward=3, again=True), "forward=3"),  # type: ignore[arg-type]
    "numbers as metadata": (lambda m: lsquant.save(m, "never", {"a": 1}), "metadata"),  # type: ignore[dict-item]
    "half a character": (lambda m: lsquant.save(m, "never", {"a": "\ud800"}), "metadata"),
    "a list as metadata": (lambda m: lsquant.save(m, "never", ["a"]), "metadata"),  # type: ignore[arg-type]
    "a pattern": (lambda m: lsquant.disabled(m, 3).__enter__(), "3 is no pattern"),  # type: ignore[arg-type]
    "a recipe of bytes": (lambda m: Recipe.from_toml(b""), "recipe is b''"),  # type: ignore[arg-type]
    "a rule alone": (lambda m: Recipe(4, 4, lsquant.Rule("0", 8)), "Recipe: rules="),  # type: ignore[arg-type]
    "skip": (lambda m: Recipe.preset("w4a4", skip=3), "skip=3"),  # type: ignore[arg-type]
    "rules": (lambda m: Recipe.preset("w4a4", rules="0"), "rules='0'"),  # type: ignore[arg-type]
    "bits": (lambda m: Quantizer(4), "spec=4"),  # type: ignore[arg-type]
    "a number as shape": (lambda m: Quantizer(QuantSpec(4), 3), "shape=3"),  # type: ignore[arg-type]
    "half a step": (lambda m: Quantizer(QuantSpec(4), (1.5,)), "shape="),  # type: ignore[arg-type]
    "a list of values": (lambda m: Quantizer(QuantSpec(4)).initialize([1.0]), "give a tensor"),  # type: ignore[arg-type]
    "another axis": (
        lambda m: Quantizer(QuantSpec(4, granularity="channel"), (3,), axis=2).initialize(torch.rand(3, 3)),
        "axis 2",
    ),
    "no groups": (
        lambda m: Quantizer(QuantSpec(4, granularity="group", group_size=4), (2,)).initialize(torch.rand(7)),
        "groups of 4",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_type(what: str, prepared: nn.Module) -> None:
    before = {name: t.clone() for name, t in prepared.state_dict().items()}
    call, says = OTHERS[what]
    with pytest.raises(UsageError) as found:
        call(prepared)
    assert says in str(found.value)
    assert all(torch.equal(t, before[name]) for name, t in prepared.state_dict().items())


@pytest.mark.parametrize("how", ["prepare", "load"])
def test_a_model_that_inference_mode_prepared_can_be_trained(how: str, prepared: nn.Module, tmp_path: Path) -> None:
    lsquant.save(prepared, tmp_path / "file")
    model = network()
    with torch.inference_mode():
        if how == "prepare":
            lsquant.prepare(model, Recipe(4, 4))
            lsquant.calibrate(model, [X])
        else:
            lsquant.load(model, tmp_path / "file")
    model(X).sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())
