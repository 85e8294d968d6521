"""The command line: what each command takes, prints and returns; one tiny run from training to report."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import lsquant
from helpers.command_line import TINY, Result, refused, run
from helpers.report_pages import page_data
from lsquant.cli.main import parser
from lsquant.tasks import open_run

for package in ("sklearn", "onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)
COMMANDS = ("train", "eval", "export", "verify", "compare", "report", "figure", "env")


# ---- the line ----


def test_train(line):
    path, results = line
    train = results["train"]
    assert train.code == 0
    metrics = json.loads((path / "metrics.json").read_text())
    for key in ("float", "rounded", "lsq"):
        assert f"accuracy {metrics[key]['accuracy']:.2f} %" in train.out
        assert f"test_loss {metrics[key]['test_loss']:.4f}" in train.out
    assert metrics["float"]["accuracy"] > 20  # it learns; guessing gives 10
    assert len(train.out.splitlines()) == 3
    assert re.search(r"float 2/2 .* 17/17", train.err)  # progress goes to stderr
    assert re.search(r"lsq 1/1 .* 17/17", train.err)
    run_ = open_run(path)
    assert run_.recipe == lsquant.Recipe.preset("w2a2")
    assert (run_.settings.float_epochs, run_.settings.epochs, run_.settings.batch_size) == (2, 1, 80)


def test_eval(line):
    path, results = line
    metrics = json.loads((path / "metrics.json").read_text())["lsq"]
    assert results["eval"].code == results["eval json"].code == 0
    assert results["eval json"].json == metrics
    assert results["eval"].out == f"accuracy {metrics['accuracy']:.2f} %, test_loss {metrics['test_loss']:.4f}\n"


def test_export_and_verify(line):
    path, results = line
    file = path / "export" / "exact.onnx"
    assert results["export"].code == 0
    assert results["export"].out == f"{file}: {file.stat().st_size:,} bytes\n"
    assert results["verify"].code == 0
    verdict = results["verify"].json
    assert (verdict["level"], verdict["exact"], verdict["required"], verdict["samples"]) == (
        "outputs",
        True,
        "outputs",
        500,
    )
    assert "exact: equal outputs, bit for bit" in verdict["text"]
    assert verdict["plain"]["level"] == "outputs"
    assert json.loads((path / "export" / "exact.verdict.json").read_text()) == verdict


def test_verify_fails_where_the_file_is_not_exact_and_require_relaxes_it(line):
    path, results = line
    assert results["export qdq"].code == 0
    level = json.loads((path / "export" / "qdq.verdict.json").read_text())["level"]
    assert level != "outputs"
    assert results["verify qdq"].code == 1
    assert "\nrequired: outputs (profile qdq promises weights: --require weights)" in results["verify qdq"].out
    assert level in results["verify qdq"].out
    assert run("verify", path, "--profile", "qdq", "--require", level).code == 0


def test_compare(line):
    path, results = line
    assert results["compare"].code == 0
    found = results["compare"].json
    assert json.loads((path / "export" / "compare.json").read_text()) == found
    rows = {row["name"]: row for row in found["rows"]}
    metrics = json.loads((path / "metrics.json").read_text())
    assert list(rows) == ["float", "exact", "small", "qdq", "integer", "packed"]
    assert rows["float"]["metrics"] == metrics["float"]
    for name in ("exact", "small", "packed"):
        assert rows[name]["level"] == "outputs"
        assert rows[name]["metrics"]["accuracy"] == metrics["lsq"]["accuracy"]
    assert rows["exact"]["bytes"] == (path / "export" / "exact.onnx").stat().st_size
    assert (found["batch_sizes"], found["samples"], found["threads"]) == ([1, 64], 500, 1)
    assert rows["integer"]["reason"].startswith("left out: ")
    assert found["text"].endswith(found["advice"])
    assert not list(path.glob("export/small*"))  # they are deleted


def test_a_damaged_comparison_is_missing_on_the_page(line, tmp_path):
    path, _ = line
    (shown,) = page_data(path / "report.html")["runs"]
    assert shown["comparison"] == json.loads((path / "export" / "compare.json").read_text())
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    found = json.loads((copy / "export" / "compare.json").read_text())
    found["rows"][1]["ratio"]["1"] = "<script>"
    (copy / "export" / "compare.json").write_text(json.dumps(found))
    assert run("report", copy).code == 0
    (shown,) = page_data(copy / "report.html")["runs"]
    assert shown["comparison"] is None
    assert any("compare.json" in text and "ratio" in text for text in shown["missing"])


def test_report(line):
    path, results = line
    assert results["report"].code == results["report json"].code == 0
    metrics = json.loads((path / "metrics.json").read_text())
    out, (shown,) = results["report"].out, page_data(path / "report.html")["runs"]
    for key in ("float", "rounded", "lsq"):
        assert f"accuracy {metrics[key]['accuracy']:.2f} %" in out
    assert {key: numbers for key, _, numbers in shown["results"]} == {
        key: metrics[key] for key in ("float", "rounded", "lsq")
    }
    assert "exact, level outputs" in out
    assert f"{(path / 'export' / 'exact.onnx').stat().st_size:,} bytes" in out
    assert str(path / "report.html") in out
    told = results["report json"].json
    assert told["metrics"] == metrics
    assert told["verdicts"]["exact"] == "outputs"
    assert told["files"]["model.safetensors"] == (path / "model.safetensors").stat().st_size
    weights = told["files"]["quantized weights in float32"]
    assert weights == 4 * (9 * 24 + 2 * 9 * 24 * 24 + 9 * 24 * 48 + 480)
    packed = 9 * 24 + 2 * 9 * 24 * 24 // 4 + 9 * 24 * 48 // 4 + 480 + 5 * 4  # 8 bits first and last, a step each
    assert told["files"]["the same packed, with steps"] == packed


def test_the_page_has_the_numbers(line):
    path, _ = line
    shown = page_data(path / "report.html")
    (of_run,) = shown["runs"]
    rows = {row["name"]: row for row in of_run["quantizers"]}
    assert {name: row["step"] for name, row in rows.items()} == {
        name: q.effective_step().item() for name, q in lsquant.nn.quantizers(open_run(path).model())
    }
    logged = json.loads((path / "log.jsonl").read_text().splitlines()[-1])["quantizers"]
    assert {name: row["balance"] for name, row in rows.items()} == {name: facts["R"] for name, facts in logged.items()}
    assert len(rows) == 10
    assert {row["bits"] for row in rows.values()} == {2, 8}
    assert of_run["verdicts"][0] == json.loads((path / "export" / "exact.verdict.json").read_text())
    assert [v["profile"] for v in of_run["verdicts"]] == ["exact", "qdq"]
    assert of_run["environment"] == json.loads((path / "env.json").read_text())
    assert of_run["missing"] == []
    assert of_run["commands"][0].startswith("lsquant train digits --recipe ")
    assert shown["version"] == lsquant.__version__


def test_check_of_a_run_knows_the_guarded_steps_of_its_log(line, tmp_path):
    """The counter is not saved with the model."""
    path = shutil.copytree(line[0], tmp_path / "run")
    rows = [json.loads(row) for row in (path / "log.jsonl").read_text().splitlines()]
    rows[-1]["quantizers"]["head.input_quantizer"]["guarded"] = 500
    (path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = json.loads(run("check", path, "--json").out)["findings"]
    (often,) = (finding for finding in found if finding["code"] == "guarded_often")
    assert (often["where"], often["evidence"]["guarded"]) == ("head.input_quantizer", 500)
    assert "guarded_often" not in run("check", line[0], "--json").out


def test_a_report_without_the_other_files_says_what_is_missing(line, tmp_path):
    path, _ = line
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "export").mkdir()
    for name in ("config.toml", "recipe.toml", "model.safetensors"):
        (folder / name).write_bytes((path / name).read_bytes())
    (folder / "env.json").write_text("{")
    result = run("report", folder, "--out", tmp_path / "page.html")
    assert result.code == 0
    (of_run,) = page_data(tmp_path / "page.html")["runs"]
    assert [text.split(":")[0] for text in of_run["missing"]] == [
        "metrics.json does not exist", "env.json is damaged", "log.jsonl does not exist",
    ]  # fmt: skip
    assert all(text in result.err for text in of_run["missing"])
    assert len(of_run["quantizers"]) == 10
    assert not (folder / "report.html").exists()


# ---- an output that exists ----


def test_an_existing_directory(line, tmp_path):
    path, results = line
    before = (path / "model.safetensors").read_bytes()
    refused(2, "--resume .* --overwrite", "train", "digits", "--bits", "2", "--out", path, *TINY)
    refused(2, "exclude each other", "train", "digits", "--bits", "2", "--out", path, "--resume", "--overwrite", *TINY)
    refused(2, "other bits", "train", "digits", "--bits", "3", "--out", path, "--resume", *TINY)
    again = run("train", "--out", path, "--resume", "--quiet")
    assert again.code == 0
    assert again.out == results["train"].out
    assert again.err == ""
    assert "is complete: nothing is left to train" in run("train", "--out", path, "--resume").err
    assert (path / "model.safetensors").read_bytes() == before
    (tmp_path / "mine.txt").write_text("x")
    refused(2, "no run directory", "train", "digits", "--bits", "2", "--out", tmp_path, "--overwrite")
    assert (tmp_path / "mine.txt").read_text() == "x"


def test_resume_refuses_what_the_run_does_not_have(line):
    path, _ = line
    for option, value in (("--lr", "7"), ("--epochs", "99"), ("--seed", "5"), ("--bits", "3")):
        refused(2, "is another run", "train", "--out", path, "--resume", option, value)
    assert run("train", "digits", "--out", path, "--resume", "--quiet").code == 0  # the task may be named


def test_wrong_input_leaves_no_run_behind(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "float.pt")
    (tmp_path / "bad.toml").write_text('weight = 2\nactivation = 2\n[[rules]]\nwhich = "nolayer"\nweight = 8\n')
    out = tmp_path / "run"
    refused(3, "torch.save", "train", "digits", "--bits", "2", "--init", tmp_path / "float.pt", "--out", out)
    refused(2, "nolayer.*matches no layer", "train", "digits", "--recipe", tmp_path / "bad.toml", "--out", out)
    refused(2, "lr=-3", "train", "digits", "--bits", "2", "--lr", "-3", "--out", out)
    assert not out.exists()


def test_an_output_that_is_a_folder(line, tmp_path):
    refused(2, "is a folder", "report", line[0], "--out", tmp_path)


def test_train_json_and_quiet(tmp_path):
    options = ["--float-epochs", "0", "--epochs", "0", "--quiet", "--json", "--seed", "3"]
    bits = ["--weight-bits", "4", "--activation-bits", "8"]
    result = run("train", "digits", *bits, "--out", tmp_path / "r", *options)
    assert result.code == 0
    assert result.err == ""
    assert result.json["seed"] == 3
    assert result.json["run"] == str(tmp_path / "r")
    assert open_run(tmp_path / "r").recipe == lsquant.Recipe.preset("w4a8")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(lsquant.Recipe(3, None).to_toml())
    result = run("train", "digits", "--recipe", recipe, "--out", tmp_path / "r", "--overwrite", *options)
    assert result.code == 0
    assert open_run(tmp_path / "r").recipe == lsquant.Recipe(3, None)


# ---- help, version, env, figure ----


def test_every_command_has_help():
    top = run("--help")
    assert top.code == 0
    for name in COMMANDS:
        assert re.search(rf"^ +{name} ", top.out, re.MULTILINE)
        sub = run(name, "--help")
        assert sub.code == 0
        for option in ("--json", "--quiet", "--threads", "--seed"):
            assert option in sub.out


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("train", "figure", "env")])
def test_commands_on_a_run_take_its_path(command):
    arguments = parser().parse_args([command, "RUN"])
    assert arguments.path == (["RUN"] if command == "report" else "RUN")
    assert (arguments.json, arguments.quiet) == (False, False)
    assert run(command).code == 2


def test_env():
    told = run("env", "--json").json
    assert told["lsquant"] == lsquant.__version__
    assert told["packages"]["torch"]
    text = run("env")
    assert text.code == 0
    assert re.search(rf"^lsquant +{re.escape(lsquant.__version__)}$", text.out, re.MULTILINE)


def test_version_and_module():
    assert run("--version") == Result(0, f"lsquant {lsquant.__version__}\n", "")
    result = subprocess.run(
        [sys.executable, "-m", "lsquant", "eval", "none"], capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr == "lsquant: error: none is no run directory: it has no config.toml\n"
