"""Files from strangers: ten thousand edited files of each format give a result or an LsquantError, nothing else."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lsquant
from helpers.checkpoint import VARIED, trained
from helpers.convert import images, net, ready
from helpers.edited_files import Edits, Subject, edited_safetensors, fuzz, read_safetensors, write_safetensors
from helpers.language_models import FLOAT, language_model, quantized
from lsquant import LsquantError, QuantSpec, Recipe, Rule
from lsquant._util.files import json_text, write_json
from lsquant._util.tensors import read_tensors
from lsquant.formats.gguf import Vocabulary, read_gguf
from lsquant.formats.table import format_of
from lsquant.report.run_files import read_verdict, run_files
from lsquant.runs.directory import Run, start_run
from lsquant.runs.log_reader import read_metrics
from lsquant.runs.network_files import load_float
from lsquant.shipped import ship
from lsquant.tasks import Settings, open_run
from lsquant.tasks.digits import Digits
from lsquant.training import CosineSchedule, TransitionRate, WeightAverage, fit, param_groups
from lsquant.verification import export_vectors
from lsquant.verification.check_vectors import main as check_vectors
from lsquant.verification.comparison import compare_weights

RECIPE = Recipe(
    VARIED.weight, VARIED.activation, [*VARIED.rules, Rule("0*", 8), Rule("*", None)],
    Recipe.preset("w4a4").preset_rules,
)  # fmt: skip
FAST, MANY = 150, 10_000
PARTS = 4  # of the many, so that they can run side by side


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one good file of each format; read only."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases")
    model, x = trained(VARIED), images(4)
    torch.save(x, folder / "x.pt")
    lsquant.save(model, folder / "saved")
    lsquant.export_packed(model, folder / "packed")
    joined = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1)).eval()
    lsquant.prepare(joined, Recipe(4, 8, joins=8), example_inputs=images(2))
    lsquant.calibrate(joined, [images(2)])
    lsquant.save(joined, folder / "joined")
    lsquant.export_program(lsquant.fuse(joined), folder / "program")
    (folder / "recipe").write_text(RECIPE.to_toml())
    run_directory(folder / "run")
    training(folder / "state")
    return folder


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an ONNX file of each profile, and golden vectors; read only."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    folder, model, x = tmp_path_factory.mktemp("graphs"), trained(VARIED), images(4)
    lsquant.save(model, folder / "saved")
    torch.save(x, folder / "x.pt")
    for profile in ("exact", "small", "qdq"):
        lsquant.export_onnx(model, folder / f"{profile}.onnx", x, profile=profile)
    export_vectors(model, folder / "v.npz", x)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model's folder of each profile; read only."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("folders"), tiny_language_model()
    lsquant.export_compressed_tensors(model, folder / "compressed-tensors")
    lsquant.export_hf(model, folder / "hf")
    return folder


def tiny_language_model() -> Any:
    model = language_model(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    groups, channels = QuantSpec(4, True, granularity="group", group_size=8), QuantSpec(5, True, granularity="channel")
    return quantized(model, Recipe(groups, rules=[*FLOAT, Rule("*.o_proj", channels)]))


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GGUF file, the model in it, and tokenizers; read only."""
    for package in ("gguf", "transformers"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("language"), gguf_model()
    lsquant.save(model, folder / "saved")
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁the"]
    pieces = [t.encode() for t in texts]
    (folder / "tok.bin").write_bytes(b"\7\0\0\0" + b"".join(struct.pack("<fi", 0, len(t)) + t for t in pieces))
    parts = [b"\x0a" + bytes([len(t)]) + t + b"\x15\0\0\x80\xbf" for t in pieces]  # text and score
    (folder / "tokenizer.model").write_bytes(b"".join(b"\x0a" + bytes([len(p)]) + p for p in parts) + b"\x12\2\x18\2")
    with pytest.warns(UserWarning, match="token_embd"):
        lsquant.export_gguf(model, folder / "m.gguf", tokenizer=folder / "tokenizer.json")
    return folder


TOKENIZER = {
    "added_tokens": [{"id": 3, "content": "<end>", "special": True}],
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "use_regex": True}]},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<end>"}}]},
    "model": {"type": "BPE", "unk_token": "a", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b", ["a", "b"]]},
}


