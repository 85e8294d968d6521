"""Mistakes with optimizers, files, export and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import lsquant
from helpers.mistakes import W4A4, Net, Reversed, command, images, mistake, prepared, ready, torchs_error, warned
from lsquant import Quantizer, QuantSpec, Recipe, Rule
from lsquant.cli import main
from lsquant.runs.lock import RunLock
from lsquant.training import TransitionRate

# ---- the optimizer ----


@mistake("stem.weight_quantizer.step", "after prepare")
def an_optimizer_from_before_prepare(_: Path) -> Any:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lsquant.prepare(model, W4A4)
    lsquant.calibrate(model, [images()])
    return lsquant.check(model, optimizer)


@mistake("weight decay 0.0001", "param_groups")
def an_optimizer_that_decays_the_steps(_: Path) -> Any:
    model = ready()
    return lsquant.check(model, torch.optim.SGD(model.parameters(), 0.1, weight_decay=1e-4))


@mistake("head.input_quantizer.step", "requires_grad_(True)")
def a_frozen_step(_: Path) -> Any:
    model = ready()
    model.head.input_quantizer.step.requires_grad_(False)
    return lsquant.check(model, torch.optim.SGD(model.parameters(), 0.1))


@mistake("the optimizer is a generator", "give a torch optimizer")
def parameters_for_an_optimizer(_: Path) -> Any:
    model = ready()
    lsquant.check(model, model.parameters())


@mistake("Net has no quantizers", "lsquant.prepare")
def a_float_model_checked(_: Path) -> Any:
    return lsquant.check(Net())


@mistake("stem.input_quantizer", "calibrate again on data like these")
def data_of_another_scale(_: Path) -> Any:
    return lsquant.check(ready(), batches=[images() * 100])


@mistake("the optimizer is a RMSprop", "SGD, Adam and AdamW")
def transition_rates_for_another_optimizer(_: Path) -> Any:
    model = ready(Recipe(2, None))
    TransitionRate(model, torch.optim.RMSprop(lsquant.param_groups(model, 0.1, low_bit=True)), steps=10)


@mistake("first=0.2 lets 20% of the weights change code", "0.002 is usual")
def percent_for_a_transition_rate(_: Path) -> Any:
    model = ready(Recipe(2, None))
    optimizer = torch.optim.SGD(lsquant.param_groups(model, 0.1, low_bit=True))
    return warned(lambda: TransitionRate(model, optimizer, 0.2, steps=10))


# ---- files ----


@mistake("the state has the codes -2 to 1 (2 bit), the model -8 to 7 (4 bit", "prepare the model by the recipe")
def a_state_of_other_bits(_: Path) -> Any:
    return torchs_error(lambda: ready().load_state_dict(ready(Recipe(2, 2)).state_dict()))


@mistake("'stem.weight_quantizer': size mismatch: the state has a step of shape (4,)", "prepare the model by")
def a_state_of_another_granularity(_: Path) -> Any:
    state = ready(Recipe(QuantSpec(4, granularity="channel"), 4)).state_dict()
    return torchs_error(lambda: ready().load_state_dict(state))


@mistake("'stem.weight_quantizer': the state has the codes 0 to 15", "prepare the model by the recipe")
def a_state_of_another_sign(_: Path) -> Any:
    model = ready(Recipe(QuantSpec(4, signed=False), None))
    return torchs_error(lambda: ready(Recipe(4, None)).load_state_dict(model.state_dict()))


@mistake("copied from codes -2 to 1, it has -8 to 7", "copy it again")
def a_state_of_other_bits_copied_tensor_by_tensor(_: Path) -> Any:
    model = ready(Recipe(4, None))
    with torch.no_grad():
        for mine, theirs in zip(model.state_dict().values(), ready(Recipe(2, None)).state_dict().values(), strict=True):
            mine.copy_(theirs)
    return lsquant.check(model)


@mistake("'stem.weight' the first, are on the meta device", "to_empty(device='cpu')")
def a_model_without_values_loaded(tmp: Path) -> Any:
    lsquant.save(ready(), tmp / "m")
    with torch.device("meta"):
        model = Net()
    lsquant.load(model, tmp / "m")


@mistake("'stem.weight' is on the meta device", "load a state first")
def a_model_without_values_saved(tmp: Path) -> Any:
    lsquant.save(ready().to("meta"), tmp / "m")


@mistake("'stem.weight' the first, are on the meta device", "load_state_dict(state, assign=True)")
def a_model_without_values_checked(_: Path) -> Any:
    return lsquant.check(ready().to("meta"))


@mistake("is a folder", "give the name of a file")
def saved_into_a_folder(tmp: Path) -> Any:
    lsquant.save(ready(), tmp)


@mistake("is a packed file", "lsquant.load_packed(model, path)")
def a_packed_file_loaded_as_a_saved_one(tmp: Path) -> Any:
    lsquant.export_packed(ready(), tmp / "m")
    lsquant.load(Net(), tmp / "m")


@mistake("was not written by lsquant.export_packed", "read it with lsquant.load")
def a_saved_file_loaded_as_a_packed_one(tmp: Path) -> Any:
    lsquant.save(ready(), tmp / "m")
    lsquant.load_packed(Net(), tmp / "m")


@mistake("no quantized layer", "lsquant.prepare")
def a_float_model_saved(tmp: Path) -> Any:
    lsquant.save(Net(), tmp / "m")


@mistake("none", "does not exist")
def a_file_that_is_not_there(tmp: Path) -> Any:
    lsquant.load(Net(), tmp / "none")


@mistake("stem.weight is (4, 1, 3, 3) in the file and (8, 1, 3, 3)", "Build the model that was saved")
def a_model_of_another_size_loaded(tmp: Path) -> Any:
    lsquant.save(ready(), tmp / "m")
    lsquant.load(Net(8), tmp / "m")


@mistake("the model lacks norm.bias", "Build the model that was saved")
def another_architecture_loaded(tmp: Path) -> Any:
    lsquant.save(ready(), tmp / "m")
    lsquant.load(Reversed(), tmp / "m")


@mistake("no recipe", "load_state_dict")
def a_float_checkpoint_loaded(tmp: Path) -> Any:
    from safetensors.torch import save_file

    save_file(Net().state_dict(), tmp / "float.safetensors")
    lsquant.load(Net(), tmp / "float.safetensors")


@mistake("damaged", "m")
def a_file_that_was_cut(tmp: Path) -> Any:
    lsquant.save(ready(), tmp / "m")
    content = (tmp / "m").read_bytes()
    (tmp / "m").write_bytes(content[: len(content) // 2])
    lsquant.load(Net(), tmp / "m")


@mistake("folder", "create it first")
def a_folder_that_is_not_there(tmp: Path) -> Any:
    lsquant.save(ready(), tmp / "none" / "m")


# ---- export and verify ----


@mistake("stem.input_quantizer", "lsquant.calibrate")
def exported_before_calibration(tmp: Path) -> Any:
    lsquant.export_onnx(prepared(), tmp / "m.onnx", images())


@mistake("profile='int8'", "'exact', 'qdq'")
def an_unknown_profile(tmp: Path) -> Any:
    lsquant.export_onnx(ready(), tmp / "m.onnx", images(), profile="int8")


@mistake("profile='fast'", "'exact', 'qdq'")
def a_profile_that_is_not_built(tmp: Path) -> Any:
    lsquant.export_onnx(ready(), tmp / "m.onnx", images(), profile="fast")


@mistake("opset=10", "ReduceMean needs")
def an_opset_that_is_too_low(tmp: Path) -> Any:
    lsquant.export_onnx(ready(), tmp / "m.onnx", images(), opset=10)


@mistake("no quantized layer", "lsquant.prepare")
def a_float_model_exported(tmp: Path) -> Any:
    lsquant.export_onnx(Net(), tmp / "m.onnx", images())


@mistake("another model", "'body'")
def verified_with_another_model(tmp: Path) -> Any:
    lsquant.export_onnx(ready(), tmp / "m.onnx", images())
    other = ready(Recipe(4, 4, [Rule("body", None, None)]))
    lsquant.verify(other, tmp / "m.onnx", [images()])


@mistake("batches is a Tensor", "pass [batch]")
def verified_with_a_bare_tensor(tmp: Path) -> Any:
    lsquant.export_onnx(ready(), tmp / "m.onnx", images())
    lsquant.verify(ready(), tmp / "m.onnx", images())


@mistake("N is unknown", "count=N")
def a_quantizer_of_ones_own_without_n(_: Path) -> Any:
    q = Quantizer(QuantSpec(4))
    q.initialize(torch.randn(20))
    q(torch.randn(20))


@mistake("no step yet", ".initialize(x)")
def a_quantizer_of_ones_own_without_a_step(_: Path) -> Any:
    Quantizer(QuantSpec(4, signed=True), count=20)(torch.randn(20))


@mistake("granularity='channel'", "axis=")
def a_quantizer_of_ones_own_without_an_axis(_: Path) -> Any:
    Quantizer(QuantSpec(4, granularity="channel"), (3,), count=20)


@mistake("step has shape (3,)", "need 4")
def a_quantizer_of_ones_own_of_another_shape(_: Path) -> Any:
    Quantizer(QuantSpec(4, granularity="channel"), (3,), axis=0, count=20).initialize(torch.randn(4, 20))


# ---- the command line ----


@mistake("'mnist'", "digits")
def an_unknown_task(tmp: Path) -> Any:
    return command("train", "mnist", "--out", tmp / "run")


@mistake("exists", "--overwrite")
def a_run_that_exists(tmp: Path) -> Any:
    (tmp / "run").mkdir()
    (tmp / "run" / "config.toml").write_text("")
    return command("train", "digits", "--bits", 2, "--out", tmp / "run")


@mistake("is being trained by process", "wait for it, stop it, or choose another --out")
def two_trainings_of_one_run(tmp: Path) -> Any:
    options = ("--epochs", 0, "--float-epochs", 0, "--quiet")
    main(["train", "digits", "--bits", "2", "--out", str(tmp / "run"), *map(str, options)])
    with RunLock(tmp / "run"):
        return command("train", "--resume", "--out", tmp / "run")


@mistake("is no run directory", "config.toml")
def a_folder_resumed_that_is_no_run(tmp: Path) -> Any:
    return command("train", "--resume", "--out", tmp)


@mistake("exclude each other", "--overwrite")
def resumed_and_overwritten(tmp: Path) -> Any:
    return command("train", "digits", "--bits", 2, "--resume", "--overwrite", "--out", tmp)


@mistake("'nonsense'", "package.module:name")
def a_model_named_without_a_function(tmp: Path) -> Any:
    return command("calibrate", "--model", "nonsense", "--data", "nonsense", "--bits", "4", "--out", tmp / "m")


# ---- ties, and weights that are not finite ----


class Table(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.table(index)))


def untied() -> nn.Module:
    model = Table(tied=False)
    lsquant.prepare(model, Recipe(4, 8))
    lsquant.calibrate(model, [torch.arange(7).reshape(1, 7)])
    return model


@mistake("'table.weight' and 'head.weight' are one tensor in the model", "load it into a model that is not tied")
def an_untied_file_for_a_tied_model(folder: Path) -> Any:
    lsquant.save(untied(), folder / "untied")
    lsquant.load(Table(tied=True), folder / "untied")


@mistake("'table.weight' and 'head.weight' are one tensor in the model", "load it into a model that is not tied")
def an_untied_packed_file_for_a_tied_model(folder: Path) -> Any:
    lsquant.export_packed(untied(), folder / "untied")
    lsquant.load_packed(Table(tied=True), folder / "untied")


@mistake("layers 'table' and 'head' share one weight, but not its", "call lsquant.prepare(model, recipe) again")
def weights_tied_after_prepare_and_saved(folder: Path) -> Any:
    model = untied()
    model.head.weight = model.table.weight
    lsquant.save(model, folder / "tied")


@mistake("layers 'table' and 'head' share one weight, but not its", "call lsquant.prepare(model, recipe) again")
def weights_tied_after_prepare_and_packed(folder: Path) -> Any:
    model = untied()
    model.head.weight = model.table.weight
    lsquant.export_packed(model, folder / "tied")


@mistake("save: 1 of the weights of layer 'stem' are NaN or infinite", "go back to the last good checkpoint")
def a_diverged_model_saved(folder: Path) -> Any:
    model = ready()
    model.stem.weight.data[0, 0, 0, 0] = float("nan")
    lsquant.save(model, folder / "nan")


@mistake("1 of its weights are NaN or infinite", "lower the learning rate")
def a_diverged_model_checked(_: Path) -> Any:
    model = ready()
    model.stem.weight.data[0, 0, 0, 0] = float("nan")
    return lsquant.check(model)


@mistake("by order of definition, but 'stem' runs first", "prepare(model, recipe, example_inputs=batch)")
def a_guessed_order_that_nothing_calibrates(_: Path) -> Any:
    model = Reversed()
    lsquant.prepare(model, Recipe.preset("w4"))
    return lsquant.check(model, batches=[torch.randn(3, 4)])
