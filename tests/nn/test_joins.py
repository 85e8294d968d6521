"""The modules that stand for functions, written by hand: what they compute, how they print, what they refuse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lsquant import UsageError
from lsquant import nn as q

A = torch.arange(24.0).reshape(1, 4, 2, 3)
B = A * 2 - 30

CASES = [
    (q.Add(), (A, B), A * 3 - 30, "Add()"),
    (q.Add(), (A, torch.ones(4, 1, 1)), A + 1, "Add()"),
    (q.Mul(), (A, B), A * A * 2 - 30 * A, "Mul()"),
    (q.Cat(), (A, B, A), torch.stack([*A[0], *B[0], *A[0]])[None], "Cat(dim=1)"),
    (q.Cat(-1), (A, B), torch.cat((A, B), 3), "Cat(dim=-1)"),
    (q.Clip(3, 5), (A,), A.minimum(torch.tensor(5.0)).maximum(torch.tensor(3.0)), "Clip(min=3, max=5)"),
    (q.Clip(max=2.0), (B,), B.minimum(torch.tensor(2.0)), "Clip(min=None, max=2.0)"),
    (q.Mean(), (A,), torch.tensor([[2.5, 8.5, 14.5, 20.5]]), "Mean(dim=(2, 3), keepdim=False)"),
    (q.Mean(1, keepdim=True), (A,), A[:, :1] + 9, "Mean(dim=(1,), keepdim=True)"),
    (q.Slice(slice(None), slice(0, 2)), (A,), A[:, 0:2], "Slice(:, 0:2)"),
    (q.Slice(..., slice(None, None, 2), 0), (A,), A[..., ::2, 0], "Slice(..., ::2, 0)"),
    (q.Resize(), (A, (4, 6)), A.repeat_interleave(2, 2).repeat_interleave(2, 3), "Resize()"),
]


@pytest.mark.parametrize("module, inputs, output, text", CASES, ids=[c[3] for c in CASES])
def test_what_they_compute(module: nn.Module, inputs, output, text):
    assert torch.equal(module(*inputs), output)
    assert str(module) == text
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(*inputs), output)
        assert str(other) == text
    assert list(module.state_dict()) == []


def test_parts():
    one, two = q.Chunk(2)(A)
    assert torch.equal(one, A[:, :2])
    assert torch.equal(two, A[:, 2:])
    assert str(q.Chunk(2)) == "Chunk(2, dim=1)"
    one, two = q.Split([1, 3])(A)
    assert torch.equal(one, A[:, :1])
    assert torch.equal(two, A[:, 1:])
    assert str(q.Split([1, 3])) == "Split((1, 3), dim=1)"
    assert len(q.Split(1, -1)(A)) == 3


def test_the_gradient_of_clip_passes_at_the_limits():
    x = torch.tensor([-1.0, 0.0, 3.0, 6.0, 7.0], requires_grad=True)
    q.Clip(0, 6)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: q.Cat()([A, B]), r"cat\(a, b\) instead of cat\(\[a, b\]\)"),
        (lambda: q.Cat()(), "one by one"),
        (lambda: q.Cat([1]), r"dim is \[1\], not an integer"),
        (lambda: q.Clip(), "give min, max or both"),
        (lambda: q.Slice(torch.tensor(1)), "is no slice, integer"),
    ],
)
def test_what_they_refuse(call, message):
    with pytest.raises(UsageError, match=message):
        call()
