"""``compare``: bytes, verdicts and metrics are those of the files themselves; the advice follows from the rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lsquant
from lsquant import Comparison, Recipe
from lsquant._util.errors import UsageError
from lsquant._util.nested import replaced, tensors_in
from lsquant.formats import file_format
from lsquant.formats.onnx.row import OnnxFormat
from lsquant.nn import Add
from lsquant.verification import latency
from lsquant.verification.latency import Latency
from lsquant.verification.profiles import Shippable, _advice

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


class Residual(nn.Module):
    """Small, with a join."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv, self.add = nn.Conv2d(8, 8, 3, padding=1), Add()
        self.pool, self.flat, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        return self.head(self.flat(self.pool(self.add(self.conv(x), x))))


def ready(joins: bool, preset: str = "w4a8") -> tuple[Any, Tensor]:
    torch.manual_seed(2)
    model, x = Residual().eval(), torch.randn(6, 3, 8, 8)
    lsquant.prepare(model, Recipe.preset(preset, integer_only=joins), example_inputs=x)
    lsquant.calibrate(model, [x])
    return model, x


def first_logit(output: Any, batch: Any) -> Tensor:
    return output[:, 0].double().mean()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing is none of these tests' business."""
    monkeypatch.setattr(latency, "SECONDS", 0.0)


def in_runtime(path: Path, x: Tensor) -> np.ndarray:
    session = ort.InferenceSession(str(path))
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def test_rows_say_what_the_files_are(tmp_path: Path) -> None:
    model, x = ready(joins=True)
    torch.manual_seed(3)
    plain, batches = Residual().eval(), [x, -x]
    training = model.train()
    found = lsquant.compare(training, x, batches, first_logit, float_model=plain, folder=tmp_path, repeats=7, threads=2)
    assert training.training
    model.eval()
    assert [row.name for row in found.rows] == ["float", "exact", "small", "qdq", "integer", "packed"]
    assert (found.batch_sizes, found.samples, found.threads) == ((1, 6), 12, 2)
    for row in found.rows[1:]:
        path = tmp_path / file_format(row.name).file_name
        assert row.bytes == path.stat().st_size
        assert row.level == lsquant.verify(model, path, batches).level
        if row.name == "packed":
            assert not row.latency
            assert row.oldest is None
            with torch.no_grad():
                wanted = float((model(x)[:, 0].mean() + model(-x)[:, 0].mean()) / 2)
            assert row.metrics["first_logit"] == pytest.approx(wanted)
            continue
        outputs = [in_runtime(path, batch)[:, 0].astype(np.float64).mean() for batch in batches]
        if row.exact:
            assert row.metrics["first_logit"] == sum(outputs) / 2
        assert set(row.latency) == set(row.ratio) == {1, 6}
        for size, times in row.latency.items():
            assert 0 < times.p20 <= times.p50 <= times.p80
            assert row.ratio[size] == times.p50 / found.row("float").latency[size].p50
        assert bool(row.reason) == row.of_fused_form == (row.name == "integer")
    assert [found.row(n).exact for n in ("exact", "small", "integer", "packed")] == [True] * 4
    assert [found.row(n).oldest for n in ("exact", "small", "integer")] == ["1.16.3", "1.23.2", "1.23.2"]
    with torch.no_grad():
        wanted = float((plain(x)[:, 0].double().mean() + plain(-x)[:, 0].double().mean()) / 2)
    assert found.row("float").metrics == {"first_logit": wanted}
    assert found.row("float").level is None
    assert json.loads(json.dumps(found.to_dict()))["rows"][1]["bytes"] == found.row("exact").bytes
    assert str(found).splitlines()[-1] == found.advice
    assert found.best in found.advice


