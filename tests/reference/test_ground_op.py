"""The op in PyTorch's machinery: what it saves, second derivatives, compile, opcheck, autocast, threads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lsquant
from helpers.cases import Case, some
from helpers.engines import ENGINES, assert_same, assert_within, gradients, leaf, value

engines = pytest.mark.parametrize("engine", ENGINES)

USUAL = some(
    *("s4-normal", "axis0-ties", "axis1-boundaries", "group-normal", "z-int-u4", "z-tensor-s4-axis"),
    *("z-offset-u4-axis", "channels_last-axis1", "strided-lsq-plus", "bfloat16-group", "float16-lsq-plus"),
    *("empty-batch-axis", "zero-dimensional"),
)
usual = pytest.mark.parametrize("case", USUAL, ids=str)


def call(b, x: Tensor, step: Tensor, offset: Tensor | None = None) -> Tensor:
    extras: dict[str, Any] = {**b.extras, "offset": offset}
    return lsquant.fake_quantize(x, step, b.q_min, b.q_max, b.g, **extras)


# ---------------------------------------------------------------------------------------------- memory


@usual
def test_only_the_input_and_the_step_are_saved(case: Case) -> None:
    b = case.build()
    x, step = leaf(b.x), leaf(b.step)
    offset = None if b.offset is None else leaf(b.offset)
    mine = [t for t in (x, step, offset, b.zero_point) if isinstance(t, Tensor)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = call(b, x, step, offset)
    assert y.requires_grad
    storages = {t.untyped_storage()._cdata for t in mine}
    for t in saved:
        assert t.untyped_storage()._cdata in storages or t.numel() <= step.numel(), f"saved {t.dtype} {tuple(t.shape)}"
        assert t.untyped_storage()._cdata in storages, "a copy of the input or of a per-step tensor is kept"
    assert len(saved) <= len(mine)


def test_the_input_itself_is_saved_not_its_float32_copy() -> None:
    b = some("bfloat16-normal")[0].build()
    x, step = leaf(b.x), leaf(b.step)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = call(b, x, step)
    assert [t.dtype for t in saved if t.numel() == x.numel()] == [torch.bfloat16]
    del y


@engines
def test_nothing_given_is_changed(engine: str) -> None:
    for case in USUAL:
        b = case.build()
        before = [b.x.clone(), b.step.clone(), b.upstream.clone()]
        gradients(engine, b)
        for now, then in zip((b.x, b.step, b.upstream), before, strict=True):
            assert_same(now, then)


# ---------------------------------------------------------------------------------------------- the graph


@engines
def test_retain_graph(engine: str) -> None:
    b = some("axis0-normal")[0].build()
    x, step = leaf(b.x), leaf(b.step)
    y = ENGINES[engine](x, step, b.q_min, b.q_max, b.g, **b.extras)
    y.backward(b.upstream, retain_graph=True)
    assert x.grad is not None
    assert step.grad is not None
    first = x.grad.clone(), step.grad.clone()
    y.backward(b.upstream)
    assert_same(x.grad, 2 * first[0])
    assert_same(step.grad, 2 * first[1])
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(b.upstream)


@engines
def test_one_step_used_twice(engine: str) -> None:
    one, two = (case.build() for case in some("s4-normal", "s4-boundaries"))
    alone = [gradients(engine, b)[1] for b in (one, two)]
    step = leaf(one.step)
    alone[1] = torch.autograd.grad(ENGINES[engine](two.x, step, one.q_min, one.q_max, one.g), step, two.upstream)[0]
    together = ENGINES[engine](one.x, step, one.q_min, one.q_max, one.g) * one.upstream
    together = together + ENGINES[engine](two.x, step, one.q_min, one.q_max, one.g) * two.upstream
    assert_same(torch.autograd.grad(together.sum(), step)[0], alone[0] + alone[1])


@engines
@pytest.mark.parametrize("wanted", ["x", "step", "offset"])
def test_a_second_derivative_is_a_clear_error(engine: str, wanted: str) -> None:
    b = some("z-offset-u4")[0].build()
    tensors = {"x": leaf(b.x), "step": leaf(b.step), "offset": leaf(torch.zeros(1) if b.offset is None else b.offset)}
    clear = r"second derivative|differentiate twice"

    def first() -> Tensor:
        y = ENGINES[engine](tensors["x"], tensors["step"], b.q_min, b.q_max, b.g, offset=tensors["offset"])
        return torch.autograd.grad((y**2).sum(), tensors[wanted], create_graph=True)[0]

    assert first().requires_grad, "it would silently count as a constant"
    with pytest.raises(RuntimeError, match=clear):
        (first() ** 2).sum().backward()
    if engine != "reference":
        with pytest.raises(RuntimeError, match=clear):
            torch.autograd.grad(first().sum(), tensors["x"], allow_unused=True)


@engines
def test_an_input_changed_in_place_is_noticed(engine: str) -> None:
    b = some("s4-normal")[0].build()
    x, step = b.x.clone(), leaf(b.step)
    y = ENGINES[engine](x, step, b.q_min, b.q_max, b.g)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(b.upstream)


# ---------------------------------------------------------------------------------------------- the same bits


@engines
@pytest.mark.parametrize("layout", [{}, {"axis": 0}, {"axis": 1}, {"group_size": 130}], ids=str)
def test_gradients_have_the_same_bits_for_any_number_of_threads(engine: str, layout: dict[str, Any]) -> None:
    b = Case("threads", shape=(64, 130, 31), **layout).build()  # 258,000 elements: PyTorch uses threads from 32,768
    threads = torch.get_num_threads()
    got = []
    try:
        for count in (1, 2, 3, 1, 2):
            torch.set_num_threads(count)
            got.append((value(engine, b), *gradients(engine, b)[:2]))
    finally:
        torch.set_num_threads(threads)
    assert_within(got[0][2], *b.expected_step_gradient())
    for other in got[1:]:
        assert all(torch.equal(a, c) for a, c in zip(got[0], other, strict=True))


@usual
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "reference"])
def test_engines_give_the_values_and_element_gradients_of_the_reference(engine: str, case: Case) -> None:
    b = case.build()
    assert_same(value(engine, b), value("reference", b))
    assert_same(gradients(engine, b)[0], gradients("reference", b)[0])


# ---------------------------------------------------------------------------------------------- torch.library


class Recorder(TorchDispatchMode):
    """Keeps every call of an op of the library."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("lsquant", "lsquant_cpp"):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@usual