def gguf_model() -> nn.Module:
    """A Llama of one layer, prepared, with steps that float16 holds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    lsquant.prepare(model, Recipe.preset("w4g32", first_last=None, skip=[nn.Embedding]))
    for _, quantizer in lsquant.quantizers(model):
        quantizer.step.data = quantizer.step.data.half().float()
    return model


# ---- safetensors ----


def of_saved(bases: Path, folder: Path) -> Subject:
    parts, target = read_safetensors(bases / "saved"), folder / "m"

    def read() -> None:
        lsquant.load(net(), target).eval()(images(2))

    return Subject(lambda e: edited_safetensors(e, target, parts, e.one(("lsquant.recipe", "lsquant.aliases"))), read)


def of_packed(bases: Path, folder: Path) -> Subject:
    parts, target = read_safetensors(bases / "packed"), folder / "p"

    def read() -> None:
        lsquant.read_packed(target)
        lsquant.load_packed(net(), target).eval()(images(2))

    return Subject(lambda e: edited_safetensors(e, target, parts, "lsquant.packed"), read)


def of_program(bases: Path, folder: Path) -> Subject:
    parts, target = read_safetensors(bases / "program"), folder / "p"
    model = lsquant.load(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1)).eval(), bases / "joined")
    network = lsquant.fuse(model)

    def read() -> None:
        lsquant.verify(network, target, [images(2)])

    return Subject(lambda e: edited_safetensors(e, target, parts, "lsquant.program"), read)


def of_folder(profile: str) -> Callable[[Path, Path], Subject]:
    def subject(folders: Path, folder: Path) -> Subject:
        target, model = folder / "f", tiny_language_model()
        shutil.copytree(folders / profile, target)
        config = (target / "config.json").read_text()
        tensors, metadata = read_safetensors(folders / profile / "model.safetensors")
        whole = (target / "model.safetensors").read_bytes()

        def edit(edits: Edits) -> str:
            kind = edits.one(("config", "config", "tensor", "tensor", "bytes"))
            (target / "config.json").write_text(config)
            (target / "model.safetensors").write_bytes(edits.data(whole) if kind == "bytes" else whole)
            if kind == "config":
                text = edits.json(config).encode("utf-8", "replace").decode()
                (target / "config.json").write_text(text)
                return text[:3000]
            if kind == "tensor":
                write_safetensors(target / "model.safetensors", edits.tensors(tensors), metadata, True)
            return kind

        return Subject(edit, lambda: lsquant.verify(model, target, []))

    return subject


# ---- ONNX ----


def of_onnx(profile: str) -> Callable[[Path, Path], Subject]:
    def subject(graphs: Path, folder: Path) -> Subject:
        import onnx

        data, target = (graphs / f"{profile}.onnx").read_bytes(), folder / "m.onnx"
        model, x = lsquant.load(net(), graphs / "saved").eval(), torch.load(graphs / "x.pt")
        shipped = ship(model)

        run = [True]

        def edit(edits: Edits) -> str:
            kind = edits.one(("layers", "layers", "session", "metadata", "bytes", "graph", "graph"))
            run[0] = edits.random.random() < 0.35
            if kind == "bytes":
                target.write_bytes(edits.data(data))
                return kind
            proto = onnx.load_from_string(data)
            said = edit_graph(edits, proto) if kind == "graph" else edit_metadata(edits, proto, kind)
            target.write_bytes(proto.SerializeToString())
            return f"{kind}: {said}"

        def read() -> None:
            """Every file is read and its weights are compared; a third is run as well, which takes the time."""
            if run[0]:
                lsquant.verify(model, target, [x])
            else:
                row = format_of(target)
                compare_weights(str(target), row.weights(row.read(target), shipped))

        return Subject(edit, read)

    return subject


def edit_metadata(edits: Edits, proto: Any, kind: str) -> str:
    pairs = [pair for pair in proto.metadata_props if kind in (pair.key.removeprefix("lsquant."), "metadata")]
    pair = edits.one(pairs)
    if kind == "metadata" and edits.random.random() < 0.3:
        pair.key = edits.one((f"{pair.key}x", "lsquant.session", "lsquant.layers", "lsquant."))
    else:
        text = edits.json(pair.value) if pair.value[:1] in "[{" else edits.text(pair.value)
        pair.value = text.encode("utf-8", "replace").decode()
    return f"{pair.key} {pair.value[:2000]}"


KINDS = ("dims", "type", "raw", "name", "external", "input", "output", "op", "domain", "attribute", "value", "opset",
         "remove", "copy")  # fmt: skip


def edit_graph(edits: Edits, proto: Any) -> str:
    """Change an initializer, a node or a value of the graph."""
    r, graph = edits.random, proto.graph
    tensor, node, value = edits.one(graph.initializer), edits.one(graph.node), edits.one([*graph.input, *graph.output])
    number = edits.one((0, 1, 2, 3, 6, 7, 10, 11, 21, 25, 99, -1, 2**31 - 1))
    kind = edits.one(KINDS)
    if kind == "dims":
        tensor.dims[:] = [edits.one((0, 1, 3, 2**20, 2**40, -1, *tensor.dims)) for _ in range(r.randint(0, 4))]
    elif kind == "type":
        tensor.data_type = number
    elif kind == "raw":
        tensor.raw_data = edits.data(tensor.raw_data)
    elif kind == "name":
        tensor.name = edits.one(t.name for t in graph.initializer)
    elif kind == "external":
        tensor.data_location = 1
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", edits.one(("/etc/passwd", "../x", "m.onnx"))
    elif kind == "input" and node.input:
        names = [n for other in graph.node for n in (*other.input, *other.output)]
        node.input[r.randrange(len(node.input))] = edits.one((*names, "", "x"))
    elif kind == "output":
        node.output[r.randrange(len(node.output))] = edits.one((*node.input, "", "x", *graph.node[0].output))
    elif kind == "op":
        node.op_type = edits.one([*(other.op_type for other in graph.node), "Relu", "Identity", "Nothing", "Loop"])
    elif kind == "domain":
        node.domain = edits.one(("com.microsoft", "x", "ai.onnx.ml"))
    elif kind == "attribute" and node.attribute:
        attribute = edits.one(node.attribute)
        attribute.type = edits.one((attribute.type, attribute.type, 1, 2, 3, 6, 7))
        attribute.i = number
        if attribute.ints:
            attribute.ints[r.randrange(len(attribute.ints))] = number
    elif kind == "value":
        value.type.tensor_type.elem_type = edits.one((value.type.tensor_type.elem_type, number))
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_value = edits.one((1, 2, 4, 0, 2**40))
    elif kind == "opset":
        proto.opset_import[0].version = number
        proto.ir_version = edits.one((proto.ir_version, number))
    elif kind == "remove":
        part = edits.one((graph.node, graph.initializer, graph.output, graph.input))
        del part[r.randrange(len(part))]
    else:
        part = edits.one((graph.node, graph.initializer, graph.output, graph.input))
        part.add().CopyFrom(edits.one(part))
    return f"{kind} {tensor.name} {node.name} {number}"


def of_vectors(graphs: Path, folder: Path) -> Subject:
    data, target = (graphs / "v.npz").read_bytes(), folder / "v.npz"

    def edit(edits: Edits) -> str:
        target.write_bytes(edits.data(data))
        return "bytes"

    return Subject(edit, lambda: check_vectors(str(graphs / "exact.onnx"), str(target)), (SystemExit,))


# ---- GGUF and tokenizers ----

NUMBERS = (0, 1, 2, 3, 7, 8, 9, 30, 31, 42, 255, 2**20, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


def of_gguf(language: Path, folder: Path) -> Subject:
    """Bytes and numbers of the header, bytes of the data; every file is read, and compared with the model."""
    data, target = (language / "m.gguf").read_bytes(), folder / "m.gguf"
    start = read_gguf(language / "m.gguf").start
    shipped = ship(lsquant.load(gguf_model(), language / "saved").eval())

    def edit(edits: Edits) -> str:
        kind = edits.one(("bytes", "header", "header", "number", "number", "data"))
        header, rest = bytearray(data[:start]), data[start:]
        if kind == "number":
            at, size = edits.random.randrange(start - 8), edits.one((1, 4, 8))
            header[at : at + size] = (edits.one(NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind == "header":
            header = edits.data(bytes(header))
        elif kind == "data":
            rest = edits.data(rest)
        target.write_bytes(edits.data(data) if kind == "bytes" else bytes(header) + rest)
        return kind

    def read() -> None:
        row = format_of(target)
        compare_weights(str(target), row.weights(row.read(target), shipped))

    return Subject(edit, read)


def of_tokenizer(language: Path, folder: Path) -> Subject:
    good = {name: (language / name).read_bytes() for name in ("tokenizer.json", "tokenizer.model", "tok.bin")}
    target = [folder]

    def edit(edits: Edits) -> str:
        name = edits.one(("tokenizer.json", "tokenizer.json", "tokenizer.model", "tok.bin"))
        target[0] = folder / name
        if name == "tokenizer.json":
            text = edits.json(good[name].decode())
            target[0].write_bytes(text.encode("utf-8", "replace"))
            return f"{name} {text[:3000]}"
        target[0].write_bytes(edits.data(good[name]))
        return f"{name} bytes"

    return Subject(edit, lambda: Vocabulary.of(target[0]).fields(1 << 17))


# ---- recipes and run directories ----


def of_recipe(bases: Path, folder: Path) -> Subject:
    text, kept = (bases / "recipe").read_text(), [""]

    def edit(edits: Edits) -> str:
        kept[0] = edits.toml(text)
        return kept[0][:3000]

    return Subject(edit, lambda: lsquant.prepare(net(), Recipe.from_toml(kept[0])))


FILES = ("config.toml", "recipe.toml", "env.json", "log.jsonl", "metrics.json", "export/packed.verdict.json")


def run_directory(path: Path) -> None:
    """A finished run of the task digits that was not trained."""
    task, recipe = Digits(width=2), Recipe(4, 4)
    start_run(Run(path, task, recipe, Settings(epochs=3, progressive=(8, 4), ema=0.9)))
    model = ready(task.model(), recipe, torch.rand(4, 1, 8, 8)).eval()
    lsquant.save(model, path / "model.safetensors")
    facts = {name: {"step": 0.1, "R": 0.5, "guarded": 3} for name, _ in lsquant.quantizers(model)}
    rows = [{"phase": "lsq", "epoch": n, "iteration": 9 * n, "loss": 0.5, "quantizers": facts} for n in (1, 2)]
    (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {"float": {"accuracy": 90.0}, "lsq": {"accuracy": 89.5}, "seconds": {"float": 1.0}}
    write_json(path / "metrics.json", {"format": 1, "task": "digits", "seed": 0, **results})
    lsquant.export_packed(model, path / "export/packed.safetensors")
    verdict = lsquant.verify(model, path / "export/packed.safetensors", [torch.rand(4, 1, 8, 8)])
    write_json(path / "export/packed.verdict.json", replace(verdict, plain=verdict).to_dict())


def of_run(bases: Path, folder: Path) -> Subject:
    good, target = bases / "run", folder / "run"
    texts = {name: (good / name).read_text() for name in FILES}
    shutil.copytree(good, target)
    last = [FILES[0]]

    def edit(edits: Edits) -> str:
        (target / last[0]).write_text(texts[last[0]])
        last[0] = name = edits.one(FILES)
        kind = edits.random.random()
        if kind < 0.15:
            (target / name).write_bytes(edits.data(texts[name].encode()))
            return f"{name} bytes"
        if name == "log.jsonl":
            lines = texts[name].splitlines()
            lines[edits.random.randrange(len(lines))] = edits.json(lines[0])
            text = "\n".join(lines)
        else:
            text = edits.toml(texts[name]) if name.endswith("toml") else edits.json(texts[name])
        (target / name).write_bytes(text.encode("utf-8", "replace"))
        return f"{name} {text[:3000]}"

    def read() -> None:
        """What reads one file at a time goes first: the report says what is missing and takes the rest."""
        found = run_files(target)
        json_text(found)
        read_metrics(target / "metrics.json")
        read_verdict(target / "export/packed.verdict.json")
        run = open_run(target)
        run.model()
        start_run(run, resume=True)

    return Subject(edit, read)


# ---- the state of a training ----


@cache
def small() -> tuple[nn.Module, list[Any]]:
    """A calibrated model and the batches of an epoch; to be copied."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    data = [(torch.rand(4, 3), torch.tensor([0, 1, 0, 1]))] * 3
    return ready(model, Recipe(4, 4), data[0][0]), data