def test_a_file_of_other_weights_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The metric and the verdict are the file's own."""
    model, x = ready(joins=False)
    other, _ = ready(joins=False)
    with torch.no_grad():
        other.head.bias += 100.0
    write: Callable[..., Path] = OnnxFormat.write

    def swapped(self: OnnxFormat, model: nn.Module, path: Path, example: Any, **options: Any) -> Path:
        return write(self, other if self.name == "small" else model, path, example, **options)

    monkeypatch.setattr(OnnxFormat, "write", swapped)
    found = lsquant.compare(model, x, [x], first_logit, profiles=["exact", "small"], repeats=7)
    assert found.row("exact").exact
    assert not found.row("small").exact
    assert found.row("small").metrics["first_logit"] == pytest.approx(
        found.row("exact").metrics["first_logit"] + 100, abs=1e-3
    )
    assert found.best == "exact"


def test_what_cannot_be_written_says_why() -> None:
    model, x = ready(joins=False, preset="w2a2")
    found = lsquant.compare(model, x, [x], profiles=["integer", "small"], repeats=7)
    row = found.row("integer")
    assert row.reason.startswith("left out: fuse: the tensors between the layers")
    assert (row.bytes, row.level, row.latency, row.metrics) == (None, None, {}, {})
    assert found.row("small").oldest == "1.24.1"
    assert f"integer: {row.reason}" in str(found)


def test_a_fused_network_ships_as_integer_only() -> None:
    model, x = ready(joins=True)
    network = lsquant.fuse(model)
    found = lsquant.compare(network, x, [x], first_logit, profiles=["integer", "exact", "packed"], repeats=7)
    assert [found.row(name).exact for name in ("integer", "exact", "packed")] == [True] * 3
    with torch.no_grad():
        wanted = {"integer": network(x), "exact": model(x)}
    for name, output in wanted.items():
        assert found.row(name).metrics["first_logit"] == float(output[:, 0].double().mean())
    assert found.row("float").bytes is not None
    assert not found.row("integer").reason
    assert "the trained ones, bit for bit" in found.advice
    assert "float: its metric is measured where compare is given float_model=" in str(found)


def test_links_are_not_followed(tmp_path: Path) -> None:
    model, x = ready(joins=False)
    (tmp_path / "elsewhere").write_text("kept")
    for name in ("float.onnx", "exact.onnx"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UsageError, match=f"{name} is a symbolic link"):
            lsquant.compare(model, x, [x], profiles=["exact"], folder=tmp_path, repeats=7)
        (tmp_path / name).unlink()
    assert (tmp_path / "elsewhere").read_text() == "kept"


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).bfloat16()


def test_what_cannot_be_run_or_cut() -> None:
    """NumPy has no bfloat16; and an example has to be a batch."""
    torch.manual_seed(6)
    model, x = Halves().eval(), torch.randn(4, 5)
    lsquant.prepare(model, Recipe(4, 8))
    lsquant.calibrate(model, [x])
    found = lsquant.compare(model, x, [x], profiles=["exact", "packed"], repeats=7)
    assert "ONNX Runtime does not run this file from Python" in found.row("float").reason
    assert found.best == "packed"
    plain, x = nn.Sequential(nn.Linear(5, 3)).eval(), torch.randn(5)
    lsquant.prepare(plain, Recipe(4, 8))
    lsquant.calibrate(plain, [x])
    with pytest.raises(UsageError, match="of which the first dimension has to be the batch"):
        lsquant.compare(plain, x, [x], repeats=7)


@dataclasses.dataclass(frozen=True)
class Answer:
    logits: Tensor
    name: str = "answer"


class Wrapped(nn.Module):
    """Takes keywords, returns tensors in containers."""

    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, *, first: Tensor, second: Tensor) -> dict[str, Any]:
        y = self.layer(first + second)
        return {"answer": Answer(y), "pair": (y + 1, None)}


def test_containers_and_keywords() -> None:
    torch.manual_seed(4)
    model = Wrapped().eval()
    batch = {"first": torch.randn(4, 5), "second": torch.randn(4, 5)}
    lsquant.prepare(model, Recipe(4, 8))
    lsquant.calibrate(model, [batch])
    seen = []

    def metric(output: dict[str, Any], batch: dict[str, Tensor]) -> float:
        seen.append(type(output["answer"]))
        assert output["pair"][1] is None
        assert output["answer"].name == "answer"
        return float(output["answer"].logits.sum() + output["pair"][0].sum())

    def forward(network: Any, batch: dict[str, Tensor]) -> Any:
        return network(first=network.scale * batch["first"], second=batch["second"])

    found = lsquant.compare(model, batch, [batch], metric, forward=forward, profiles=["exact"], repeats=7)
    assert set(seen) == {Answer}
    with torch.no_grad():
        answer = model(first=2 * batch["first"], second=batch["second"])
    assert found.row("exact").exact
    assert found.row("exact").metrics["metric"] == float(answer["answer"].logits.sum() + answer["pair"][0].sum())


