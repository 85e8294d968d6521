"""The metadata of ONNX files are input from strangers: typed, bounded, options from a list, no path is followed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lsquant
from helpers.convert import images, net, ready
from lsquant import Recipe
from lsquant._util.errors import DamagedFile, UsageError
from lsquant.formats.onnx.reader import SESSION_OPTIONS, load_onnx
from lsquant.formats.onnx.writer import SESSION

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, torch.Tensor, Path]:
    """A model, its input, and its file of profile exact; read only."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    model, x = ready(net(), Recipe(4, 4), images(4)).eval(), images(4)
    lsquant.export_onnx(model, path, x)
    return model, x, path


def edited(path: Path, target: Path, change: Callable[[Any], Any]) -> Path:
    """The file with its ModelProto changed."""
    import onnx

    proto = onnx.load(path)
    change(proto)
    target.write_bytes(proto.SerializeToString())
    return target


def with_metadata(key: str, text: str | None) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        for i, pair in enumerate(proto.metadata_props):
            if pair.key == f"lsquant.{key}":
                if text is None:
                    del proto.metadata_props[i]
                else:
                    pair.value = text
                return

    return change


# ---- session options ----


@pytest.mark.parametrize(
    "name, value",
    [
        ("optimized_model_filepath", "victim.txt"),
        ("profile_file_prefix", "victim.txt"),
        ("enable_profiling", True),
        ("logid", "x"),
        ("intra_op_num_threads", 1),
        ("add_session_config_entry", "x"),
        ("session.optimized_model_external_initializers_file_name", "victim.txt"),
        ("ep.context_file_path", "victim.txt"),
        ("__class__", "x"),
    ],
)
def test_other_options_of_a_file_are_refused(name, value, exported, in_tmp):
    model, x, path = exported
    (in_tmp / "victim.txt").write_text("my thesis")
    edited(path, in_tmp / "evil.onnx", with_metadata("session", json.dumps({name: value})))
    for act in (lambda: lsquant.onnx_session("evil.onnx"), lambda: lsquant.verify(model, "evil.onnx", [x])):
        with pytest.raises(DamagedFile, match=rf"evil\.onnx .*lsquant\.session: the option '{name}' is none"):
            act()
    assert (in_tmp / "victim.txt").read_text() == "my thesis"
    assert sorted(p.name for p in in_tmp.iterdir()) == ["evil.onnx", "victim.txt"]


@pytest.mark.parametrize("value", [1, True, None, "2", "", ["1"]])
def test_values_of_options_are_from_a_list(value, exported, tmp_path):
    text = json.dumps({"session.x64quantprecision": value})
    edited(exported[2], tmp_path / "m.onnx", with_metadata("session", text))
    says = r"lsquant\.session\.session\.x64quantprecision is .*needed is one of '0', '1'"
    with pytest.raises(DamagedFile, match=says):
        load_onnx(tmp_path / "m.onnx")


def test_what_is_written_is_read(exported, tmp_path):
    """Every option that an exporter recommends is in the reader's list, with its value."""
    for options in SESSION.values():
        assert all(value in SESSION_OPTIONS[name] for name, value in options.items())
        edited(exported[2], tmp_path / "m.onnx", with_metadata("session", json.dumps(options)))
        assert load_onnx(tmp_path / "m.onnx")[1]["session"] == options


@pytest.mark.parametrize(
    "overrides, says",
    [
        ({"intra_op_num_threads": "x"}, "intra_op_num_threads='x' is not of the type"),
        ({"colour": 1}, "'colour' is no attribute"),
        ({"add_session_config_entry": 1}, "'add_session_config_entry' is no attribute"),
        ({"__doc__": "x"}, "'__doc__' is no attribute"),
    ],
)
def test_options_of_the_caller(overrides, says, exported):
    with pytest.raises(UsageError, match=says):
        lsquant.onnx_session(exported[2], **overrides)
    assert lsquant.onnx_session(exported[2], intra_op_num_threads=1, **{"session.x64quantprecision": "1"})


# ---- other files ----


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "beside", ""])
@pytest.mark.parametrize("where", ["initializer", "attribute", "subgraph"])
def test_external_data_are_refused(where, location, exported, tmp_path):
    """lsquant writes none; a file that names another could read whatever the user can."""
    import onnx
    from onnx import helper, numpy_helper

    (tmp_path / "beside").write_bytes(bytes(4096))

    def change(proto: Any) -> None:
        if where == "initializer":
            tensor = proto.graph.initializer[0]
        else:
            tensor = numpy_helper.from_array(torch.zeros(4).numpy(), "hidden")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        if where == "attribute":
            proto.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))
        elif where == "subgraph":
            inner = helper.make_graph([], "inner", [], [], [tensor])
            proto.graph.node.append(helper.make_node("If", ["unused"], [], then_branch=inner, else_branch=inner))

    edited(exported[2], tmp_path / "m.onnx", change)
    with pytest.raises(DamagedFile, match=r"m\.onnx: its tensor .* lies in another file \(external data\)"):
        load_onnx(tmp_path / "m.onnx")


