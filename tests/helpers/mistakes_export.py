"""Mistakes with batches, wrapped models, exported files and their verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import lsquant
from helpers.mistakes import W4A4, images, mistake, ready
from lsquant import Recipe


class Two(nn.Module):
    """A forward with two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(3, 8)

    def forward(self, image: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
        return self.a(image) + self.b(meta)


class Result:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class Opaque(nn.Sequential):
    """Returns an object in which no tensor is looked for."""

    def forward(self, input: torch.Tensor) -> Any:
        return Result(super().forward(input))


def linear(kind: Any = nn.Sequential) -> Any:
    model = kind(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    lsquant.prepare(model, W4A4)
    lsquant.calibrate(model, [torch.randn(8, 4)])
    return model.eval()


# ---- batches ----


@mistake("missing a required argument: 'meta'", "a mapping gives keyword arguments")
def a_tuple_for_two_arguments(_: Path) -> Any:
    lsquant.prepare(Two(), W4A4, example_inputs=(torch.randn(2, 4), torch.randn(2, 3)))


@mistake("'picture'", "image, meta")
def a_key_that_forward_does_not_take(_: Path) -> Any:
    lsquant.prepare(Two(), W4A4, example_inputs={"picture": torch.randn(2, 4), "meta": torch.randn(2, 3)})


@mistake("QuantConv2d(1, 4, kernel_size=(3, 3)", "it must be a tensor")
def an_array_for_a_tensor(_: Path) -> Any:
    ready()(images().numpy())


@mistake("layer 'stem': the input has 2 features or channels", "the layer takes 1")
def an_example_of_other_channels(tmp: Path) -> Any:
    lsquant.export_onnx(ready(), tmp / "m.onnx", torch.randn(2, 2, 6, 6))


@mistake("failed on a batch ([2, 5])", "shape, type and device")
def a_batch_of_another_shape(_: Path) -> Any:
    lsquant.prepare(nn.Sequential(nn.Linear(4, 4)), W4A4, example_inputs=torch.randn(2, 5))


# ---- wrapped models ----


@mistake("revert the model before it is wrapped in DataParallel", ".module")
def a_wrapped_model_reverted(_: Path) -> Any:
    lsquant.revert(nn.DataParallel(ready()))


@mistake("load the model before it is wrapped in DataParallel", ".module")
def a_file_loaded_into_a_wrapped_model(tmp: Path) -> Any:
    lsquant.save(ready(), tmp / "m")
    lsquant.load(nn.DataParallel(ready()), tmp / "m")


# ---- export ----


@mistake("opset=99", "without opset=")
def an_opset_that_there_is_not(tmp: Path) -> Any:
    lsquant.export_onnx(linear(), tmp / "m.onnx", torch.randn(2, 4), opset=99)


@mistake("opset='18'", "without opset=")
def an_opset_as_a_word(tmp: Path) -> Any:
    lsquant.export_onnx(linear(), tmp / "m.onnx", torch.randn(2, 4), opset="18")  # type: ignore[arg-type]


@mistake("what the model returns, a Result", "return tensors in tuples")
def an_output_that_is_no_tensor_exported(tmp: Path) -> Any:
    lsquant.export_onnx(linear(Opaque), tmp / "m.onnx", torch.randn(2, 4))


@mistake("the sums of layer '0' can reach", "fewer bits")
def sums_that_do_not_fit_an_integer(tmp: Path) -> Any:
    model, x = nn.Sequential(nn.Conv1d(1, 1, 70_000)), torch.rand(2, 1, 70_000)
    lsquant.prepare(model, Recipe(8, 8))
    lsquant.calibrate(model, [x])
    lsquant.export_onnx(model, tmp / "m.onnx", x)


class Fixed(nn.Sequential):
    """Takes batches of two samples."""

    def forward(self, input: torch.Tensor) -> Any:
        return super().forward(input.reshape(2, 4))


@mistake("torch cannot trace this model", "dynamic batch dimension")
def a_model_of_one_batch_size_exported(tmp: Path) -> Any:
    model = Fixed(nn.Linear(4, 4))
    lsquant.prepare(model, W4A4)
    lsquant.calibrate(model, [torch.randn(2, 4)])
    lsquant.export_onnx(model, tmp / "m.onnx", torch.randn(2, 4))


# ---- verdicts ----


@mistake("the file holds other trained values", "exported from another state")
def a_file_of_another_training_verified(tmp: Path) -> Any:
    model = ready()
    lsquant.export_packed(model, tmp / "m")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return str(lsquant.verify(model, tmp / "m", [images()]))


@mistake("a Result", "no outputs were compared")
def an_output_that_is_no_tensor_verified(tmp: Path) -> Any:
    model = linear(Opaque)
    lsquant.export_packed(model, tmp / "m")
    return str(lsquant.verify(model, tmp / "m", [torch.randn(2, 4)]))


@mistake("the batches hold no samples", "nothing was compared")
def verified_without_samples(tmp: Path) -> Any:
    model = linear()
    lsquant.export_packed(model, tmp / "m")
    return str(lsquant.verify(model, tmp / "m", [torch.randn(0, 4)]))


@mistake("the model was given 2 tensors", "takes the inputs ['input']")
def verified_with_too_many_inputs(tmp: Path) -> Any:
    model = linear(Scaled)
    lsquant.export_onnx(model, tmp / "m.onnx", torch.randn(2, 4))
    lsquant.verify(model, tmp / "m.onnx", [{"input": torch.randn(2, 4), "scale": torch.ones(3)}])


class Scaled(nn.Sequential):
    """A second input that may be left out."""

    def forward(self, input: torch.Tensor, scale: Any = None) -> Any:
        y = super().forward(input)
        return y if scale is None else y * scale
