"""A random network of a seed.  Every node is tried as it is drawn, so that the network runs."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from helpers.fuzz_nets import (
    ACTIVATIONS,
    CONVS,
    EXTREMES,
    LATE,
    MODULES,
    QUANTIZED,
    Case,
    Invalid,
    Net,
    Node,
    Options,
    add_module,
    zeros,
)  # fmt: skip

LARGEST = 600
"""Elements of one sample that a value may have."""
SIZES = (2, 3, 4, 4, 6, 8)
"""Channels and features, few, so that weights of one shape meet."""


def draw(seed: int) -> Case:
    """Return the network of a seed."""
    r = random.Random(seed)
    domain = r.choice(
        ["image"] * 6 + ["signal"] * 2 + ["volume"] * 3 + ["features"] * 3 + ["sequence"] * 3 + ["tokens"] * 2
    )
    inputs = [_input(r, domain)]
    if r.random() < 0.15:
        inputs.append(inputs[0])
    case = Case(seed, tuple(inputs), ())
    case = _with_nodes(r, case, r.randint(2, 7))
    one = len(case.leaves()) == 1
    case = replace(
        case,
        outputs="tensor" if one and r.random() < 0.8 else r.choice(["tuple", "list", "dict", "nested"]),
        dtype=r.choice(["float32"] * 20 + ["bfloat16", "float16", "float64"]),
        autocast=r.random() < 0.1,
        channels_last=domain == "image" and r.random() < 0.25,
        strange=r.choice(["", "", "", "", "", "expanded", "transposed", "sliced"]) if domain != "tokens" else "",
        preset=r.choice(["", "", "", "", "", "w4a4", "w2a2", "w8a8", "w4", "w3a8", "W4A16"]),
        first_last=r.choice([None, 8, 8, 4]),
        example=r.random() < 0.8,
        method=r.choice(["mse", "paper"]),
        steps=r.choice([1, 1, 2]),
        guarded=r.random() < 0.2,
        extreme=r.choice(list(EXTREMES)) if r.random() < 0.1 else "",
        again=r.choice(["w4a4", "w8a8", "w3a5", "w4"]) if r.random() < 0.08 else "",
        hook=r.choice(["observe", "observe_pre", "observe_keywords", "change"]) if r.random() < 0.06 else "",
        late=r.choice(list(LATE)) if r.random() < 0.05 else "",
        profile=r.choice(["exact", "exact", "small", "qdq"]),
        dynamic=r.random() < 0.1,
    )  # fmt: skip
    if any(node.kind == "groupnorm" for node in case.nodes):
        case = replace(case, channels_last=False)  # torch 2.13 itself crashes in the backward pass of some
    for i in range(len(case.nodes)):
        ruled = _ruled(r, case, i)
        case = replace(case, nodes=(*case.nodes[:i], ruled, *case.nodes[i + 1 :]))
    return case


def _input(r: random.Random, domain: str) -> tuple[tuple[int, ...], int]:
    if domain == "tokens":
        return (r.randint(2, 5),), r.choice([4, 6, 8])
    channels = r.choice(SIZES)
    shapes = {
        "image": (channels, r.randint(3, 7), r.randint(3, 7)),
        "signal": (channels, r.randint(4, 12)),
        "volume": (min(channels, 4), *(r.randint(2, 4) for _ in range(3))),
        "features": (channels,),
        "sequence": (r.randint(2, 4), r.choice(SIZES)),
    }
    return shapes[domain], 0


def _with_nodes(r: random.Random, case: Case, count: int) -> Case:
    """Add nodes until there are enough, and at least one that is quantized."""
    net = Net(case).eval()
    values = zeros(case)
    state = torch.get_rng_state()
    torch.manual_seed(case.seed)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for _ in range(200):
            enough = len(case.nodes) >= count
            if enough and any(node.kind in QUANTIZED for node in case.nodes):
                break
            i, last = _starting_value(r, case, values)
            longer = replace(case, nodes=(*case.nodes, _node(r, case, values, i, last, only_layers=enough)))
            try:
                value = _try(net, longer, values)
            except (Invalid, RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, KeyError):
                continue  # a module that is left over is replaced by the next of its name
            if not 0 < value[0].numel() <= LARGEST or value.shape[0] != 2:
                continue
            case, values = longer, [*values, value]
    torch.set_rng_state(state)
    return case


def _starting_value(r: random.Random, case: Case, values: list[Tensor]) -> tuple[int, Tensor]:
    """Mostly the last value; unread inputs first."""
    read = {i for node in case.nodes for i in node.of}
    unread = [i for i in range(len(case.inputs)) if i not in read]
    if unread and (not case.nodes or r.random() < 0.5):
        i = unread[0]
    elif case.nodes and r.random() < 0.75:
        i = len(values) - 1
    else:
        i = r.randrange(len(values))
    return i, values[i]


def _try(net: Net, case: Case, values: list[Tensor]) -> Tensor:
    i = len(case.nodes) - 1
    net.plan, net.names = case.nodes, [case.name(k) for k in range(len(case.nodes))]
    add_module(net, i, values)
    value = net.step(i, values)
    if not value.is_floating_point():
        raise ValueError
    return value


# ---- one node ----


def _node(r: random.Random, case: Case, values: list[Tensor], i: int, x: Tensor, only_layers: bool) -> Node:
    if not x.is_floating_point():
        again = [k for k, n in enumerate(case.nodes) if n.kind == "embedding" and n.same is None]
        if again and r.random() < 0.3:
            return Node("embedding", (i,), case.nodes[again[0]].options, same=again[0])
        count = case.inputs[i][1]
        return Node(
            "embedding", (i,), {"count": count, "out": r.choice([4, 6, 8]), "padding_idx": r.choice([None, None, 0])}
        )
    if not only_layers and r.random() < 0.18 and (node := _join(r, values, i, x)) is not None:
        return node
    if r.random() < 0.25 and (node := _again(r, case, values, i, x)) is not None:
        return node
    if only_layers or r.random() < 0.5:
        return _layer(r, i, x)
    return _other(r, i, x)


def _join(r: random.Random, values: list[Tensor], i: int, x: Tensor) -> Node | None:
    alike = [k for k, v in enumerate(values) if v.is_floating_point() and v.shape == x.shape]
    kind = r.choice(["add", "add", "add", "sub", "mul", "max", "cat", "cat", "matmul", "sdpa"])
    if kind in ("matmul", "sdpa") and x.dim() != 3:
        kind = "add"
    if kind == "sdpa":
        return Node("sdpa", (i, r.choice(alike), r.choice(alike)))
    if kind == "cat":
        rest = [
            k
            for k, v in enumerate(values)
            if v.is_floating_point() and v.shape[2:] == x.shape[2:] and v.dim() == x.dim()
        ]
        return Node("cat", (i, r.choice(rest)), {"dim": 1})
    return Node(kind, (i, r.choice(alike)))


def _again(r: random.Random, case: Case, values: list[Tensor], i: int, x: Tensor) -> Node | None:
    """An earlier module once more, or a new layer with an earlier layer's weight."""
    owners = [k for k, n in enumerate(case.nodes) if n.kind in QUANTIZED and n.same is None]
    if not owners:
        return None
    k = r.choice(owners)
    node = case.nodes[k]
    before = values[node.of[0]]
    if before.is_floating_point() and before.shape == x.shape and r.random() < 0.5:
        return Node(node.kind, (i,), node.options, same=k)
    if node.kind == "embedding":
        return Node("linear", (i,), {"out": node.options["count"], "bias": r.random() < 0.5}, share=k)
    if node.kind in CONVS and x.dim() == before.dim() and r.random() < 0.3:  # the decoder has the encoder's weight
        o = node.options
        return Node(
            f"convt{x.dim() - 2}d", (i,), _transposed_options(r, x, o["kernel"], before.shape[1], o["groups"]), share=k
        )
    options = dict(node.options)
    if "bias" in options:
        options["bias"] = r.random() < 0.5
    return Node(node.kind, (i,), options, share=k)


