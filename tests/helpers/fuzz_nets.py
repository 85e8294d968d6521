"""A network as a plain description, and the description as a network.

A ``Case`` is data: it prints as JSON, can be edited by hand, and gives the same network everywhere.  Numbers of input
channels are no part of it, so that a node can be taken out and the rest still fits.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import lsquant
from lsquant import QuantSpec, Recipe, Rule

Options = dict[str, Any]


class Invalid(Exception):
    """The description gives no network that PyTorch can run: no finding about lsquant."""


@dataclass(frozen=True)
class Node:
    """One module, or one operation on earlier values.

    kind: a key of MODULES or OPERATIONS.
    of: indices of the values that go in; the inputs of the network come first, then the nodes.
    options: arguments of the module or operation.
    weight, activation: QuantSpec arguments of the rule for this node; None is floating point, "default" has no rule.
    hook: "", or a key of HOOKS.
    made_by: "", or a key of WEIGHT_MAKERS: what makes the weight.
    share: the node whose weight this one has too.
    same: the node whose module is called here once more.
    """

    kind: str
    of: tuple[int, ...]
    options: Options = field(default_factory=dict)
    weight: Any = "default"
    activation: Any = "default"
    hook: str = ""
    made_by: str = ""
    share: int | None = None
    same: int | None = None


@dataclass(frozen=True)
class Case:
    """A network, its recipe, its training and how it ships.

    seed: of weights and data.
    inputs: (shape of one sample, number of indices or 0 for floats) of each input.
    nodes: in order of execution; those whose value nothing reads are the outputs.
    outputs: "tensor" (with one output), "tuple", "list", "dict" or "nested".
    dtype: of the model, "float32", "bfloat16", "float16" or "float64".
    autocast: train under autocast to bfloat16.
    channels_last: model and images in that memory format.
    strange: "", or how the inputs lie in memory: "expanded", "transposed", "sliced".
    preset: a preset's name that stands for the default, "" for 8 bits; with ``first_last`` bits.
    example: give prepare a batch.
    method: of calibration.
    steps: of training.
    guarded: set some steps below their guard.
    extreme: "", or a key of EXTREMES: values at the edge of what is allowed.
    again: "", or a preset by which the model is prepared once more; its steps are rescaled where ``steps`` is even.
    hook: of the network itself, "" or a key of HOOKS.
    late: "", or a key of LATE: what is changed after prepare.
    profile: of the ONNX file; dynamic: whether its batch is free.
    """

    seed: int
    inputs: tuple[tuple[tuple[int, ...], int], ...]
    nodes: tuple[Node, ...]
    outputs: str = "tensor"
    dtype: str = "float32"
    autocast: bool = False
    channels_last: bool = False
    strange: str = ""
    preset: str = ""
    first_last: int | None = None
    example: bool = True
    method: str = "mse"
    steps: int = 1
    guarded: bool = False
    extreme: str = ""
    again: str = ""
    hook: str = ""
    late: str = ""
    profile: str = "exact"
    dynamic: bool = False

    def to_json(self) -> str:
        """Return the case on a few lines, one node a line; what is as usual is left out."""
        usual, plain = Case(0, (), ()), Node("", ())

        def told(value: Any, like: Any) -> Options:
            return {k: v for k, v in asdict(value).items() if k in ("seed", "kind", "of") or v != getattr(like, k)}

        head = told(self, usual)
        nodes = [json.dumps(told(node, plain)) for node in self.nodes]
        head.pop("nodes", None)
        return json.dumps(head)[:-1] + ', "nodes": [\n  ' + ",\n  ".join(nodes) + "\n]}"

    @classmethod
    def from_json(cls, text: str) -> Case:
        """Read what ``to_json`` wrote."""
        values = json.loads(text)
        nodes = tuple(Node(**{**node, "of": tuple(node["of"])}) for node in values.pop("nodes"))
        inputs = tuple((tuple(shape), count) for shape, count in values.pop("inputs"))
        return cls(inputs=inputs, nodes=nodes, **values)

    def leaves(self) -> list[int]:
        """Return the values that nothing reads: the outputs."""
        read = {i for node in self.nodes for i in node.of}
        first = len(self.inputs)
        return [i for i in range(first, first + len(self.nodes)) if i not in read]

    def name(self, index: int) -> str:
        """Return the name of a node's module."""
        node = self.nodes[index]
        return self.name(node.same) if node.same is not None else f"{node.kind}{index}"


# ---- modules: (options, shapes of the values that go in) -> module ----


