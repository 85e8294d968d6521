"""Mistakes with models that `prepare` cannot take as they are, and with what is done to them between it and a file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune

import lsquant
from helpers.mistakes import W4A4, Net, images, mistake, prepared, ready
from lsquant import QuantSpec, Recipe, Rule


def said_of(changes: Any, name: str) -> str:
    """The note on one module."""
    return next(c.reason for c in changes if c.name == name)


@mistake("'1' is a LazyLinear", "run a batch first")
def a_lazy_layer(_: Path) -> Any:
    lsquant.prepare(nn.Sequential(nn.Linear(4, 8), nn.LazyLinear(3)), W4A4)


@mistake("weight_norm makes its weight", "remove_weight_norm(layer) before prepare")
def a_weight_norm_of_the_old_kind(_: Path) -> Any:
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.body)
    return said_of(lsquant.prepare(model, W4A4), "body")


@mistake("Conv2d with a parametrized weight", "remove_parametrizations(layer, 'weight')")
def a_parametrized_weight(_: Path) -> Any:
    model = Net()
    parametrizations.spectral_norm(model.body)
    return said_of(lsquant.prepare(model, W4A4), "body")


@mistake("body: pruning makes its weight", "prune.remove(layer, 'weight')")
def pruned_after_prepare(tmp: Path) -> Any:
    model = ready()
    prune.l1_unstructured(model.body, "weight", 0.5)
    lsquant.export_packed(model, tmp / "m")


@mistake("body: its weight of shape (3, 4, 3, 3) needs 3 steps, its quantizer has 4", "prepare(model, recipe) again")
def channels_removed_after_prepare(tmp: Path) -> Any:
    model = ready(Recipe(QuantSpec(4, granularity="channel"), 4))
    model.body.weight = nn.Parameter(model.body.weight[:3].detach())
    lsquant.save(model, tmp / "m")


@mistake("head: it came into the model after prepare", "lsquant.prepare(model, recipe) again")
def a_head_replaced_after_prepare(_: Path) -> Any:
    model = ready()
    model.head = nn.Linear(4, 10)
    return lsquant.check(model)


@mistake("a global forward hook", "handle.remove()")
def a_global_hook(_: Path) -> Any:
    handle = torch_module.register_module_forward_hook(lambda module, args, output: output)
    try:
        lsquant.to_integer(ready())
    finally:
        handle.remove()


@mistake("'code' (Conv2d) and 'decode' (ConvTranspose2d) share one weight", "skip=['code', 'decode']")
def one_weight_in_two_layouts(_: Path) -> Any:
    model = nn.ModuleDict({"code": nn.Conv2d(4, 4, 3), "decode": nn.ConvTranspose2d(4, 4, 3)})
    model["decode"].weight = model["code"].weight  # type: ignore[assignment]
    lsquant.prepare(model, W4A4)


@mistake("module '0' keeps a dict", "get_extra_state return a tensor")
def extra_state_that_is_no_tensor(tmp: Path) -> Any:
    class Counting(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 1}

    model = nn.Sequential(Counting(4, 4), nn.Linear(4, 4))
    lsquant.prepare(model, Recipe(4, None))
    lsquant.save(model, tmp / "m")


@mistake("att stays float", "MultiheadAttention computes with its weights directly")
def a_rule_for_an_attention_block(_: Path) -> Any:
    model = nn.ModuleDict({"att": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 4)})
    lsquant.prepare(model, Recipe(4, 4, [Rule("att", weight=8)]))


@mistake("'body' was parametrized after prepare", "remove_parametrizations")
def reverted_with_a_parametrization(_: Path) -> Any:
    model = prepared()
    parametrizations.weight_norm(model.body)
    lsquant.revert(model)


@mistake("Sequential cannot be copied", "generator")
def a_model_that_cannot_be_copied(_: Path) -> Any:
    model = nn.Sequential(nn.Linear(4, 4))
    lsquant.prepare(model, Recipe(4, None))
    model.numbers = (n for n in range(3))
    lsquant.to_integer(model)


@mistake("Linear has no graph of its own in torch.fx", "torch.nn.Sequential(layer)")
def a_single_layer_traced(_: Path) -> Any:
    layer = nn.Linear(4, 4)
    lsquant.prepare(layer, W4A4)
    torch.fx.symbolic_trace(layer)


@mistake("export_onnx has no form for 0", "leave them float for it (skip=)")
def an_embedding_with_max_norm_that_is_to_be_exported(_: Path) -> Any:
    return str(lsquant.prepare(nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Linear(4, 2)), W4A4))


@mistake("hooks that change values", "of body")
def a_hook_that_no_graph_can_hold(tmp: Path) -> Any:
    model = ready()
    model.body.register_forward_hook(lambda module, args, y: torch.from_numpy(y.detach().numpy() * 2))
    lsquant.export_onnx(model, tmp / "m.onnx", images())


@mistake("body.weight_quantizer: this quantizer has a forward hook", "register it on the layer")
def a_hook_on_a_quantizer(_: Path) -> Any:
    model = ready()
    model.body.weight_quantizer.register_forward_hook(lambda module, args, y: y * 2)
    lsquant.to_integer(model)


@mistake("body: its weight_quantizer is that of 'stem'", "call lsquant.prepare(model, recipe) again")
def one_quantizer_for_two_weights(_: Path) -> Any:
    model = ready()
    model.body.weight_quantizer = model.stem.weight_quantizer
    lsquant.to_integer(model)


@mistake("a TorchScript program", "give the model that it was made from")
def a_scripted_model(_: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    lsquant.prepare(scripted, W4A4)


@mistake("torchao's tensor has no float64", "model.float()")
def a_float64_model_for_torchao(_: Path) -> Any:
    model = nn.Sequential(nn.Linear(4, 4)).double()
    lsquant.prepare(model, Recipe(4, None))
    lsquant.to_torchao(model)


@mistake("None is no path", "give the name of a file")
def no_path(_: Path) -> Any:
    lsquant.save(ready(), None)  # type: ignore[arg-type]


@mistake("batches is a int, not an iterable of batches", "pass [batch]")
def a_number_of_batches(_: Path) -> Any:
    lsquant.calibrate(prepared(), 3)  # type: ignore[arg-type]