def test_errors() -> None:
    model, x = ready(joins=False)
    for given, said in (
        ({"profiles": ["exactly"]}, "'exactly' is no profile to compare; choose from exact, small, qdq"),
        ({"profiles": ()}, "profiles is empty; choose from exact"),
        ({"repeats": 3}, "repeats=3: at least 7"),
        ({"threads": 0}, "threads=0: at least 1, at most 1024"),
        ({"threads": True}, "threads=True: at least 1"),
        ({"float_model": "m"}, "the model is 'm', which is no nn.Module"),
        ({"folder": str(Path(__file__))}, "folder=.*test_compare.py.*: File exists"),
        ({"metric": lambda y, b: "good"}, r"metric\(output, batch\) gave a str"),
    ):
        with pytest.raises(UsageError, match=said):
            lsquant.compare(model, x, [x], **{"float_model": model, **given})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"metric\(output, batch\) gave a str"):
        lsquant.compare(model, x, [x], lambda y, b: "good", profiles=["exact"])
    with pytest.raises(UsageError, match="no batches were given"):
        lsquant.compare(model, x, [])
    other = Wrapped().eval()
    lsquant.prepare(other, Recipe(4, None))
    batch = ({"first": torch.zeros(1, 5), "second": torch.zeros(1, 5)}, torch.zeros(1))
    with pytest.raises(UsageError, match=r"forward=lambda model, batch: model\(\*\*batch\[0\]\)"):
        lsquant.compare(other, batch[0], [batch])


def row(name: str, level: str, ratios: tuple[float, float], size: int) -> Shippable:
    times = {batch: Latency(r, r, r) for batch, r in zip((1, 64), ratios, strict=True)}
    return Shippable(name, size, times, {b: t.p50 for b, t in times.items()}, {}, level, "1.16.3")


PLAIN = row("float", "none", (1.0, 1.0), 1000)


@pytest.mark.parametrize(
    ("rows", "best", "says"),
    [
        # the fastest of those that keep the trained bits
        ([row("a", "outputs", (1.5, 1.6), 300), row("b", "outputs", (0.5, 0.4), 400)], "b", "bit for bit, 0.50 of"),
        # faster, and not the trained bits
        ([row("a", "outputs", (0.8, 0.8), 300), row("b", "weights", (0.5, 0.4), 400)], "a", "b is faster (0.50 of"),
        # alike in time: the smaller one
        ([row("a", "outputs", (0.50, 0.50), 300), row("b", "outputs", (0.49, 0.49), 400)], "a", "300 bytes (0.30 of"),
        # none is exact: the highest level that is reached
        ([row("a", "weights", (0.5, 0.5), 300), row("b", "layers", (0.9, 0.9), 400)], "b", "verdict reaches layers"),
        # slower than float
        ([row("a", "outputs", (1.5, 0.9), 300)], "a", "an integer-only network is faster (joins=8"),
        # nothing was timed
        ([Shippable("packed", 50, level="outputs")], "packed", "50 bytes; nothing was timed"),
        ([Shippable("a", reason="left out: x")], None, "no file was written"),
    ],
)  # fmt: skip
def test_advice(rows: list[Shippable], best: str | None, says: str) -> None:
    found, text = _advice([PLAIN, *rows], (1, 64), None)
    assert found == best
    assert says in text