def _conv(kind: type[nn.Module], o: Options, shape: torch.Size) -> nn.Module:
    padding = o.get("padding", 0)
    return kind(
        shape[1], o["out"], tuple(o["kernel"]), tuple(o["stride"]),
        padding if isinstance(padding, str) else tuple(padding), tuple(o["dilation"]), o["groups"],
        o["bias"], o["mode"],
    )  # fmt: skip


def _transposed(kind: type[nn.Module], o: Options, shape: torch.Size) -> nn.Module:
    return kind(
        shape[1], o["out"], tuple(o["kernel"]), tuple(o["stride"]), tuple(o["padding"]), tuple(o["extra"]),
        o["groups"], o["bias"], tuple(o["dilation"]),
    )  # fmt: skip


def _norm(kinds: Sequence[type[nn.Module]], o: Options, shape: torch.Size) -> nn.Module:
    """BatchNorm or InstanceNorm by the number of dimensions, with statistics as after training."""
    bn: Any = kinds[max(len(shape) - 3, 0)](shape[1], **o)
    with torch.no_grad():
        if bn.weight is not None:
            bn.weight.normal_(1.0, 0.5)
            bn.weight[0] *= -1.0
            bn.bias.normal_(0.3, 0.5)
        if bn.running_mean is not None:
            bn.running_mean.normal_(0.0, 0.5)
            bn.running_var.uniform_(0.3, 2.0)
    return bn


def _encoder(o: Options, shape: torch.Size) -> nn.Module:
    return nn.TransformerEncoderLayer(shape[-1], o["heads"], o["width"], 0.0, o["activation"], batch_first=True)


class Attention(nn.Module):
    """Self attention as torch has it; its weights are used without layers."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(size, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    """An LSTM or a GRU, which stays float."""

    def __init__(self, kind: str, size: int, out: int) -> None:
        super().__init__()
        self.recurrent = getattr(nn, kind)(size, out, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0]


class Scale(nn.Module):
    """A parameter of its own, multiplied with the values."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Doubled(nn.Linear):
    """A subclass that computes otherwise: it must stay float."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.one = self.other = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.relu(self.one(x)))


class Unbatched(nn.Module):
    """A convolution that gets one sample at a time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.inner(one) for one in x])


def _mlp(o: Options, shape: torch.Size) -> nn.Module:
    return nn.Sequential(nn.Linear(shape[-1], o["width"]), nn.ReLU(), nn.Linear(o["width"], shape[-1]))


def _hf_conv1d(o: Options, shape: torch.Size) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(o["out"], shape[-1])


def _quantizer(o: Options, shape: torch.Size) -> nn.Module:
    spec, shape_of_step, axis = QuantSpec(**o["spec"]), (1,), None
    if spec.granularity == "channel":
        shape_of_step, axis = (shape[1],), 1
    quantizer = lsquant.Quantizer(spec, shape_of_step, axis=axis, count=shape[1:].numel() // shape_of_step[0])
    quantizer.enabled = False  # until the network is built: it has no step yet
    return quantizer


CONVS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
TRANSPOSED = {"convt1d": nn.ConvTranspose1d, "convt2d": nn.ConvTranspose2d, "convt3d": nn.ConvTranspose3d}
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCENORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
ACTIVATIONS = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "leaky": nn.LeakyReLU, "hardtanh": nn.Hardtanh, "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "silu": nn.SiLU, "hardswish": nn.Hardswish, "softmax": nn.Softmax,
    "elu": nn.ELU, "softplus": nn.Softplus, "identity": nn.Identity,
}  # fmt: skip
POOLS = {
    f"{name}{n}d": getattr(nn, f"{name}{n}d")
    for name in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")
    for n in (1, 2, 3)
}


def _options_only(kind: Callable[..., nn.Module], o: Options, shape: torch.Size) -> nn.Module:
    return kind(
        **{k: tuple(v) if isinstance(v, list) and not o.get("lists") else v for k, v in o.items() if k != "lists"}
    )


