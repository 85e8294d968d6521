"""A trained model in every form in which it ships, run on one batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lsquant

WRITERS: dict[str, Callable[[nn.Module, Path, Any], Any]] = {
    "save": lambda model, tmp, x: lsquant.save(model, tmp / "m.safetensors"),
    "to_integer": lambda model, tmp, x: lsquant.to_integer(model),
    "export_packed": lambda model, tmp, x: lsquant.export_packed(model, tmp / "m.packed"),
    "export_onnx": lambda model, tmp, x: lsquant.export_onnx(model, tmp / "m.onnx", x),
    "to_torchao": lambda model, tmp, x: lsquant.to_torchao(model),
    "export_vectors": lambda model, tmp, x: lsquant.export_vectors(model, tmp / "v.npz", x),
}
"""Every call that writes or makes a shipped form."""


@torch.no_grad()
def forms(model: nn.Module, make: Callable[[], nn.Module], x: Tensor, tmp: Path) -> dict[str, Tensor]:
    """Name of a form -> what it gives for x.  make: builds the float model anew, with other values."""
    lsquant.save(model, tmp / "m.safetensors")
    lsquant.export_packed(model, tmp / "m.packed")
    lsquant.export_onnx(model, tmp / "m.onnx", x)
    session = lsquant.onnx_session(tmp / "m.onnx")
    return {
        "saved": lsquant.load(make(), tmp / "m.safetensors").eval()(x),
        "packed": lsquant.load_packed(make(), tmp / "m.packed").eval()(x),
        "integer": lsquant.to_integer(model)(x),
        "onnx": torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]),
    }


def assert_every_form_is_equal(
    model: nn.Module, make: Callable[[], nn.Module], x: Tensor, tmp: Path, torchao: bool = True
) -> None:
    """All forms, and the verdicts of verify, are equal to the model in eval mode; torchao's up to rounding."""
    expected = model.eval()(x).detach()
    for name, found in forms(model, make, x, tmp).items():
        assert torch.equal(found, expected), (name, float((found - expected).abs().max()))
    if torchao:
        torch.testing.assert_close(lsquant.to_torchao(model)(x), expected)
    for file in ("m.onnx", "m.packed"):
        verdict = lsquant.verify(model, tmp / file, [x])
        assert verdict.exact, verdict
