"""What gpu.py checks and measures, section by section; gpu.py says what each section is."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import memory
import network_speed
import numpy as np
import peers
import quantizer_speed
import timing
import torch
from networks import Block, Residual, ResNet18, Workload
from timing import Contender, Options, say
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant
from lsquant import ops

ENGINE = "triton"
OURS = f"lsquant, {ENGINE}"
OK, FAILED, NEEDS_CUDA, SKIPPED = "ok", "failed", "needs CUDA", "skipped"


@dataclass(frozen=True)
class Row:
    """One line of the CSV file.  Of a measurement: p20, p50, p80 of ``repeats``, and p50 over that of ``baseline``.

    Of a check: how many things were compared, in ``unit``.  status: "ok", "failed", "needs CUDA" or "skipped".
    """

    section: str
    what: str
    contender: str = ""
    unit: str = ""
    p20: float = 0.0
    p50: float = 0.0
    p80: float = 0.0
    repeats: int = 0
    ratio: float = 0.0
    baseline: str = ""
    peak_bytes: int = 0
    status: str = OK
    check: str = ""


class Task(NamedTuple):
    """A part of a section that succeeds or fails by itself."""

    what: str
    run: Callable[[], Iterable[Any]]  # gives rows


def words(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def counted(section: str, what: str, count: int, unit: str, wrong: str, right: str) -> Row:
    """The row of a check: right, or what is wrong."""
    status, check = (FAILED, wrong) if wrong else (OK, right)
    return Row(section, what, unit=unit, p20=count, p50=count, p80=count, repeats=1, status=status, check=check)


def gathered(section: str, what: str, makers: Mapping[str, Callable[[str], Contender]]) -> Iterator[Contender | Row]:
    """The contenders by name; where one cannot be made, or computes the wrong thing, a row that says so."""
    for name, make in makers.items():
        try:
            yield make(name)
        except Exception as error:  # noqa: BLE001  (whatever it is, the others are still measured)
            say(traceback.format_exc())
            yield Row(section, what, name, status=FAILED, check=words(error))


def timed(section: str, what: str, makers: Mapping[str, Callable[[str], Contender]], options: Options) -> list[Row]:
    """One row a contender, measured in turns; the ratio is p50 over the baseline's."""
    found = list(gathered(section, what, makers))
    field = [c for c in found if isinstance(c, Contender)]
    timing.measure(field, options)
    return [c if isinstance(c, Row) else measured(section, what, c, field) for c in found]


def measured(section: str, what: str, c: Contender, field: Sequence[Contender], unit: str = "ms",
             factor: float = 1e3) -> Row:  # fmt: skip
    p20, p50, p80 = (np.percentile(c.seconds, (20, 50, 80)) * factor).tolist()
    base = next((float(np.median(b.seconds)) * factor for b in field if b.name == c.baseline), 0.0)
    ratio = p50 / base if base else 0.0
    return Row(section, what, c.name, unit, p20, p50, p80, len(c.seconds), ratio, c.baseline, check=c.check)


def backend(options: Options) -> str:
    """Of torch.compile: inductor compiles for the GPU; the interpreter's kernels can only be called."""
    return "aot_eager" if options.tiny else "inductor"


# ---------------------------------------------------------------------------------------------- cases

CHUNK = 64
FEW = (
    "s4-normal", "u8-ties", "axis0-boundaries", "axis1-huge", "group-normal", "z-int-u4", "z-tensor-s4-axis",
    "z-offset-u8-group", "bfloat16-axis", "float16-lsq-plus", "float64-normal", "channels_last-axis1", "strided-group",
    "zero-dimensional", "empty-batch-axis",
)  # fmt: skip


class Grids(NamedTuple):
    """Bounds of the codes of input and weight; learned: with LSQ+'s offset."""

    what: str
    x: tuple[int, int]
    weight: tuple[int, int]
    learned: bool = False