def test_advice_for_integer_only_networks() -> None:
    slow = [PLAIN, row("integer", "outputs", (1.5, 0.9), 300)]
    best, text = _advice(slow, (1, 64), "uint8")
    assert best == "integer"
    assert "joins=8" not in text
    assert "slower than the float network at batch 1: look at what is in floating point" in text
    assert "network: look" in _advice([PLAIN, row("integer", "outputs", (1.5, 1.1), 300)], (1, 64), "uint8")[1]
    fast = [PLAIN, row("exact", "outputs", (0.4, 0.4), 300), row("integer", "codes", (0.5, 0.4), 200)]
    assert _advice(fast, (1, 64), "uint8")[0] == "exact"
    for container, target in (("int8", "xnnpack"), ("symmetric", "tensorrt")):
        best, text = _advice(fast, (1, 64), container)
        assert best == "integer"
        assert f"the file of the target '{target}', 200 bytes; times and levels here are those of ONNX Runtime" in text


def test_whose_outputs_an_integer_only_file_has() -> None:
    model, x = ready(joins=True)
    found = lsquant.compare(model, x, [x], profiles=["integer"], repeats=7)
    assert "its outputs are those of lsquant.fuse(model), bit for bit" in found.advice
    assert "differs a little from that form: train network = lsquant.fuse(model) on" in found.advice
    assert "compared with the fused form of the model" in found.row("integer").reason


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call once a round, in turns; medians and spread of the rounds, in milliseconds."""
    now, order = [0.0], []

    def call(name: str, seconds: list[float]) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            now[0] += seconds[0] if len(seconds) == 1 else seconds.pop(0)

        return run

    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    # a: two calls to warm up, then in every round one that does not count and one that does
    rounds = [0.001, 0.002, 0.003, 0.004, 0.010]
    a = [0.5, 0.5, *(t for r in rounds for t in (0.7, r)), 0.0]
    found = latency.in_turns({"a": call("a", a), "b": call("b", [0.006])}, 5)
    assert order == ["a", "a", "b", "b", *["a", "a", "b", "b"] * 5]
    assert found["a"].p50 == pytest.approx(3.0)
    assert found["a"].p20 == pytest.approx(np.percentile([1, 2, 3, 4, 10], 20))
    assert found["a"].p80 == pytest.approx(np.percentile([1, 2, 3, 4, 10], 80))
    assert (found["b"].p20, found["b"].p50) == pytest.approx((6.0, 6.0))


def test_short_calls_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    now, count = [0.0], [0]

    def run() -> None:
        now[0] += 0.01
        count[0] += 1

    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(latency, "SECONDS", 0.035)
    assert latency.in_turns({"a": run}, 7)["a"].p50 == pytest.approx(10.0)
    assert count[0] == 2 + 7 * (1 + 4)


def test_tensors_are_replaced_in_their_containers() -> None:
    transformers = pytest.importorskip("transformers")
    output = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=torch.zeros(2), hidden_states=None)
    value = {
        "a": [torch.zeros(1), "kept"],
        "b": Answer(torch.zeros(3)),
        "c": (output, SimpleNamespace(t=torch.ones(1))),
    }
    given = [torch.full((2,), float(i)) for i in range(4)]
    found = replaced(value, given)
    assert [t.tolist() for t in tensors_in(found)] == [t.tolist() for t in given]
    assert found["a"][1] == "kept"
    assert type(found["c"][0]) is type(output)
    assert found["c"][0].last_hidden_state is found["c"][0]["last_hidden_state"] is given[2]
    assert [t.tolist() for t in tensors_in(value)] == [[0.0], [0.0] * 3, [0.0] * 2, [1.0]]  # it was copied


def test_it_prints_a_table() -> None:
    found = Comparison(
        (PLAIN, row("a", "outputs", (0.5, 0.25), 250), Shippable("b", reason="left out: because")),
        (1, 64), 10, 1, "a machine", "a", "ship a",
    )  # fmt: skip
    lines = str(found).splitlines()
    assert lines[0].startswith("file   bytes  of float  batch 1, ms (p20 to p80)  of float  batch 64, ms")
    assert " ".join(lines[2].split()) == "a 250 0.25 0.5 (0.5 to 0.5) 0.50 0.25 (0.25 to 0.25) 0.25 outputs 1.16.3"
    assert lines[-3:] == ["b: left out: because", "a machine, 1 thread; verdicts on 10 samples", "ship a"]
