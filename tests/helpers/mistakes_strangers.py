"""Mistakes with files that were edited by hand or came from somebody else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import lsquant
from helpers.edited_files import read_safetensors, write_safetensors
from helpers.mistakes import Net, command, images, mistake, ready
from lsquant import QuantSpec, Recipe
from lsquant.runs import Run
from lsquant.runs.directory import start_run
from lsquant.tasks import Settings, get_task, open_run
from lsquant.tasks.digits import Digits
from lsquant.training import save_state
from lsquant.training.seeds import rng_state, set_rng_state

# ---- words for numbers and truth values ----


@mistake("narrow='no'", "use True or False")
def a_word_for_false_in_toml(_: Path) -> Any:
    Recipe.from_toml('weight = { bits = 4, narrow = "no" }\n')


@mistake("offset='no'", "use True or False")
def a_word_for_false_in_code(_: Path) -> Any:
    QuantSpec(4, offset="no")  # type: ignore[arg-type]


@mistake("signed=1", "use True, False or None")
def a_number_for_a_sign(_: Path) -> Any:
    QuantSpec(4, signed=1)  # type: ignore[arg-type]


@mistake("epochs=2.5", "must be a whole number")
def half_an_epoch(_: Path) -> Any:
    Settings(epochs=2.5)  # type: ignore[arg-type]


@mistake("width='24'", "a number of channels from 1")
def a_word_for_a_width(_: Path) -> Any:
    get_task("digits", width="24")


# ---- recipes in files ----


@mistake("'re:.*fc[12]'", "pip install 'lsquant[re2]', or write names and globs")
def a_regular_expression_in_toml(_: Path) -> Any:
    Recipe.from_toml('[[rules]]\nwhich = "re:.*fc[12]"\nweight = 8\n')


@mistake("not valid TOML", "recipe:")
def a_recipe_that_is_nested_for_ever(_: Path) -> Any:
    Recipe.from_toml("weight = " + "[" * 5000 + "]" * 5000)


@mistake("r.toml is not UTF-8", "byte 0xff")
def a_recipe_that_is_no_text(tmp: Path) -> Any:
    (tmp / "r.toml").write_bytes(b"weight = 4\n\xff\xfe")
    return command("train", "digits", "--recipe", tmp / "r.toml", "--out", tmp / "run")


# ---- ONNX ----


def exported(tmp: Path, key: str, text: str) -> Path:
    """A file with a value of its metadata edited."""
    import onnx

    lsquant.export_onnx(ready(), tmp / "m.onnx", images())
    proto = onnx.load(tmp / "m.onnx")
    for pair in proto.metadata_props:
        if pair.key == key:
            pair.value = text
    onnx.save(proto, tmp / "m.onnx")
    return tmp / "m.onnx"


@mistake("'optimized_model_filepath' is none that a file may set", "known are session.x64quantprecision")
def a_file_that_sets_an_option(tmp: Path) -> Any:
    lsquant.onnx_session(exported(tmp, "lsquant.session", '{"optimized_model_filepath": "mine.txt"}'))


@mistake("m.onnx is damaged: lsquant.format is 'abc'", "needed is a number")
def a_file_with_an_edited_format(tmp: Path) -> Any:
    lsquant.verify(ready(), exported(tmp, "lsquant.format", "abc"), [images()])


@mistake("lies in another file (external data)", "nothing in a file may name a path")
def a_file_whose_weights_lie_elsewhere(tmp: Path) -> Any:
    import onnx

    lsquant.export_onnx(ready(), tmp / "m.onnx", images())
    onnx.save(
        onnx.load(tmp / "m.onnx"), tmp / "m.onnx", save_as_external_data=True, location="beside", size_threshold=0
    )
    lsquant.onnx_session(tmp / "m.onnx")


@mistake("intra_op_num_threads='2'", "not of the type that ONNX Runtime takes")
def a_word_for_a_number_of_threads(tmp: Path) -> Any:
    lsquant.export_onnx(ready(), tmp / "m.onnx", images())
    lsquant.onnx_session(tmp / "m.onnx", intra_op_num_threads="2")


# ---- safetensors ----


def rewritten(path: Path, key: str, old: str, new: str) -> Path:
    """The file with its metadata edited and signed again."""
    tensors, metadata = read_safetensors(path)
    assert old in metadata[key]
    write_safetensors(path, tensors, metadata | {key: metadata[key].replace(old, new)}, True)
    return path


@mistake("it names 'nothing'", "which is not there")
def a_saved_file_with_a_name_for_nothing(tmp: Path) -> Any:
    lsquant.save(ready(), tmp / "m")
    lsquant.load(Net(), rewritten(tmp / "m", "lsquant.aliases", "{}", '{"two": "nothing"}'))


@mistake("quantizers.stem.weight_quantizer.count is -9", "needed is an integer from 0")
def a_packed_file_with_a_count_below_zero(tmp: Path) -> Any:
    lsquant.export_packed(ready(), tmp / "p")
    lsquant.load_packed(Net(), rewritten(tmp / "p", "lsquant.packed", '"count":36', '"count":-9'))


# ---- runs ----


def run_directory(tmp: Path) -> Path:
    start_run(Run(tmp / "run", Digits(width=2), Recipe(4, 4), Settings()))
    return tmp / "run"


@mistake("settings: epochs='three'", "must be a whole number")
def a_run_whose_settings_were_edited(tmp: Path) -> Any:
    config = run_directory(tmp) / "config.toml"
    config.write_text(config.read_text().replace("\nepochs = 30", '\nepochs = "three"'))
    return command("eval", tmp / "run")


@mistake("code in a file", "--task FILE.py:task")
def a_run_of_somebody_elses_code(tmp: Path) -> Any:
    config = run_directory(tmp) / "config.toml"
    config.write_text(config.read_text().replace('task = "digits"', 'task = "theirs.py:task"'))
    (tmp / "theirs.py").write_text("raise SystemExit('their code ran')\n")
    return command("eval", tmp / "run")


@mistake("metrics.json is damaged: lsq.accuracy is 'good'", "needed is a finite number")
def a_result_that_is_a_word(tmp: Path) -> Any:
    from lsquant.tasks import run_training

    (run_directory(tmp) / "metrics.json").write_text(json.dumps({"lsq": {"accuracy": "good"}}))
    run_training(open_run(tmp / "run"), resume=True, quiet=True)


@mistake("an integer beyond 64 bits (at a.b)", "a checkpoint cannot hold")
def a_number_that_no_checkpoint_holds(tmp: Path) -> Any:
    save_state(tmp / "s", {"a": {"b": 2**70}})


@mistake("the state of the random generators is damaged: numpy.2 is 100000", "needed is an integer from 0 to 624")
def a_state_beyond_its_end(_: Path) -> Any:
    state = rng_state()
    state["numpy"][2] = 100_000
    before = torch.get_rng_state()
    try:
        set_rng_state(state)
    finally:
        assert torch.equal(torch.get_rng_state(), before)
