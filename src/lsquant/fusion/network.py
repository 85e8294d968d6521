"""``fuse`` and the network it returns: the trained modules, computed as an integer-only network computes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn

from lsquant import reference_integer as reference
from lsquant._util.batches import Forward, require_one_process
from lsquant._util.errors import UsageError
from lsquant.dataflow import Node, dataflow
from lsquant.fusion.arithmetic import (
    Codes,
    Folded,
    bounds_of,
    codes_grid,
    codes_of,
    fold_layer,
    layer_output,
    requantized,
    with_values,
    zero_of,
)
from lsquant.fusion.changes import FoldChanges, Metric, changes
from lsquant.fusion.functions import (
    MOST_RAISES,
    all_codes,
    all_products,
    function_quotients,
    plain_function,
    safe_function_steps,
)
from lsquant.joining import STORED
from lsquant.nn import StoredInputs, quantizers
from lsquant.nn.pool import is_windowed, window_means, window_size
from lsquant.program import Kind, Program, Step, gives_parts, program_of
from lsquant.quantizer import Quantizer
from lsquant.spec import QuantSpec
from lsquant.tied import TiedQuantizer

MOST_PASSES, PASSES_OF_FUNCTIONS = 1000, 20


def fuse(model: nn.Module) -> FusedNetwork:
    """Return the integer-only form of a prepared model, which shares its parameters.

    model: prepared with ``Recipe(..., joins=8)`` and calibrated.
    Returns: FusedNetwork.  In it BatchNorm keeps its running statistics.
    Raises: UsageError for a model whose joins are not quantized, or with a step that is not set.
    """
    model = require_one_process(model, "fuse")
    joins = vars(model).get(STORED)
    if joins is None:
        raise UsageError(
            "fuse: the tensors between the layers of this model are floating point; call lsquant.prepare(model, "
            "Recipe(..., joins=8)), and lsquant.trace(model, example_inputs) before where its forward adds by functions"
        )
    for _, quantizer in quantizers(model):
        quantizer.require_initialized()
    return FusedNetwork(model, program_of(dataflow(model, "fuse"), joins))


class Tap(nn.Module):
    """Where the codes of a stored tensor can be seen: they go through it, whole float32 numbers, where it has hooks."""

    def forward(self, codes: Tensor) -> Tensor:
        return codes


class FusedNetwork(nn.Module):
    """A trained network, computed by (M13) to (M18): nothing between two layers is floating point but one factor.

    Its parameters are those of the model, so it can be trained; dropout does nothing and BatchNorm's statistics are
    fixed.  The forward pass gives the outputs of the integer program in training mode and in eval mode.

    model: the trained model, in eval mode; it is what is saved.
    program: the steps.
    taps: name of a stored tensor, that of the module which makes it -> where its codes can be seen.
    joins: of what joins read.
    """

    TRAINED = "model"  # the attribute that ``_util.batches.trained_model`` returns

    model: nn.Module
    taps: dict[str, Tap]
    joins: QuantSpec

    def __init__(self, model: nn.Module, program: Program) -> None:
        super().__init__()
        self.model = model
        self.program = program
        self.__dict__["joins"] = vars(model)[STORED]
        self.train(model.training)
        made = [step.end for step in program.steps if program.stored[step.end] is not None]
        ends = dict.fromkeys(node for node in made if not gives_parts(node))
        self.__dict__["taps"] = {node.name: Tap() for node in ends}  # no submodules: they have no state

    def train(self, mode: bool = True) -> FusedNetwork:
        """Set the mode; the model in it is in eval mode always, for BatchNorm's statistics and dropout."""
        super().train(mode)
        self.model.eval()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedNetwork:
        return fuse(copy.deepcopy(self.model, memo)).train(self.training)

    def __reduce__(self) -> Any:
        return _fused_again, (self.model, self.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.taps).outputs(self.given(args, kwargs))

    def run(self, taps: dict[str, Tap] | None = None) -> Run:
        """Return a forward pass to be made.

        Raises: UsageError where the model is not what was fused, or a quantizer is switched off.
        """
        if vars(self.model).get(STORED) is not self.joins:
            raise UsageError("the model was prepared or reverted after fuse: call lsquant.fuse(model) again")
        for name, quantizer in quantizers(self.model):
            if not quantizer.enabled:
                raise UsageError(
                    f"{name}: this quantizer is switched off (lsquant.disabled), and an integer-only network computes "
                    "with codes everywhere: call the trained model, network.model"
                )
        return Run(self.program, taps=taps)

    def changes(
        self,
        batches: Iterable[Any],
        *,
        metric: Metric | None = None,
        max_batches: int | None = 32,
        forward: Forward | None = None,
    ) -> FoldChanges:
        """Compare this form with the model as it was trained: codes of stored tensors, outputs and a metric.

        batches: as for ``calibrate``.
        metric: ``metric(output, batch)`` gives a number; the mean over batches counts.
        max_batches: run at most so many; None: all.
        forward: ``forward(model, batch)`` runs a model on one batch.
        Returns: FoldChanges; prints as a table.
        """
        return changes(self, batches, metric, max_batches, forward)

    @torch.no_grad()
    def constants(self) -> dict[str, Folded]:
        """Return what every layer multiplies with and adds, by its name."""
        run = self.run()
        return {step.name: run.folded(step) for step in self.program.steps if step.kind is Kind.LAYER}

    def stored_steps(self) -> dict[str, Tensor]:
        """Return the step of every stored tensor, () float32, by the name of the module that makes it."""
        run = self.run()
        return {s.end.name: run.step_of(s.end) for s in self.program.steps if self.program.stored[s.end] is not None}

    def layer(self, name: str) -> Any:
        """Return a layer by its name."""
        return self._step(name).module

    def read_step(self, name: str) -> Tensor:
        """Return the step of what a layer multiplies, () float32."""
        return self.run().read_grid(self._step(name)).step.detach()

    def _step(self, name: str) -> Step:
        return next(step for step in self.program.steps if step.kind is Kind.LAYER and step.name == name)

    def codes(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the codes of every stored tensor, int64, by the name of the module that makes it."""
        with torch.no_grad():
            run = self.run()
            run.outputs(self.given(args, kwargs))
        found = {node: q for node, q in run.stored.items() if isinstance(q, Tensor)}
        return {node.name: q.to(torch.int64) + run.grid(node).zero for node, q in found.items()}

    def zero_points(self) -> dict[str, int]:
        """Return z of every stored tensor, by the name of the module that makes it; 0 without an offset."""
        run, stored = self.run(), self.program.stored
        return {s.end.name: run.grid(s.end).zero for s in self.program.steps if stored[s.end] is not None}

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Node, Any]:
        """Return the inputs of a forward pass by their nodes."""
        bound = inspect.signature(self.model.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        inputs = [node for node in self.program.flow.nodes if node.kind == "input"]
        return dict(zip(inputs, bound.arguments.values(), strict=True))


def _fused_again(model: nn.Module, training: bool) -> FusedNetwork:
    return fuse(model).train(training)


class Run:
    """One forward pass.

    stored: node -> codes less their zero point, whole float32 numbers.
    real: node -> values in floating point.
    constants: the step of a layer -> what it multiplied with and added.
    steps: of ``safe_steps``, made anew where not given.
    """

    def __init__(
        self, program: Program, steps: dict[Quantizer, Tensor] | None = None, taps: dict[str, Tap] | None = None
    ) -> None:
        self.program, self.taps = program, taps or {}
        self.stored: dict[Node, Any] = {}
        self.real: dict[Node, Any] = {}
        self.constants: dict[Step, Folded] = {}
        self.steps = safe_steps(program) if steps is None else steps

    def outputs(self, given: dict[Node, Any]) -> Any:
        self.real.update(given)
        device = next((v.device.type for v in given.values() if isinstance(v, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            for step in self.program.steps:
                self.compute(step)
                self._show(step.end)
        end = next(node for node in reversed(self.program.flow.nodes) if node.kind == "output")
        return self.mapped(end.call.args[0])

    def compute(self, step: Step) -> None:
        """Compute one step: its output, and the constants of a layer."""
        _COMPUTE[step.kind](self, step)

    def _show(self, node: Node) -> None:
        tap = self.taps.get(node.name) if node in self.stored else None  # a float step's result is stored by the next
        if tap is not None and tap._forward_hooks and isinstance(self.stored[node], Tensor):
            tap(self.stored[node].detach() + float(self.grid(node).zero))  # no -0.0

    # ---- values ----

    def mapped(self, arguments: Any) -> Any:
        """Put real values in the place of calls."""
        return fx.map_arg(arguments, lambda call: self.real_of(self.program.flow.of[call]))

    def real_of(self, node: Node) -> Any:
        return self.real[node] if node in self.real else self.value(node)

    def value(self, node: Node) -> Any:
        """Return ``v_hat`` of a stored tensor, or of each of several."""
        codes, step = self.stored[node], self.step_of(node)
        return codes * step if isinstance(codes, Tensor) else type(codes)(part * step for part in codes)

    def grid(self, node: Node) -> Codes:
        """Return what the codes of a stored tensor may be."""
        quantizer = self.program.stored[node]
        assert quantizer is not None
        return codes_grid(quantizer, self.steps.get(_owner(quantizer)))

    def step_of(self, node: Node) -> Tensor:
        return self.grid(node).step.detach()

    # ---- steps ----

    def quantize(self, step: Step) -> None:
        out, x = self.grid(step.end), self.real[step.node].float()
        s = out.step.detach()
        self.stored[step.end] = requantized(x, 1.0 / s, x.detach() / s, out)

    def layer(self, step: Step) -> None:
        layer, source = step.module, step.node.inputs[0]
        x, read = self.stored[source], self.read_grid(step)
        if layer.stored_quantizer is not None:  # (M17)
            v = layer.input_quantizer(self.value(source))
            x = with_values(v / read.step.detach(), codes_of(v, read.step))
        out = None if self.program.stored[step.end] is None else self.limited(step)
        value, self.constants[step] = layer_output(layer, step.norm, x, read, out)
        if out is not None:
            self.stored[step.end] = value
        else:
            self.real[step.end] = value if step.limit is None else step.limit(value)

    def read_grid(self, step: Step) -> Codes:
        """Return the codes that a layer multiplies: those of its input, or fewer (M17)."""
        layer = step.module
        return self.grid(step.node.inputs[0]) if layer.stored_quantizer is None else codes_grid(layer.input_quantizer)

    def folded(self, step: Step) -> Folded:
        """Return what a layer multiplies with and adds."""
        out = None if self.program.stored[step.end] is None else self.grid(step.end)
        return fold_layer(step.module, step.norm, self.read_grid(step), out)[1]

    def limited(self, step: Step) -> Codes:
        """Return the codes of a step's output within the limit behind it."""
        out = self.grid(step.end)
        return out if step.limit is None else out.within(*limits_of(step.limit))

    def add(self, step: Step) -> None:
        a, b = (self.stored[source] for source in step.node.inputs)
        out, total = self.limited(step), a + b
        # (M15): no sum within the bounds comes so close to a tie that two roundings to float32 matter (safe_steps)
        ratio = (self.step_of(step.node.inputs[0]).double() / out.step.detach().double()).float()
        self.stored[step.end] = requantized(total, ratio, total.detach() * ratio, out)

    def multiply(self, step: Step) -> None:
        a, b = step.node.inputs
        out, total = self.limited(step), self.stored[a] * self.stored[b]  # whole numbers below 2^24
        # (M19): no product within the bounds comes so close to a tie that roundings to float32 matter (safe_steps)
        ratio = (self.step_of(a).double() * self.step_of(b).double() / out.step.detach().double()).float()
        self.stored[step.end] = requantized(total, ratio, total.detach() * ratio, out)

    def cat(self, step: Step) -> None:
        self.stored[step.end] = torch.cat([self.stored[source] for source in step.node.inputs], step.module.dim)

    def average(self, step: Step) -> None:
        source, out = step.node.inputs[0], self.limited(step)
        codes, s, s_y = self.stored[source], self.step_of(source), out.step.detach()
        if is_windowed(step.module):
            means = window_means(step.module, codes.double())
            count = window_size(step.module)
            total = torch.round(means.detach() * count).float()
            factor = s * (torch.ones_like(s) / count) / s_y  # that of a layer
            self.stored[step.end] = requantized(means.float(), s / s_y, total * factor, out)
            return
        dims, keep = averaged(step.module, codes)
        total = codes.detach().double().sum(dims, keepdim=keep).float()
        count = codes.numel() // max(total.numel(), 1)
        self.stored[step.end] = requantized(codes.mean(dims, keepdim=keep), s / s_y, total * (s / (s_y * count)), out)

    def function(self, step: Step) -> None:
        source, out = step.node.inputs[0], self.grid(step.end)
        codes, read, s_y = self.stored[source], self.grid(source), out.step.detach()
        table = function_quotients(step.module, all_codes(read.low, read.high, codes.device), read.step.detach(), s_y)
        places = (codes.detach() - read.low).nan_to_num(0.0).long()
        u = torch.where(codes.detach().isnan(), torch.nan, table.float()[places])
        y = plain_function(step.module)(self.value(source)) if codes.requires_grad else u
        self.stored[step.end] = requantized(y, 1.0 / s_y, u, out)

    def move(self, step: Step) -> None:
        def value(call: fx.Node) -> Any:
            return self.stored[self.program.flow.of[call]]

        call = step.node.call
        args, kwargs = fx.map_arg(call.args, value), fx.map_arg(call.kwargs, value)
        function: Any = step.module if step.module is not None else call.target
        self.stored[step.end] = function(*args, **kwargs)

    def real_step(self, step: Step) -> None:
        call = step.node.call
        args, kwargs = self.mapped(call.args), self.mapped(call.kwargs)
        if isinstance(step.module, StoredInputs):  # what is read has gone through the quantizer
            self.real[step.end] = step.module.float_type.forward(step.module, *args, **kwargs)
        elif step.module is not None:
            self.real[step.end] = step.module(*args, **kwargs)
        elif call.op == "get_attr":  # a parameter of the model's own
            self.real[step.end] = reduce(getattr, str(call.target).split("."), self.program.flow.model)
        elif call.op == "call_method":
            self.real[step.end] = getattr(args[0], str(call.target))(*args[1:], **kwargs)
        else:
            function: Any = call.target
            self.real[step.end] = function(*args, **kwargs)


_COMPUTE: dict[Kind, Callable[[Run, Step], None]] = {
    Kind.QUANTIZE: Run.quantize,
    Kind.LAYER: Run.layer,
    Kind.ADD: Run.add,
    Kind.MULTIPLY: Run.multiply,
    Kind.CAT: Run.cat,
    Kind.AVERAGE: Run.average,
    Kind.FUNCTION: Run.function,
    Kind.MOVE: Run.move,
    Kind.FLOAT: Run.real_step,
}


def _owner(quantizer: Quantizer) -> Quantizer:
    return quantizer.owner if isinstance(quantizer, TiedQuantizer) else quantizer


@torch.no_grad()
def safe_steps(program: Program) -> dict[Quantizer, Tensor]:
    """(M15, M18, M19) Return the steps around additions, products and functions that were raised: owner -> () float32.

    What was found is kept until a step changes.
    """
    owners = {_owner(quantizer) for quantizer in program.stored.values() if quantizer is not None}
    now = {owner: (float(owner.effective_step()), zero_of(owner)) for owner in owners}
    if program.settled.get("steps") != now:
        program.settled.update(steps=now, raised=_settled(program))
    return program.settled["raised"]


def _settled(program: Program) -> dict[Quantizer, Tensor]:
    raised: dict[Quantizer, Tensor] = {}

    def step(owner: Quantizer) -> Tensor:
        return raised[owner] if owner in raised else owner.effective_step().reshape(())

    def changed(owner: Quantizer, after: Tensor) -> bool:
        if bool(after == step(owner)):
            return False
        raised[owner] = after
        return True

    def quantizer(node: Node) -> Quantizer:
        found = program.stored[node]
        assert found is not None
        return found

    def largest_of(one: Quantizer) -> int:
        return max(map(abs, bounds_of(one)))

    def settle_addition(one: Step) -> bool:
        a, b = (quantizer(source) for source in one.node.inputs)
        source, target = _owner(a), _owner(quantizer(one.end))
        if target is source:
            return False  # the quotient is 1
        largest = largest_of(a) + largest_of(b)
        after = reference.safe_output_step(float(step(source)), float(step(target)), largest)
        return changed(target, torch.tensor(after, device=step(target).device))

    def settle_product(one: Step) -> bool:
        a, b, out = (quantizer(node) for node in (*one.node.inputs, one.end))
        sources, target = (_owner(a), _owner(b)), _owner(out)
        moving = next((o for o in sources if o is not target), target) if target in sources else target
        every = all_products(largest_of(a), largest_of(b))
        largest, before = largest_of(out), step(moving)
        for _ in range(MOST_RAISES):
            s_a, s_b, s_y = (float(step(owner)) for owner in (*sources, target))
            if not reference.near_a_product_tie(every, s_a * s_b / s_y, largest):
                break
            raised[moving] = reference.raised(step(moving))
        return bool(step(moving) != before)

    def settle_function(one: Step) -> bool:
        read, out = quantizer(one.node.inputs[0]), quantizer(one.end)
        source, target = _owner(read), _owner(out)
        if target is source:
            return False  # the quotients hardly depend on it
        codes = all_codes(*bounds_of(read), step(source).device)
        s, s_y = safe_function_steps(one.module, codes, bounds_of(out), step(source), step(target))
        moved = changed(source, s)
        return changed(target, s_y) or moved

    def of_kind(kind: Kind) -> list[Step]:
        return [one for one in program.steps if one.kind is kind]

    additions, products, functions = map(of_kind, (Kind.ADD, Kind.MULTIPLY, Kind.FUNCTION))
    for number in range(MOST_PASSES):
        moved = [settle_addition(one) for one in additions] + [settle_product(one) for one in products]
        if number < PASSES_OF_FUNCTIONS:  # a function whose steps find no values is written as a table
            moved += [settle_function(one) for one in functions]
        if not any(moved):
            return raised
    raise UsageError("fuse: the steps of additions and products that depend on each other in a circle find no values")


def limits_of(module: nn.Module) -> tuple[float | None, float | None]:
    """Return (lowest, highest) value that a limit lets through."""
    if isinstance(module, nn.ReLU):
        return 0.0, None
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        return float(module.min_val), float(module.max_val)
    clip: Any = module
    return clip.min, clip.max


def averaged(module: Any, x: Tensor) -> tuple[list[int], bool]:
    """Return the dimensions that are averaged, and whether they stay."""
    if hasattr(module, "keepdim"):
        return [int(d) for d in module.dim], module.keepdim
    return list(range(x.dim() - module.dims, x.dim())), True
