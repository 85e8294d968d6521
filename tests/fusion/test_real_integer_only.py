"""MobileNetV1 with ImageNet's weights as an integer-only network, calibrated only.

It has dead channels and variances of 1e-35.  ``LSQUANT_TEST_DATA=... PYTHONPATH=tests python
tests/fusion/test_real_integer_only.py`` prints accuracies, sizes and the verdict.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lsquant
from helpers.real_deployment import data
from helpers.real_nets import real_net
from lsquant import QuantSpec, Recipe


def sequential(net: Any) -> nn.Sequential:
    """The same layers with fixed padding: Keras pads images of even size by (0, 1) where a convolution has stride 2."""
    layers: list[nn.Module] = []
    for name in ("conv1", *(f"conv_{kind}_{i}" for i in range(1, 14) for kind in ("dw", "pw"))):
        conv = net.get_submodule(name)
        if conv.stride == (2, 2):
            layers.append(nn.ZeroPad2d((0, 1, 0, 1)))
        else:
            conv.padding = tuple(k // 2 for k in conv.kernel_size)
        layers += [conv, net.get_submodule(f"{name}_bn"), nn.ReLU6()]
    return nn.Sequential(*layers, net.pool, net.conv_preds, nn.Flatten())


def run(folder: Path, place: Path, bits: int = 8, count: int = 500) -> dict[str, Any]:
    """Accuracies of the float network and of the integer-only one, and the verdict on the file."""
    calibration, images, labels, size = data("MobileNetV1", folder, place)
    images, labels = images[:count], labels[:count]

    def top1(network: nn.Module) -> float:
        with torch.no_grad():
            parts = zip(images.split(20), labels.split(20), strict=True)
            return 100.0 * sum(int((network(x).argmax(1) == y).sum()) for x, y in parts) / len(images)

    float_network = real_net("MobileNetV1", folder)
    with torch.no_grad():
        wanted = float_network(images[:4])
        model = sequential(float_network).eval()
        torch.testing.assert_close(model(images[:4]), wanted)
    found: dict[str, Any] = {"float": top1(model)}
    lsquant.prepare(model, Recipe(QuantSpec(bits, granularity="channel"), bits, joins=8), example_inputs=images[:2])
    lsquant.calibrate(model, calibration.split(size), weights="mse")
    network = lsquant.fuse(model.eval())
    found |= {"integer-only": top1(network), "raised": sum(f.raised for f in network.constants().values())}
    path = lsquant.export_onnx(network, place / "m.onnx", images[:2], profile="integer")
    return found | {"bytes": path.stat().st_size, "verdict": lsquant.verify(network, path, list(images.split(20)))}


@pytest.mark.slow
def test_mobilenet_calibrated_only(data_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    found = run(data_folder, tmp_path)
    assert found["float"] == pytest.approx(64.8)
    assert found["integer-only"] >= found["float"] - 1.5
    assert found["verdict"].exact, str(found["verdict"])
    assert found["verdict"].samples == 500


def _print() -> None:
    with tempfile.TemporaryDirectory() as place:
        for name, value in run(Path(os.environ["LSQUANT_TEST_DATA"]), Path(place)).items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    _print()