GRIDS = (
    Grids("4/4 bits", (0, 15), (-8, 7)), Grids("8/8 bits", (-128, 127), (-128, 127)),
    Grids("8/8 bits, LSQ+", (0, 255), (-128, 127), learned=True),
)  # fmt: skip
# shapes of input and weight; on a GPU such that every kind of product is taken
LAYERS = {"Linear": ((96, 256), (64, 256)), "Conv2d": ((4, 64, 28, 28), (64, 64, 3, 3))}
TINY_LAYERS = {"Linear": ((20, 24), (16, 24)), "Conv2d": ((2, 3, 5, 5), (8, 3, 3, 3))}


def cases(options: Options) -> Iterator[Task]:
    """The shared table, and layers over codes."""
    from helpers.cases import CASES, some

    chosen = some(*FEW) if options.tiny else CASES
    for first in range(0, len(chosen), CHUNK):
        part = chosen[first : first + CHUNK]
        what = f"shared cases {first + 1} to {first + len(part)}, of {len(CASES)}"
        yield Task(what, partial(shared, what, part))
    for layer in LAYERS:
        for grids in GRIDS:
            what = f"{layer}, {grids.what}"
            yield Task(what, partial(exact, what, layer, grids, options))


def shared(what: str, part: Sequence[Any]) -> list[Row]:
    """One row for some cases of the table."""
    mistakes = {case.name: mistake(case) for case in part}
    wrong = {name: text for name, text in mistakes.items() if text}
    first = f"; {next(iter(wrong))}: {next(iter(wrong.values()))}" if wrong else ""
    text = f"{len(wrong)} failed: {', '.join(wrong)}{first}" if wrong else ""
    return [counted("cases", what, len(part), "cases", text, "0 failed")]


def mistake(case: Any) -> str:
    """What the engine gets wrong in a case; empty when nothing."""
    from helpers.engines import assert_same, assert_within, gradients, value

    built, found = case.build(), []

    def repeated() -> None:
        for a, b in zip(*found, strict=True):
            assert a is None or torch.equal(a, b), "another run has other bits"

    checks: dict[str, Callable[[], Any]] = {
        "output": lambda: assert_same(value(ENGINE, built), built.expected_value()),
        "codes": lambda: assert_same(codes(built), torch.tensor(built.expected_codes())),
        "backward": lambda: found.extend(gradients(ENGINE, built) for _ in range(2)),
        "gradient of x": lambda: assert_same(found[0][0], built.expected_element_gradient()),
        "gradient of the step": lambda: assert_within(found[0][1], *built.expected_step_gradient()),
        "gradient of the offset": lambda: (
            found[0][2] is None or assert_within(found[0][2], *built.expected_offset_gradient())
        ),
        "gradients": repeated,
    }
    for what, check in checks.items():
        try:
            check()
        except Exception as error:  # noqa: BLE001  (a kernel that cannot run is a mistake as well)
            return f"{what}: {words(error)}"
    return ""


def codes(built: Any) -> Tensor:
    """The integers behind the output: of the values in float32, where no two of them have the same output."""
    import oracle
    from helpers.engines import value

    y = value(ENGINE, replace(built, x=built.x.float())).double()
    step, z = (torch.tensor(oracle.spread(v, y.shape, **built.layout)) for v in (built.step.numpy(), built.z))
    return torch.round(y / step.double()) + z


