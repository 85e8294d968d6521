"""The verdict: each level falls when, and only when, something at that level is wrong."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lsquant
from helpers.verify import damage, one_code, onnx
from lsquant import Recipe
from lsquant._util.errors import DamagedFile, MissingFile, UsageError
from lsquant.verification.verdict import LEVELS, Check, Differences, Verdict, different

pytest.importorskip("onnxruntime")


def batches(x: Tensor, size: int = 16) -> list[Tensor]:
    return list(x.split(size))


def test_exact(trained: Any, exported: Path) -> None:
    model, x = trained
    verdict = lsquant.verify(model, exported, batches(x))
    assert verdict.level == "outputs"
    assert verdict.exact
    assert verdict.plain is not None
    assert verdict.plain.exact
    assert (verdict.batches, verdict.samples, verdict.layers) == (3, 40, 3)
    assert [check.level for check in verdict.checks] == ["weights", "layers", "layers", "codes", "outputs"]
    weights, codes, outputs, all_codes, whole = (check.compared for check in verdict.checks)
    assert codes == all_codes == 40 * (2 * 36 + 8 * 16 + 8)
    assert outputs == 40 * (8 * 16 + 8 * 4 + 3)
    assert whole == 40 * 3
    assert weights == 8 * 18 + 8 * 72 + 24 + (8 + 8 + 3) + 3  # codes, fl(s_x s_w), s_x


def one_scale(arrays: dict[str, Any], model: Any) -> None:
    arrays["conv.scale"].flat[3] = np.nextafter(arrays["conv.scale"].flat[3], np.float32(1))


def input_step(arrays: dict[str, Any], model: Any) -> None:
    arrays["mid.input_step"] *= np.float32(1.0001)


def bias(arrays: dict[str, Any], model: Any) -> None:
    arrays["mid.bias"] += np.float32(0.01)


def zero_point(arrays: dict[str, Any], model: Any) -> None:
    arrays["conv.input_zero_point"] += np.uint8(1)


def batchnorm(arrays: dict[str, Any], model: Any) -> None:
    arrays["bn.alpha"] *= np.float32(1.05)


def relu_at_the_end(arrays: dict[str, Any], model: Any) -> None:
    last = model.graph.node[-1]
    name = last.output[0]
    last.output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Clip", ["before", "", "ceiling"], [name]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.01), "ceiling"))
    arrays["ceiling"] = np.float32(0.01)
    for entry in model.metadata_props:
        if entry.key == "lsquant.layers":
            entry.value = entry.value.replace('"output":"output"', '"output":"before"')


@pytest.mark.parametrize(
    "change, level, worst",
    [
        (one_code, "none", "mid"),
        (one_scale, "none", "conv"),
        (input_step, "none", "mid"),
        (bias, "weights", "mid"),
        (zero_point, "weights", "conv"),
        (batchnorm, "layers", "mid"),
        (relu_at_the_end, "codes", "output"),
    ],
)
def test_the_level_falls_to_where_the_damage_is(
    change: Any, level: str, worst: str, trained: Any, exported: Path, tmp_path: Path
) -> None:
    model, x = trained
    verdict = lsquant.verify(model, damage(exported, tmp_path / "d.onnx", change), batches(x))
    assert verdict.level == level, str(verdict)
    assert not verdict.exact
    first = next(check for check in verdict.checks if check.mismatches)
    assert first.level == LEVELS[LEVELS.index(level) + 1]
    assert first.worst == worst
    assert first.largest > 0
    if change is one_code:
        assert (first.mismatches, first.failing, first.parts) == (1, 1, 3)
    assert "not exact" in str(verdict)
    assert worst in str(verdict)


def test_a_model_that_was_trained_on_falls_out(trained: Any, exported: Path) -> None:
    model, x = trained
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.conv.weight.mul_(-1)
    assert lsquant.verify(other, exported, batches(x)).level == "none"


def test_all_batches_in_their_sizes_and_max_batches(trained: Any, exported: Path) -> None:
    model, x = trained
    verdict = lsquant.verify(model, exported, [x[:1], x[:7], x[:3]])
    assert (verdict.batches, verdict.samples) == (3, 11)
    verdict = lsquant.verify(model, exported, batches(x), max_batches=2)
    assert (verdict.batches, verdict.samples) == (2, 32)


def test_forms_of_batches(trained: Any, exported: Path) -> None:
    model, x = trained
    for batch, forward in (
        ((x, "label"), None),
        ([x], None),
        ({"x": x}, None),
        ({"image": x}, lambda m, b: m(b["image"])),
    ):
        assert lsquant.verify(model, exported, [batch], forward=forward).exact
    with pytest.raises(UsageError, match="did not call the model"):
        lsquant.verify(model, exported, [x], forward=lambda m, b: b)
    for nothing in ([], iter(())):
        with pytest.raises(UsageError, match="no batches"):
            lsquant.verify(model, exported, nothing)


def test_the_model_is_left_as_it_was(trained: Any, exported: Path) -> None:
    model, x = trained
    model.train()
    try:
        lsquant.verify(model, exported, [x])
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    finally:
        model.eval()


def test_table_and_dict(trained: Any, exported: Path) -> None:
    model, x = trained
    verdict = lsquant.verify(model, exported, batches(x))
    text = str(verdict)
    assert "exact: equal outputs, bit for bit" in text
    assert "plain session: the same in every count" in text
    rows = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(rows) == 6
    assert len({len(row) for row in rows[1:]}) == 1  # the numbers end in one column
    data = json.loads(json.dumps(verdict.to_dict()))
    assert data["level"] == "outputs"
    assert data["exact"] is True
    assert data["plain"]["level"] == "outputs"
    assert data["checks"][0]["level"] == "weights"
    assert data["checks"][0]["mismatches"] == 0


def test_nan_inputs_are_mismatches(trained: Any, exported: Path) -> None:
    """The trained model answers NaN; ONNX has no code for it, and the verdict says so."""
    model, x = trained
    x = x[:4].clone()
    x[1, 0, 2, 3] = float("nan")
    verdict = lsquant.verify(model, exported, [x])
    assert verdict.level == "weights"
    assert [check.largest for check in verdict.checks[1:]] == [float("inf")] * 4


# ---- files that are no good ----


def test_missing_file(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"nothing\.onnx does not exist"):
        lsquant.verify(trained[0], tmp_path / "nothing.onnx", [trained[1]])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.95, 0.999])
def test_truncated_files(share: float, trained: Any, exported: Path, tmp_path: Path) -> None:
    data = exported.read_bytes()
    path = tmp_path / "t.onnx"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DamagedFile, match=r"t\.onnx"):
        lsquant.verify(trained[0], path, [trained[1]])


def test_foreign_files(trained: Any, exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "f.onnx"
    path.write_bytes(b"\x89PNG\r\n" + bytes(range(256)))
    with pytest.raises(DamagedFile, match=r"f\.onnx"):
        lsquant.verify(trained[0], path, [trained[1]])
    model = onnx.load(exported)
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(DamagedFile, match=r"f\.onnx has no lsquant metadata"):
        lsquant.verify(trained[0], path, [trained[1]])
    with pytest.raises(DamagedFile, match="no lsquant metadata"):
        lsquant.onnx_session(path)


def test_newer_format(trained: Any, exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported)
    next(p for p in model.metadata_props if p.key == "lsquant.format").value = "2"
    onnx.save(model, tmp_path / "n.onnx")
    with pytest.raises(UsageError, match="newer"):
        lsquant.verify(trained[0], tmp_path / "n.onnx", [trained[1]])


def test_another_model(trained: Any, exported: Path) -> None:
    other = nn.Sequential(nn.Linear(3, 3))
    lsquant.prepare(other, Recipe(4, 4))
    lsquant.calibrate(other, [torch.randn(2, 3)])
    with pytest.raises(UsageError, match="another model"):
        lsquant.verify(other, exported, [torch.randn(2, 3)])


def test_flipped_bytes_never_pass_and_never_crash(trained: Any, exported: Path, tmp_path: Path) -> None:
    """A changed byte gives a clean error or a verdict; in weights, scales and biases never an exact one."""
    model, x = trained
    data = bytearray(exported.read_bytes())
    values = onnx.load(exported).graph.initializer
    spans = [(t.name, t.raw_data) for t in values if t.name.endswith((".weight", ".scale", ".bias")) and t.raw_data]
    assert len(spans) >= 7
    for name, raw in spans:
        at = bytes(data).index(raw) + len(raw) // 2
        damaged = bytearray(data)
        damaged[at] ^= 0x01
        (tmp_path / "b.onnx").write_bytes(damaged)
        assert not lsquant.verify(model, tmp_path / "b.onnx", [x]).exact, name
    generator = np.random.default_rng(0)
    for at in generator.integers(0, len(data), 60):
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(generator.integers(8))
        (tmp_path / "b.onnx").write_bytes(damaged)
        with suppress(DamagedFile, UsageError):
            lsquant.verify(model, tmp_path / "b.onnx", [x[:2]])


# ---- the counting ----


def test_tally() -> None:
    tally = Differences("outputs", "outputs")
    a = np.array([1.0, np.nan, 0.0, np.inf], np.float32)
    tally.add("same", a, a.copy())
    assert tally.check() == Check("outputs", "outputs", 4, 0, 0.0, "", 0, 1)
    tally.add("other", np.array([1.5, np.nan, -0.0, np.inf], np.float32), a)
    check = tally.check()
    assert (check.compared, check.mismatches, check.largest, check.worst, check.failing) == (8, 2, 0.5, "other", 1)
    tally.add("shape", a[:2], a)
    assert tally.check().largest == float("inf")
    assert tally.check().mismatches == 2 + 4
    tally.add("nan", np.array([np.nan, np.nan, 0.0, np.inf], np.float32), a)
    assert tally.check().mismatches == 2 + 4 + 1


def test_different_looks_at_bits() -> None:
    a = np.array([0.0, 1.0, np.nan], np.float32)
    b = np.array([-0.0, np.nextafter(np.float32(1), np.float32(2)), -np.nan], np.float32)
    assert different(a, b).tolist() == [True, True, False]


def test_levels() -> None:
    def verdict(*wrong: str) -> Verdict:
        checks = tuple(Check(level, "x", 10, int(level in wrong), 0.0) for level in LEVELS[1:])
        return Verdict("p", "exact", "r", {}, 1, 1, 1, checks)

    assert verdict().level == "outputs"
    assert verdict("weights").level == "none"
    assert verdict("layers").level == "weights"
    assert verdict("codes", "outputs").level == "layers"
    assert verdict("outputs").level == "codes"
    assert verdict("layers").level == "weights"
    assert verdict("codes").reaches("layers")
    assert not verdict("codes").reaches("outputs")


def test_an_input_of_unknown_rank(tmp_path: Path) -> None:
    """Shape inference cannot follow a computed shape: the probes of the layer behind it have no shape, not rank 0."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Linear(8, 600), nn.ReLU(), nn.Linear(600, 4))
    lsquant.prepare(model, Recipe.preset("w8a8"), x)
    lsquant.calibrate(model, [x])
    path = lsquant.export_onnx(model.eval(), tmp_path / "m.onnx", x)
    proto = onnx.load(path)
    (records,) = [prop for prop in proto.metadata_props if prop.key == "lsquant.layers"]
    layers = json.loads(records.value)
    before, layers[1]["input"] = layers[1]["input"], "same"
    records.value = json.dumps(layers)
    place = [node.name for node in proto.graph.node].index("2/QuantizeLinear")
    proto.graph.node[place].input[0] = "same"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(4, bool), "all"))
    make = onnx.helper.make_node
    proto.graph.node.insert(place, make("Reshape", [before, "the_shape"], ["same"]))
    proto.graph.node.insert(place, make("Compress", ["shape", "all"], ["the_shape"]))
    proto.graph.node.insert(place, make("Shape", [before], ["shape"]))
    onnx.save(proto, path)
    verdict = lsquant.verify(model, path, [x])
    assert verdict.exact, str(verdict)


class SampleBySample(nn.Module):
    """Convolutions that get the first two samples one at a time, without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 4, 3), nn.Conv1d(4, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.b(self.a(sample).relu()) for sample in (x[0], x[1])])


def test_layers_without_a_batch_dimension(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, other = torch.randn(2, 2, 3, 8).unbind()
    model = SampleBySample()
    lsquant.prepare(model, Recipe.preset("w4a4"), x)
    lsquant.calibrate(model, [x])
    path = lsquant.export_onnx(model.eval(), tmp_path / "m.onnx", x)
    verdict = lsquant.verify(model, path, [x, other])
    assert verdict.exact, str(verdict)
    with torch.no_grad():
        model.b.bias += 1  # type: ignore[operator]
    assert lsquant.verify(model, path, [x]).level == "weights"
