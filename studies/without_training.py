"""Integer-only ResNet-20 without training: least squares, importance, corrected biases (docs/integer-only.md).

    python studies/without_training.py --data DIR --init resnet20.safetensors [--peers]

DIR: the images of CIFAR-10 (docs/cifar10.md).  2,000 training images calibrate, all 10,000 test images measure.
--peers: also ONNX Runtime's static quantization and NNCF's post-training quantization of the float network, calibrated
on the same images, each measured in its own runtime (pip install onnxruntime openvino nncf).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lsquant
from lsquant import QuantSpec, Recipe, Rule
from lsquant.tasks import get_task, load_float

BATCH, BATCHES, CORRECTED = 250, 8, 4
WEIGHTS = {
    "w4a8, per tensor": QuantSpec(4, True),
    "w4a8, per channel": QuantSpec(4, True, granularity="channel"),
    "w8a8, per channel": QuantSpec(8, True, granularity="channel"),
}


class Peer(nn.Module):
    """A network that another tool quantized.  run: from an array to an array."""

    def __init__(self, run: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.run(x.contiguous().numpy()))


def exported(model: nn.Module, folder: Path) -> Path:
    """The float network as torch exports it."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    path, x = folder / "float.onnx", torch.zeros(2, 3, 32, 32)
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False, external_data=False)
    return path


def onnx_runtime(path: Path, batches: list[Any], folder: Path) -> Iterator[tuple[str, nn.Module]]:
    """Static quantization, 8 bits, weights per channel, with each of its rules for ranges."""
    runtime = __import__("onnxruntime")
    tools = __import__("onnxruntime.quantization", fromlist=["quantize_static"])
    prepared = folder / "prepared.onnx"
    tools.quant_pre_process(path, prepared, skip_symbolic_shape=True)
    name = runtime.InferenceSession(prepared).get_inputs()[0].name

    class Reader(tools.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.images = ({name: x.numpy()} for x, _ in batches)

        def get_next(self) -> Any:
            return next(self.images, None)

    kinds = {"activation_type": tools.QuantType.QUInt8, "weight_type": tools.QuantType.QInt8, "per_channel": True}
    for method in ("MinMax", "Entropy", "Percentile"):
        target = folder / f"{method}.onnx"
        rule = getattr(tools.CalibrationMethod, method)
        tools.quantize_static(prepared, target, Reader(), calibrate_method=rule, **kinds)
        session = runtime.InferenceSession(target)
        yield f"ONNX Runtime static, {method}", Peer(lambda x, session=session: session.run(None, {name: x})[0])


def nncf(model: nn.Module, batches: list[Any]) -> Iterator[tuple[str, nn.Module]]:
    """NNCF's post-training quantization, with both presets, of OpenVINO's conversion of the float network.

    Of the ONNX export, read by OpenVINO, NNCF 3.4.0 makes a network that is right in 22 % of the images.
    """
    tool, openvino = __import__("nncf"), __import__("openvino")
    images = [x[i : i + 1].numpy() for x, _ in batches for i in range(len(x))]
    for preset in ("performance", "mixed"):
        network = openvino.convert_model(model, example_input=torch.zeros(2, 3, 32, 32), input=[-1, 3, 32, 32])
        options = {"subset_size": len(images), "preset": tool.QuantizationPreset(preset)}
        found = tool.quantize(network, tool.Dataset(images), **options)
        compiled = openvino.Core().compile_model(found, "CPU")
        yield f"NNCF, {preset}", Peer(lambda x, compiled=compiled: compiled(x)[0])


def peers(task: Any, model: nn.Module, batches: list[Any]) -> None:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        path = exported(model, Path(name))
        for found in (onnx_runtime(path, batches, Path(name)), nncf(model, batches)):
            for what, peer in found:
                print("w8a8,", what, task.metric(peer), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--init", required=True, metavar="FILE")
    parser.add_argument("--peers", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = get_task("cifar10", data=arguments.data)
    batches = list(islice(task.batches("calibration", batch_size=BATCH), BATCHES))
    if arguments.peers:
        peers(task, load_float(task.model(), arguments.init).eval(), batches)
    for name, weight in WEIGHTS.items():
        model = load_float(task.model(), arguments.init).eval()
        lsquant.trace(model, task.example_input())
        recipe = Recipe(weight, 8, [Rule("first", 8, 8), Rule("last", 8, 8)], joins=8)
        lsquant.prepare(model, recipe, example_inputs=task.example_input())
        for importance in (False, True):
            lsquant.calibrate(model, batches, weights="mse", importance=importance, again=True)
            how = "with importance" if importance else "least squares"
            print(name, how, task.metric(lsquant.fuse(model)), flush=True)
        lsquant.correct_bias(model, batches, max_batches=CORRECTED)
        print(name, "and correct_bias", task.metric(lsquant.fuse(model)), flush=True)


if __name__ == "__main__":
    main()
