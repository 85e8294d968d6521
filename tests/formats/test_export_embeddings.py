"""Quantized embeddings in ONNX files: rows are gathered as codes, the values are the trained ones, bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lsquant
from lsquant import QuantSpec, Recipe, Rule
from lsquant.formats.onnx import load_onnx
from lsquant.formats.onnx.reader import initializers

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

WORDS, SIZE = 40, 24
PROFILES = ("exact", "small", "qdq")
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
UINT8, INT8, UINT2, INT2, UINT4, INT4 = 2, 3, 25, 26, 21, 22  # onnx.TensorProto
KINDS = ("tensor", "channel", "group")


def spec(bits: int, kind: str, **options: Any) -> QuantSpec:
    return QuantSpec(bits, granularity=kind, group_size=8 if kind == "group" else None, **options)  # type: ignore[arg-type]


def table(quantized: QuantSpec) -> nn.Sequential:
    """An embedding alone, row 3 of padding."""
    model = nn.Sequential(nn.Embedding(WORDS, SIZE, padding_idx=3))
    lsquant.prepare(model, Recipe(quantized, None))
    return model.eval()


class Side(nn.Module):
    """Models side by side, by name: one file for all."""

    def __init__(self, models: dict[str, nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)

    def forward(self, words: Tensor) -> list[Tensor]:
        return [model(words) for model in self.models.values()]


class Language(nn.Module):
    """A language model in small: words and places, a layer, a head that is tied or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, SIZE, padding_idx=0), nn.Embedding(9, SIZE)
        self.middle, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(torch.arange(words.shape[1]))
        return self.head(self.middle(x).relu())


def language(recipe: Recipe, tied: bool = True) -> tuple[Language, Tensor]:
    model, words = Language(tied), torch.randint(WORDS, (4, 7))
    words[0, :3] = 0
    lsquant.prepare(model, recipe)
    if recipe.activation is not None:
        lsquant.calibrate(model, [words])
    return model.eval(), words


CASES = {f"{kind}_{bits}_{x}": (spec(bits, kind), x) for kind in KINDS for bits in (2, 8) for x in (8, None)}
"""Name -> (weights, bits of the inputs)."""


def languages(tied: bool) -> tuple[Side, Tensor]:
    """A language model of every case."""
    found = {name: language(Recipe(*case), tied) for name, case in CASES.items()}
    return Side({name: model for name, (model, _) in found.items()}), next(iter(found.values()))[1]


def exported(model: nn.Module, words: Tensor, tmp_path: Path, profile: str) -> tuple[Path, dict[str, Any]]:
    path = lsquant.export_onnx(model, tmp_path / f"{profile}.onnx", words, profile=profile)
    return path, {tensor.name: tensor for tensor in load_onnx(path)[0].graph.initializer}


def optimized(path: Path, level: str) -> Any:
    """The graph that ONNX Runtime runs."""
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options)
    return session, onnx.load(options.optimized_model_filepath).graph


@pytest.mark.parametrize("profile", PROFILES)
def test_rows_are_code_times_step(profile: str, tmp_path: Path) -> None:
    """fl(code * step) for every row, computed here from the trained codes; at every level of optimization."""
    model = Side({f"{kind}_{bits}": table(spec(bits, kind)) for kind in KINDS for bits in (2, 3, 4, 8)})
    words = torch.arange(WORDS).reshape(5, 8)
    path, _ = exported(model, words, tmp_path, profile)
    wanted = []
    for layer in model.models.values():
        codes, step, _ = layer[0].integer_weight()  # type: ignore[index, operator]
        count = step.numel()
        rows = codes.numpy().astype(np.float32).reshape(count, -1) * step.detach().numpy().reshape(count, 1)
        wanted.append(rows.reshape(5, 8, SIZE) + 0)  # no -0.0
    for level in LEVELS:
        session, _ = optimized(path, level)
        got = session.run(None, {session.get_inputs()[0].name: words.numpy()})
        assert all(np.array_equal(a.view(np.int32), b.view(np.int32)) for a, b in zip(got, wanted, strict=True))
    verdict = lsquant.verify(model, path, [words, words[:1]])
    assert verdict.exact, str(verdict)
    assert verdict.plain is None or verdict.plain.exact


@pytest.mark.parametrize("profile", PROFILES)
def test_tables_stay_integers_in_memory(profile: str, tmp_path: Path) -> None:
    """No level of optimization makes a float table; codes of 2 bits become bytes where there is any."""
    model, words = languages(tied=False)
    path, _ = exported(model, words, tmp_path, profile)
    for level in LEVELS:
        _, graph = optimized(path, level)
        held = {t.name: t for t in graph.initializer}
        made = {name: node for node in graph.node for name in node.output}
        gathers = [n for n in graph.node if "Gather" in n.op_type and n.input[1] == graph.input[0].name]
        sources = {n.input[0] for n in gathers if not n.input[0].endswith("weight_step")}
        assert len(sources) == len(CASES)
        for source in sources:
            if source not in held:  # the Cast of 2 bits
                assert (level, profile, made[source].op_type) == ("ORT_DISABLE_ALL", "small", "Cast")
            assert held[source if source in held else made[source].input[0]].data_type in (INT2, INT8, UINT8)
        floats = [name for name, t in held.items() if t.data_type == onnx.TensorProto.FLOAT]
        assert not [name for name in floats if list(held[name].dims) == [WORDS, SIZE] and ".head/" not in name]


