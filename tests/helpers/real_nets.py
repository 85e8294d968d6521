"""Published networks whose weights are among the real data: MLPerf Tiny's ResNet-8, ImageNet's MobileNetV1 0.75."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lsquant.tasks.resnet import cifar_resnet

EPSILON = 1e-3  # of Keras' BatchNorm


def same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """TensorFlow's SAME padding: what is left over goes to the right and the bottom."""
    total = [max((-(-n // s) - 1) * s + k - n, 0)
             for n, s, k in zip(x.shape[2:], conv.stride, conv.kernel_size, strict=True)]  # fmt: skip
    rows, columns = total
    return conv(F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)))


def conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride, groups=groups, bias=bias)


class ResNet8(nn.Module):
    """x: (N, 3, 32, 32), 0 to 255.  Convolutions have biases; 1x1 shortcuts have no BatchNorm."""

    PLAN = ((16, 16, 1), (16, 32, 2), (32, 64, 2))

    def __init__(self) -> None:
        super().__init__()
        self.conv2d = conv(3, 16, 3, bias=True)
        self.batch_normalization = nn.BatchNorm2d(16, EPSILON)
        number, norm = 1, 1
        for channels, out, stride in self.PLAN:
            for n, s in ((channels, stride), (out, 1)):
                setattr(self, f"conv2d_{number}", conv(n, out, 3, s, bias=True))
                setattr(self, f"batch_normalization_{norm}", nn.BatchNorm2d(out, EPSILON))
                number, norm = number + 1, norm + 1
            if stride > 1:
                setattr(self, f"conv2d_{number}", conv(channels, out, 1, stride, bias=True))
                number += 1
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dense = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.batch_normalization(same(x, self.conv2d)))
        for first, norm, shortcut in ((1, 1, None), (3, 3, 5), (6, 5, 8)):
            part = self.get_submodule
            y = F.relu(part(f"batch_normalization_{norm}")(same(x, part(f"conv2d_{first}"))))  # type: ignore[arg-type]
            y = part(f"batch_normalization_{norm + 1}")(same(y, part(f"conv2d_{first + 1}")))  # type: ignore[arg-type]
            x = F.relu(y + (x if shortcut is None else part(f"conv2d_{shortcut}")(x)))
        return self.dense(self.pool(x).flatten(1))


class MobileNet(nn.Module):
    """MobileNetV1 of width 0.75.  x: (N, 3, 224, 224), ``pixels / 127.5 - 1``."""

    CHANNELS = (24, 48, 96, 96, 192, 192, 384, 384, 384, 384, 384, 384, 768, 768)
    STRIDED = (2, 4, 6, 12)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv1_bn = conv(3, 24, 3, 2), nn.BatchNorm2d(24, EPSILON)
        for i in range(1, 14):
            channels, out = self.CHANNELS[i - 1 : i + 1]
            setattr(self, f"conv_dw_{i}", conv(channels, channels, 3, 2 if i in self.STRIDED else 1, channels))
            setattr(self, f"conv_dw_{i}_bn", nn.BatchNorm2d(channels, EPSILON))
            setattr(self, f"conv_pw_{i}", conv(channels, out, 1))
            setattr(self, f"conv_pw_{i}_bn", nn.BatchNorm2d(out, EPSILON))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv_preds = conv(768, 1000, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        names = ["conv1", *(f"conv_{kind}_{i}" for i in range(1, 14) for kind in ("dw", "pw"))]
        for name in names:
            x = F.relu6(self.get_submodule(f"{name}_bn")(same(x, self.get_submodule(name))))  # type: ignore[arg-type]
        return self.conv_preds(self.pool(x)).flatten(1)


_KERAS = {
    "kernel": "weight", "depthwise_kernel": "weight", "gamma": "weight", "beta": "bias",
    "moving_mean": "running_mean", "moving_variance": "running_var", "bias": "bias",
}  # fmt: skip
FILES = {
    "ResNet-20": "cifar10_resnet20.safetensors",
    "ResNet-8": "cifar10_resnet8_mlperf_tiny/pretrainedResnet.safetensors",
    "MobileNetV1": "imagenet_mobilenet_v1_0.75_224.safetensors",
}


def real_net(name: str, folder: Path) -> nn.Module:
    """One of FILES with its weights, from the folder of real data, in eval mode."""
    tensors = load_file(folder / "checkpoints" / FILES[name])
    if name == "ResNet-20":
        net: nn.Module = cifar_resnet("resnet20")
    else:
        net = ResNet8() if name == "ResNet-8" else MobileNet()
        tensors = {f"{k.rpartition('.')[0]}.{_KERAS[k.rpartition('.')[2]]}": v for k, v in tensors.items()}
    missing, odd = net.load_state_dict(tensors, strict=False)
    assert not odd
    assert all(key.endswith("num_batches_tracked") for key in missing), missing
    return net.eval()


def some_input(name: str, count: int = 2) -> Tensor:
    """Random pixels in the form the network takes."""
    x = torch.rand(count, 3, *((224, 224) if name == "MobileNetV1" else (32, 32)))
    return {"ResNet-20": (x - 0.45) / 0.225, "ResNet-8": (x * 255).round(), "MobileNetV1": x * 2 - 1}[name]
