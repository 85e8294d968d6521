"""Models inside torch.compile, DataParallel and DistributedDataParallel: one rule for every public function."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lsquant
from lsquant import Recipe
from lsquant._util.batches import unwrapped
from lsquant._util.errors import UsageError
from lsquant.diagnostics.collect import collect

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's own

W4A4 = Recipe(4, 4)
NAMES = ["0.weight_quantizer", "0.input_quantizer", "2.weight_quantizer", "2.input_quantizer"]
INPUT = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def quantized() -> nn.Module:
    model = network()
    lsquant.prepare(model, W4A4)
    lsquant.calibrate(model, [INPUT])
    return model


def compiled(model: nn.Module) -> Any:
    """Compiled, and run once, so that hooks come too late for the compiled code."""
    wrapped: Any = torch.compile(model, backend="eager")
    with torch.no_grad(), contextlib.suppress(UsageError):  # no step is set yet
        wrapped(INPUT)
    return wrapped


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS: dict[str, tuple[Callable[[nn.Module], Any], bool]] = {  # and whether it is for several processes
    "compiled": (compiled, False),
    "DataParallel": (nn.DataParallel, True),
    "DistributedDataParallel": (ddp, True),
    "compiled DistributedDataParallel": (lambda model: compiled(ddp(model)), True),
    "DistributedDataParallel of compiled": (lambda model: ddp(compiled(model)), True),
}


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    place = tmp_path_factory.mktemp("group") / "rendezvous"
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    torch.compiler.reset()


def with_file(write: Callable[[nn.Module, Path], Any]) -> Callable[[Any, Path], Any]:
    """The content of the file that a function writes."""

    def result(model: Any, folder: Path) -> Any:
        write(model, folder / "file")
        return (folder / "file").read_bytes()

    return result


def onnx_verdict(model: Any, folder: Path) -> Any:
    pytest.importorskip("onnxruntime")
    lsquant.export_onnx(quantized(), folder / "m.onnx", INPUT)
    return lsquant.verify(model, folder / "m.onnx", [INPUT]).to_dict() | {"path": ""}


def packed_verdict(model: Any, folder: Path) -> Any:
    lsquant.export_packed(quantized(), folder / "m.packed")
    verdict = lsquant.verify(model, folder / "m.packed", [INPUT])
    assert verdict.exact
    return verdict.to_dict() | {"path": ""}


def compared(model: Any, folder: Path) -> Any:
    """Everything but the times."""
    pytest.importorskip("onnxruntime")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lsquant.verification.latency.SECONDS", 0.0)
        found = lsquant.compare(
            model, INPUT, [INPUT], lambda y, _: float(y.sum()), float_model=model, profiles=["exact"], repeats=7
        )
    assert found.row("exact").exact
    return [(row.name, row.bytes, row.metrics, row.level, row.reason) for row in found.rows]


def codes(model: nn.Module) -> Any:
    with torch.no_grad():
        return {k: v.tolist() for k, v in model.state_dict().items()}, model(INPUT).tolist()


def switched_off(model: Any, _: Path) -> Any:
    with lsquant.disabled(model, "0*"):
        return [name for name, q in lsquant.quantizers(model) if not q.enabled]


def groups(model: Any, _: Path) -> Any:
    return [(g["name"], [p.tolist() for p in g["params"]]) for g in lsquant.param_groups(model, 0.1)]


def torchao_weights(model: Any, _: Path) -> Any:
    pytest.importorskip("torchao")
    found: Any = lsquant.to_torchao(model)
    return list(dict(found.named_modules())), found[0].weight.dequantize().tolist()


def report(model: nn.Module, path: Path) -> None:
    lsquant.write_report(model, path, [INPUT], title="t")


READING: dict[str, Callable[[Any, Path], Any]] = {
    "quantizers": lambda model, _: [name for name, _ in lsquant.quantizers(model)],
    "integer_weights": lambda model, _: {k: v[0].tolist() for k, v in lsquant.integer_weights(model).items()},
    "resolved_recipe": lambda model, _: lsquant.resolved_recipe(model).to_toml(),
    "disabled": switched_off,
    "param_groups": groups,
    "check": lambda model, _: list(map(str, lsquant.check(model, batches=[INPUT]))),
    "sensitivity": lambda model, _: list(map(str, lsquant.sensitivity(model, [INPUT], lambda y, _: float(y.sum())))),
    "save": with_file(lsquant.save),
    "export_packed": with_file(lsquant.export_packed),
    "export_onnx": with_file(lambda model, path: lsquant.export_onnx(model, path, INPUT)),
    "export_vectors": with_file(lambda model, path: lsquant.export_vectors(model, path, INPUT)),
    "to_integer": lambda model, _: codes(lsquant.to_integer(model)),
    "to_torchao": torchao_weights,
    "compare": compared,
    "verify": lambda model, folder: (onnx_verdict(model, folder), packed_verdict(model, folder)),
    "write_report": with_file(report),
}


def prepared_again(model: Any, _: Path) -> Any:
    lsquant.prepare(model, Recipe(8, 8), INPUT)
    lsquant.calibrate(unwrapped(model), [INPUT])


def calibrated(model: Any, _: Path) -> Any:
    lsquant.calibrate(model, [INPUT * 2], weights="mse")


def loaded(model: Any, folder: Path) -> Any:
    other = quantized()
    with torch.no_grad():
        other[0].weight.mul_(3)  # type: ignore[operator, union-attr]
    lsquant.save(other, folder / "saved")
    lsquant.load(model, folder / "saved")


def loaded_packed(model: Any, folder: Path) -> Any:
    lsquant.export_packed(quantized(), folder / "packed")
    lsquant.load_packed(model, folder / "packed")


CHANGING: dict[str, Callable[[Any, Path], Any]] = {
    "prepare": prepared_again,
    "calibrate": calibrated,
    "correct_bias": lambda model, _: lsquant.correct_bias(model, [INPUT]),
    "load": loaded,
    "load_packed": loaded_packed,
    "revert": lambda model, _: lsquant.revert(model),
}


def test_the_tables_have_every_public_function_of_a_model() -> None:
    of_model = {
        name
        for name in lsquant.__all__
        if inspect.isfunction(function := getattr(lsquant, name)) and "model" in inspect.signature(function).parameters
    }
    before_any_wrapper = {"trace", "fuse"}  # tests/tracing/test_untraceable.py, tests/fusion: they refuse them
    before_any_wrapper |= {"export_gguf", "export_hf", "export_compressed_tensors"}  # of models of transformers
    assert of_model == READING.keys() | CHANGING.keys() | before_any_wrapper


@pytest.mark.parametrize("function", READING)
def test_functions_that_read_look_inside(function: str, tmp_path: Path) -> None:
    expected = READING[function](quantized(), tmp_path)
    for wrapper, (wrap, _) in WRAPPERS.items():
        assert READING[function](wrap(quantized()), tmp_path) == expected, wrapper


@pytest.mark.parametrize("function", CHANGING)
def test_functions_that_change_look_inside_compiled_models_only(function: str, tmp_path: Path) -> None:
    """A parallel wrapper has taken stock of the parameters, so they say which one is in the way."""
    expected = quantized()
    CHANGING[function](expected, tmp_path)
    for wrap, parallel in WRAPPERS.values():
        model = quantized()
        wrapped, before = wrap(model), codes(model)
        if parallel:
            with pytest.raises(UsageError, match=r"before it is wrapped in (Distributed)?DataParallel"):
                CHANGING[function](wrapped, tmp_path)
            assert codes(model) == before
        else:
            CHANGING[function](wrapped, tmp_path)
            assert codes(model) == codes(expected) != before
            with torch.no_grad():
                assert torch.equal(wrapped(INPUT), expected(INPUT))  # what was compiled is compiled anew


def test_names_without_the_wrapper() -> None:
    for wrap, _ in WRAPPERS.values():
        assert [name for name, _ in lsquant.quantizers(wrap(quantized()))] == NAMES


def test_a_model_compiled_in_place_is_seen(tmp_path: Path) -> None:
    """``model.compile()`` leaves the class what it is; hooks that come later are no part of the compiled code."""
    model = quantized()
    model.compile(backend="eager")
    with torch.no_grad():
        model(INPUT)
    assert [f.elements for f in collect(model, [INPUT]) if f.kind == "input"] == [8 * 6, 8 * 5]
    assert packed_verdict(model, tmp_path)["checks"][1]["compared"] == 8 * (6 + 5)
    lsquant.prepare(model, Recipe(8, 8), INPUT)
    lsquant.calibrate(model, [INPUT])
    assert float(dict(lsquant.quantizers(model))["0.input_quantizer"].step) > 0


def test_forward_may_call_the_wrapped_model(tmp_path: Path) -> None:
    model = quantized()
    wrapped = compiled(model)
    lsquant.export_packed(model, tmp_path / "p")

    def forward(m: nn.Module, x: Any) -> Any:
        return wrapped(x) if m is model else m(x)

    verdict = lsquant.verify(model, tmp_path / "p", [INPUT], forward=forward)
    assert verdict.exact
    assert verdict.checks[-1].compared == 8 * 3


def test_unwrapped_leaves_other_models_alone() -> None:
    model = network()
    assert unwrapped(model) is model
    assert unwrapped(copy.deepcopy(compiled(model))) is not model