@pytest.mark.parametrize("profile", PROFILES)
def test_tied_weights_are_one_initializer(profile: str, tmp_path: Path) -> None:
    model, words = languages(tied=True)
    path, tensors = exported(model, words, tmp_path, profile)
    large = [name for name, t in tensors.items() if math.prod(t.dims) == WORDS * SIZE]
    assert large == [f"models.{name}.words.weight" for name in CASES]
    for name, (quantized, activation) in CASES.items():
        shifted = quantized.bits == 8 and activation is not None and profile != "qdq"  # as MatMulInteger takes it
        narrow = INT2 if (quantized.bits, profile) == (2, "small") else INT8
        assert tensors[f"models.{name}.words.weight"].data_type == (UINT8 if shifted else narrow)
    verdict = lsquant.verify(model, path, [words, words[:1]])
    assert verdict.reaches("weights" if profile == "qdq" else "outputs"), str(verdict)
    if profile == "qdq":
        (alone,) = [check for check in verdict.checks if check.what == "outputs, layer by layer"]
        assert alone.largest < 1e-5


def test_a_tied_head_whose_sums_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sums could leave int32, here a small bound, the head multiplies parts of the one table."""
    monkeypatch.setattr("lsquant.formats.onnx.sums.INT32_SUMS", 2**20)
    model, words = language(Recipe(spec(8, "channel"), 8))
    path, tensors = exported(model, words, tmp_path, "exact")
    names = [node.name for node in load_onnx(path)[0].graph.node]
    assert sum(name.startswith("head/MatMulInteger") for name in names) > 1
    assert [name for name in tensors if name.startswith("head.weight")] == []
    assert lsquant.verify(model, path, [words]).exact


def test_types_of_the_codes(tmp_path: Path) -> None:
    """As other weights: bytes, int8 where it can be; in profile small 2 and 4 bits and their operator set."""
    cases = [(2, True, INT2), (3, True, INT4), (4, True, INT4), (5, True, INT8), (8, True, INT8)]
    cases += [(2, False, UINT2), (4, False, UINT4), (8, False, UINT8)]
    words = torch.arange(WORDS).reshape(8, 5)
    model = Side({str(i): table(spec(bits, "channel", signed=s)) for i, (bits, s, _) in enumerate(cases)})
    for profile, opset in zip(PROFILES, (14, 25, 14), strict=True):
        path, tensors = exported(model, words, tmp_path, profile)
        assert load_onnx(path)[0].opset_import[0].version == opset
        for i, (bits, signed, small) in enumerate(cases):
            tensor = tensors[f"models.{i}.0.weight"]
            byte = UINT8 if (bits, signed) == (8, False) else INT8
            assert tensor.data_type == (small if profile == "small" else byte)
            assert list(tensor.dims) == [WORDS, SIZE]
        assert lsquant.verify(model, path, [words]).exact
    four = Side({str(i): table(spec(bits, "channel")) for i, bits in enumerate((2, 4))})
    path = lsquant.export_onnx(four, tmp_path / "m.onnx", words, profile="small", opset=21)
    assert {t.data_type for t in load_onnx(path)[0].graph.initializer if t.name.endswith("weight")} == {INT4}


class Odd(nn.Module):
    """One table with indices in int32, without a dimension, constant, and a second table of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Embedding(WORDS, SIZE), nn.Embedding(WORDS, SIZE)
        self.two.weight = self.one.weight
        self.register_buffer("places", torch.tensor([[1, 5], [7, 7]]))

    def forward(self, long: Tensor, short: Tensor) -> tuple[Tensor, ...]:
        return (
            self.one(long),
            self.two(short),
            self.one(self.places),
            self.one(short[:, 0]),
            self.two(long.sum() % WORDS),
        )


@pytest.mark.parametrize("profile,kind", [("exact", "group"), ("small", "channel"), ("qdq", "tensor")])
def test_indices_of_any_kind(profile: str, kind: str, tmp_path: Path) -> None:
    model = Odd()
    lsquant.prepare(model, Recipe(spec(4, kind), None))
    batch = {"long": torch.randint(WORDS, (3, 2, 5)), "short": torch.randint(WORDS, (3, 4), dtype=torch.int32)}
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", batch, profile=profile)
    proto, metadata = load_onnx(path)
    calls = [(trace.layer, trace.call) for trace in metadata["layers"]]
    assert calls == [("one", 0), ("two", 0), ("one", 1), ("one", 2), ("two", 1)]
    assert [t.name for t in proto.graph.initializer if math.prod(t.dims) == WORDS * SIZE] == ["one.weight"]
    verdict = lsquant.verify(model, path, [batch, {name: x[:1] for name, x in batch.items()}])
    assert verdict.exact, str(verdict)


