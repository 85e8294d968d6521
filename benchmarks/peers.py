"""What lsquant is compared with: the common eager formulation of LSQ, PyTorch core, Brevitas, torchao.

Every quantizer here is signed, with one step per tensor or one per index of an axis.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsquant import Recipe, calibrate, prepare
from lsquant.nn import quantized_layers

# ---- the common eager formulation, from the paper's appendix: two helpers by detach, and clamp ----


def grad_scale(x: Tensor, scale: float) -> Tensor:
    """x forward, ``scale`` times the gradient backward."""
    y, scaled = x, x * scale
    return (y - scaled).detach() + scaled


def round_pass(x: Tensor) -> Tensor:
    """round(x) forward, the gradient as it is backward."""
    return (x.round() - x).detach() + x


def formulation(x: Tensor, step: Tensor, q_min: int, q_max: int, g: float) -> Tensor:
    """LSQ as it is usually written.  step: broadcasts with x.  Its boundary gradients are those of clamp."""
    step = grad_scale(step, g)
    return round_pass(torch.clamp(x / step, q_min, q_max)) * step


class FormulationLayer(nn.Module):
    """A Conv2d or Linear whose input and weight go through the formulation."""

    def __init__(self, layer: nn.Module, quantized: Any) -> None:
        super().__init__()
        self.layer = layer
        for name in ("weight", "input"):
            quantizer = getattr(quantized, f"{name}_quantizer")
            setattr(self, f"{name}_step", nn.Parameter(quantizer.step.detach().clone()))
            setattr(self, f"{name}_numbers", (quantizer.q_min, quantizer.q_max, quantizer.gradient_scale))

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        x = formulation(x, self.input_step, *self.input_numbers)
        weight = formulation(layer.weight, self.weight_step, *self.weight_numbers)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def quantized(model: nn.Module, recipe: Recipe, inputs: Tensor) -> nn.Module:
    """A copy of a float model, prepared and calibrated by lsquant."""
    model = copy.deepcopy(model)
    prepare(model, recipe, example_inputs=inputs)
    calibrate(model, [inputs])
    return model


def formulated(model: nn.Module, recipe: Recipe, inputs: Tensor) -> nn.Module:
    """A copy of a float model with the formulation in the layers, and the steps, that lsquant would quantize."""
    template, model = quantized(model, recipe, inputs), copy.deepcopy(model)
    for name, layer in quantized_layers(template):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, FormulationLayer(model.get_submodule(name), layer))
    return model


# ---- quantizers alone ----


class Problem(NamedTuple):
    """One tensor to be quantized: x, step (1,) or (x.shape[axis],), bounds and g."""

    x: Tensor
    step: Tensor
    axis: int | None
    bits: int
    g: float

    @property
    def bounds(self) -> tuple[int, int]:
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def broadcast(self, step: Tensor) -> Tensor:
        shape = [1] * self.x.dim()
        if self.axis is not None:
            shape[self.axis] = -1
        return step.reshape(shape) if self.axis is not None else step


class Quantize(NamedTuple):
    """A function of x, and the parameters that learn."""

    function: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]


class LeftOut(Exception):
    """Why a contender does not take part."""


def formulation_quantizer(p: Problem) -> Quantize:
    """The step has the type of x, as the parameters of a bfloat16 model have."""
    step = p.step.to(p.x.dtype, copy=True).requires_grad_()
    return Quantize(lambda x: formulation(x, p.broadcast(step), *p.bounds, p.g), [step])


def compiled_formulation_quantizer(p: Problem) -> Quantize:
    function, parameters = formulation_quantizer(p)
    return Quantize(torch.compile(function, dynamic=False), parameters)


def core_quantizer(p: Problem) -> Quantize:
    """PyTorch's own learnable fake quantization."""
    step, zero = p.step.clone().requires_grad_(), torch.zeros_like(p.step)
    if p.axis is None:
        op = torch._fake_quantize_learnable_per_tensor_affine
        return Quantize(lambda x: op(x, step, zero, *p.bounds, p.g), [step])
    channel_op = torch._fake_quantize_learnable_per_channel_affine
    return Quantize(lambda x: channel_op(x, step, zero, p.axis, *p.bounds, p.g), [step])


def brevitas_quantizer(p: Problem) -> Quantize:
    """``QuantIdentity`` with a learned scale; as a module of a bfloat16 model its scale is bfloat16."""
    if find_spec("brevitas") is None:
        raise LeftOut("not installed: pip install brevitas")
    from brevitas.nn import QuantIdentity  # type: ignore[import-not-found]
    from brevitas.quant import Int8ActPerTensorFloat  # type: ignore[import-not-found]

    init = p.broadcast(p.step) * 2.0 ** (p.bits - 1)  # its parameter is the threshold
    more: dict[str, Any] = {"scaling_init": float(init)} if p.axis is None else {
        "scaling_init": init, "scaling_per_output_channel": True, "per_channel_broadcastable_shape": tuple(init.shape),
        "scaling_stats_permute_dims": (p.axis, *(d for d in range(p.x.dim()) if d != p.axis)),
    }  # fmt: skip
    module = QuantIdentity(act_quant=Int8ActPerTensorFloat, bit_width=p.bits, scaling_impl_type="parameter", **more)
    module = module.to(p.x.device, p.x.dtype)
    return Quantize(module, list(module.parameters()))


def torchao_quantizer(p: Problem) -> Quantize:
    """``IntxFakeQuantizer`` with range learning, which knows rows of a matrix."""
    if find_spec("torchao") is None:
        raise LeftOut("not installed: pip install torchao")
    if p.axis not in (None, 0):
        raise LeftOut("its range learning has one scale per row of a matrix, no other axis")
    from torchao.quantization.granularity import PerAxis  # type: ignore[import-not-found]
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer  # type: ignore[import-not-found]

    kind = getattr(torch, f"int{p.bits}")
    config = IntxFakeQuantizeConfig(kind, PerAxis(0), is_symmetric=True, is_dynamic=False, range_learning=True)
    module = IntxFakeQuantizer(config)
    module.scale = nn.Parameter(p.step.reshape(-1, 1).clone())
    module.zero_point, module._initialized = torch.zeros_like(module.scale, dtype=torch.int32), True
    rows = p.step.numel()
    return Quantize(lambda x: module(x.reshape(rows, -1)).reshape(x.shape), [module.scale])


PEERS: dict[str, Callable[[Problem], Quantize]] = {
    "LSQ formulation, eager": formulation_quantizer,
    "LSQ formulation, compiled": compiled_formulation_quantizer,
    "PyTorch core": core_quantizer,
    "Brevitas": brevitas_quantizer,
    "torchao range learning": torchao_quantizer,
}
