"""Quantized embeddings, alone and tied with the layer that reads them; torch's encoder without its fast path."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lsquant
import oracle
from helpers.engines import assert_same
from helpers.layers import array
from lsquant import QuantSpec, Recipe, Rule, reference
from lsquant.nn import QuantEmbedding, QuantLinear, quantizers

SPECS = {
    "tensor": QuantSpec(4),
    "2 bits": QuantSpec(2),
    "channel": QuantSpec(4, granularity="channel"),
    "group": QuantSpec(4, granularity="group", group_size=3),
    "ternary group": QuantSpec(2, narrow=True, granularity="group", group_size=6),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
WORDS, SIZE = 11, 12


def made(spec: QuantSpec, **options: Any) -> Any:
    layer = nn.Embedding(WORDS, SIZE, **options)
    lsquant.prepare(layer, Recipe(spec, 4))
    assert type(layer) is QuantEmbedding
    assert layer.input_quantizer is None
    return layer


def kind(spec: QuantSpec) -> dict[str, Any]:
    return {"axis": 0 if spec.granularity == "channel" else None, "group_size": spec.group_size}


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 1, 4), (0,), (2, 0)])
@every_spec
def test_forward(spec, shape):
    layer, words = made(spec), torch.randint(WORDS, shape)
    q = layer.weight_quantizer
    values = oracle.fake_quantize(array(layer.weight), array(q.effective_step()), q.q_min, q.q_max, **kind(spec))
    assert_same(layer(words).detach(), torch.tensor(values)[words])
    codes, step, _ = layer.integer_weight()
    assert np.array_equal(codes.numpy() * oracle.spread(array(step), values.shape, **kind(spec)), values)
    assert_same(layer(words.int()), layer(words))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"padding_idx": -1}, {"max_norm": 2.0}])
@every_spec
def test_gradients_are_those_of_the_whole_quantized_weight(spec, options):
    layer, words = made(spec, **options), torch.tensor([[1, 1, 2, 10], [3, 2, 0, 1]])
    q = layer.weight_quantizer
    with torch.no_grad():
        layer.weight.normal_()  # the row of the padding index too
    if "max_norm" in options:
        layer(words)  # torch shrinks the rows in place
    args = (q.effective_step(), q.q_min, q.q_max, q.gradient_scale)
    y = F.embedding(words, reference.fake_quantize(layer.weight, *args, **kind(spec)), layer.padding_idx)
    upstream = torch.randn_like(y)
    want = torch.autograd.grad(y, [layer.weight, q.step], upstream)
    got = torch.autograd.grad(layer(words), [layer.weight, q.step], upstream)
    for mine, theirs in zip(got, want, strict=True):
        assert theirs.abs().max() > 0
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)
        assert torch.equal(mine == 0, theirs == 0)
    if "padding_idx" in options:
        assert bool((got[0][options["padding_idx"]] == 0).all())


@every_spec
def test_n_is_the_number_of_weights_per_step(spec):
    layer = made(spec)
    assert int(layer.weight_quantizer.count) == WORDS * SIZE // len(layer.weight_quantizer.step)


@pytest.mark.parametrize("options, reason", [({"sparse": True}, "sparse"), ({"scale_grad_by_freq": True}, "freq")])
def test_what_has_no_right_step_gradient_stays_float_and_says_so(options, reason):
    model = nn.Sequential(nn.Embedding(WORDS, SIZE, **options), nn.Linear(SIZE, 2))
    changes = lsquant.prepare(model, Recipe(4, 4))
    assert type(model[0]) is nn.Embedding
    assert reason in changes[0].reason


@every_spec
def test_names_checkpoints_copies_types_and_revert(spec, tmp_path):
    layer, words = made(spec), torch.randint(WORDS, (3, 4))
    keys = {"step", "initial_step", "signed", "count", "initialized", "bounds"}
    assert set(layer.state_dict()) == {"weight"} | {f"weight_quantizer.{key}" for key in keys}
    want = layer(words)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same(other(words), want)
    lsquant.save(layer, tmp_path / "m")
    assert_same(lsquant.load(nn.Embedding(WORDS, SIZE), tmp_path / "m")(words), want)
    floats = nn.Embedding(WORDS, SIZE)
    layer.load_state_dict(floats.state_dict(), strict=True)
    again = copy.deepcopy(floats)
    lsquant.prepare(again, Recipe(spec, None))
    assert_same(layer(words), again(words))
    low = copy.deepcopy(layer).bfloat16()
    q = low.weight_quantizer
    assert q.step.dtype == torch.float32
    values = oracle.fake_quantize(array(low.weight), array(q.effective_step()), q.q_min, q.q_max, **kind(spec))
    assert_same(low(words).detach(), torch.tensor(values).bfloat16()[words])
    lsquant.revert(layer)
    assert type(layer) is nn.Embedding
    assert_same(layer(words), floats(words))


def test_disabled_is_the_float_embedding():
    layer, words = made(SPECS["group"]), torch.randint(WORDS, (3, 4))
    with lsquant.disabled(layer):
        assert_same(layer(words), layer.weight[words])


# ---- tied with the layer that reads it ----


class Words(nn.Module):
    """A language model in small: its last layer has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, SIZE)
        self.middle = nn.Linear(SIZE, SIZE)
        self.head = nn.Linear(SIZE, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embedding(words)).relu())


