"""Names of inputs and outputs of exported files, and operator sets that there are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lsquant
from helpers.export_onnx import ready, tiny
from lsquant import Recipe
from lsquant._util.errors import UsageError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Net(nn.Module):
    """Its inputs are called as outputs of a file are."""

    def __init__(self, give: Callable[[Tensor, Tensor, Any], Any]) -> None:
        super().__init__()
        self.layer, self.give = nn.Linear(4, 3), give

    def forward(self, output_0: Tensor, output: Any = None) -> Any:
        return self.give(self.layer(output_0), output_0, output)


@pytest.mark.parametrize(
    "give, names",
    [
        (lambda y, a, b: y, ["output_"]),
        (lambda y, a, b: (y, y + b), ["output_0_", "output_1"]),
        (lambda y, a, b: (a, y * b, a), ["output_0_", "output_1", "output_2"]),
        (lambda y, a, b: (y, {"again": y}), ["output_0_", "output_1"]),
    ],
    ids=["one", "two", "an input", "one twice"],
)
def test_outputs_beside_inputs_of_their_name(give: Any, names: list[str], tmp_path: Path) -> None:
    x, scale = torch.randn(8, 4), torch.randn(8, 1)
    model = ready(Net(give), Recipe(4, 4), output_0=x, output=scale).eval()
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", {"output_0": x, "output": scale})
    session = lsquant.onnx_session(path)
    assert [value.name for value in session.get_inputs()] == ["output_0", "output"]
    assert [value.name for value in session.get_outputs()] == names
    found = session.run(None, {"output_0": x.numpy(), "output": scale.numpy()})
    y = model.layer(x).detach()  # type: ignore[operator]
    want = give(y, x, scale)
    flat = [want] if isinstance(want, Tensor) else [t["again"] if isinstance(t, dict) else t for t in want]
    for got, expected in zip(found, flat, strict=True):
        assert torch.equal(torch.from_numpy(got), expected)
    assert lsquant.verify(model, path, [{"output": scale, "output_0": x}]).exact


@pytest.mark.parametrize("opset", [99, 0, -3, True, "18", 18.0])
def test_operator_sets_that_there_are_not(opset: Any, tmp_path: Path) -> None:
    model, x = tiny()
    known = onnx.defs.onnx_opset_version()
    with pytest.raises(UsageError, match=rf"opset={opset!r} is not possible; .* writes 13 to {known}"):
        lsquant.export_onnx(model, tmp_path / "m.onnx", x, opset=opset)
    assert not list(tmp_path.iterdir())


def test_whatever_onnx_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise onnx.checker.ValidationError("Nodes in a graph must be topologically sorted\nmore")

    model, x = tiny()
    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(UsageError, match="onnx refuses the graph of this model: Nodes in a graph must be") as told:
        lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    assert "more" not in str(told.value)
    assert not list(tmp_path.iterdir())