def exact(what: str, layer: str, grids: Grids, options: Options) -> list[Row]:
    """A layer over codes, the extreme ones among them, against the exact sums."""
    import oracle

    (low, high), (w_low, w_high) = grids.x, grids.weight
    x_shape, w_shape = (TINY_LAYERS if options.tiny else LAYERS)[layer]
    random = torch.Generator().manual_seed(1)
    x, w = torch.randn(x_shape, generator=random), torch.randn(w_shape, generator=random)
    b, sw = torch.randn(len(w), generator=random), 0.1 * torch.rand(len(w), generator=random) + 1.0 / w_high
    x[0], x[1], w[0], w[1] = 1e9, -1e9, -1e9, 1e9
    s, offset = torch.tensor([3.0 / high]), torch.tensor([-0.7]) if grids.learned else None
    z = 0 if offset is None else oracle.lsq_plus_zero_point(offset.numpy(), s.numpy(), low, high)[0]
    qx = oracle.codes(x.numpy(), s.numpy(), low, high, z)
    qw = oracle.codes(w.numpy(), sw.numpy(), w_low, w_high, axis=0)
    operands = (qx, z, s.item(), qw, sw.numpy(), b.numpy())
    wanted = oracle.linear(*operands) if layer == "Linear" else oracle.conv2d(*operands, padding=1)
    x, w, b, s, sw = (t.to(options.device) for t in (x, w, b, s, sw))
    offset = None if offset is None else offset.to(options.device)
    grid = ops.Grid(s, low, high, 1.0, offset), ops.Grid(sw, w_low, w_high, 1.0)
    conv = ops.Conv([1, 1], [1, 1], [1, 1])
    found = [ops.linear(x, w, b, *grid) if layer == "Linear" else ops.convolution(x, w, b, *grid, conv)
             for _ in range(2)]  # fmt: skip
    different = int((found[0].cpu() != torch.tensor(wanted)).sum())
    text = f"{different} of {wanted.size} outputs differ from the exact ones" if different else ""
    text = text or ("" if torch.equal(*found) else "another run has other bits")
    return [counted("cases", what, wanted.size, "outputs", text, "0 differ from the exact ones")]


# ---------------------------------------------------------------------------------------------- quantizer

COPY, FORMULATION, COMPILED = quantizer_speed.BASELINE, "LSQ formulation, eager", "lsquant, compiled"
LARGEST, COMPILED_AT = 33_554_432, 2_097_152
SIZES = (*quantizer_speed.SIZES, LARGEST)
LARGEST_SHAPES = {None: (2048, 16, 32, 32), 1: (2048, 16, 32, 32), 0: (4096, 8192)}  # by the axis of the steps
LAYOUTS = tuple(
    layout._replace(shapes={**layout.shapes, LARGEST: LARGEST_SHAPES[layout.axis]})
    for layout in quantizer_speed.LAYOUTS
    if not layout.channels_last
)


def quantizer(options: Options) -> Iterator[Task]:
    """All sizes, types and layouts."""
    for elements in quantizer_speed.TINY if options.tiny else SIZES:
        for type_name, dtype in quantizer_speed.DTYPES.items():
            for layout in LAYOUTS:
                what = f"{elements:,} elements, {type_name}, {layout.name}"
                yield Task(what, partial(one_tensor, what, layout, elements, dtype, options))


def one_tensor(what: str, layout: quantizer_speed.Layout, elements: int, dtype: torch.dtype,
               options: Options) -> list[Row]:  # fmt: skip
    """Every contender over one tensor; lsquant's have to be equal to ``lsquant.reference``."""
    timing.forget_compiled()
    p = quantizer_speed.problem(layout, elements, dtype, options.device)
    x, upstream = p.x.detach().requires_grad_(), torch.randn_like(p.x)
    wanted = quantizer_speed.truth(p, upstream)
    kinds = {COPY: quantizer_speed.identity, OURS: quantizer_speed.ours, FORMULATION: peers.formulation_quantizer}
    if elements == COMPILED_AT:
        kinds[COMPILED] = quantizer_speed.ours_compiled

    def contender(name: str) -> Contender:
        quantize = kinds[name](p)
        found, ours = quantizer_speed.results(quantize, x, upstream), name.startswith("lsquant")
        check = "" if name == COPY else quantizer_speed.compared(found, wanted, p, strict=ours)
        return Contender(name, partial(quantizer_speed.results, quantize, x, upstream), COPY, ENGINE, check)

    found = timed("quantizer", what, dict.fromkeys(kinds, contender), options)
    return [*found, Row("quantizer", what, COMPILED, status=NEEDS_CUDA)] if options.tiny else found