MODULES: dict[str, Callable[[Options, torch.Size], nn.Module]] = {
    "linear": lambda o, shape: nn.Linear(shape[-1], o["out"], o["bias"]),
    "hfconv1d": _hf_conv1d,
    **{name: partial(_conv, kind) for name, kind in CONVS.items()},
    **{name: partial(_transposed, kind) for name, kind in TRANSPOSED.items()},
    "embedding": lambda o, shape: nn.Embedding(o["count"], o["out"], o.get("padding_idx")),
    "batchnorm": partial(_norm, BATCHNORMS),
    "instancenorm": partial(_norm, INSTANCENORMS),
    "layernorm": lambda o, shape: nn.LayerNorm(shape[-1]),
    "groupnorm": lambda o, shape: nn.GroupNorm(o["groups"], shape[1]),
    "prelu": lambda o, shape: nn.PReLU(shape[1]),
    "encoder": _encoder,
    "attention": lambda o, shape: Attention(shape[-1], o["heads"]),
    "recurrent": lambda o, shape: Recurrent(o["kind"], shape[-1], o["out"]),
    "scale": lambda o, shape: Scale(shape[-1]),
    "quantizer": _quantizer,
    "subclass": lambda o, shape: Doubled(shape[-1], o["out"]),
    "twice": lambda o, shape: Twice(shape[-1]),
    "unbatched": lambda o, shape: Unbatched(shape[1]),
    "mlp": _mlp,
    **{name: partial(_options_only, kind) for name, kind in {**ACTIVATIONS, **POOLS}.items()},
    "flatten": lambda o, shape: nn.Flatten(1),
    "upsample": lambda o, shape: nn.Upsample(scale_factor=o["factor"]),
    "shuffle": lambda o, shape: nn.PixelShuffle(2),
}
"""Kind -> what makes its module."""

QUANTIZED = ("linear", "hfconv1d", *CONVS, *TRANSPOSED, "embedding")
"""Kinds of layers that lsquant quantizes."""

OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": lambda o, a, b: a + b,
    "sub": lambda o, a, b: a - b,
    "mul": lambda o, a, b: a * b,
    "max": lambda o, a, b: torch.maximum(a, b),
    "cat": lambda o, *values: torch.cat(values, o.get("dim", 1)),
    "matmul": lambda o, a, b: a @ b.transpose(-1, -2),
    "sdpa": lambda o, a, b, c: F.scaled_dot_product_attention(*(t.unsqueeze(1) for t in (a, b, c))).squeeze(1),
    "mean": lambda o, a: a.mean(-1),
    "transpose": lambda o, a: a.transpose(1, -1),
    "unflatten": lambda o, a: a.unflatten(1, (o["parts"], -1)),
    "pad": lambda o, a: F.pad(a, (1, 1), "constant", o["value"]),
    "slice": lambda o, a: a[:, : max(1, a.shape[1] // 2)],
    "chunk": lambda o, a: torch.chunk(a, 2, 1)[1],
    "half": lambda o, a: a * 0.5,
    "clone": lambda o, a: a.clone(),
}  # fmt: skip
"""Kind -> function of options and values."""


# ---- what hooks and parametrizations do ----


def _count(module: Any, *_: Any) -> None:
    module.seen = getattr(module, "seen", 0) + 1


def _doubled(value: Any) -> Any:
    return value * 2 if isinstance(value, Tensor) and value.is_floating_point() else value


def _double_in_place(module: nn.Module, args: Any, y: Tensor) -> None:
    y.mul_(2)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "observe": lambda m: m.register_forward_hook(_count),
    "observe_pre": lambda m: m.register_forward_pre_hook(_count),
    "observe_keywords": lambda m: m.register_forward_hook(lambda m, args, kwargs, y: None, with_kwargs=True),
    "change": lambda m: m.register_forward_hook(lambda m, args, y: _doubled(y)),
    "change_pre": lambda m: m.register_forward_pre_hook(lambda m, args: tuple(map(_doubled, args))),
    "change_in_place": lambda m: m.register_forward_hook(_double_in_place),
}
"""Name -> what registers the hook; those that begin with "change" change values."""


class Squashed(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch.tanh(weight)


WEIGHT_MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", Squashed()),
    "bias_parametrization": lambda m: parametrize.register_parametrization(m, "bias", Squashed()),
    "old_weight_norm": nn.utils.weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.4),
    "frozen": lambda m: m.weight.requires_grad_(False),
}
"""Name -> what makes the weight anew for every use, or does something else to it."""


def _zero_channel(layer: Any) -> None:
    layer.weight[0] = 0.0


EXTREMES: dict[str, Callable[[Any], Any]] = {
    "zero channel": _zero_channel,
    "tiny weights": lambda layer: layer.weight.mul_(1e-5),
    "large weights": lambda layer: layer.weight.mul_(30.0),
    "equal weights": lambda layer: layer.weight.fill_(0.375),
    "one sign": lambda layer: layer.weight.abs_(),
    "large bias": lambda layer: None if layer.bias is None else layer.bias.add_(100.0),
}
"""Name -> what is done to each layer of a kind that is quantized."""