def _layer(r: random.Random, i: int, x: Tensor) -> Node:
    """A layer that is quantized, by the number of dimensions."""
    spatial = x.dim() - 2
    if (spatial == 1 and r.random() < 0.6) or not 1 <= spatial <= 3 or r.random() < 0.1:
        if r.random() < 0.06:
            return Node("hfconv1d", (i,), {"out": r.choice(SIZES)})
        return Node("linear", (i,), {"out": r.choice(SIZES), "bias": r.random() < 0.6})
    if r.random() < 0.25:
        groups = r.choice([g for g in (1, 1, 2, x.shape[1]) if x.shape[1] % g == 0])
        kernel = [r.randint(1, 3) for _ in range(spatial)]
        return Node(f"convt{spatial}d", (i,), _transposed_options(r, x, kernel, groups * r.randint(1, 3), groups))
    return Node(f"conv{spatial}d", (i,), _conv_options(r, x))


def _conv_options(r: random.Random, x: Tensor) -> Options:
    sizes = x.shape[2:]
    groups = r.choice([g for g in (1, 1, 1, 2, x.shape[1]) if x.shape[1] % g == 0])
    mode = r.choice(["zeros"] * 6 + ["reflect", "replicate", "circular"])
    dilation = [r.choice([1, 1, 1, 2]) for _ in sizes]
    kernel = [min(r.choice([1, 2, 3, 3]), (n - 1) // d + 1) for n, d in zip(sizes, dilation, strict=True)]
    padding: Any = [r.randint(0, 2 if mode == "zeros" else 1) for _ in sizes]
    stride = [r.choice([1, 1, 2]) for _ in sizes]
    if r.random() < 0.25:
        padding, stride = r.choice(["same", "same", "valid"]), [1] * len(sizes)
    return {
        "out": groups * r.randint(1, 3) if r.random() < 0.5 else groups * max(1, 4 // groups), "kernel": kernel,
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": r.random() < 0.6,
        "mode": mode,
    }  # fmt: skip


def _transposed_options(r: random.Random, x: Tensor, kernel: list[int], out: int, groups: int) -> Options:
    count = len(kernel)
    stride, dilation = [r.choice([1, 1, 2, 3]) for _ in kernel], [r.choice([1, 1, 2]) for _ in kernel]
    return {
        "out": out, "kernel": kernel, "stride": stride,
        "padding": [r.randint(0, min(1, d * (k - 1))) for k, d in zip(kernel, dilation, strict=True)],
        "extra": [r.randrange(max(s, d)) if r.random() < 0.4 else 0 for s, d in zip(stride, dilation, strict=True)],
        "groups": groups, "bias": r.random() < 0.6, "dilation": dilation[:count],
    }  # fmt: skip


def _other(r: random.Random, i: int, x: Tensor) -> Node:
    """A module that is not quantized, or an operation."""
    spatial = x.dim() - 2
    kinds = ["activation"] * 5 + [
        "half",
        "clone",
        "quantizer",
        "slice",
        "flatten",
        "pad",
        "unflatten",
        "norm",
        "norm",
        "norm",
    ]
    if spatial:
        kinds += ["pool", "pool", "pool", "pool", "mean", "transpose", "chunk"]
    if r.random() < 0.15:
        kinds = ["subclass", "twice", "mlp", "mlp"] + ["unbatched"] * (spatial == 1)
    elif spatial == 1:
        kinds += ["layernorm", "encoder", "attention", "recurrent", "scale"]
    elif spatial == 2:
        kinds += ["upsample", "shuffle"]
    kind = r.choice(kinds)
    if kind == "activation":
        kind = r.choice([*["relu"] * 8, *["relu6"] * 2, *ACTIVATIONS, "prelu"])
        options = {"leaky": {"negative_slope": r.choice([0.125, 0.01])}, "softmax": {"dim": -1}}.get(kind, {})
        return Node(kind, (i,), options)
    if kind == "norm":
        kind = r.choice(["batchnorm"] * 6 + ["layernorm", "groupnorm", "instancenorm"])
    if kind == "pool":
        return _pool(r, i, x, spatial)
    options: dict[str, Options] = {
        "batchnorm": r.choice([{}, {}, {}, {"affine": False}, {"track_running_stats": False}]),
        "instancenorm": r.choice([{}, {"affine": True}, {"track_running_stats": True}]),
        "groupnorm": {"groups": r.choice([g for g in (1, 2) if x.shape[1] % g == 0])},
        "encoder": {"heads": 1, "width": r.choice([4, 8]), "activation": r.choice(["relu", "gelu"])},
        "attention": {"heads": 1},
        "recurrent": {"kind": r.choice(["LSTM", "GRU"]), "out": r.choice([2, 4])},
        "quantizer": {
            "spec": _activation(r) if r.random() < 0.7 else {"bits": r.randint(2, 8), "granularity": "channel"}
        },
        "unflatten": {"parts": 2},
        "subclass": {"out": r.choice(SIZES)},
        "mlp": {"width": r.choice(SIZES)},
        "pad": {"value": r.choice([0.0, 0.5])},
        "upsample": {"factor": r.choice([2, 2, 3])},
    }
    return Node(kind, (i,), options.get(kind, {}))


def _pool(r: random.Random, i: int, x: Tensor, spatial: int) -> Node:
    name = r.choice(
        ["MaxPool", "AvgPool", "AvgPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool"]
    )
    sizes = x.shape[2:]
    options: Options = {"lists": True} if r.random() < 0.1 else {}
    if name.startswith("Adaptive"):
        options["output_size"] = r.choice(
            [1, 2, [r.randint(1, n) for n in sizes], [r.choice([None, n]) for n in sizes]]
        )
    else:
        kernel = r.choice([2, 3, [r.randint(1, min(3, n)) for n in sizes]])
        options |= {"kernel_size": kernel, "stride": r.choice([None, 1, 2])}
        if r.random() < 0.3:
            options["padding"] = 1
        if name == "AvgPool" and r.random() < 0.3:
            options["count_include_pad"] = False
        if r.random() < 0.15:
            options["ceil_mode"] = True
        if name == "AvgPool" and spatial > 1 and r.random() < 0.1:
            options["divisor_override"] = r.choice([3, 5])
    return Node(f"{name}{spatial}d", (i,), options)


# ---- rules, hooks and what makes weights ----


def _activation(r: random.Random) -> Options:
    kind = r.choice(["free", "free", "free", "signed", "unsigned", "narrow", "offset", "signed offset"])
    spec: Options = {"bits": r.randint(2, 8)}
    if kind in ("signed", "unsigned", "signed offset"):
        spec["signed"] = kind != "unsigned"
    if kind == "narrow":
        spec["narrow"] = True
    if "offset" in kind:
        spec["offset"] = True
    return spec


def _weight(r: random.Random, case: Case, i: int) -> Options:
    spec: Options = {"bits": r.randint(2, 8), "granularity": r.choice(["tensor", "channel", "channel"])}
    if r.random() < 0.2:
        spec["narrow"] = True
        if r.random() < 0.5:
            spec["bits"] = 2
    if r.random() < 0.2 and (size := _row_size(case, i)) > 1:
        spec |= {"granularity": "group", "group_size": r.choice([d for d in range(1, size + 1) if size % d == 0][1:])}
    return spec


def _row_size(case: Case, i: int) -> int:
    """The flattened input dimension of a layer that may have groups, else 0."""
    node = case.nodes[i]
    if node.kind not in ("linear", "conv2d", "embedding"):
        return 0
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        values = zeros(case)
        net = Net(case).eval()
        for k in range(i + 1):
            add_module(net, k, values)
            values.append(net.step(k, values))
    weight: Any = net.get_submodule(case.name(i)).weight
    return weight[0].numel()


def _ruled(r: random.Random, case: Case, i: int) -> Node:
    """Give a node its rule, and sometimes a hook or something that makes its weight."""
    node = case.nodes[i]
    if node.kind not in MODULES or node.same is not None:
        return node
    if r.random() < 0.06:
        node = replace(
            node,
            hook=r.choice(["observe", "observe_pre", "observe_keywords", "change", "change_pre", "change_in_place"]),
        )
    shared = {n.share for n in case.nodes} | {n.same for n in case.nodes}
    if node.kind not in QUANTIZED:
        return node
    if r.random() < 0.06 and i not in shared and node.share is None and node.kind != "hfconv1d":
        makers = [
            "weight_norm",
            "spectral_norm",
            "parametrization",
            "old_weight_norm",
            "old_spectral_norm",
            "prune",
            "frozen",
        ]
        node = replace(node, made_by=r.choice(makers + (["bias_parametrization"] if node.options.get("bias") else [])))
    if any(e >= s for e, s in zip(node.options.get("extra", ()), node.options.get("stride", ()), strict=False)):
        node = replace(node, made_by="")  # torch's exporter writes it as a float layer in a form that no runtime runs
    if node.made_by not in ("", "frozen", "prune", "old_weight_norm", "old_spectral_norm"):
        return node  # no layer for a rule any more
    if r.random() < 0.75:
        node = replace(node, weight=_weight(r, case, i), activation=_activation(r))
        kind = r.random()
        if kind < 0.12:
            node = replace(node, activation=None)
        elif kind < 0.18:
            node = replace(node, weight=None)
        elif kind < 0.23:
            node = replace(node, weight=None, activation=None)
        if node.weight is None and node.activation is None and "extra" in node.options:
            node = replace(node, weight=_weight(r, case, i))  # for the same reason
    if node.share is not None:
        # the weight's rule is the first layer's; rules that disagree are refused, as they should
        node = replace(node, weight=case.nodes[node.share].weight)
    return node
