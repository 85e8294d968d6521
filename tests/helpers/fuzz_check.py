"""What must hold for a network of the fuzzer: every shipped form is equal to the trained model, or refused by name."""

from __future__ import annotations

import copy
import random
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

import lsquant
import oracle
from helpers.fuzz_nets import LATE, QUANTIZED, Case, Invalid, Net, batch_of, build, data, recipe, switch
from lsquant import Recipe
from lsquant.nn import QuantizedLayer

OTHER_WEIGHTS = 123_456
"""The seed of the weights that a loaded file must replace."""
VALUE_HOOKS = ("change", "change_pre", "change_in_place")
MADE_BY_HOOKS = ("old_weight_norm", "old_spectral_norm", "prune")


class Failure(Exception):
    """Something that must not be.

    stage: of the life of the model: "prepare", "packed file".
    what: what was wrong, in a few words; two failures of one stage and with one ``what`` are taken for the same.
    """

    def __init__(self, stage: str, what: str, detail: str = "") -> None:
        super().__init__(f"{stage}: {what}" + (f"\n{detail}" if detail else ""))
        self.stage, self.what = stage, what


class Refused(Exception):
    """lsquant refused, with a message that names the cause, where it may."""


@dataclass
class Trained:
    """A network after its training, with what the shipped forms are compared with.

    refused: stage -> message, of what was refused.
    """

    case: Case
    model: Net
    batches: list[list[Tensor]]
    outputs: list[list[np.ndarray]]
    refused: dict[str, str] = field(default_factory=dict)


SAME_LAYOUT = ({"embedding", "linear"}, *({kind} for kind in QUANTIZED))
"""Kinds whose weights may be one."""

# ---- tags: what a case contains ----


def tags(case: Case) -> set[str]:
    """Return what a case contains of the things that may be refused, and of those that one may want to leave out."""
    found = {case.dtype, case.strange, f"profile {case.profile}", *(f"kind {n.kind}" for n in case.nodes)} - {""}
    layers = [n for n in case.nodes if n.kind in QUANTIZED]
    if case.late:
        found |= {"late", f"late {case.late}"}
    if any(n.hook in VALUE_HOOKS for n in case.nodes) or case.hook in VALUE_HOOKS:
        found.add("value hook")
    if case.hook or any(n.hook for n in case.nodes):
        found.add("hook")
    if any(n.made_by in MADE_BY_HOOKS for n in case.nodes):
        found.add("weight made by hooks")
    if any(n.made_by for n in case.nodes):
        found.add("made weight")
    for node in layers:
        if node.share is not None and {node.kind, case.nodes[node.share].kind} not in SAME_LAYOUT:
            found.add("shared layouts")
        if node.kind in ("linear", "hfconv1d") and _only_weights(case, node):
            found.add("weight-only linear")
        if isinstance(node.weight, dict) and "offset" in str(node.activation):
            found.add("offset")
        if isinstance(node.weight, dict) and node.weight.get("granularity") == "group":
            found.add(f"groups of {node.kind}")
    if any(n.share is not None for n in case.nodes):
        found.add("share")
    if any(n.options.get("lists") for n in case.nodes):
        found.add("lists")
    return found


def _only_weights(case: Case, node: Any) -> bool:
    default = case.preset.lower() in ("w4", "w4a16")
    return node.weight is not None and (node.activation is None or (node.activation == "default" and default))


def extra_of_a_stride(node: Any) -> bool:
    """Tell whether a node is a transposed convolution that adds a stride or more to its output."""
    if not node.kind.startswith("convt"):
        return False
    return any(extra >= stride for extra, stride in zip(node.options["extra"], node.options["stride"], strict=True))