# ---------------------------------------------------------------------------------------------- int_mm

# rows, inputs, outputs: an MLP of ViT-Base, square and wide layers of a language model, the latter for few rows
SHAPES = ((4096, 768, 3072), (2048, 4096, 4096), (2048, 4096, 14336), (32, 4096, 4096))
TINY_SHAPES = ((32, 16, 24),)
BFLOAT16, FLOAT32, INT_MM, LINEAR = "bfloat16 product", "float32 product", "torch._int_mm", "lsquant Linear, forward"


def int_mm(options: Options) -> Iterator[Task]:
    """For every shape the known answers, then the times."""
    for shape in TINY_SHAPES if options.tiny else SHAPES:
        what = f"{shape[0]} rows, {shape[1]} inputs, {shape[2]} outputs"
        yield Task(f"sums, {what}", partial(known_answers, f"sums, {what}", shape, options))
        yield Task(what, partial(products, what, shape, options))


def int8_codes(shape: tuple[int, int, int], options: Options) -> tuple[Tensor, Tensor]:
    """Random codes of input and weight, their extremes in the first rows.

    The weight has 7 bits on a CPU, where an integer product of 8-bit numbers may saturate.
    """
    (rows, inputs, outputs), top = shape, 64 if options.device == "cpu" else 128
    random = torch.Generator().manual_seed(2)
    x = torch.randint(-128, 128, (rows, inputs), generator=random, dtype=torch.int8)
    w = torch.randint(-top, top, (outputs, inputs), generator=random, dtype=torch.int8)
    x[0], x[1], w[0], w[1] = -128, 127, -top, top - 1
    return x.to(options.device), w.to(options.device)