# ---- the network ----


class Net(nn.Module):
    """The network of a description.  Modules are attributes by the names of their nodes."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.plan = case.nodes
        self.names = [case.name(i) for i in range(len(case.nodes))]
        self.kind_of_outputs, self.leaves = case.outputs, case.leaves()

    def forward(self, x0: Tensor, x1: Tensor | None = None) -> Any:
        values = [x0] if x1 is None else [x0, x1]
        for i in range(len(self.plan)):
            values.append(self.step(i, values))
        out = [values[i] for i in self.leaves]
        if self.kind_of_outputs == "tensor" and len(out) == 1:
            return out[0]
        if self.kind_of_outputs == "dict":
            return {f"y{i}": y for i, y in enumerate(out)}
        if self.kind_of_outputs == "nested":
            return {"first": out[0], "others": tuple(out[1:])} if len(out) > 1 else [{"only": (out[0],)}]
        return list(out) if self.kind_of_outputs == "list" else tuple(out)

    def step(self, i: int, values: list[Tensor]) -> Tensor:
        """Return the value of a node."""
        node, taken = self.plan[i], [values[k] for k in self.plan[i].of]
        if node.kind in OPERATIONS:
            return OPERATIONS[node.kind](node.options, *taken)
        return getattr(self, self.names[i])(*taken)


def build(case: Case, weights: int | None = None) -> Net:
    """Return the float network.  weights: another seed for the weights than the case's.

    Raises: Invalid where PyTorch cannot build or run it.
    """
    state = torch.get_rng_state()
    torch.manual_seed(case.seed if weights is None else weights)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _build(case)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        IndexError,
        NotImplementedError,
        AttributeError,
        AssertionError,
        KeyError,
    ) as e:
        raise Invalid(f"{type(e).__name__}: {e}") from e
    finally:
        torch.set_rng_state(state)


def _build(case: Case) -> Net:
    net = Net(case).eval()
    values: list[Tensor] = list(zeros(case))
    with torch.no_grad():
        for i in range(len(case.nodes)):
            add_module(net, i, values)
            values.append(net.step(i, values))
    switch(net, True)
    if case.extreme:
        with torch.no_grad():
            for module in net.modules():
                if lsquant.nn.quantized_type(module) is not None:
                    EXTREMES[case.extreme](module)
    for i, node in enumerate(case.nodes):
        if node.same is None and node.made_by:
            WEIGHT_MAKERS[node.made_by](net.get_submodule(case.name(i)))
    for i, node in enumerate(case.nodes):
        if node.hook and node.kind in MODULES and node.same is None:
            HOOKS[node.hook](net.get_submodule(case.name(i)))
    if case.hook:
        HOOKS[case.hook](net)
    net = net.to(getattr(torch, case.dtype))
    if case.channels_last:
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return net


def switch(net: nn.Module, on: bool) -> nn.Module:
    """Switch the quantizers of a float network on, or off, so that it runs without steps.  Returns the network."""
    for _, quantizer in lsquant.quantizers(net):
        quantizer.enabled = on
    return net


def add_module(net: Net, i: int, values: list[Tensor]) -> None:
    """Make the module of a node, and give it the weight that it shares."""
    node = net.plan[i]
    if node.kind in OPERATIONS or node.same is not None:
        return
    if node.kind not in MODULES:
        raise Invalid(f"there is no {node.kind}")
    module: Any = MODULES[node.kind](node.options, values[node.of[0]].shape)
    if node.share is not None:
        owner: Any = getattr(net, net.names[node.share])
        if module.weight.shape != owner.weight.shape:
            raise Invalid(f"{net.names[i]} cannot have the weight of {net.names[node.share]}")
        module.weight = owner.weight
    net.add_module(net.names[i], module.eval())


def zeros(case: Case) -> list[Tensor]:
    """Return a batch of two samples for building."""
    return [torch.zeros(2, *shape, dtype=torch.long if count else torch.float32) for shape, count in case.inputs]


def data(case: Case, seed: int, batch: int) -> list[Tensor]:
    """Return the inputs: normal values with outliers, zeros and ties, or indices."""
    g = torch.Generator().manual_seed(case.seed * 1000 + seed)
    found = []
    for shape, count in case.inputs:
        if count:
            found.append(torch.randint(0, count, (batch, *shape), generator=g))
            continue
        x = torch.randn((batch, *shape), generator=g)
        x = torch.where(torch.rand(x.shape, generator=g) < 0.02, x * 30, x)
        x = torch.where(torch.rand(x.shape, generator=g) < 0.1, (x * 8).round() / 8, x)
        found.append(_laid_out(x.to(getattr(torch, case.dtype)), case))
    return found


def _laid_out(x: Tensor, case: Case) -> Tensor:
    if case.strange == "expanded" and x.shape[1] > 1:
        return x[:, :1].expand(x.shape)
    if case.strange == "transposed" and x.dim() > 2:
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    if case.strange == "sliced":
        return torch.stack([x, x], -1)[..., 0]
    if case.channels_last and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def batch_of(case: Case, seed: int, batch: int) -> Any:
    """Return the inputs as lsquant's functions take a batch: a tensor, or a mapping for two inputs."""
    found = data(case, seed, batch)
    return found[0] if len(found) == 1 else {f"x{i}": x for i, x in enumerate(found)}