def training(path: Path, stop: bool = True) -> nn.Module:
    """Train a small model from the checkpoint at ``path``, if there is one; ``stop``: only until there is one."""
    model, data = copy.deepcopy(small())
    optimizer = torch.optim.AdamW(param_groups(model, 0.001, low_bit=True))
    transition, average = TransitionRate(model, optimizer, steps=6), WeightAverage(model, 0.9)

    def interrupt(iteration: int) -> None:
        average.update()
        if stop and iteration == 4:
            raise InterruptedError

    options: dict[str, Any] = {"extras": {"average": average}, "transition": transition, "after_step": interrupt}
    try:
        fit(
            model, lambda epoch: data, optimizer, epochs=2, steps_per_epoch=3, schedule=CosineSchedule(6),
            checkpoint=path, checkpoint_every=1, resume=True, quiet=True, **options,
        )  # fmt: skip
    except InterruptedError:
        if not stop:
            raise
    return model


def of_state(bases: Path, folder: Path) -> Subject:
    parts, target = read_safetensors(bases / "state"), folder / "last.safetensors"

    def read() -> None:
        with contextlib.suppress(LsquantError):  # a float network is wanted: it is read, and does not fit
            load_float(nn.Linear(3, 4), target)
        training(target, stop=False)

    return Subject(lambda e: edited_safetensors(e, target, parts, "structure"), read)