def integer_product(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.aten._int_mm(x, w.t())


def known_answers(what: str, shape: tuple[int, int, int], options: Options) -> list[Row]:
    """The int32 sums against literal ones of the extremes, and against float64, which is exact here."""
    x, w = int8_codes(shape, options)
    sums = integer_product(x, w)
    low, high = int(w[0, 0]), int(w[1, 0])
    literal = [[-128 * low * shape[1], -128 * high * shape[1]], [127 * low * shape[1], 127 * high * shape[1]]]
    different = int((sums.double() != x.double() @ w.double().t()).sum())
    wrong = f"{different} of {sums.numel()} sums are not exact" if different else ""
    if sums.dtype != torch.int32 or sums[:2, :2].tolist() != literal:
        wrong = f"the extreme codes give {sums[:2, :2].tolist()} ({sums.dtype}), not {literal} (int32)"
    return [counted("int_mm", what, sums.numel(), "sums", wrong, f"all exact, weights {low} to {high}")]


def products(what: str, shape: tuple[int, int, int], options: Options) -> list[Row]:
    """Products of the same numbers; the layer also quantizes its input and weight and scales the sums."""
    codes_x, codes_w = int8_codes(shape, options)
    x, w = codes_x * 0.01, codes_w * 0.01
    low_x, low_w = x.bfloat16(), w.bfloat16()
    step = torch.tensor([0.01], device=options.device)
    grids = ops.Grid(step, -128, 127, 1.0), ops.Grid(step, -128, 127, 1.0)
    calls: dict[str, Callable[[], Tensor]] = {
        BFLOAT16: lambda: low_x @ low_w.t(),
        FLOAT32: lambda: x @ w.t(),
        INT_MM: lambda: integer_product(codes_x, codes_w),
        LINEAR: lambda: ops.linear(low_x, w, None, *grids),
    }

    def contender(name: str) -> Contender:
        check = ""
        if name == LINEAR:
            with lsquant.use_engine("eager"):
                wanted = calls[name]()
            if different := int((calls[name]() != wanted).sum()):
                raise RuntimeError(f"{different} of {wanted.numel()} outputs differ from those of the eager engine")
            check = "outputs of the eager engine"
        return Contender(name, calls[name], BFLOAT16, ENGINE, check)

    found = timed("int_mm", what, dict.fromkeys(calls, contender), options)
    more = Row("int_mm", what, f"{LINEAR}, by _int_mm", status=NEEDS_CUDA, check="here its product is floating point")
    return [*found, more] if options.tiny else found


# ---------------------------------------------------------------------------------------------- compile


class Layers(nn.Module):
    """A convolution and two linear layers; gives, beside the output, what the linear layers are given.

    Between the layers is nothing that rounds: compiled, everything forward has the same bits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(128, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1)
        g = F.relu(self.hidden(h))
        return self.head(g), h, g


def compiled(options: Options) -> Iterator[Task]:
    """The quantizer alone in every layout, then a network in float32 and under autocast."""
    elements = quantizer_speed.TINY[0] if options.tiny else quantizer_speed.SIZES[0]
    for layout in LAYOUTS:
        what = f"quantizer, {elements:,} elements, {layout.name}"
        yield Task(what, partial(compiled_quantizer, what, layout, elements, options))
    for name, autocast in (("float32", False), ("bfloat16 autocast", True)):
        what = f"convolution and linear layers, {name}"
        yield Task(what, partial(compiled_network, what, autocast, options))
    if options.tiny:
        what = "everything above by inductor, the kernels in its graph"
        yield Task(what, lambda: [Row("compile", what, status=NEEDS_CUDA)])


def compiled_quantizer(what: str, layout: quantizer_speed.Layout, elements: int, options: Options) -> list[Row]:
    """One graph forward and backward: outputs and gradient of x bit for bit, that of the step nearly."""
    timing.forget_compiled()
    p = quantizer_speed.problem(layout, elements, torch.float32, options.device)
    x, upstream = p.x.detach().requires_grad_(), torch.randn_like(p.x)
    function, parameters = quantizer_speed.ours(p)
    run = torch.compile(function, fullgraph=True, dynamic=False, backend=backend(options))
    found = quantizer_speed.results(peers.Quantize(run, parameters), x, upstream)
    check = quantizer_speed.compared(found, quantizer_speed.truth(p, upstream), p, strict=True)
    return [counted("compile", what, elements, "codes", "", f"one graph ({backend(options)}); {check}")]


def compiled_network(what: str, autocast: bool, options: Options) -> list[Row]:
    """Two training passes, eager and compiled: one graph, the same codes and outputs, gradients but for rounding."""
    timing.forget_compiled()
    torch.manual_seed(3)
    x, target = torch.randn(32, 3, 8, 8, device=options.device), torch.randn(32, 16, device=options.device)
    model = peers.quantized(Layers().to(options.device), lsquant.Recipe.preset(network_speed.BITS), x).train()
    run = torch.compile(model, fullgraph=True, dynamic=False, backend=backend(options))
    counters = torch._dynamo.utils.counters
    counters.clear()
    expected, found = ([passed(model, how, x, target, autocast) for _ in range(2)] for how in (model, run))
    graphs, breaks = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
    if graphs != 1 or breaks:
        raise RuntimeError(f"{graphs} graphs instead of one, breaks: {breaks}")
    names = ("codes of hidden", "codes of head", "outputs")
    for one, other in zip(expected, found, strict=True):
        for name, a, b in zip(names, one, other, strict=False):
            if not torch.equal(a, b):
                raise RuntimeError(f"{int((a != b).sum())} of {a.numel()} {name} differ from those of the eager model")
    off = max(float((a[3] - b[3]).norm() / a[3].norm()) for a, b in zip(expected, found, strict=True))
    if not off < 1e-2:
        raise RuntimeError(f"the gradients are off by {off:.1e} from those of the eager model")
    count = sum(a.numel() for one in expected for a in one[:2])
    check = f"one graph ({backend(options)}); codes and outputs equal, gradients off by {off:.1e}"
    return [counted("compile", what, count, "codes", "", check)]


def passed(model: nn.Module, run: Callable[..., Any], x: Tensor, target: Tensor, autocast: bool) -> tuple[Tensor, ...]:
    """One pass forward and backward: codes of the linear layers' inputs, output, all gradients in one vector."""
    model.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y, *inputs = run(x)
    (y.float() * target).sum().backward()
    layers: Any = model
    found = [q.codes(h) for q, h in zip((layers.hidden.input_quantizer, layers.head.input_quantizer), inputs,
                                        strict=True)]  # fmt: skip
    gradients = torch.cat([p.grad.float().reshape(-1) for p in model.parameters() if p.grad is not None])
    return *found, y.detach(), gradients


# ---------------------------------------------------------------------------------------------- networks

NETWORKS = (
    Workload("ResNet-18", ResNet18, (64, 3, 224, 224), ()),
    Workload(
        "12 blocks of ViT-Small", lambda: nn.Sequential(*(Block(384, 6, norm_first=True) for _ in range(12))),
        (64, 197, 384), (), None, images=False,
    ),
)  # fmt: skip
TINY_NETWORKS = (
    Workload(
        "a residual block",
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Residual(8, 16, 2), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(64, 10)),
        (2, 3, 14, 14), (),
    ),
    Workload("a block of width 16", lambda: Block(16, 2, norm_first=True), (2, 5, 16), (), None, images=False),
)  # fmt: skip
ALLOWED = {"float": 0.1, "lsquant": 0.9}  # relative; a rounding may flip a code, and from layer to layer more of them
Outcomes = dict[str, dict[str, Tensor]]