def test_mixed_rules_and_a_float_head(tmp_path: Path) -> None:
    """8 bits for the words, 4 for the places, no head: each table as its rule says, and exact together."""
    rules = [Rule("words", spec(8, "channel"), None), Rule("places", spec(4, "tensor"), None), Rule("head", None, None)]
    model, words = language(Recipe(spec(4, "channel"), 8, rules), tied=False)
    path, tensors = exported(model, words, tmp_path, "small")
    assert [tensors[f"{name}.weight"].data_type for name in ("words", "places", "middle")] == [INT8, INT4, INT4]
    assert lsquant.verify(model, path, [words]).reaches("codes")


def test_float16_steps_take_two_bytes(tmp_path: Path) -> None:
    """Of tables and of blocks, in profile small, where every step is a float16 number."""
    rules = [Rule(nn.Embedding, spec(8, "channel", step_dtype="float16"), None)]
    for step_dtype, kept in (("float16", onnx.TensorProto.FLOAT16), ("float32", onnx.TensorProto.FLOAT)):
        model, words = language(Recipe(spec(4, "group", step_dtype=step_dtype), None, rules), tied=False)
        for profile in PROFILES:
            path, tensors = exported(model, words, tmp_path, profile)
            small = profile == "small"
            for name, kind in (("words", onnx.TensorProto.FLOAT16), ("middle", kept)):
                assert tensors[f"{name}.weight_step"].data_type == (kind if small else onnx.TensorProto.FLOAT)
            verdict = lsquant.verify(model, path, [words])
            assert verdict.reaches("weights"), str(verdict)
            (alone,) = [check for check in verdict.checks if check.what == "outputs, layer by layer"]
            assert alone.largest < 1e-5


@pytest.mark.parametrize("what", ["words.weight", "words.weight_step"])
def test_verify_finds_another_code_or_step(what: str, tmp_path: Path) -> None:
    model, words = language(Recipe(spec(8, "channel"), 8), tied=False)
    path, _ = exported(model, words, tmp_path, "exact")
    proto = load_onnx(path)[0]
    (tensor,) = [t for t in proto.graph.initializer if t.name == what]
    values = initializers(proto)[what].copy()
    values[int(words[1, 1])] += values.dtype.type(1) if values.dtype.kind == "i" else np.float32(0.25)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, what))
    onnx.save(proto, path)
    verdict = lsquant.verify(model, path, [words])
    assert verdict.level == "none"
    checks = {check.what: check for check in verdict.checks}
    assert checks["weight codes and steps"].worst == "words"
    assert checks["outputs, layer by layer"].worst == "words"


def test_verify_finds_another_row(tmp_path: Path) -> None:
    """The integers are the trained ones, and the graph looks up others."""
    model, words = language(Recipe(spec(8, "channel"), 8), tied=False)
    path, _ = exported(model, words, tmp_path, "exact")
    proto = load_onnx(path)[0]
    (gather,) = [node for node in proto.graph.node if node.name == "words/Gather"]
    graph = proto.graph
    graph.initializer.append(onnx.numpy_helper.from_array(np.int64(1), "one"))
    graph.initializer.append(onnx.numpy_helper.from_array(np.int64(WORDS), "all"))
    place = list(graph.node).index(gather)
    graph.node.insert(place, onnx.helper.make_node("Mod", ["next", "all"], ["other"], "words/Mod"))
    graph.node.insert(place, onnx.helper.make_node("Add", [gather.input[1], "one"], ["next"], "words/Add"))
    gather.input[1] = "other"
    onnx.save(proto, path)
    verdict = lsquant.verify(model, path, [words])
    assert verdict.level == "weights", str(verdict)


def test_padding_is_a_row_as_it_was_trained(tmp_path: Path) -> None:
    model, words = table(spec(4, "tensor")), torch.tensor([[3, 3], [0, 3]])
    path, _ = exported(model, words, tmp_path, "exact")
    session = lsquant.onnx_session(path)
    (rows,) = session.run(None, {session.get_inputs()[0].name: words.numpy()})
    assert not rows[words.numpy() == 3].any()
    assert np.array_equal(rows, model(words).detach().numpy())


def test_groups_of_a_whole_row_and_one_row(tmp_path: Path) -> None:
    for rows, group in ((1, 8), (6, SIZE)):
        model = nn.Sequential(nn.Embedding(rows, SIZE))
        lsquant.prepare(model, Recipe(QuantSpec(4, granularity="group", group_size=group), None))
        words = torch.randint(rows, (4, 3))
        for profile in PROFILES:
            path, _ = exported(model, words, tmp_path, profile)
            assert lsquant.verify(model, path, [words]).exact


def test_openvino_reads_them(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model, words = language(Recipe(spec(8, "channel"), 8))
    path, _ = exported(model, words, tmp_path, "exact")
    assert lsquant.verify(model, path, [words], runtime="openvino").reaches("weights")