FORMS = ("integer model", "save", "packed file", "onnx")
MAY_REFUSE: list[tuple[str, Callable[[Case, set[str]], bool], str]] = [
    ("calibrate", lambda c, t: True, "all input values of layer .* are zero"),
    ("prepare again", lambda c, t: True, "all input values of layer .* are zero"),
    ("calibrate", lambda c, t: c.extreme == "zero channel", "weight_quantizer': all values are zero"),
    ("prepare again", lambda c, t: c.extreme == "zero channel", "weight_quantizer': all values are zero"),
    ("onnx", lambda c, t: any(extra_of_a_stride(n) for n in c.nodes), "output_padding is not below its stride"),
    ("onnx", lambda c, t: any(n.options.get("divisor_override") for n in c.nodes), "leaves out divisor_override=5"),
    ("load_packed", lambda c, t: c.dtype == "float16", "steps of .* are too small or large for torch.float16"),
    ("onnx", lambda c, t: any(n.options.get("ceil_mode") for n in c.nodes), "with ceil_mode=True: PyTorch and ONNX"),
    *((form, lambda c, t: c.late == "replace", "has no quantized layer") for form in FORMS),
    ("prepare", lambda c, t: "shared layouts" in t, "share one weight in different layouts"),
    ("prepare", lambda c, t: c.preset == "w4g32", "group"),
    ("onnx", lambda c, t: c.dtype != "float32", "float32"),
    ("onnx", lambda c, t: any(k.startswith("kind AdaptiveMaxPool") for k in t), "adaptive_max_pool"),
    ("onnx", lambda c, t: "kind unbatched" in t, "cannot trace this model with a dynamic batch dimension"),
    ("onnx", lambda c, t: "kind AdaptiveAvgPool3d" in t, "adaptive_avg_pool3d"),
    (
        "onnx",
        lambda c, t: "groups of conv2d" in t and c.profile == "exact",
        "group-wise weight steps has no exact form",
    ),
]
"""(stage, whether a case may be refused there, pattern of the message).  Hooks, made and shared weights: below."""


def may_refuse(case: Case, stage: str, message: str, model: nn.Module | None) -> bool:
    """Tell whether a refusal is one that the documentation allows, by a message that names the cause."""
    found = tags(case)
    if any(stage == where and applies(case, found) and re.search(text, message) for where, applies, text in MAY_REFUSE):
        return True
    names = [] if model is None else [name for name, _ in model.named_modules() if name]
    named = any(name in message for name in (*names, *(case.name(i) for i in range(len(case.nodes)))))
    root = case.hook in VALUE_HOOKS and type(model).__name__ in message
    return (named or root) and bool({"value hook", "weight made by hooks", "shared layouts", "late"} & found)


@contextmanager
def stage(name: str, trained: Trained | None, case: Case, model: nn.Module | None = None) -> Iterator[None]:
    """Raise Refused for a refusal that is allowed, Failure for one that is not and for every other exception."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Failure, Refused, Invalid):
        raise
    except lsquant.LsquantError as error:
        message = str(error)
        if not may_refuse(case, name, message, model):
            raise Failure(name, f"refused: {_shape_of(message)}", message) from error
        if trained is not None:
            trained.refused[name] = message
        raise Refused(message) from error
    except Exception as error:
        where = [f for f in traceback.extract_tb(error.__traceback__) if "/lsquant/" in f.filename]
        place = f"{Path(where[-1].filename).name} {where[-1].name}" if where else "outside lsquant"
        detail = "".join(traceback.format_exception(error))[-3000:]
        raise Failure(name, f"{type(error).__name__} in {place}", detail) from error


def _shape_of(message: str) -> str:
    """The message without names and numbers, so that shrinking keeps it."""
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'|/\S+", "X", message))[:60]


# ---- running ----


def flat(value: Any) -> list[Tensor]:
    """Return the tensors of an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [t for part in (value.values() if isinstance(value, dict) else value) for t in flat(part)]


def arrays(value: Any) -> list[np.ndarray]:
    """Return the outputs as arrays; 16-bit floats, which are exact there, as float32."""
    wide = (torch.float32, torch.float64)
    return [t.detach().to(t.dtype if t.dtype in wide else torch.float32).numpy() for t in flat(value)]


def run(model: nn.Module, inputs: list[Tensor]) -> list[np.ndarray]:
    with torch.no_grad():
        return arrays(model(*inputs))


