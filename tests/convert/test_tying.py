"""Shared weights and shared quantizers: what `lsquant.tying` says of a model in which layers share."""

from __future__ import annotations

import torch
from torch import nn

import lsquant
from lsquant import Recipe, tying


class Tied(nn.Module):
    """`table` and `head` have one weight, `part` is a view of half of it, `alone` has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head, self.alone = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("part", self.table.weight.detach()[:3])


def prepared() -> Tied:
    torch.manual_seed(0)
    model = Tied()
    lsquant.prepare(model, Recipe(4, 4))
    return model


def test_layers_are_grouped_by_their_weight():
    model = Tied()
    groups = tying.layers_by_weight([model.alone, model.table, model.head])
    assert list(groups) == [model.alone.weight, model.table.weight]
    assert list(groups.values()) == [[model.alone], [model.table, model.head]]


def test_a_shared_weight_has_the_quantizer_of_its_first_layer():
    model = prepared()
    owners = tying.weight_quantizers(model)
    assert [(name, layer) for name, layer in owners.values()] == [("table", model.table), ("alone", model.alone)]
    assert model.head.weight_quantizer is model.table.weight_quantizer
    assert [name for name, _ in tying.quantizer_owners(model).values()] == ["table", "head", "alone", "alone"]
    assert list(tying.weights_with_several_quantizers(model)) == []


def test_weights_tied_after_prepare_are_found():
    model = prepared()
    model.alone.weight = model.table.weight
    assert list(tying.weights_with_several_quantizers(model)) == [("alone", "table")]


def test_tensors_are_stored_once_and_views_whole():
    stored, aliases = tying.stored_once(Tied())
    assert aliases == {"head.weight": "table.weight"}
    assert stored.keys() == {"table.weight", "alone.weight", "part"}
    assert stored["part"].untyped_storage().nbytes() == 3 * 4 * 4


def test_a_weight_that_is_also_read_without_its_quantizer():
    model = prepared()
    assert tying.weights_used_in_float(model) == {"table.weight", "head.weight", "part"}
    del model.part
    assert tying.weights_used_in_float(model) == set()