def recipe(case: Case) -> Recipe:
    """Return the recipe: a rule for each node that has one, and the default or preset."""
    rules = []
    for i, node in enumerate(case.nodes):
        if node.kind in QUANTIZED and node.same is None and (node.weight, node.activation) != ("default", "default"):
            halves = {
                half: None if spec is None else QuantSpec(**spec)
                for half, spec in (("weight", node.weight), ("activation", node.activation))
                if spec != "default"
            }
            rules.append(Rule(case.name(i), **halves))
    if case.preset:
        return Recipe.preset(case.preset, first_last=case.first_last, rules=rules)
    return Recipe(8, 8, rules)


LATE: dict[str, Callable[[Net, random.Random], Any]] = {}
"""Name -> what changes a prepared and calibrated network."""


def late(name: str) -> Callable[[Any], Any]:
    def register(function: Callable[[Net, random.Random], Any]) -> Callable[[Net, random.Random], Any]:
        LATE[name] = function
        return function

    return register


def _layers(net: Net) -> list[Any]:
    return [m for _, m in lsquant.nn.quantized_layers(net)]


@late("prune")
def _prune_late(net: Net, r: random.Random) -> None:
    prune.l1_unstructured(r.choice(_layers(net)), "weight", 0.4)


@late("hook")
def _hook_late(net: Net, r: random.Random) -> None:
    HOOKS["change"](r.choice(_layers(net)))


@late("parametrization")
def _parametrize_late(net: Net, r: random.Random) -> None:
    parametrize.register_parametrization(r.choice(_layers(net)), "weight", Squashed())


@late("new parameter")
def _new_parameter(net: Net, r: random.Random) -> None:
    layer = r.choice(_layers(net))
    layer.weight = nn.Parameter(layer.weight.detach() * 0.7)


@late("other bias")
def _other_bias(net: Net, r: random.Random) -> None:
    layer = r.choice(_layers(net))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach() + 0.25)


@late("tie")
def _tie_late(net: Net, r: random.Random) -> None:
    layers = _layers(net)
    r.shuffle(layers)
    for a in layers:
        for b in layers:
            if a is not b and a.weight is not b.weight and a.weight.shape == b.weight.shape:
                b.weight = a.weight
                return


@late("replace")
def _replace_late(net: Net, r: random.Random) -> None:
    """A float layer in the place of a quantized one, as where a head is exchanged for another task."""
    linears = [(n, m) for n, m in lsquant.nn.quantized_layers(net) if isinstance(m, nn.Linear) and "." not in n]
    if linears:
        name, old = r.choice(linears)
        new = nn.Linear(old.in_features, old.out_features, old.bias is not None, dtype=old.weight.dtype)
        setattr(net, name, new)


@late("deepcopied layer")
def _copied_late(net: Net, r: random.Random) -> None:
    import copy

    names = [n for n, _ in lsquant.nn.quantized_layers(net) if "." not in n]
    if names:
        name = r.choice(names)
        setattr(net, name, copy.deepcopy(getattr(net, name)))


def without(case: Case, index: int) -> Case:
    """Return the case without one node: its readers take its first input."""
    value, taken = index + len(case.inputs), case.nodes[index].of[0]

    def moved(i: int) -> int:
        i = taken if i == value else i
        return i - (i > value)

    def kept(i: int | None) -> int | None:
        return None if i is None or i == index else i - (i > index)

    nodes = []
    for i, node in enumerate(case.nodes):
        if i == index:
            continue
        same = kept(node.same)
        if node.same == index:  # the module itself is needed: this node has it now
            node = replace(case.nodes[index], of=node.of)
        nodes.append(replace(node, of=tuple(map(moved, node.of)), share=kept(node.share), same=same))
    return replace(case, nodes=tuple(nodes))