def tied(spec: QuantSpec | int = 4) -> tuple[Any, torch.Tensor]:
    model, words = Words(), torch.randint(WORDS, (4, 5))
    lsquant.prepare(model, Recipe(spec, 4))
    lsquant.calibrate(model, [words])
    return model, words


@every_spec
def test_a_tied_weight_has_one_quantizer_and_one_step_under_both_names(spec, tmp_path):
    model, words = tied(spec)
    q = model.embedding.weight_quantizer
    assert q is model.head.weight_quantizer
    assert type(model.head) is QuantLinear
    assert [name for name, _ in quantizers(model)] == [
        "embedding.weight_quantizer", "middle.weight_quantizer", "middle.input_quantizer", "head.input_quantizer",
    ]  # fmt: skip
    state = model.state_dict()
    for key in ("step", "initial_step", "signed", "count", "initialized", "bounds"):
        names = (f"embedding.weight_quantizer.{key}", f"head.weight_quantizer.{key}")
        assert state[names[0]].data_ptr() == state[names[1]].data_ptr()
    assert sum(p is q.step for group in lsquant.param_groups(model, 0.1) for p in group["params"]) == 1
    lsquant.save(model, tmp_path / "m")
    for other in (copy.deepcopy(model), lsquant.load(Words(), tmp_path / "m")):
        assert_same(other(words), model(words))
        assert other.embedding.weight_quantizer is other.head.weight_quantizer
        assert other.embedding.weight is other.head.weight
    lsquant.revert(model)
    assert model.embedding.weight is model.head.weight


def test_the_gradients_of_both_uses_add_up():
    model, words = tied()
    q = model.embedding.weight_quantizer
    hidden = model.middle(model.embedding(words)).relu()
    parts = []
    for use in (lambda: model.head(hidden.detach()), lambda: hidden):
        parts.append(torch.autograd.grad(use().square().sum(), [model.embedding.weight, q.step], retain_graph=True))
    (model.head(hidden.detach()).square().sum() + hidden.square().sum()).backward()
    for total, one, two in zip((model.embedding.weight.grad, q.step.grad), *parts, strict=True):
        assert torch.allclose(total, one + two, rtol=1e-5, atol=1e-6)


def test_the_share_of_weights_counts_a_tied_one_once():
    changes = lsquant.prepare(Words(), Recipe(4, 4, [Rule("middle", None, None)]))
    assert changes.weight_share == WORDS * SIZE / (WORDS * SIZE + SIZE * SIZE)
    assert [c.shares for c in changes] == [None, None, "embedding"]
    assert "shares its weight with 'embedding'" in str(changes)


def test_the_last_layers_bits_go_to_the_tied_embedding_too():
    model = Words()
    lsquant.prepare(model, Recipe.preset("w2a2"))
    assert model.embedding.weight_quantizer is model.head.weight_quantizer
    assert (model.head.weight_quantizer.spec.bits, model.head.input_quantizer.spec.bits) == (8, 8)


# ---- torch's encoder ----


def encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)


MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    "attention": {"mask": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)},
}


# torch warns that nested tensors, which are part of the fast path, are a prototype
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}])
def test_an_encoder_in_eval_mode_uses_its_quantized_layers(options, masks):
    model, x = encoder(**options), torch.randn(2, 5, 8)
    plain = copy.deepcopy(model).eval()
    lsquant.prepare(model, Recipe(2, 2))
    lsquant.calibrate(model, [x])
    trained = model.train()(x, **masks)
    calls: list[str] = []
    hooks = [
        m.register_forward_hook(lambda *_, n=n: calls.append(n))
        for n, m in model.named_modules()
        if isinstance(m, QuantLinear)
    ]
    with torch.no_grad():
        y = model.eval()(x, **masks)
    assert sorted(calls) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert torch.allclose(y, trained, rtol=1e-4, atol=1e-5)  # without dropout
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        want = plain(x, **masks)
        assert not torch.allclose(y, want, atol=0.01)
        lsquant.revert(model)
        assert type(model) is nn.TransformerEncoder
        assert type(model.layers[0]) is nn.TransformerEncoderLayer
        assert vars(model).keys() == vars(plain).keys()
        assert model.use_nested_tensor == plain.use_nested_tensor
        assert model.layers[0].activation_relu_or_gelu == plain.layers[0].activation_relu_or_gelu
        assert_same(model(x, **masks), want)


def test_a_prepared_encoder_can_be_copied_saved_and_loaded(tmp_path):
    model, x = encoder(), torch.randn(2, 5, 8)
    lsquant.prepare(model, Recipe(4, 4))
    lsquant.calibrate(model, [x])
    with torch.no_grad():
        want = model.eval()(x)
        lsquant.save(model, tmp_path / "m")
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), lsquant.load(encoder(), tmp_path / "m")):
            assert_same(other.eval()(x), want)
    assert not lsquant.check(model, batches=[x]) or {f.code for f in lsquant.check(model, batches=[x])} == {
        "stays_float"
    }
