"""A verdict for ExecuTorch and LiteRT: do they compute what was trained?

    python studies/other_runtimes.py executorch|litert --data FOLDER --cifar FILE [--bits w8a8] [--images N]

Neither has operators for sums over low-bit codes that torch's exporters reach, so the integer model is written out in
plain operators: divide, round, clip, a float convolution over integer-valued codes, one multiplication, one addition.
Weights are int8 codes, cast in the graph.  As the sums stay below 2^24 the float convolution is exact, whatever its
order.  The network is MLPerf Tiny's ResNet-8, calibrated on CIFAR-10's images; its codes at every layer and its outputs
are compared with the trained model's.

FOLDER: with checkpoints/; FILE: test_batch.bin of CIFAR-10's binary version.  Run it in an environment of its own, in
which executorch or litert-torch is installed beside lsquant.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant
from lsquant import shipped
from lsquant.verification.verdict import Differences

ROOT = Path(__file__).resolve().parents[1]


SEEN: list[Tensor] = []  # codes of the last call, in order of execution; an attribute would disturb torch.export


class Plain(nn.Module):
    """A frozen layer in operators that every exporter knows; adds its codes to SEEN."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer_is_conv = isinstance(layer, shipped.IntegerConv)
        self.low, self.high = float(layer.input.q_min), float(layer.input.q_max)
        dims = 2 if self.layer_is_conv else 0
        for name, value in (("step", layer.input.step), ("codes", layer.codes), ("scale", layer.scale)):
            self.register_buffer(name, value.detach().clone())
        self.scale = self.scale.reshape(-1, *[1] * dims)
        bias = layer.bias if layer.bias is not None else torch.zeros(len(layer.codes))
        self.register_buffer("bias", bias.detach().reshape(-1, *[1] * dims))
        if self.layer_is_conv:
            self.stride, self.kernel_size = layer.stride, layer.kernel_size  # the network looks at them
            self.geometry = (layer.stride, [a for a, _ in layer.node_padding], layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.clamp(torch.round(x / self.step), self.low, self.high)
        SEEN.append(codes)
        weight = self.codes.to(torch.float32)
        sums = F.conv2d(codes, weight, None, *self.geometry) if self.layer_is_conv else F.linear(codes, weight)
        return sums * self.scale + self.bias


class WithCodes(nn.Module):
    """(outputs, codes of every layer in order of execution)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = shipped.integer_model(shipped.ship(model))
        for name, layer in list(self.model.named_modules()):
            if isinstance(layer, shipped.IntegerLayer):
                parent, _, last = name.rpartition(".")
                setattr(self.model.get_submodule(parent), last, Plain(layer))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        SEEN.clear()
        y = self.model(x)
        return y, *SEEN


def executorch(model: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], list[Tensor]], int]:
    """Through XNNPACK where it takes a part of the graph, else portable kernels."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = torch.export.export(model, (x,))
    data = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer
    loaded = Runtime.get().load_program(data)
    method = loaded.load_method("forward")
    keep = (data, loaded)  # a method does not hold its program: without them it crashes
    return lambda batch: method.execute([batch]) if keep else [], len(data)


def litert(model: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], list[Tensor]], int]:
    """Through LiteRT's interpreter, with its XNNPACK delegate."""
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter

    path = Path("resnet8.tflite")
    litert_torch.convert(model, (x,)).export(str(path))
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    run = interpreter.get_signature_runner()
    names = sorted(run.get_output_details(), key=lambda name: int(name.rpartition("_")[2]))
    (given,) = run.get_input_details()
    size = path.stat().st_size

    def call(batch: Tensor) -> list[Tensor]:
        found = run(**{given: batch.numpy()})
        return [torch.from_numpy(found[name].copy()) for name in names]

    return call, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=("executorch", "litert"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--images", type=int, default=1000)
    a = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.real_nets import real_net

    pixels = np.fromfile(a.cifar, np.uint8).reshape(-1, 3073)[: a.images, 1:].reshape(-1, 3, 32, 32)
    images = torch.from_numpy(pixels.astype(np.float32))
    model = real_net("ResNet-8", a.data)
    lsquant.prepare(model, lsquant.Recipe.preset(a.bits), images[:2])
    lsquant.calibrate(model, images[:256].split(64))
    model.eval()
    plain = WithCodes(model).eval()
    with torch.no_grad():
        assert torch.equal(plain(images[:8])[0], model(images[:8])), "the plain model is not the trained one"
        start = time.time()
        call, size = (executorch if a.runtime == "executorch" else litert)(plain, images[:8])
        print(f"converted in {time.time() - start:.0f} s, {size:,} bytes")
        codes, outputs = Differences("codes", "input codes, end to end"), Differences("outputs", "outputs")
        for batch in images.split(8):
            if len(batch) < 8:
                break
            want, got = [model(batch), *plain(batch)[1:]], call(batch)
            assert len(want) == len(got)
            outputs.add("output", got[0].numpy(), want[0].numpy())
            for i, (one, other) in enumerate(zip(got[1:], want[1:], strict=True)):
                codes.add(str(i), one.numpy(), other.numpy())
    package = {"executorch": "executorch", "litert": "ai-edge-litert"}[a.runtime]
    print(f"{package} {metadata.version(package)}, torch {torch.__version__}, {a.bits}, {len(images)} images")
    for differences in (codes, outputs):
        print(differences.check())


if __name__ == "__main__":
    main()