# ---- types of the metadata ----


def layers(**changes: Any) -> str:
    entry = {"layer": "0", "call": 0, "input": "input", "output": "0/output"}
    return json.dumps([{**entry, **changes}])


@pytest.mark.parametrize(
    "key, text, says",
    [
        ("format", "abc", "lsquant.format is 'abc'; needed is a number"),
        ("format", "1" * 5000, "lsquant.format"),
        ("format", "-1", "needed is a number"),
        ("format", "", "needed is a number"),
        ("profile", "fast", "lsquant.profile is 'fast'; needed is one of 'exact', 'qdq', 'small'"),
        ("version", "v" * 100, "lsquant.version"),
        ("session", None, "its metadata lack lsquant.session"),
        ("session", "", "lsquant.session: not valid JSON"),
        ("session", "[1]", "lsquant.session is .1.; needed is a table"),
        ("session", "[" * 100_000, "lsquant.session: not valid JSON"),
        ("session", "[" * 80 + "]" * 80, "nested deeper than 64 levels"),
        ("session", '{"a": NaN}', "NaN is no number of JSON"),
        ("layers", None, "its metadata lack lsquant.layers"),
        ("layers", "{}", "lsquant.layers is a table of 0 keys; needed is a list"),
        ("layers", "[1]", r"lsquant.layers\[0\] is 1; needed is a table"),
        ("layers", "[{}]", "the key 'layer' is missing"),
        ("layers", layers(colour=1), "unknown key 'colour'"),
        ("layers", layers(layer=3), r"lsquant.layers\[0\].layer is 3; needed is a text"),
        ("layers", layers(call=-1), r"call is -1; needed is an integer from 0"),
        ("layers", layers(call=True), r"call is True"),
        ("layers", layers(call=0.0), r"call is 0\.0"),
        ("layers", layers(offset="a"), r"offset is 'a'; needed is an integer from -256 to 256"),
        ("layers", layers(offset=10**18), r"offset is 10"),
        ("layers", layers(offset=10**30), "an integer of 31 digits"),
        ("layers", layers(transposed=1), "transposed is 1; needed is true or false"),
        ("layers", layers(layout="x"), "layout is 'x'; needed is one of '', 'own', 'reversed'"),
        ("layers", layers(weights="w"), "weights is 'w'; needed is a list"),
        ("layers", layers(weights=[["w"]]), r"weights\[0\] is"),
        ("layers", layers(weights=["w"]), "the file has no initializer 'w', which its layer '0' names"),
        ("layers", layers(input="nothing"), "the file has no value 'nothing', which its layer '0' names"),
        ("layers", layers(layer="\ud800"), r"layer is '\\ud800'"),
        ("layers", json.dumps(json.loads(layers()) * 2), "call 0 of the layer '0' is there twice"),
    ],
    ids=lambda value: value and value[:50],
)
def test_metadata(key, text, says, exported, tmp_path):
    edited(exported[2], tmp_path / "m.onnx", with_metadata(key, text))
    with pytest.raises(DamagedFile, match=rf"m\.onnx is damaged: .*{says}"):
        lsquant.verify(exported[0], tmp_path / "m.onnx", [exported[1]])


def test_a_key_twice(exported, tmp_path):
    def change(proto: Any) -> None:
        proto.metadata_props.add(key="lsquant.session", value="{}")

    edited(exported[2], tmp_path / "m.onnx", change)
    with pytest.raises(DamagedFile, match=r"its metadata have 'lsquant\.session' twice"):
        load_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "dtype, field, says",
    [("float32", "weights", "is of type float32"), ("int8", "scales", "is of type int8")],
)
def test_types_of_initializers(dtype, field, says, exported, tmp_path):
    """Codes are integers, steps are float32."""
    from onnx import numpy_helper

    def change(proto: Any) -> None:
        entry = next(pair for pair in proto.metadata_props if pair.key == "lsquant.layers")
        name = json.loads(entry.value)[0][field][0]
        for tensor in proto.graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), name))

    edited(exported[2], tmp_path / "m.onnx", change)
    with pytest.raises(DamagedFile, match=rf"m\.onnx is damaged: layer '0': initializer .* {says}"):
        lsquant.verify(exported[0], tmp_path / "m.onnx", [exported[1]])
