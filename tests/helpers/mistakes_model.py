"""Mistakes with recipes, prepare, calibrate and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import lsquant
from helpers.mistakes import W4A4, Net, Reversed, images, mistake, prepared, ready, warned
from lsquant import QuantSpec, Recipe, Rule

# ---- numbers and names ----


@mistake("bits=1", "from 2 to 8")
def one_bit(_: Path) -> Any:
    QuantSpec(1)


@mistake("weight=16", "None for floating point")
def sixteen_bits_for_no_quantization(_: Path) -> Any:
    Recipe(16, 4)


@mistake("'int4'", "bits (2 to 8)")
def bits_as_a_word(_: Path) -> Any:
    Recipe("int4", 4)


@mistake("granularity='row'", "tensor, channel, group")
def an_unknown_granularity(_: Path) -> Any:
    QuantSpec(4, granularity="row")  # type: ignore[arg-type]


@mistake("group_size=32", "granularity='group'")
def a_group_size_without_groups(_: Path) -> Any:
    QuantSpec(4, group_size=32)


@mistake("layer 'head': group_size=32", "choose a divisor")
def a_group_size_that_does_not_divide(_: Path) -> Any:
    lsquant.prepare(Net(), Recipe(None, None, [Rule("head", QuantSpec(4, granularity="group", group_size=32))]))


@mistake("layer '0'", "use 'channel'")
def groups_for_a_layer_that_has_none(_: Path) -> Any:
    lsquant.prepare(nn.Sequential(nn.Conv1d(2, 2, 2)), Recipe.preset("w4g2", first_last=None))


@mistake("activation=", "granularity='tensor'")
def channels_for_an_activation(_: Path) -> Any:
    Recipe(4, QuantSpec(4, granularity="channel"))


@mistake("narrow=True", "signed=False")
def narrow_and_unsigned(_: Path) -> Any:
    QuantSpec(4, signed=False, narrow=True)


@mistake("'int8'", "w4a4")
def an_unknown_preset(_: Path) -> Any:
    Recipe.preset("int8")


@mistake("Linear(", "a layer class")
def a_layer_for_a_rule(_: Path) -> Any:
    Rule(nn.Linear(2, 2), 4)


@mistake("re:(", "not a regular expression")
def a_broken_regular_expression(_: Path) -> Any:
    Rule("re:(", 4)


@mistake("'fc'", "near names: stem, body, head")
def a_rule_for_no_layer(_: Path) -> Any:
    lsquant.prepare(Net(), Recipe(4, 4, [Rule("fc", 8)]))


@mistake("'haed'", "near names: head")
def a_misspelt_skip(_: Path) -> Any:
    lsquant.prepare(Net(), Recipe.preset("w4a4", skip=["haed"]))


@mistake("'one' and 'two' share one weight", "give both the same rule")
def two_rules_for_a_tied_weight(_: Path) -> Any:
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    model["two"].weight = model["one"].weight
    lsquant.prepare(model, Recipe(4, 4, [Rule("one", 2), Rule("two", 8)]))


# ---- TOML ----


@mistake("'wieght'", "known are")
def a_misspelt_key_in_toml(_: Path) -> Any:
    Recipe.from_toml("wieght = 4\n")


@mistake("'bit'", "known are")
def a_misspelt_field_in_toml(_: Path) -> Any:
    Recipe.from_toml("weight = { bit = 4 }\n")


@mistake("'activations'", "'activation'")
def a_misspelt_half_in_a_toml_rule(_: Path) -> Any:
    Recipe.from_toml('[[rules]]\nwhich = "head"\nactivations = 4\n')


@mistake("line 1", "not valid TOML")
def broken_toml(_: Path) -> Any:
    Recipe.from_toml("weight = \n")


@mistake("rules", "[[rules]]")
def a_table_for_rules(_: Path) -> Any:
    Recipe.from_toml('[rules]\nwhich = "head"\n')


# ---- the order of calls ----


@mistake("recipe is 'w4a4'", "Recipe.preset('w4a4')")
def a_name_for_a_recipe(_: Path) -> Any:
    lsquant.prepare(Net(), "w4a4")  # type: ignore[arg-type]


@mistake("model is a OrderedDict", "nn.Module")
def a_state_dict_for_a_model(_: Path) -> Any:
    lsquant.prepare(Net().state_dict(), W4A4)  # type: ignore[arg-type]


@mistake("no layer that can be quantized", "Linear")
def a_model_without_layers(_: Path) -> Any:
    lsquant.prepare(nn.Sequential(nn.ReLU()), W4A4)


@mistake("the model you passed", "prepare works in place")
def what_prepare_returns_for_the_model(_: Path) -> Any:
    model = lsquant.prepare(Net(), W4A4)
    return model(images())


@mistake(".train", "prepare works in place")
def what_prepare_returns_for_the_model_in_training(_: Path) -> Any:
    lsquant.prepare(Net(), W4A4).train()


@mistake("on the model you passed", "prepare works in place")
def what_prepare_returns_for_the_model_in_calibrate(_: Path) -> Any:
    lsquant.calibrate(lsquant.prepare(Net(), W4A4), [images()])  # type: ignore[arg-type]


@mistake("DataParallel", "before it is wrapped")
def a_wrapped_model(_: Path) -> Any:
    lsquant.prepare(nn.DataParallel(Net()), W4A4)


@mistake("DistributedDataParallel", "before it is wrapped")
def a_model_wrapped_for_several_processes(tmp: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp}/meet", rank=0, world_size=1)
    try:
        lsquant.prepare(nn.parallel.DistributedDataParallel(Net()), W4A4)
    finally:
        torch.distributed.destroy_process_group()


@mistake("steps='keep'", "'rescale' or 'recalibrate'")
def prepared_twice_with_a_wrong_word(_: Path) -> Any:
    lsquant.prepare(prepared(), Recipe(2, 2), steps="keep")  # type: ignore[arg-type]


@mistake("stem.input_quantizer", "lsquant.calibrate")
def prepared_twice_without_calibrating_again(_: Path) -> Any:
    model = ready()
    lsquant.prepare(model, Recipe(2, 2), steps="recalibrate")
    model(images())


@mistake("stem.input_quantizer", "lsquant.calibrate")
def used_before_calibration(_: Path) -> Any:
    prepared()(images())


@mistake("no quantizers", "lsquant.prepare")
def calibrated_before_prepare(_: Path) -> Any:
    lsquant.calibrate(Net(), [images()])


@mistake("'head' was taken for the first", "example_inputs")
def a_model_defined_in_another_order(_: Path) -> Any:
    model = Reversed()
    lsquant.prepare(model, Recipe.preset("w2a2"))
    lsquant.calibrate(model, [torch.randn(3, 4)])


@mistake("layer 'stem'", "has 5 features or channels, the layer takes 4")
def an_input_of_another_size(_: Path) -> Any:
    model = nn.ModuleDict({"stem": nn.Linear(4, 4)})
    lsquant.prepare(model, W4A4)
    lsquant.calibrate(model, [torch.randn(3, 4)], forward=lambda m, x: m["stem"](x))
    model["stem"](torch.randn(3, 5))


@mistake("layer 'body'", "has 3 features or channels, the layer takes 4")
def an_input_of_other_channels(_: Path) -> Any:
    ready().body(torch.randn(1, 3, 6, 6))


@mistake("layer 'up'", "has 3 features or channels, the layer takes 4")
def a_transposed_convolution_with_other_channels(_: Path) -> Any:
    model = nn.ModuleDict({"up": nn.ConvTranspose1d(4, 2, 2)})
    lsquant.prepare(model, Recipe(4, None))
    model["up"](torch.randn(1, 3, 6))


@mistake("smallest is [12]", "stride (2,)")
def an_output_size_out_of_reach(_: Path) -> Any:
    model = nn.ModuleDict({"up": nn.ConvTranspose1d(4, 2, 2, stride=2)})
    lsquant.prepare(model, Recipe(4, None))
    model["up"](torch.randn(1, 4, 6), output_size=[15])


# ---- batches ----


@mistake("batches is a Tensor", "pass [batch]")
def a_bare_tensor_for_batches(_: Path) -> Any:
    lsquant.calibrate(prepared(), images())


@mistake("no batches", "only once")
def a_generator_that_is_used_up(_: Path) -> Any:
    batches = (b for b in [images()])
    list(batches)
    lsquant.calibrate(prepared(), batches)


@mistake("type str", "forward=lambda")
def batches_of_words(_: Path) -> Any:
    lsquant.calibrate(prepared(), ["a", "b"])


@mistake("'stem'", "clean the data")
def batches_with_nan(_: Path) -> Any:
    lsquant.calibrate(prepared(), [images() / 0.0])


@mistake("layer 'stem' are zero", "skip=")
def batches_of_zeros(_: Path) -> Any:
    lsquant.calibrate(prepared(), [torch.zeros(2, 1, 6, 6)])


@mistake("layer 'unused' was not reached", "skip=")
def a_layer_that_no_batch_reaches(_: Path) -> Any:
    model = Net()
    model.unused = nn.Linear(2, 2)
    lsquant.prepare(model, W4A4)
    lsquant.calibrate(model, [images()])


@mistake("max_batches", "at least 1")
def no_batch_at_all(_: Path) -> Any:
    lsquant.calibrate(prepared(), [images()], max_batches=0)


@mistake("method='minmax'", "'mse' or 'paper'")
def an_unknown_method(_: Path) -> Any:
    lsquant.calibrate(prepared(), [images()], method="minmax")  # type: ignore[arg-type]


@mistake("'stem.weight_quantizer'", "is the trained float model loaded")
def weights_that_are_all_zero(_: Path) -> Any:
    model = Net()
    nn.init.zeros_(model.stem.weight)
    lsquant.prepare(model, W4A4)
    lsquant.calibrate(model, [images()])


@mistake("matches no quantizer", "near names: body")
def a_misspelt_name_for_disabled(_: Path) -> Any:
    with lsquant.disabled(ready(), "boddy"):
        pass


# ---- calibrating again, and what a step cannot represent ----


@mistake("every step is set already", "again=True")
def calibrated_twice(_: Path) -> Any:
    model = ready()
    return warned(lambda: lsquant.calibrate(model, [images() * 3]))


@mistake("layer 'stem' was not reached by any batch with values", "skip=")
def nothing_but_empty_batches(_: Path) -> Any:
    lsquant.calibrate(prepared(), [torch.empty(0, 1, 6, 6)])


@mistake("weights='max'", "'mse' or 'paper'")
def an_unknown_rule_for_weights(_: Path) -> Any:
    lsquant.calibrate(prepared(), [images()], weights="max")  # type: ignore[arg-type]


@mistake("'stem.weight' is on the meta device", "load a state first")
def a_model_without_values_calibrated(_: Path) -> Any:
    lsquant.calibrate(prepared().to("meta"), [images()])


@mistake("its 12 weights are integers", "weights='mse'")
def whole_numbers_that_the_step_merges(_: Path) -> Any:
    model = prepared(Recipe(8, None))
    with torch.no_grad():
        model.head.weight.copy_(torch.arange(12.0).reshape(3, 4))
    model.head.weight_quantizer.initialize(model.head.weight, "paper")
    return lsquant.check(model)


@mistake("no step represents them at 4 bits", "give it more bits")
def whole_numbers_of_too_many_bits(_: Path) -> Any:
    model = Net()
    with torch.no_grad():
        model.head.weight.copy_(torch.arange(12.0).reshape(3, 4))
    lsquant.prepare(model, Recipe(4, None))
    return lsquant.check(model)


# ---- layers that changed after prepare, tensors that do not fit ----


@mistake("layer 'body': the weight, output channels first (2, 4, 3, 3), needs 2", "lsquant.prepare(model, recipe)")
def a_convolution_pruned_after_prepare(_: Path) -> Any:
    model = ready(Recipe(QuantSpec(4, granularity="channel"), 4))
    model.body.weight = nn.Parameter(model.body.weight.detach()[:2])
    model(images())


@mistake("layer 'head': the weight, output channels first (6, 4), needs 6 steps", "lsquant.prepare(model, recipe)")
def a_head_grown_after_prepare(_: Path) -> Any:
    model = ready(Recipe(QuantSpec(4, granularity="channel"), None))
    model.head.weight = nn.Parameter(torch.cat([model.head.weight.detach()] * 2))
    lsquant.integer_weights(model)


@mistake("layer 'head': the bias must be (6,), floating point", "got torch.float32 of shape (3,)")
def a_head_grown_without_its_bias(_: Path) -> Any:
    model = ready()
    model.head.weight = nn.Parameter(torch.cat([model.head.weight.detach()] * 2))
    model(images())


@mistake("layer 'stem': Calculated padded input size per channel: (2 x 2)", "Kernel size can't be greater")
def an_image_smaller_than_the_kernel(_: Path) -> Any:
    model = ready()
    model.stem.padding = (0, 0)
    model(torch.randn(1, 1, 2, 2))


@mistake("layer 'stem': input and weight must be float32", "got torch.uint8 and torch.float32")
def images_of_bytes(_: Path) -> Any:
    ready()(torch.zeros(2, 1, 6, 6, dtype=torch.uint8))


@mistake("layer 'stem': the input is on meta, its step on cpu", "move model or batch with .to()")
def a_batch_on_another_device(_: Path) -> Any:
    ready()(images().to("meta"))


@mistake("layer 'stem': convolution: input (1, 1, 6), weight (4, 1, 3, 3)", "dimensions differ")
def a_line_for_a_convolution_of_images(_: Path) -> Any:
    ready().stem(torch.randn(1, 6))


# ---- the operator ----


@mistake("an input of shape (4, 5) wants 5 step(s)", "got 3")
def steps_that_do_not_fit_an_axis(_: Path) -> Any:
    lsquant.fake_quantize(torch.randn(4, 5), torch.ones(3), -8, 7, 1.0, axis=1)


@mistake("q_min=7, q_max=-8", "bounds must be in order")
def bounds_the_wrong_way_round(_: Path) -> Any:
    lsquant.fake_quantize(torch.randn(4, 5), torch.ones(1), 7, -8, 1.0)


@mistake("offset must be float32, got torch.float64", "stay float32")
def an_offset_of_another_type(_: Path) -> Any:
    lsquant.fake_quantize(torch.randn(4), torch.ones(1), 0, 15, 1.0, offset=torch.zeros(1, dtype=torch.float64))


@mistake("zero_point=1.5", "an integer")
def a_zero_point_between_two_codes(_: Path) -> Any:
    lsquant.fake_quantize(torch.randn(4), torch.ones(1), 0, 15, 1.0, zero_point=1.5)  # type: ignore[arg-type]


@mistake("group_size=3 does not divide the 5 elements of a row", "(4, 5)")
def groups_that_do_not_divide_a_row(_: Path) -> Any:
    lsquant.fake_quantize(torch.randn(4, 5), torch.ones(1), -8, 7, 1.0, group_size=3)


# ---- tracing ----


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.relu() if x.abs().mean() > 0 else x


class Masked(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return x + x.relu() if mask is None else (x + x.relu()) * mask


@mistake("block '0' (Branching)", "lsquant.nn.Add() for add")
def a_network_that_cannot_be_traced(_: Path) -> Any:
    lsquant.trace(nn.Sequential(Branching()), images())


@mistake("trace works in place", "the model you passed")
def what_trace_returned_as_a_model(_: Path) -> Any:
    lsquant.trace(nn.Sequential(Masked()), images())(images())


@mistake("argument 'mask'", "trace a fresh model with such inputs")
def a_traced_network_with_another_argument(_: Path) -> Any:
    model = Masked()
    lsquant.trace(model, images())
    model(images(), torch.ones(()))


@mistake("Cat takes its tensors one by one", "cat(a, b)")
def a_list_for_cat(_: Path) -> Any:
    lsquant.nn.Cat()([images(), images()])  # type: ignore[arg-type]