def networks(options: Options) -> Iterator[Task]:
    """All networks eager, then compiled, which takes long."""
    chosen = TINY_NETWORKS if options.tiny else NETWORKS
    first: dict[str, Outcomes] = {workload.what: {} for workload in chosen}
    for how in ("eager", "compiled"):
        for workload in chosen:
            what = f"{workload.what}, input {'x'.join(map(str, workload.shape))}, bfloat16 autocast, {how}"
            yield Task(what, partial(steps, what, workload, how == "compiled", first[workload.what], options))


def steps(what: str, workload: Workload, compile: bool, first: Outcomes, options: Options) -> list[Row]:
    """Time and peak memory of the training step, float and quantized.  first: what the eager ones computed."""
    timing.forget_compiled()
    names = (network_speed.COMPILED, COMPILED) if compile else (network_speed.FLOAT, OURS)
    made: dict[str, network_speed.Network] = {}

    def contender(name: str) -> Contender:
        network = build(workload, name.startswith("lsquant"), compile, options)
        check = agreed(name, network, first)
        made[name] = network
        return Contender(name, network.step, names[0], ENGINE, check)

    found = timed("networks", f"{what}: step", dict.fromkeys(names, contender), options)
    sizes = [] if options.device == "cpu" else peaks(what, made, names[0])
    by_name = {row.contender: row.peak_bytes for row in sizes}
    found = [replace(row, peak_bytes=by_name.get(row.contender, 0)) for row in found]
    return [*found, *(sizes or [Row("networks", f"{what}: peak", name, status=NEEDS_CUDA) for name in names])]


def peaks(what: str, made: Mapping[str, network_speed.Network], baseline: str) -> Iterable[Row]:
    """By how much a step exceeds what is allocated before it: weights, their gradients, the optimizer's state."""
    field = []
    for name, network in made.items():
        network.step()
        field.append(Contender(name, None, baseline, seconds=[float(memory.peak(network)) for _ in range(3)]))
    found = [measured("networks", f"{what}: peak", c, field, "MiB", 1 / memory.MIB) for c in field]
    return [replace(row, peak_bytes=round(np.median(c.seconds))) for row, c in zip(found, field, strict=True)]