SUBJECTS: dict[str, tuple[str, Callable[[Path, Path], Subject]]] = {
    "saved": ("bases", of_saved),
    "packed": ("bases", of_packed),
    "program": ("bases", of_program),
    "compressed-tensors": ("folders", of_folder("compressed-tensors")),
    "hf": ("folders", of_folder("hf")),
    "exact": ("graphs", of_onnx("exact")),
    "small": ("graphs", of_onnx("small")),
    "qdq": ("graphs", of_onnx("qdq")),
    "recipe": ("bases", of_recipe),
    "run": ("bases", of_run),
    "state": ("bases", of_state),
    "vectors": ("graphs", of_vectors),
    "gguf": ("language", of_gguf),
    "tokenizer": ("language", of_tokenizer),
}
SLOWER = {"exact": 60, "small": 60, "qdq": 60, "state": 60, "run": 100}
"""Formats of which the fast suite reads fewer files, for each is run."""


def test_the_bases_are_read(bases, tmp_path):
    """What is edited is good to begin with."""
    assert lsquant.prepare(net(), Recipe.from_toml((bases / "recipe").read_text()))
    assert not run_files(bases / "run")["missing"]
    assert open_run(bases / "run").model() is not None
    assert read_tensors(bases / "state")[2]
    shutil.copy(bases / "state", tmp_path / "state")
    training(tmp_path / "state", stop=False)


@pytest.mark.parametrize("name", SUBJECTS)
def test_some_edited_files(name, tmp_path, request):
    base, make = SUBJECTS[name]
    found = fuzz(make(request.getfixturevalue(base), tmp_path), SLOWER.get(name, FAST), seed=0)
    assert found["refused"] > 3, found  # how many are read depends on the bytes; the whole ones are (above)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", SUBJECTS)
def test_ten_thousand_edited_files(name, part, tmp_path, request):
    base, make = SUBJECTS[name]
    found = fuzz(make(request.getfixturevalue(base), tmp_path), MANY // PARTS, seed=1 + part)
    print(name, part, dict(found))
    assert min(found["refused"], found["read"]) > 50, found
