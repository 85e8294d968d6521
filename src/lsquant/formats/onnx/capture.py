"""From the integer model to an ONNX graph in which every quantized layer is one marked node, to be lowered."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lsquant._util.batches import model_inputs, require_arguments
from lsquant._util.errors import LsquantError, UsageError
from lsquant._util.nested import map_tensors, tensors_in
from lsquant.nn import EXACT_TYPES
from lsquant.shipped import FrozenQuantizer, drop_observers, frozen_parts

TORCH_OPSET = 18
"""The lowest operator set that torch's exporter writes."""


def captured(
    frozen: nn.Module, example_inputs: Any, opset: int, dynamic_batch: bool = True
) -> tuple[Any, dict[str, nn.Module]]:
    """Return (ONNX ModelProto, name -> frozen layer).

    frozen: an integer model, whose layers are marked by this call.
    dynamic_batch: whether the first dimension of every tensor input is free, and the same for all.

    Raises: UsageError for a model without quantized layers, and with torch's reason where it cannot be traced.
    """
    args, kwargs = model_inputs(example_inputs)
    require_arguments(frozen, example_inputs)
    changing = drop_observers(frozen, lambda: frozen(*args, **kwargs))
    layers = _marked(frozen)
    if not layers:
        raise UsageError("export_onnx: this model has no quantized layer; call lsquant.prepare on it first")
    _write_divisors(frozen)
    _require_output_padding(frozen)
    return exported(frozen, example_inputs, opset, dynamic_batch, changing), layers


def exported(
    module: nn.Module, example_inputs: Any, opset: int, dynamic_batch: bool = True, changing: Sequence[str] = ()
) -> Any:
    """Return the ONNX ModelProto of a module that marks what an exporter replaces.

    changing: names of hooks that change values, for the message.
    """
    args, kwargs = model_inputs(example_inputs)
    module.register_forward_hook(_outputs)
    shapes = None
    if dynamic_batch:
        args, kwargs = _at_least_two_samples(args, kwargs)
        shapes = _dynamic_batch(module, args, kwargs)
    with _quiet(), torch.no_grad():
        try:
            program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
            _require_divisors(program)
            found = torch.onnx.export(program, dynamo=True, opset_version=max(opset, TORCH_OPSET), verbose=False)
        except LsquantError:
            raise
        except Exception as error:
            if isinstance(root := _root(error), LsquantError):
                raise root from error
            how = " with a dynamic batch dimension" if dynamic_batch else ""
            hooks = f" (hooks that change values: {', '.join(changing)})" if changing else ""
            reason = f"torch cannot trace this model{how}{hooks}: {_first_lines(error)}"
            raise UsageError(f"export_onnx: {reason}") from error
    assert found is not None
    return found.model_proto


def _write_divisors(frozen: nn.Module) -> None:
    """Let averages with a divisor of their own be sums and a division: torch's exporter leaves the divisor out."""
    for module in frozen.modules():
        exact = EXACT_TYPES.get(type(module))
        if exact is not None and getattr(module, "divisor_override", None) and not exact.unsupported(module):
            module.__class__ = exact


def _require_output_padding(frozen: nn.Module) -> None:
    """Raise UsageError for a float transposed convolution that ONNX has no form for; quantized ones are written."""
    for name, module in frozen.named_modules():
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            pairs = zip(module.output_padding, module.stride, strict=True)
            if any(extra >= stride for extra, stride in pairs):
                raise UsageError(
                    f"export_onnx: {name}: ONNX Runtime refuses a transposed convolution whose output_padding is not "
                    "below its stride; quantize this layer, which is then written in another way, or choose other sizes"
                )


def _require_divisors(program: torch.export.ExportedProgram) -> None:
    """Raise UsageError for an average with a divisor of its own that is still there."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        names = [] if schema is None else [argument.name for argument in schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if given.get("divisor_override") is not None:
            raise UsageError(
                f"export_onnx: torch's exporter leaves out divisor_override={given['divisor_override']} of {node.name}"
                "; use nn.AvgPool2d(..., divisor_override=...) without ceil_mode as a module, or multiply what a plain "
                "average gives"
            )


def _outputs(frozen: nn.Module, args: Any, output: Any) -> list[Tensor]:
    """Return the tensors of a model's output, in whatever containers they are: what ``verify`` compares."""
    found = tensors_in(output)
    if not found:
        kind = type(output).__name__
        raise UsageError(
            f"export_onnx: no tensor is found in what the model returns, a {kind}; return tensors in tuples, lists, "
            "mappings or dataclasses"
        )
    return found


def _marked(frozen: nn.Module) -> dict[str, nn.Module]:
    """Mark every frozen layer, and every frozen quantizer that stands alone, with its name."""
    layers = frozen_parts(frozen)
    for name, module in layers.items():
        if isinstance(module, FrozenQuantizer) and module.group_size is not None:
            raise UsageError(f"{name}: a stand-alone quantizer with groups has no form in ONNX; use tensor or channel")
        module.marker = name
    return layers


def _at_least_two_samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat a batch of one, for torch.export takes a size of 1 for a constant."""
    tensors = tensors_in((args, kwargs))
    if not tensors:
        raise UsageError("export_onnx: example_inputs holds no tensor; give a batch as the model's forward takes it")
    if wrong := [t.dtype for t in tensors if t.is_floating_point() and t.dtype != torch.float32]:
        raise UsageError(f"export_onnx: example_inputs of type {wrong[0]}; give float32, and a float32 model")
    batched = [t for t in tensors if t.dim()]
    if not batched or any(t.shape[0] != 1 for t in batched):
        return args, kwargs
    return map_tensors((args, kwargs), lambda t: torch.cat([t, t]) if t.dim() else t)


def _dynamic_batch(frozen: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    batch = torch.export.Dim("batch")
    bound = inspect.signature(frozen.forward).bind(*args, **kwargs).arguments
    return map_tensors(dict(bound), lambda t: {0: batch} if t.dim() else None, lambda other: None)


def _first_lines(error: BaseException) -> str:
    """Return the reason at the root of torch's error, without its advice."""
    return " ".join(line.strip() for line in str(_root(error)).splitlines()[:4] if line.strip())


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's notes on missing packages and its own deprecations."""
    names = ("torch.onnx", "torch.__trace", "torch.export", "torch._dynamo", "torch._guards", "onnxscript", "onnx_ir")
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    try:
        for logger, _ in levels:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
