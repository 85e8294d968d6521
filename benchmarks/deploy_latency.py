"""Latency of the exported files over the float export, in ONNX Runtime and OpenVINO.

    python benchmarks/deploy_latency.py [resnet20 detector/w4a8 ...] [--bits w4a4 w2a2] [--batches 1 64] [--threads N]
    python benchmarks/deploy_latency.py --operators             # where ONNX Runtime's time goes, instead
    python benchmarks/tables.py --page docs/deployment.md       # the table

Every contender is a session on a file of the same network: the float model as torch exports it, with BatchNorm, which
both runtimes fold into the convolutions; and each ONNX profile, with the options that its file recommends.  All have
the same number of threads and the same batch, and are measured in turns.  Weights are random, inputs normal: neither
matters to the time.  Before it is timed every file is compared with the trained model; ``check`` has its size and how
many outputs differ.  Rows go to results/bench/deploy.csv.

``exact, ConvInteger`` is no profile but the file as `exact` would be if no convolution added up in float32.
``integer`` is the integer-only form of the same network, prepared with 8-bit joins, in both of its forms; ``static`` is
ONNX Runtime's own static quantization of the float file (8 bits, per channel), calibrated on the same images; ``NNCF``
is NNCF's post-training quantization of the float network for OpenVINO (where nncf is installed), likewise.
onnxruntime-web, in a headless Chromium on one thread, runs the float and the integer-only file where
LSQUANT_NODE_MODULES names its folder, on batches of at most a million numbers; the time is taken inside the page.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timing
import torch
from networks import DEPLOYED, Workload
from timing import Contender, Options, Row, measure, report, rows, say, show
from torch import Tensor, nn

import lsquant
from lsquant.formats.onnx import exact
from lsquant.formats.onnx.integer import FORMS
from lsquant.verification.runtimes.openvino import OPENVINO
from lsquant.verification.runtimes.web import Browser

PROFILES = ("exact", "small", "qdq")
FLOAT = "float, ONNX Runtime"
MOST_IN_PAGE = 1_000_000
OTHERS = ("float", "static", "NNCF")
"""What is not to give the trained outputs."""


def trained(workload: Workload, bits: str, x: Tensor, integer_only: bool = False) -> nn.Module:
    """A quantized network with BatchNorm statistics and steps that belong to its weights."""
    torch.manual_seed(0)
    model = workload.make()
    with torch.no_grad():
        for _ in range(3):
            model(x[:16])
    if integer_only:
        lsquant.trace(model.eval(), x[:2])
    recipe = lsquant.Recipe.preset(bits, first_last=workload.first_last, integer_only=integer_only)
    lsquant.prepare(model, recipe, x[:2])
    lsquant.calibrate(model, [x[:16]])
    return model.eval()


def files(model: nn.Module, network: lsquant.FusedNetwork, x: Tensor, folder: Path) -> dict[str, Path]:
    """Name -> file: the float network of the same weights, every profile, and ONNX Runtime's own quantization.

    network: the integer-only form.
    """
    plain = lsquant.revert(copy.deepcopy(model)).eval()
    found = {"float": folder / "float.onnx"}
    batch = torch.export.Dim("batch")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(
        plain, (x[:2],), found["float"], dynamo=True, dynamic_shapes=({0: batch},), verbose=False, external_data=False
    )
    for profile in PROFILES:
        found[profile] = lsquant.export_onnx(model, folder / f"{profile}.onnx", x[:2], profile=profile)
    with in_integers():
        found["exact, ConvInteger"] = lsquant.export_onnx(model, folder / "integers.onnx", x[:2])
    for form in FORMS:
        path = folder / f"integer-{form}.onnx"
        found[f"integer, {form}"] = lsquant.export_onnx(network, path, x[:2], profile="integer", form=form)
    found["static"] = folder / "static.onnx"
    quantized_statically(found["float"], found["static"], x[:16])
    if importlib.util.find_spec("nncf"):
        found["NNCF"] = folder / "nncf.xml"
        quantized_by_nncf(plain, found["NNCF"], x[:16])
    return found


def quantized_by_nncf(model: nn.Module, target: Path, x: Tensor) -> None:
    """NNCF's post-training quantization of OpenVINO's conversion, with its defaults."""
    nncf, openvino = __import__("nncf"), __import__("openvino")
    logging.disable(logging.WARNING)
    network = openvino.convert_model(model, example_input=x[:2], input=[-1, *x.shape[1:]])
    data = nncf.Dataset([x[i : i + 1].numpy() for i in range(len(x))])
    openvino.save_model(nncf.quantize(network, data, subset_size=len(x)), target)
    logging.disable(logging.NOTSET)


def quantized_statically(source: Path, target: Path, x: Tensor) -> None:
    """ONNX Runtime's static quantization in its QDQ form: uint8 activations, int8 weights per channel."""
    tools = __import__("onnxruntime.quantization", fromlist=["quantize_static"])
    name = onnxruntime.InferenceSession(source).get_inputs()[0].name

    class Reader(tools.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.batches = iter([{name: x.numpy()}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    logging.disable(logging.WARNING)
    tools.quant_pre_process(source, target, skip_symbolic_shape=True)
    kinds = tools.QuantType
    tools.quantize_static(
        target, target, Reader(), per_channel=True, activation_type=kinds.QUInt8, weight_type=kinds.QInt8
    )
    logging.disable(logging.NOTSET)


@contextmanager
def in_integers() -> Iterator[None]:
    """Exports in which convolutions never add up in float32."""
    limit, exact.FLOAT_SUMS = exact.FLOAT_SUMS, 0
    try:
        yield
    finally:
        exact.FLOAT_SUMS = limit


def onnx_runtime(path: Path, x: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    options: dict[str, Any] = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    if path.stem in ("float", "static"):
        settings = onnxruntime.SessionOptions()
        for name, value in options.items():
            setattr(settings, name, value)
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    else:
        session = lsquant.onnx_session(path, **options)
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})[0]


def openvino_(path: Path, x: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    openvino = __import__("openvino")
    options = {**OPENVINO, "INFERENCE_NUM_THREADS": str(threads)}
    model = openvino.Core().compile_model(str(path), "CPU", options)
    return lambda: model(x)[0]


def contenders(
    model: nn.Module, network: nn.Module, paths: dict[str, Path], x: Tensor, threads: int
) -> Iterator[Contender]:
    """Both runtimes on every file, each checked; one that refuses a file is left out with its reason."""
    with torch.no_grad():
        of_layers, fused = model(x).numpy(), network(x).numpy()
    for runtime, load in (("ONNX Runtime", onnx_runtime), ("OpenVINO", openvino_)):
        for name, path in paths.items():
            if path.suffix == ".xml" and runtime != "OpenVINO":
                continue
            try:
                call = load(path, x.numpy(), threads)
                got = call()
            except (RuntimeError, ImportError) as error:
                last = str(error).strip().splitlines()[-1]  # the innermost of nested reasons
                reason = " ".join(last.split())[:100]
                yield Contender(f"{name}, {runtime}", None, FLOAT, check=f"left out: {reason}")
                continue
            share = 100 * float((got != (fused if name.startswith("integer") else of_layers)).mean())
            size = sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*"))  # OpenVINO's are two
            check = f"{size:,} bytes"
            check += "" if name in OTHERS else f"; other than trained: {share:.2f}% of outputs"
            yield Contender(f"{name}, {runtime}", call, FLOAT, check=check)


@contextmanager
def in_a_browser(network: nn.Module, paths: dict[str, Path], x: Tensor) -> Iterator[list[Contender]]:
    """onnxruntime-web on the float and the integer-only file; nothing where it is not installed."""
    if "LSQUANT_NODE_MODULES" not in os.environ or x.numel() > MOST_IN_PAGE or torch.get_num_threads() > 1:
        yield []
        return
    with torch.no_grad():
        wanted = network(x).numpy()
    with Browser() as browser:
        found = []
        for name in ("float", "integer, qdq"):
            session = browser.open(str(paths[name]), {})
            feeds = {session.inputs[0]: x.numpy()}
            (got,) = session.run(session.outputs, feeds)
            share = 100 * float((got != wanted).mean())
            check = "" if name == "float" else f"other than trained: {share:.2f}% of outputs"
            contender = Contender(f"{name}, onnxruntime-web", lambda: None, FLOAT, check=check)
            contender.timer = session.timer(feeds)
            found.append(contender)
        yield found


def operators(path: Path, x: np.ndarray, threads: int, passes: int = 20) -> dict[str, float]:
    """Milliseconds by operator of one pass in a plain session, the largest first."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.enable_profiling = threads, True
    settings.profile_file_prefix = str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    for _ in range(passes):
        session.run(None, {session.get_inputs()[0].name: x})
    found: dict[str, float] = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            kind = event["args"]["op_name"]
            found[kind] = found.get(kind, 0.0) + event["dur"] / 1000 / passes
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def say_operators(name: str, bits: str, batch: int, tiny: bool) -> None:
    workload = DEPLOYED[name]
    x = torch.randn(max(batch, 16), *(workload.tiny if tiny else workload.shape)[1:])
    model, network = trained(workload, bits, x), lsquant.fuse(trained(workload, bits, x, integer_only=True))
    with tempfile.TemporaryDirectory() as folder:
        for kind, path in files(model, network, x, Path(folder)).items():
            if path.suffix == ".xml":
                continue
            times = operators(path, x[:batch].numpy(), torch.get_num_threads())
            parts = ", ".join(f"{op} {ms:.1f}" for op, ms in list(times.items())[:6])
            say(f"{workload.what}, {bits}, batch {batch}, {kind}: {sum(times.values()):.1f} ms: {parts}")


def run(name: str, bits: str, batches: Sequence[int], counts: Sequence[int], options: Options) -> Iterator[Row]:
    """The rows of one network at some bits.  counts: of threads."""
    workload = DEPLOYED[name]
    shape = workload.tiny if options.tiny else workload.shape
    x = torch.randn(max(*batches, 16), *shape[1:])
    model, network = trained(workload, bits, x), lsquant.fuse(trained(workload, bits, x, integer_only=True))
    with tempfile.TemporaryDirectory() as folder:
        paths = files(model, network, x, Path(folder))
        for threads, batch in product(counts, batches):
            torch.set_num_threads(threads)
            part = x[:batch].contiguous()
            found = list(contenders(model, network, paths, part, threads))
            with in_a_browser(network, paths, part) as more:
                found = [c for c in [*found, *more] if options.selects(c.name) or c.name == FLOAT]
                measure(found, options)
            text = f"{workload.what}, {bits}, batch {batch}" + (f", {threads} threads" if threads > 1 else "")
            part = list(rows("deploy", text, "inference", found, options))
            show(part)
            yield from part


def bits_of(name: str, bits: Sequence[str]) -> Sequence[str]:
    """The presets of a network: its own, as in ``resnet20/w4a8``, or all."""
    own = name.partition("/")[2]
    return [own] if own else bits


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about = f"of {', '.join(DEPLOYED)}, or NAME/BITS"
    parser.add_argument("networks", nargs="*", default=["resnet20"], help=about)
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w2a2"], help="presets")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--only", nargs="+", default=(), help="contenders with these in their names")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", nargs="+", type=int, help="of every runtime; default: torch's choice")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    parser.add_argument("--operators", action="store_true", help="time by operator, of the last of --batches")
    a = parser.parse_args(arguments)
    counts = a.threads or [torch.get_num_threads()]
    torch.set_num_threads(counts[0])
    warnings.simplefilter("ignore")
    if a.operators:
        for name in a.networks:
            say_operators(name.partition("/")[0], bits_of(name, a.bits)[0], a.batches[-1], a.tiny)
        return
    timing.VERSIONS = (*timing.VERSIONS, "onnx", "onnxruntime", "openvino")
    # long enough for several calls, before which one is made untimed: the threads of the session before still spin then
    seconds = 0.0 if a.tiny else 0.15
    options = Options(a.out, a.only, a.repeats, 1 if a.tiny else 3, seconds, tiny=a.tiny)
    pairs = [(name.partition("/")[0], bits) for name in a.networks for bits in bits_of(name, a.bits)]
    found = [row for name, bits in pairs for row in run(name, bits, a.batches, counts, options)]
    say(f"written: {report('deploy', found, options)}")


if __name__ == "__main__":
    main()