def build(workload: Workload, quantized: bool, compile: bool, options: Options) -> network_speed.Network:
    """The network and its batch, made where they are used: the same weights and numbers every time."""
    torch.manual_seed(0)
    x = torch.randn(workload.shape, device=options.device)
    model = workload.make().to(options.device)
    if workload.images:
        with torch.no_grad():  # statistics of BatchNorm that belong to the weights
            for _ in range(5):
                model(x[:16])
            classes = model(x[:2]).shape[-1]
        target = torch.randint(classes, x.shape[:1], device=options.device)
    else:
        target = torch.randn_like(x) / x.numel()
    if quantized:
        recipe = lsquant.Recipe.preset(network_speed.BITS, first_last=workload.first_last)
        model = peers.quantized(model, recipe, x[:4])
    layout = torch.channels_last if workload.images else torch.contiguous_format
    model = model.to(memory_format=layout).train()  # type: ignore[call-overload]
    x = x.contiguous(memory_format=layout).requires_grad_(not workload.images)
    groups: Any = lsquant.param_groups(model, lr=1e-3) if quantized else model.parameters()
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)
    run = torch.compile(model, dynamic=False, backend=backend(options)) if compile else model
    return network_speed.Network(model, run, x, target, workload.images, optimizer, autocast=True)


def agreed(name: str, network: network_speed.Network, first: Outcomes) -> str:
    """How far output and gradient are from those of the eager network of the kind.

    The output of the engine has to be that of the eager engine, bit for bit.  Raises: RuntimeError where it is not, or
    where a difference is no rounding.
    """
    kind = name.partition(",")[0]
    found = network_speed.outcome(network, exact=name == OURS)
    wanted = first.setdefault(kind, found)
    gaps = {what: float((found[what] - right).norm() / right.norm()) for what, right in wanted.items()}
    text = "off by " + ", ".join(f"{gap:.1e} ({what})" for what, gap in gaps.items())
    if not max(gaps.values()) < ALLOWED[kind]:
        raise RuntimeError(f"{name} is {text} from the eager network")
    return "output of the eager engine" if name == OURS else "" if found is wanted else text


# ---------------------------------------------------------------------------------------------- one section

SECTIONS: dict[str, Callable[[Options], Iterator[Task]]] = {
    "cases": cases, "quantizer": quantizer, "int_mm": int_mm, "compile": compiled, "networks": networks,
}  # fmt: skip


def settings(tiny: bool) -> Options:
    if tiny:
        return Options(repeats=1, warmup=1, seconds=0.0, device="cpu", autocast=True, tiny=True)
    return Options(repeats=9, warmup=3, device="cuda", autocast=True)


def rows_of(section: str, options: Options, deadline: float = float("inf")) -> Iterator[Row]:
    """The rows of a section as they are found; what is left at the deadline is skipped."""
    say(f"{section}: begins")
    start = time.monotonic()
    for row in _rows_of(section, options, deadline):
        if row.status in (FAILED, SKIPPED):
            say(f"{section}: {row.status}: {row.what}, {row.contender}: {row.check}")
        yield row
    say(f"{section}: took {time.monotonic() - start:.1f} s")


def _rows_of(section: str, options: Options, deadline: float) -> Iterator[Row]:
    for task in attempted(section, Task("its parts", partial(SECTIONS[section], options))):
        if isinstance(task, Row):
            yield task
            return
        if time.monotonic() > deadline:
            yield skipped(section, f"{task.what}, and what follows it")
            return
        say(f"{section}: {task.what}")
        yield from attempted(section, task)
        gc.collect()


def attempted(section: str, task: Task) -> list[Any]:
    """What a task gives; one row that says why when it fails."""
    try:
        # NumPy, which Triton's interpreter computes with, warns of what a GPU does silently
        with np.errstate(all="ignore"), lsquant.use_engine(ENGINE):
            return list(task.run())
    except Exception as error:  # noqa: BLE001  (whatever it is, the next task is tried)
        say(traceback.format_exc())
        return [Row(section, task.what, status=FAILED, check=words(error))]


def skipped(section: str, what: str) -> Row:
    return Row(section, what, status=SKIPPED, check="the budget is spent")