def test_opcheck(case: Case) -> None:
    b = case.build()
    x, step = leaf(b.x), leaf(b.step)
    offset = None if b.offset is None else leaf(b.offset)
    with Recorder() as forward:
        y = call(b, x, step, offset)
    with Recorder() as backward:
        y.backward(b.upstream)
    assert len(forward.calls) == 1, "the forward pass is one op"
    assert len(backward.calls) == 1, "the backward pass is one op"
    for (op, args, kwargs), wants_gradient in ((forward.calls[0], True), (backward.calls[0], False)):
        fresh = [
            a.detach().clone().requires_grad_(wants_gradient and a.is_floating_point()) if isinstance(a, Tensor) else a
            for a in args
        ]
        torch.library.opcheck(op, tuple(fresh), kwargs)


@usual
def test_meta_tensors_pass(case: Case) -> None:
    b = case.build()
    x, step = (t.detach().to("meta").requires_grad_() for t in (b.x, b.step))
    extras: dict[str, Any] = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in b.extras.items()}
    y = lsquant.fake_quantize(x, step, b.q_min, b.q_max, b.g, **extras)
    assert (y.shape, y.dtype, y.device.type) == (b.x.shape, b.x.dtype, "meta")
    of_x, of_step = torch.autograd.grad(y, (x, step), b.upstream.to("meta"))
    assert (of_x.shape, of_x.dtype) == (b.x.shape, b.x.dtype)
    assert (of_step.shape, of_step.dtype) == (b.step.shape, torch.float32)


# ---------------------------------------------------------------------------------------------- torch.compile