def compare(name: str, got: list[np.ndarray], want: list[np.ndarray], tolerance: float = 0.0) -> None:
    """Raise Failure where outputs differ: in any bit, or by more than a part of the largest value."""
    if [y.shape for y in got] != [y.shape for y in want] or [y.dtype for y in got] != [y.dtype for y in want]:
        raise Failure(
            name, "other shapes or types", f"{[(y.shape, y.dtype) for y in got]}\n{[(y.shape, y.dtype) for y in want]}"
        )
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if tolerance:
            with np.errstate(all="ignore"):
                wrong = ~(np.abs(a - b) <= tolerance * max(1e-3, float(np.abs(b[np.isfinite(b)]).max(initial=0))))
            wrong &= ~(np.isnan(a) & np.isnan(b)) & (a != b)
        else:
            bits = f"uint{8 * a.dtype.itemsize}"
            wrong = (np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)) & ~(
                np.isnan(a) & np.isnan(b)
            )
        if wrong.any():
            at = np.argwhere(wrong)[0]
            only_zeros = bool((a == b)[wrong].all())
            raise Failure(
                name,
                "0 and -0" if only_zeros else "outputs differ",
                f"output {i}: {int(wrong.sum())} of {wrong.size}, first at {at.tolist()}: {a[tuple(at)]!r}, "
                f"not {b[tuple(at)]!r}; largest difference {np.nanmax(np.abs(a - b)):g} of {np.nanmax(np.abs(b)):g}",
            )


# ---- the life of a model ----


def trained(case: Case) -> Trained:
    """Return the network, prepared, calibrated and trained.

    Raises: Invalid for a network that PyTorch cannot run or train; Refused; Failure.
    """
    model = build(case)
    batches = [data(case, k, size) for k, size in ((1, 3), (2, 1))]
    reference = float_outputs(case, batches)
    classes = {name: type(m) for name, m in model.named_modules()}
    parameters = dict(model.named_parameters())
    batch, method = batch_of(case, 0, 4), cast(Literal["mse", "paper"], case.method)
    if not any(lsquant.nn.quantized_type(m) for m in model.modules()):
        raise Invalid("nothing to quantize")
    with stage("prepare", None, case, model):
        lsquant.prepare(model, recipe(case), batch if case.example else None)
    if not any(True for _ in lsquant.nn.quantized_layers(model)):
        raise Invalid("nothing is quantized")
    with stage("disabled", None, case, model), lsquant.disabled(model):
        for inputs, want in zip(batches, reference, strict=True):
            compare("disabled", run(model, inputs), want, tolerance=_float_tolerance(case))
    with stage("calibrate", None, case, model):
        try:
            lsquant.calibrate(model, [batch], method=method)
        except lsquant.UsageError as error:
            if case.example or "is executed" not in str(error):
                raise
            lsquant.prepare(model, recipe(case), batch)
            lsquant.calibrate(model, [batch], method=method)
    if case.again:
        with stage("prepare again", None, case, model):
            how: Any = "rescale" if case.steps % 2 == 0 else "recalibrate"
            lsquant.prepare(model, Recipe.preset(case.again, first_last=None), batch, steps=how)
            lsquant.calibrate(model, [batch], method=method)
    _move_steps(case, model)
    with stage("training", None, case, model):
        for k in range(case.steps):
            train(case, model, k)
    found = Trained(case, model, batches, [])
    if case.late:
        try:
            LATE[case.late](model, random.Random(case.seed))
        except RuntimeError as error:  # torch's pruning of channels-last weights
            raise Invalid(str(error)) from error
    model.eval()
    with stage("forward", found, case, model):
        found.outputs = [run(model, inputs) for inputs in batches]
    if not all(np.isfinite(y).all() for outputs in found.outputs for y in outputs):
        raise Invalid("the outputs are not finite")
    if not case.late:
        vars(model)["fuzz_classes"], vars(model)["fuzz_parameters"] = classes, parameters
    return found


