"""The command line on the user's own model, data and task."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lsquant
from helpers.cli_own import CNN, result, run
from helpers.report_pages import page_data
from lsquant.tasks.user_objects import call, load_object


def same(first: str, second: str) -> bool:
    """Whether two files hold the same tensors."""
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


# ---- calibrate ----


def test_calibrate_writes_what_save_writes(own, capsys):
    run("calibrate", *CNN, "--bits", "4", "--out", "model.safetensors")
    out, err = capsys.readouterr()
    assert "2 layers quantized" in out
    assert "mine.network:batches" in err
    module = sys.modules["mine.network"]
    model = lsquant.load(module.build(), "model.safetensors").eval()
    expected = module.build()
    expected.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizer" not in k})
    data = list(module.batches())
    lsquant.prepare(expected, lsquant.Recipe.preset("w4a4"), data[0])
    lsquant.calibrate(expected, data, weights="mse")
    assert torch.equal(expected.eval()(data[0][0]), model(data[0][0]))
    assert "sign undecided" not in out
    assert "8 bit, unsigned, per tensor" in out

    rules = ["--weight-init", "paper", "--activation-init", "paper"]
    run("calibrate", *CNN, "--bits", "4", "--out", "paper.safetensors", *rules, "--quiet")
    model = lsquant.load(module.build(), "paper.safetensors").eval()
    lsquant.calibrate(expected, data, method="paper", weights="paper", again=True)
    assert torch.equal(expected.eval()(data[0][0]), model(data[0][0]))


def test_calibrate_takes_weights_recipe_and_seed(own, capsys):
    module = load_object("mine.network:build").__globals__
    torch.manual_seed(5)
    weights = module["build"]().state_dict()
    save_file(weights, "float.safetensors")
    Path("recipe.toml").write_text(lsquant.Recipe.preset("w3a5").to_toml())
    facts = result(
        capsys, "calibrate", *CNN, "--recipe", "recipe.toml", "--init", "float.safetensors", "--out", "a", "--quiet"
    )
    assert facts["file"] == "a"
    assert facts["bytes"] == Path("a").stat().st_size
    assert [layer["name"] for layer in facts["layers"]] == ["0", "3"]
    loaded = lsquant.load(module["build"](), "a")
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in weights.items())
    for seed, name in ((1, "b"), (1, "c"), (2, "d")):
        run("calibrate", *CNN, "--bits", "4", "--out", name, "--seed", seed, "--quiet")
    assert same("b", "c")
    assert not same("b", "d")


def test_calibrate_keeps_a_file_that_exists(own, calibrated, capsys):
    before = calibrated.read_bytes()
    again = ["calibrate", *CNN, "--weight-bits", "2", "--activation-bits", "8", "--out", "model.safetensors", "--quiet"]
    run(*again, code=2)
    assert "--overwrite" in capsys.readouterr().err
    assert calibrated.read_bytes() == before
    written = calibrated.stat().st_mtime_ns
    run(*again, "--overwrite")
    assert calibrated.stat().st_mtime_ns > written
    assert calibrated.read_bytes() == before  # the same data give the same bytes


def test_max_batches(own):
    for limit, name in ((1, "one"), (3, "three"), (99, "all")):
        run("calibrate", *CNN, "--bits", "4", "--out", name, "--max-batches", limit, "--quiet")
    assert same("three", "all")
    assert not same("one", "all")


# ---- export, verify, check, report ----


def test_export_verify_and_report(own, calibrated, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run("verify", "model.safetensors", *CNN, code=3)
    assert "lsquant export model.safetensors --profile exact" in capsys.readouterr().err
    facts = result(capsys, "export", "model.safetensors", *CNN)
    assert facts["file"] == "model.exact.onnx"
    assert facts["bytes"] == Path("model.exact.onnx").stat().st_size
    verdict = result(capsys, "verify", "model.safetensors", *CNN)
    assert verdict["level"] == "outputs"
    assert verdict["batches"] == 3
    assert json.loads(Path("model.exact.verdict.json").read_text())["level"] == "outputs"
    assert result(capsys, "verify", "model.safetensors", *CNN, "--max-batches", "1")["batches"] == 1
    # of other weights it is not the file
    run("calibrate", *CNN, "--bits", "4", "--out", "other.safetensors", "--seed", "3", "--quiet")
    result(capsys, "verify", "other.safetensors", *CNN, "--file", "model.exact.onnx", code=1)


def test_report(own, calibrated, capsys):
    assert result(capsys, "report", "model.safetensors", *CNN) == {"report": "model.html", "verdicts": {}}
    assert "<title>model.safetensors</title>" in Path("model.html").read_text()
    assert page_data(Path("model.html"))["runs"][0]["name"] == "model.safetensors"
    run("export", "model.safetensors", *CNN)
    run("verify", "model.safetensors", *CNN)
    capsys.readouterr()
    assert result(capsys, "report", "model.safetensors", *CNN)["verdicts"] == {"exact": "outputs"}
    assert [v["level"] for v in page_data(Path("model.html"))["runs"][0]["verdicts"]] == ["outputs"]
    kinds = [row["kind"] for row in page_data(Path("model.html"))["runs"][0]["quantizers"]]
    run("report", "model.safetensors", "--model", "mine.network:build", "--out", "weights.html")
    (weights,) = page_data(Path("weights.html"))["runs"]
    assert [row["kind"] for row in weights["quantizers"]] == [kind for kind in kinds if kind == "weight"]
    assert weights["missing"] == ["no data was given: the page has the weights' quantizers only"]
    run("report", "model.safetensors", "model.safetensors", *CNN, code=2)


def test_check_of_a_healthy_file(own, calibrated, capsys):
    run("check", "model.safetensors", *CNN)
    assert capsys.readouterr().out == "no findings\n"
    run("check", "model.safetensors", "--model", "mine.network:build")
    facts = result(capsys, "check", "model.safetensors", *CNN)
    assert facts == {"findings": [], "errors": 0, "warnings": 0, "notes": 0}


def test_check_of_an_ill_file(own, calibrated, capsys):
    model = lsquant.load(load_object("mine.network:build")(), calibrated)
    with torch.no_grad():
        model[3].weight_quantizer.step.mul_(1e-2)
    lsquant.save(model, "clipped.safetensors")
    facts = result(capsys, "check", "clipped.safetensors", *CNN)  # a warning is good enough
    assert [(f["code"], f["where"]) for f in facts["findings"]] == [("step_collapsed", "3.weight_quantizer")]
    assert facts["warnings"] == 1
    with torch.no_grad():
        model[0].input_quantizer.step.fill_(float("nan"))
    lsquant.save(model, "broken.safetensors")
    run("check", "broken.safetensors", *CNN, code=1)
    out = capsys.readouterr().out
    assert "0.input_quantizer" in out
    assert "remedy" in out
    assert "1 error, 1 warning, 0 notes" in out


def test_many_alike_are_summed_up(own, capsys):
    (own / "deep.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))\n"
    )
    model = load_object("deep.py:build")()
    lsquant.prepare(model, lsquant.Recipe(weight=4, activation=4))
    lsquant.save(model, "unset.safetensors")
    run("check", "unset.safetensors", "--model", "deep.py:build", code=1)
    out = capsys.readouterr().out
    assert out.count("remedy") == 3
    assert "and 3 more [step_unset]: 3.input_quantizer" in out
    facts = result(capsys, "check", "unset.safetensors", "--model", "deep.py:build", code=1)
    assert facts["errors"] == len(facts["findings"]) == 6
    del sys.modules["deep"]


def test_batches_that_are_mappings(own, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    mine = ["--model", "mine.network:Net", "--data", "mine.network:mappings"]
    run("calibrate", *mine, "--bits", "4", "--out", "net.safetensors", "--quiet")
    run("check", "net.safetensors", *mine)
    run("export", "net.safetensors", *mine)
    assert result(capsys, "verify", "net.safetensors", *mine)["level"] == "outputs"


def test_a_file_by_path_is_loaded_once(own):
    where = "mine/network.py"
    run("calibrate", "--model", f"{where}:build", "--data", f"{where}:gives_data", "--bits", "4", "--out", "a")
    assert load_object(f"{where}:build") is load_object(f"./{where}:build")
    other = own / "other" / "network.py"
    other.parent.mkdir()
    other.write_text("build = 5\n")
    assert load_object("other/network.py:build") == 5
    assert callable(load_object(f"{where}:build"))
    del sys.modules["lsquant_own_network"]


# ---- wrong spellings: one line, with near names ----

WRONG = [
    (["--model", "mine.netwrok:build"], "'mine.netwrok:build': there is no module 'mine.netwrok'; near names: network"),
    (["--model", "mien.network:build"], "there is no module 'mien'; near names: mine"),
    (["--model", "mine.network:biuld"], "'mine.network:biuld': mine.network has no 'biuld'; near names: build"),
    (["--model", "mine.network.build"], "write package.module:name or FILE.py:name"),
    (["--model", "mine.network:"], "write package.module:name or FILE.py:name"),
    (["--model", "mine.network:model"], "is a model, not a function that returns one"),
    (["--model", "mine.network:needs"], "cannot be called without arguments: missing a required argument: 'width'"),
    (["--model", "mine.network:number"], "is a int, not a function without arguments"),
    (["--model", "mine.network:three"], "returned a int, not an nn.Module"),
    (["--data", "mine.network:three"], "returned a int, not an iterable of batches"),
    (["--data", "mine.network:bathces"], "has no 'bathces'; near names: batches"),
    (["--init", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
    (["--bits", "9"], "9"),
]


@pytest.mark.parametrize("changed, text", WRONG, ids=[w[0][1] for w in WRONG])
def test_wrong_arguments_are_one_clear_line(own, capsys, changed, text):
    arguments = dict(zip(CNN[::2], CNN[1::2], strict=True)) | {"--bits": "4"} | {changed[0]: changed[1]}
    flat = [word for pair in arguments.items() for word in pair]
    run("calibrate", *flat, "--out", "a", "--quiet", code=3 if changed[0] == "--init" else 2)
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not Path("a").exists()


def test_files_that_do_not_exist(own, capsys):
    run("calibrate", "--model", "mine/netwrok.py:build", *CNN[2:], "--bits", "4", "--out", "a", code=3)
    assert "mine/netwrok.py does not exist; near names: network.py" in capsys.readouterr().err
    run("check", "nothing.safetensors", *CNN, code=3)
    assert "nothing.safetensors does not exist" in capsys.readouterr().err


def test_what_is_missing_is_named(own, calibrated, capsys):
    for command in ("export", "verify", "check", "report"):
        run(command, "model.safetensors", code=2)
        assert f"needs --model package.module:build{' and --data' * (command != 'report')}\n" in capsys.readouterr().err
    run("eval", "model.safetensors", code=2)
    assert "needs --task TASK" in capsys.readouterr().err
    run("export", "model.safetensors", *CNN[:2], code=2)
    assert "needs --data" in capsys.readouterr().err
    run("check", "model.safetensors", *CNN[2:], code=2)
    assert "goes with --model" in capsys.readouterr().err
    run("calibrate", *CNN, "--out", "a", code=2)
    assert "give --bits N" in capsys.readouterr().err
    run("calibrate", *CNN, "--out", "a", "--bits", "4", "--recipe", "r", code=2)
    assert "not both" in capsys.readouterr().err


def test_an_error_inside_the_users_module_is_passed_on(own):
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load_object("mine.broken:build")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load_object("mine/broken.py:build")
    assert "broken" not in sys.modules


def test_built_in_types_can_be_called():
    assert call(dict, "builtins:dict") == {}


def test_compare(own, calibrated, capsys):
    pytest.importorskip("onnxruntime")
    found = result(
        capsys, "compare", "model.safetensors", *CNN, "--repeats", "7", "--out", "files", "--max-batches", "2"
    )
    sizes = {row["name"]: row["bytes"] for row in found["rows"]}
    assert sizes["exact"] == Path("files/exact.onnx").stat().st_size
    assert sizes["packed"] == Path("files/packed.safetensors").stat().st_size
    assert {row["level"] for row in found["rows"] if row["name"] in ("exact", "packed")} == {"outputs"}
    assert not any(row["metrics"] for row in found["rows"])  # a file of one's own has no task
    run("compare", "model.safetensors", *CNN, "--repeats", "2", code=2)
    assert "repeats=2: at least 7" in capsys.readouterr().err
