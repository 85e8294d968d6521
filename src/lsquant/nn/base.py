"""What all quantized layers share: two quantizers, integer weights, loading of float checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lsquant import ops, reference
from lsquant._util.errors import UsageError
from lsquant.nn.layout import WeightLayout, conv_groups
from lsquant.quantizer import Method, Quantizer


class QuantizedLayer(nn.Module):
    """Mixed in before the float layer's class.  ``weight_quantizer`` and ``input_quantizer`` may be None.

    ``stored_quantizer`` is that of the stored tensor which the input is, where it has more bits than the layer reads.

    float_type: the class of the float layer.
    weight_layout: where the weight has its output channels.
    takes_codes: whether the input can be quantized.
    takes_groups: whether the weight can have a step per group.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    stored_quantizer: Quantizer | None
    float_type: type[nn.Module]
    weight_layout = WeightLayout.OUTPUT_FIRST
    takes_codes = True
    takes_groups = True

    def to_rows(self, weight: Tensor) -> Tensor:
        """Return rows, output channels first, from a tensor that lies as the layer's weight does; differentiable."""
        return self.weight_layout.rows(weight, conv_groups(self))

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return a tensor that lies as the layer's weight does, from rows; differentiable."""
        return self.weight_layout.weight(rows, conv_groups(self))

    def rows(self) -> Tensor:
        """Return the weight with output channels first, as steps per channel and groups see it."""
        return self.to_rows(self.weight)

    def attach(self, weight_quantizer: Quantizer | None, input_quantizer: Quantizer | None) -> None:
        """Give the layer its quantizers; a weight step that is not set is set from the weight, if it can be.

        Their order is the same however often this is called: the states of optimizers go by the order of parameters.
        """
        for name in ("weight_quantizer", "input_quantizer", "stored_quantizer"):
            if hasattr(self, name):
                delattr(self, name)
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        self.stored_quantizer = None
        self.initialize_weight_step()

    def initialize_weight_step(self, again: bool = False) -> None:
        """Set the weight's step; with an all-zero or unset weight it stays uninitialised.

        By the paper's rule; by least squared error where the input is not quantized, and for a step per group.  A
        frozen weight gets a step that represents it exactly, where there is one.
        """
        quantizer = self.weight_quantizer
        if quantizer is None or (quantizer.is_initialized and not again) or self.weight.is_meta:
            return
        try:
            self.set_weight_step(quantizer, self.first_rule(quantizer))
        except UsageError:
            quantizer.forget()

    def first_rule(self, quantizer: Quantizer) -> Method:
        """Return the rule by which the first step of the weight's quantizer is set."""
        return "paper" if self.input_quantizer is not None and quantizer.spec.group_size is None else "mse"

    def set_weight_step(self, quantizer: Quantizer, method: Method, moments: Tensor | None = None) -> None:
        """Set the step of the weight's quantizer, or of a copy.  Raises: UsageError for a weight that gives none.

        moments: (inputs,) float32, ``E[x^2]`` of every feature or channel of the input, by which errors are weighted.
        """
        quantizer.initialize(self.rows(), method, None if moments is None else self.importance(moments))
        if not self.weight.requires_grad:  # training will not move it to the levels
            quantizer._prefer_exact(self.rows())

    def importance(self, moments: Tensor) -> Tensor:
        """Return what errors of ``rows()`` count, in a shape that broadcasts to it.

        moments: (inputs,) float32, the mean square of every feature or channel of the input.
        """
        shape, groups = self._row_shape(), conv_groups(self)
        by_group = moments.reshape(groups, 1, -1).expand(groups, shape[0] // groups, -1).reshape(shape[0], -1)
        return by_group.reshape(*by_group.shape, *[1] * (len(shape) - 2))

    def _row_shape(self) -> torch.Size:
        """Return the shape of ``rows()``."""
        return self.weight_layout.row_shape(self.weight.shape, conv_groups(self))

    def own_quantizers(self) -> tuple[Quantizer, ...]:
        """Return the quantizers of the weight, the input, and the stored tensor it is read from: those there are."""
        own = (self.weight_quantizer, self.input_quantizer, self.stored_quantizer)
        return tuple(q for q in own if q is not None)

    def detach_quantizers(self) -> None:
        """Remove all quantizers, so that the state dict is the float layer's again."""
        del self.weight_quantizer, self.input_quantizer, self.stored_quantizer

    def read(self, x: Tensor) -> Tensor:
        """Return the input as it is stored, where that has more bits than the layer reads."""
        return x if self.stored_quantizer is None else self.stored_quantizer(x)

    def grids(self) -> tuple[ops.Grid, ops.Grid] | None:
        """Return (input's, weight's) grid when both are quantized and switched on, else None."""
        x, w = self.input_quantizer, self.weight_quantizer
        return (x.grid(), w.grid()) if x is not None and w is not None and x.enabled and w.enabled else None

    def count_guarded(self) -> None:
        """Count the guarded steps of both quantizers, for a forward pass that takes ``grids``."""
        for quantizer in self.own_quantizers():
            quantizer.count_guarded()

    def computed(self, op: Callable[..., Any], *arguments: Any) -> Any:
        """Return ``op(*arguments)``; an error of it that names no layer gets the name of this one."""
        if torch.compiler.is_compiling():
            return op(*arguments)
        try:
            return op(*arguments)
        except UsageError as error:
            if str(error).startswith(("layer ", "quantizer ")):
                raise
            raise type(error)(f"layer {self._layer_name()!r}: {error}") from error

    def require_steps(self) -> None:
        """Raise UsageError naming the layer where the weight is not the one that its steps were made for."""
        quantizer = self.weight_quantizer
        if quantizer is not None and quantizer.enabled:
            self.computed(ops.require_steps, self._row_shape(), quantizer.step, quantizer.spec.group_size)

    def _layer_name(self) -> str:
        quantizer = self.input_quantizer or self.weight_quantizer
        return quantizer.name.rpartition(".")[0] if quantizer is not None else ""

    def float_operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Fake-quantize input and weight, where they have a quantizer: for layers quantized in one of the two."""
        xq, wq = self.input_quantizer, self.weight_quantizer
        self.require_steps()
        weight = self.weight if wq is None else self.from_rows(self.computed(wq, self.rows()))
        return x if xq is None else self.computed(xq, x), weight

    @torch.no_grad()
    def integer_weight(self) -> tuple[Tensor, Tensor, None]:
        """Return (codes, step, zero_point): int8 codes in the weight's shape, the guarded step (steps,) float32, None.

        The steps are in the order of output channels, or of groups along the rows of output channels;
        ``dequantized_weight`` multiplies them.  Raises: UsageError when the weight is not quantized.
        """
        quantizer = self.weight_quantizer
        if quantizer is None:
            raise UsageError("integer_weight: this layer's weight is not quantized")
        self.require_steps()
        codes = self.computed(quantizer.codes, self.rows())
        return self.from_rows(codes), quantizer.effective_step().detach().clone(), None

    @torch.no_grad()
    def dequantized_weight(self) -> Tensor:
        """Compute ``codes * step`` in the weight's own shape, float32: what the layer multiplies with."""
        codes, step, _ = self.integer_weight()
        quantizer = self.weight_quantizer
        assert quantizer is not None
        rows = self.to_rows(codes).to(torch.float32)
        values, steps = reference.step_view(rows, step, quantizer.axis, quantizer.spec.group_size)
        return self.from_rows((values * steps).reshape(rows.shape))

    def require_size(self, found: int, wanted: int) -> None:
        """Raise UsageError naming the layer where the input has another number of features or channels."""
        if found != wanted:
            raise UsageError(
                f"layer {self._layer_name()!r}: the input has {found} features or channels, the layer takes {wanted}"
            )

    @staticmethod
    def unsupported(layer: nn.Module) -> str:
        """Say why a float layer of this type cannot be quantized; empty when it can."""
        return ""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        quantizer, place = self.weight_quantizer, prefix + "weight_quantizer."
        if quantizer is None or any(key.startswith(place) for key in state_dict):
            return
        if prefix + "weight" in state_dict:
            self.initialize_weight_step(again=True)
        else:  # not a float checkpoint: the whole layer is missing, as files have tied layers only once
            missing_keys = args[2]
            missing_keys += [place + key for key in quantizer.state_dict()]