def float_outputs(case: Case, batches: list[list[Tensor]]) -> list[list[np.ndarray]]:
    """Return what the float network gives.  Raises: Invalid where it cannot run, or cannot be trained."""
    model = switch(build(case), False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [run(model, inputs) for inputs in batches]
            train(case, model, 0, torch.optim.SGD(model.parameters(), 0.0))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise Invalid(str(error)) from error
    if not all(np.isfinite(y).all() for outputs in found for y in outputs):
        raise Invalid("the outputs are not finite")
    return found


def _float_tolerance(case: Case) -> float:
    """BatchNorm and average pooling are computed in another order after ``prepare``."""
    return 1e-4 if case.dtype == "float32" else 0.05


def _move_steps(case: Case, model: nn.Module) -> None:
    """Move the steps as training would; some below their guard."""
    g = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for i, (_, quantizer) in enumerate(lsquant.quantizers(model)):
            quantizer.step.mul_(0.5 + torch.rand(quantizer.step.shape, generator=g))
            if case.guarded and i % 2:
                quantizer.step[0] = -0.5


def train(case: Case, model: nn.Module, k: int, optimizer: Any = None) -> dict[str, Tensor]:
    """Take one step of SGD.  Returns the gradients, by name."""
    model.train()
    optimizer = optimizer or torch.optim.SGD(lsquant.param_groups(model, lr=0.02), momentum=0.9)
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        loss = sum((y.float().square().mean() for y in flat(model(*data(case, 100 + k, 4)))), torch.zeros(()))
    loss.backward()
    optimizer.step()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.zero_grad()
    model.eval()
    return gradients


# ---- the shipped forms ----


def check(case: Case, folder: Path) -> Trained:
    """Check everything of a case but ONNX.  Raises: Failure; Invalid; Refused where no model came to be."""
    found = trained(case)
    state = {k: v.clone() for k, v in found.model.state_dict().items()}
    for form in (_oracle, _integer, _saved, _packed, _state_dict, _copied, _engines, _looked_at):
        try:
            form(found, folder)
        except Refused:
            continue
    same_outputs(found, "unchanged by shipping", found.model)
    for key, value in found.model.state_dict().items():
        if value.shape != state[key].shape or not torch.equal(_bits(value), _bits(state[key])):
            raise Failure("unchanged by shipping", "the state dict changed", key)
    return found


def _bits(t: Tensor) -> Tensor:
    return torch.nan_to_num(t) if t.is_floating_point() else t


def same_outputs(found: Trained, name: str, other: nn.Module) -> None:
    with stage(name, found, found.case, found.model):
        for inputs, want in zip(found.batches, found.outputs, strict=True):
            compare(name, run(other, inputs), want)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No weight wants a gradient: torch.matmul folds dimensions by that, and rounds otherwise where it folds."""
    learned = [p for p in model.parameters() if p.requires_grad]
    for p in learned:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learned:
            p.requires_grad_(True)


def _integer(found: Trained, folder: Path) -> None:
    with stage("integer model", found, found.case, found.model):
        twin = lsquant.to_integer(found.model)
    with frozen(found.model), frozen(twin):
        _integer_outputs(found, twin)


def has_float_side(model: nn.Module) -> bool:
    """Tell whether a layer sums in floating point: alone, fed a copy of its input, it may round otherwise."""
    layers = [m for _, m in lsquant.nn.quantized_layers(model) if not isinstance(m, nn.Embedding)]
    return any(m.weight_quantizer is None or m.input_quantizer is None for m in layers)


def _integer_outputs(found: Trained, twin: nn.Module) -> None:
    with stage("integer model", found, found.case, found.model):
        for inputs in found.batches:
            compare("integer model", run(twin, inputs), run(found.model, inputs))
    for name, layer in lsquant.nn.quantized_layers(found.model):
        if layer.weight_quantizer is not None:
            integer: Any = twin.get_submodule(name)
            if not np.array_equal(integer.codes.numpy(), np_rows(oracle_codes(layer), layer)):
                raise Failure("integer model", "codes differ from the oracle's", name)
    with stage("verify integer model", found, found.case, found.model):
        verdict = lsquant.verify(found.model, twin, [batch_of(found.case, 1, 3)])
        if not verdict.exact and not has_float_side(found.model):
            raise Failure("verify integer model", "not exact", str(verdict))


def fresh(found: Trained) -> Net:
    """The float network with other weights."""
    return build(found.case, weights=OTHER_WEIGHTS)


def with_hook(found: Trained, other: Any) -> Any:
    """Return a loaded network with the hook that the trained one got after ``prepare``: no file has it."""
    if found.case.late == "hook":
        LATE["hook"](other, random.Random(found.case.seed))
    return other


def _saved(found: Trained, folder: Path) -> None:
    path = folder / "model.safetensors"
    with stage("save", found, found.case, found.model):
        lsquant.save(found.model, path)
    with stage("load", found, found.case, found.model):
        other = with_hook(found, lsquant.load(fresh(found), path).eval())
    same_outputs(found, "load", other)
    if found.case.late == "deepcopied layer" and "share" in tags(found.case):
        return  # untied by the copy, and loaded into a network that is tied
    with stage("training after load", found, found.case, found.model):
        twins = [copy.deepcopy(found.model), copy.deepcopy(other)]
        got = [train(found.case, twin, 7) for twin in twins]
        if list(got[0]) != list(got[1]):
            raise Failure("training after load", "parameters in another order", f"{list(got[0])}\n{list(got[1])}")
        if odd := [name for name in got[0] if not torch.equal(_bits(got[0][name]), _bits(got[1][name]))]:
            raise Failure("training after load", "gradients differ", ", ".join(odd))
    compare("training after load", run(twins[1], found.batches[0]), run(twins[0], found.batches[0]))
    if found.case.late == "hook":
        return  # the float network to compare with has no such hook
    with stage("revert", found, found.case, found.model):
        _reverted(found, other)


def _reverted(found: Trained, other: nn.Module) -> None:
    """The float model again, with the trained weights: PyTorch's outputs with them."""
    floats = fresh(found)
    lsquant.revert(other)
    if list(other.state_dict()) != list(floats.state_dict()):
        raise Failure("revert", "other keys in the state dict")
    kinds = [(n, type(m)) for n, m in other.named_modules()]
    wanted = [(n, type(m)) for n, m in floats.named_modules()]
    if [(n, k.__qualname__) for n, k in kinds] != [(n, k.__qualname__) for n, k in wanted]:
        raise Failure("revert", "other classes")
    floats.load_state_dict(other.state_dict())
    floats.eval()
    for inputs in found.batches:
        compare("revert", run(other, inputs), run(floats, inputs))


def _packed(found: Trained, folder: Path) -> None:
    path = folder / "packed.safetensors"
    with stage("packed file", found, found.case, found.model):
        lsquant.export_packed(found.model, path)
        content = lsquant.read_packed(path)
    for name, layer in lsquant.nn.quantized_layers(found.model):
        if layer.weight_quantizer is not None:
            stored = content.quantizers[content.layers[name]["weight"]]
            if stored.codes is None or not np.array_equal(stored.codes.numpy(), oracle_codes(layer)):
                raise Failure("packed file", "codes differ from the oracle's", name)
    with stage("load_packed", found, found.case, found.model):
        other = with_hook(found, lsquant.load_packed(fresh(found), path).eval())
    same_outputs(found, "load_packed", other)
    with stage("verify packed file", found, found.case, found.model):
        verdict = lsquant.verify(found.model, path, [batch_of(found.case, 1, 3)])
        if not verdict.exact and not has_float_side(found.model):
            raise Failure("verify packed file", "not exact", str(verdict))


def _state_dict(found: Trained, folder: Path) -> None:
    """A fresh ``prepare`` and ``load_state_dict`` give equal outputs."""
    case = found.case
    if case.late:
        return
    other = fresh(found)
    with stage("load_state_dict", found, case, found.model):
        wanted = lsquant.resolved_recipe(found.model) if case.again else recipe(case)
        lsquant.prepare(other, wanted, batch_of(case, 0, 4))
        other.load_state_dict(found.model.state_dict())
    same_outputs(found, "load_state_dict", other.eval())


def _copied(found: Trained, folder: Path) -> None:
    same_outputs(found, "deepcopy", copy.deepcopy(found.model))


def _engines(found: Trained, folder: Path) -> None:
    """Eager code computes what the engine of this machine does."""
    with lsquant.use_engine("eager"):
        same_outputs(found, "eager engine", found.model)


def _looked_at(found: Trained, folder: Path) -> None:
    """What looks at a model raises nothing and says something."""
    batch = batch_of(found.case, 1, 3)
    with stage("check", found, found.case, found.model):
        optimizer = torch.optim.SGD(lsquant.param_groups(found.model, lr=0.1))
        [str(finding) for finding in lsquant.check(found.model, optimizer, [batch])]
        repr(found.model)


# ---- the oracle ----


def oracle_step(quantizer: Any) -> np.ndarray:
    return oracle.guard(quantizer.step.detach().numpy(), quantizer.initial_step.numpy())


def oracle_codes(layer: Any) -> np.ndarray:
    """The codes of a weight in its own layout, from the weight and the steps by loops in NumPy."""
    quantizer, w = layer.weight_quantizer, layer.weight.detach().float().numpy()
    spec, step = quantizer.requested, oracle_step(quantizer)
    bounds = oracle.bounds(spec.bits, True, spec.narrow)
    if spec.granularity == "group":
        rows = w.T if isinstance(layer, _transformers_conv1d()) else w.reshape(len(w), -1)
        codes = oracle.codes(rows, step, *bounds, group_size=spec.group_size)
        return codes.T if isinstance(layer, _transformers_conv1d()) else codes.reshape(w.shape)
    if spec.granularity == "tensor":
        return np.clip(np.rint(w / step[0]), *bounds)
    if getattr(layer, "transposed", False):
        index = oracle.output_channels(w.shape, layer.groups)
        return np.clip(np.rint(w / step[index]), *bounds)
    return oracle.codes(w, step, *bounds, axis=1 if isinstance(layer, _transformers_conv1d()) else 0)


def _transformers_conv1d() -> Any:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def np_rows(codes: np.ndarray, layer: Any) -> np.ndarray:
    """Output channels first."""
    if isinstance(layer, _transformers_conv1d()):
        return codes.T
    if not getattr(layer, "transposed", False):
        return codes
    c, o, *kernel = codes.shape
    split = codes.reshape(layer.groups, c // layer.groups, o, *kernel)
    return np.swapaxes(split, 1, 2).reshape(layer.groups * o, c // layer.groups, *kernel)


def _oracle(found: Trained, folder: Path) -> None:
    """Outputs of each layer, from its input."""
    if found.case.dtype != "float32" or {"value hook", "late"} & tags(found.case):
        return
    calls: list[tuple[Any, np.ndarray, np.ndarray]] = []
    hooks = [
        layer.register_forward_hook(lambda m, args, y: calls.append((m, args[0].numpy().copy(), y.numpy().copy())))
        for _, layer in lsquant.nn.quantized_layers(found.model)
    ]
    with stage("oracle", found, found.case, found.model):
        run(found.model, found.batches[1])
        for hook in hooks:
            hook.remove()
        for layer, x, y in calls:
            want = oracle_output(layer, x)
            if want is not None:
                compare("oracle", [y], [want])


def oracle_output(layer: QuantizedLayer, x: np.ndarray) -> np.ndarray | None:
    """The output of a layer by NumPy; None for layers that the oracle has no formula of."""
    any_layer: Any = layer
    source, weights = layer.input_quantizer, layer.weight_quantizer
    if source is None or weights is None or isinstance(layer, nn.Embedding):
        return None
    s_x, s_w = oracle_step(source), oracle_step(weights)
    lo, hi = oracle.bounds(source.spec.bits, bool(int(source.signed)), source.spec.narrow)
    z = 0
    if source.offset is not None:
        z = int(oracle.lsq_plus_zero_point(source.offset.detach().numpy(), s_x, lo, hi)[0])
    q_w, bias = oracle_codes(layer), None if layer.bias is None else layer.bias.detach().numpy()
    size = weights.spec.group_size
    if getattr(layer, "transposed", False):
        q_x = oracle.codes(x, s_x, lo, hi, z)
        options = (any_layer.stride, any_layer.padding, any_layer.dilation, any_layer.groups, any_layer.output_padding)
        return oracle.transposed_convolution(q_x, z, s_x[0], q_w, s_w, bias, *options)
    if hasattr(layer, "kernel_size"):
        if size is not None or x.ndim < any_layer.weight.dim():
            return None
        padding: Any = any_layer.padding
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(any_layer.dilation, any_layer.kernel_size, strict=True)]
            padding = [(t // 2, t - t // 2) for t in total]
        elif padding == "valid":
            padding = 0
        sides = padding if np.ndim(padding) == 2 else [(p, p) for p in oracle.each(padding, x.ndim - 2)]
        if any_layer.padding_mode != "zeros":
            mode = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[any_layer.padding_mode]
            x, sides = np.pad(x, ((0, 0), (0, 0), *sides), mode=mode), [(0, 0)] * len(sides)  # type: ignore[call-overload]
        q_x = oracle.codes(x, s_x, lo, hi, z)
        geometry = (any_layer.stride, sides, any_layer.dilation, any_layer.groups)
        return oracle.convolution(q_x, z, s_x[0], q_w, s_w, bias, *geometry)
    q_x = oracle.codes(x, s_x, lo, hi, z)
    q_w = np_rows(q_w, layer)
    if size is not None:
        return oracle.linear_groups(q_x, z, s_x[0], q_w, s_w, size, bias)
    return oracle.linear(q_x, z, s_x[0], q_w, s_w, bias)