def _compiled_equals_eager(case: Case, compiler: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    b = case.build()

    def function(x: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
        return call(b, x, step, offset) + 1  # an op after it, which the compiler may fuse

    results = []
    for f in (function, compiler(function)):
        x, step = leaf(b.x), leaf(b.step)
        offset = None if b.offset is None else leaf(b.offset)
        y = f(x, step, offset)
        wanted = [t for t in (x, step, offset) if t is not None]
        results.append((y, *torch.autograd.grad(y, wanted, b.upstream)))
    for eager, compiled in zip(*results, strict=True):
        assert_same(compiled, eager)


@usual
def test_compiled_fullgraph_without_a_code_generator(case: Case) -> None:
    _compiled_equals_eager(case, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"))


# inductor imports a part of torch that uses what torch itself calls deprecated
inductor = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


@inductor
@pytest.mark.parametrize("case", some("s4-ties", "z-offset-u4-axis", "bfloat16-group"), ids=str)
def test_compiled_fullgraph(case: Case) -> None:
    _compiled_equals_eager(case, lambda f: torch.compile(f, fullgraph=True))


@inductor
@pytest.mark.slow
@usual
def test_compiled_fullgraph_everywhere(case: Case) -> None:
    _compiled_equals_eager(case, lambda f: torch.compile(f, fullgraph=True))


def test_compiled_with_changing_shapes() -> None:
    torch._dynamo.reset()
    step = torch.tensor([0.1])
    compiled = torch.compile(
        lambda x, s: lsquant.fake_quantize(x, s, -8, 7, 0.1), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for n in (3, 8, 17):
        x = torch.randn(n, 5)
        assert_same(compiled(x, step), lsquant.fake_quantize(x, step, -8, 7, 0.1))


# ---------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("name", ["bfloat16-normal", "bfloat16-axis", "bfloat16-lsq-plus", "s4-ties", "float16-group"])
@pytest.mark.parametrize("engine", ["eager", "cpp"])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(name: str, autocast: torch.dtype, engine: str) -> None:
    """bf16 in gives bf16 out, float32 in float32 out; the step is never rounded."""
    b = some(name)[0].build()
    with torch.autocast("cpu", dtype=autocast):
        y = value(engine, b)
        of_x, of_step, _ = gradients(engine, b)
    assert_same(y, b.expected_value())
    assert_same(of_x, b.expected_element_gradient())
    assert_within(of_step, *b.expected_step_gradient())


@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
def test_the_op_is_registered_for_autocast(key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("lsquant::fake_quantize", key)


def test_autocast_around_a_layer() -> None:
    """A matmul in bf16, then the quantizer: bf16 values, a float32 step gradient."""
    step = torch.tensor([0.1], requires_grad=True)
    x = torch.randn(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = x @ torch.randn(16, 16)
        y = lsquant.fake_quantize(h, step, -8, 7, 0.1)
    assert h.dtype == y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert step.grad is not None
    assert step.grad.dtype == torch.float32


@pytest.mark.parametrize("engine", ["eager", "cpp"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own rules for jvp
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "jacrev"])
def test_torch_func_over_a_model_is_refused_and_passes_when_it_is_off(transform: str, engine: str) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 4))
    weight, x = net[0].weight.detach().clone(), torch.randn(5, 6)
    lsquant.prepare(net, lsquant.Recipe(4, 4))
    lsquant.calibrate(net, [x])
    calls = {
        "grad": lambda: torch.func.grad(lambda v: net(v).sum())(x),
        "jvp": lambda: torch.func.jvp(net, (x,), (torch.ones(5, 6),))[1],
        "vmap": lambda: torch.func.vmap(net)(x) - net[0].bias,
        "jacrev": lambda: torch.func.jacrev(net)(x[0]),
    }
    with pytest.raises(lsquant.UsageError, match=r"torch\.func .* lsquant\.disabled"):
        calls[transform]()
    wanted = {
        "grad": weight.sum(0).expand(5, 6),
        "jvp": weight.sum(1).expand(5, 4),
        "vmap": x @ weight.t(),
        "jacrev": weight,
    }
    with lsquant.disabled(net):
        assert torch.allclose(calls[transform](), wanted[transform], atol=1e-6)
