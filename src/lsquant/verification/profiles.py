"""``compare``: every file that a trained model can ship as, beside the float network, and which one to take."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsquant._util.batches import Forward, evaluating, model_inputs, run_batch, take, trained_model, unwrapped
from lsquant._util.entry import reason, shown
from lsquant._util.errors import LsquantError, UsageError
from lsquant._util.files import atomic_write_bytes, require_no_link
from lsquant._util.nested import map_tensors, replaced, tensors_in
from lsquant._util.optional import require
from lsquant.convert import revert
from lsquant.diagnostics.environment import environment
from lsquant.formats import INTEGER_ONLY, FileFormat, file_formats
from lsquant.formats.onnx.capture import TORCH_OPSET, exported
from lsquant.formats.onnx.reader import make_session
from lsquant.formats.packed import load_packed
from lsquant.joining import STORED
from lsquant.shipped import copied
from lsquant.verification.comparison import OTHER_FORM, verify
from lsquant.verification.latency import FEWEST, Latency, in_turns
from lsquant.verification.recorder import recording
from lsquant.verification.runtimes.float_parts import IN_FLOAT
from lsquant.verification.runtimes.onnx_runner import feeds_of
from lsquant.verification.verdict import LEVELS

Metric = Callable[[Any, Any], Any]
Evaluate = Callable[[nn.Module], Mapping[str, float]]

FLOAT = "float"
TIMED = ("exact", "small", "qdq", "integer")
"""Profiles that ONNX Runtime runs."""
COMPARED = (*TIMED, "packed")
MOST = 1024
"""Of rounds and threads."""
MUCH = 0.05
"""Of two files whose times differ by less than this share the smaller one is better."""
OF_TARGET = {"int8": "xnnpack", "symmetric": "tensorrt"}
"""Containers of stored tensors that are for other runtimes than ONNX Runtime -> the recipe's target."""
OLDEST = {"2 bits": "1.24.1", "4 bits": "1.23.2", "others": "1.16.3"}
"""The oldest release of ONNX Runtime, of those that were tried, which runs files with initializers of such a type
(`studies/minimum_runtimes.py`)."""


@dataclass(frozen=True)
class Shippable:
    """One file.

    name: "float", or the profile that wrote it.
    bytes: of the file; None where it could not be written.
    latency: batch size -> milliseconds; empty for what ONNX Runtime does not run.
    ratio: batch size -> p50 over that of the float file.
    metrics: measured on the file's own outputs; empty without a metric.
    level: of its verdict, one of LEVELS; None for the float network.
    oldest: release of ONNX Runtime that runs it, of those that were tried; None for what ONNX Runtime does not run.
    reason: why it is left out; of an integer-only file, what ONNX Runtime computes in floating point and why.
    of_fused_form: whether its verdict is about ``fuse(model)``, of which the model as it was trained differs a little.
    """

    name: str
    bytes: int | None = None
    latency: dict[int, Latency] = field(default_factory=dict)
    ratio: dict[int, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    level: str | None = None
    oldest: str | None = None
    reason: str = ""
    of_fused_form: bool = False

    @property
    def exact(self) -> bool:
        """Bit-equal outputs."""
        return self.level == LEVELS[-1]


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found; prints as a table with advice.

    rows: the float network, then a row a file.
    batch_sizes: that were timed.
    samples: on which verdicts were found.
    threads: of a session.
    machine: on which it was timed.
    best: the row to ship; None where no file was written.
    advice: which, and why.
    """

    rows: tuple[Shippable, ...]
    batch_sizes: tuple[int, ...]
    samples: int
    threads: int
    machine: str
    best: str | None
    advice: str

    def row(self, name: str) -> Shippable:
        """Return the row of this name.  Raises: KeyError."""
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        float_bytes = self.rows[0].bytes
        names = list(dict.fromkeys(name for row in self.rows for name in row.metrics))[:1]
        sizes = [f"batch {size}, ms (p20 to p80)" for size in self.batch_sizes]
        head = ["file", "bytes", "of float", *(part for size in sizes for part in (size, "of float"))]
        table = [[*head, *names, "verdict", "ONNX Runtime from"]]
        for row in self.rows:
            share = f"{row.bytes / float_bytes:.2f}" if row.bytes and float_bytes else ""
            cells = [row.name, "" if row.bytes is None else f"{row.bytes:,}", share]
            for size in self.batch_sizes:
                t, ratio = row.latency.get(size), row.ratio.get(size)
                cells.append("" if t is None else f"{t.p50:.3g} ({t.p20:.3g} to {t.p80:.3g})")
                cells.append("" if ratio is None else f"{ratio:.2f}")
            cells += [f"{row.metrics[name]:.5g}" if name in row.metrics else "" for name in names]
            table.append([*cells, row.level or "", row.oldest or ""])
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
        lines += [f"{row.name}: {row.reason}" for row in self.rows if row.reason]
        if names and not self.rows[0].metrics:
            lines.append("float: its metric is measured where compare is given float_model=")
        many = f"{self.threads} thread" + ("s" if self.threads != 1 else "")
        lines.append(f"{self.machine}, {many}; verdicts on {self.samples:,} samples")
        return "\n".join([*lines, self.advice])


def compare(
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[Any],
    metric: Metric | None = None,
    *,
    float_model: nn.Module | None = None,
    profiles: Sequence[str] = COMPARED,
    folder: str | os.PathLike[str] | None = None,
    forward: Forward | None = None,
    max_batches: int | None = None,
    threads: int = 1,
    repeats: int = 15,
) -> Comparison:
    """Write every file that a trained model can ship as, and compare bytes, latency, metric and verdict.

    Latency is that of ONNX Runtime on this machine, for one sample and for the batch of ``example_inputs``; all files
    are timed in turns, each as the median of ``repeats`` rounds.  Keep the machine quiet meanwhile.

    model: the trained model, or what ``fuse`` returned; unchanged.
    example_inputs: one batch, as for ``export_onnx``.
    batches: as for ``verify``, which gives the verdicts; they are kept in memory.
    metric: ``metric(output, batch)`` gives a number; the mean over batches counts.  It is measured on what the file
        itself computes.
    float_model: the float network that training started from, for the metric of the first row.  Without it this row has
        no metric; bytes and latency of a float network do not depend on its weights.
    profiles: the files to write.
    folder: keeps the files, as PROFILE.onnx; default: they are deleted.
    forward: ``forward(model, batch)`` where a batch is not simply the model's input.
    max_batches: the number of batches to look at.
    threads: of a session.
    repeats: at least 7.

    Raises: UsageError for an unknown profile, too few repeats, a batch that the model does not take, and a metric that
        gives no number; MissingExtra without onnx and onnxruntime.  A file that cannot be written is a row that says
        why.
    """
    kept, trained = list(take(batches, max_batches)), trained_model(unwrapped(model))
    name = getattr(metric, "__name__", "metric")
    name = "metric" if name == "<lambda>" else name

    def evaluate(network: nn.Module) -> dict[str, float]:
        if metric is None:
            return {}
        with evaluating(network):
            values = [_number(metric(run_batch(network, batch, forward), batch)) for batch in kept]
        return {name: math.fsum(values) / len(values)}

    with evaluating(trained):  # what fails here would fail for every file
        output = run_batch(trained, kept[0], forward)
        if metric is not None:
            _number(metric(output, kept[0]))
    measured = {} if float_model is None else evaluate(unwrapped(float_model))
    data = Basis(example_inputs, kept, forward, evaluate, measured)
    return compare_files(unwrapped(model), data, profiles, folder, threads, repeats)


@dataclass(frozen=True)
class Basis:
    """What files are compared on.  evaluate: metrics of a model by name; measured: those of the float network."""

    example_inputs: Any
    batches: list[Any]
    forward: Forward | None
    evaluate: Evaluate
    measured: Mapping[str, float]


def compare_files(
    model: nn.Module,
    data: Basis,
    profiles: Sequence[str] = COMPARED,
    folder: str | os.PathLike[str] | None = None,
    threads: int = 1,
    repeats: int = 15,
) -> Comparison:
    """As ``compare``, with metrics by name."""
    rows, trained, profiles = file_formats(), trained_model(model), tuple(dict.fromkeys(profiles))
    if odd := [name for name in profiles if name not in COMPARED]:
        raise UsageError(f"compare: {odd[0]!r} is no profile to compare; choose from {', '.join(COMPARED)}")
    if not profiles:
        raise UsageError(f"compare: profiles is empty; choose from {', '.join(COMPARED)}")
    for name, value, least in (("repeats", repeats, FEWEST), ("threads", threads, 1)):
        if not hasattr(value, "__index__") or isinstance(value, bool) or not least <= value <= MOST:
            raise UsageError(f"compare: {name}={shown(value)}: at least {least}, at most {MOST}")
    require("onnx", extra="onnx")
    require("onnxruntime", extra="onnx")
    where = nullcontext(folder) if folder is not None else tempfile.TemporaryDirectory()
    with where as place, evaluating(trained):
        target = _folder(place, [FLOAT + ".onnx", *(rows[name].file_name for name in profiles)])
        feeder = _Feeder(trained, data, threads)
        feeder.require_batch()
        found = [_float_row(trained, target / "float.onnx", data, feeder)]
        for name in profiles:
            subject = model if name == INTEGER_ONLY else trained
            found.append(_row(subject, rows[name], target / rows[name].file_name, data, feeder))
        sizes = feeder.batch_sizes()
        timed = {size: in_turns(feeder.calls(size), repeats) for size in sizes if feeder.sessions}
    found = [_with_times(row, timed) for row in found]
    samples = sum(_samples(batch) for batch in data.batches)
    joins = vars(trained).get(STORED)
    best, advice = _advice(found, sizes, None if joins is None else joins.container)
    facts = environment()
    return Comparison(tuple(found), sizes, samples, threads, f"{facts['processor']}", best, advice)


def _folder(place: str | os.PathLike[str], names: Sequence[str]) -> Path:
    """Make the folder of the files.  Raises: UsageError where that cannot be done, or a file is a link."""
    target = Path(os.fspath(place))
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"compare: folder={shown(str(target))}: {error.strerror or error}") from error
    for name in names:
        require_no_link(target / name)
    return target


class _Feeder:
    """Sessions on files, and what they are fed."""

    def __init__(self, model: nn.Module, data: Basis, threads: int) -> None:
        self.model, self.data, self.threads = model, data, threads
        self.sessions: dict[str, Any] = {}

    def open(self, name: str, path: Path, options: dict[str, str]) -> Any:
        """Open a session on a file; it is timed from now on."""
        settings: dict[str, Any] = {"intra_op_num_threads": self.threads, "inter_op_num_threads": 1}
        self.sessions[name] = make_session(os.fspath(path), options, **settings)
        return self.sessions[name]

    def require_batch(self) -> None:
        """Raise UsageError where the model does not take the first sample of the example alone."""
        try:
            run_batch(self.model, self._of_size(1))
        except LsquantError as error:
            raise UsageError(
                f"compare: the model does not take the first sample of example_inputs, of which the first dimension "
                f"has to be the batch: {error}"
            ) from error

    def run_once(self, name: str) -> None:
        """Raise UsageError where a file cannot be run here."""
        try:
            self.calls(1, [name])[name]()
        except LsquantError:
            raise
        except Exception as error:  # the runtime's own kinds
            raise UsageError(f"ONNX Runtime does not run this file from Python: {reason(error)}") from error

    def _of_size(self, size: int | None) -> Any:
        """Return the example, or its first samples."""
        example = self.data.example_inputs
        inputs = example[0] if isinstance(example, (tuple, list)) else example
        return map_tensors(inputs, lambda t: t[:size] if t.dim() else t)

    def batch_sizes(self) -> tuple[int, ...]:
        """Return one and the size of the example's batch."""
        sizes = [len(t) for t in tensors_in(model_inputs(self.data.example_inputs)) if t.dim()]
        return tuple(dict.fromkeys([1, *sizes[:1]]))

    def calls(self, size: int, names: Sequence[str] | None = None) -> dict[str, Callable[[], Any]]:
        """Return what runs each file on so many samples.  names: of some files; default: of all."""
        with recording(self.model, layers=False) as calls:
            run_batch(self.model, self._of_size(size))
        found: dict[str, Callable[[], Any]] = {}
        for name in names or self.sessions:
            session = self.sessions[name]
            feeds = feeds_of(name, [value.name for value in session.get_inputs()], calls[0])
            found[name] = lambda session=session, feeds=feeds: session.run(None, feeds)
        return found


class FileModel(nn.Module):
    """A file as a model: it takes what the trained one takes, and returns what the file computes in its place.

    The trained model is run as well, for the containers in which it returns tensors, and for any attribute.
    """

    def __init__(self, trained: nn.Module, session: Any, path: Path) -> None:
        super().__init__()
        self.trained, self.path = trained, os.fspath(path)
        self.__dict__["session"] = session

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("trained"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with recording(self.trained, layers=False) as calls:
            wanted = self.trained(*args, **kwargs)
        names = [value.name for value in self.session.get_inputs()]
        made = [torch.from_numpy(y) for y in self.session.run(None, feeds_of(self.path, names, calls[0]))]
        places = tensors_in(wanted)
        if len(made) != len(places):
            raise UsageError(f"{self.path} has {len(made)} outputs, the model {len(places)}")
        return replaced(wanted, [y.to(place.device) for y, place in zip(made, places, strict=True)])


def _float_row(model: nn.Module, path: Path, data: Basis, feeder: _Feeder) -> Shippable:
    plain = revert(copied(model)).eval()
    try:
        proto = exported(plain, data.example_inputs, TORCH_OPSET)
        atomic_write_bytes(path, proto.SerializeToString(deterministic=True))
        feeder.open(FLOAT, path, {})
        feeder.run_once(FLOAT)
    except LsquantError as error:
        feeder.sessions.pop(FLOAT, None)
        return Shippable(FLOAT, metrics=dict(data.measured), reason=f"left out: {error}")
    return Shippable(FLOAT, path.stat().st_size, metrics=dict(data.measured), oldest=OLDEST["others"])


def _row(model: nn.Module, row: FileFormat, path: Path, data: Basis, feeder: _Feeder) -> Shippable:
    try:
        row.write(model, path, data.example_inputs)
        verdict = verify(model, path, data.batches, forward=data.forward)
        oldest = None
        if row.name in TIMED:
            content: Any = row.read(path)
            session, oldest = feeder.open(row.name, path, content.session), _oldest(content.proto)
            feeder.run_once(row.name)
            of_file: nn.Module = FileModel(model, session, path)
        else:
            of_file = load_packed(revert(copied(model)), path).eval()
        metrics = dict(data.evaluate(of_file))
    except LsquantError as error:
        feeder.sessions.pop(row.name, None)
        return Shippable(row.name, reason=f"left out: {error}")
    says = "; ".join(remark for remark in verdict.remarks if remark.startswith((IN_FLOAT, OTHER_FORM)))
    found = Shippable(row.name, row.size(path), metrics=metrics, level=verdict.level, oldest=oldest, reason=says)
    return replace(found, of_fused_form=OTHER_FORM in verdict.remarks)


def _oldest(proto: Any) -> str:
    """Return the oldest release, of those that were tried, with the types of a file's initializers."""
    types = require("onnx", extra="onnx").TensorProto
    held = {tensor.data_type for tensor in proto.graph.initializer}
    if held & {types.INT2, types.UINT2}:
        return OLDEST["2 bits"]
    return OLDEST["4 bits" if held & {types.INT4, types.UINT4} else "others"]


def _with_times(row: Shippable, timed: Mapping[int, Mapping[str, Latency]]) -> Shippable:
    own = {size: found[row.name] for size, found in timed.items() if row.name in found}
    ratio = {size: t.p50 / timed[size][FLOAT].p50 for size, t in own.items() if FLOAT in timed[size]}
    return replace(row, latency=own, ratio=ratio)


def _advice(rows: Sequence[Shippable], sizes: Sequence[int], container: str | None) -> tuple[str | None, str]:
    """Return (name of the file to ship, the reason in a sentence or two).

    container: of the stored tensors of a network with joins, None without.
    """
    own = [row for row in rows[1:] if row.name == INTEGER_ONLY and row.bytes is not None]
    if container in OF_TARGET and own:
        target = OF_TARGET[container]
        says = (
            f"ship integer: it is the file of the target {target!r}, {own[0].bytes:,} bytes; times and levels here are"
        )
        return INTEGER_ONLY, f"{says} those of ONNX Runtime on this machine, not the target's"
    timed = [row for row in rows[1:] if row.latency]
    if not timed:
        small = [row for row in rows[1:] if row.bytes is not None]
        if not small:
            return None, "no file was written: the rows say why"
        best = min(small, key=lambda row: row.bytes or 0)
        return best.name, f"ship {best.name}: {best.bytes:,} bytes; nothing was timed"
    most = max(LEVELS.index(row.level or LEVELS[0]) for row in timed)
    safest = [row for row in timed if LEVELS.index(row.level or LEVELS[0]) == most]
    first = min(safest, key=_time)
    alike = [row for row in safest if _time(row) <= (1 + MUCH) * _time(first)]
    best = min(alike, key=lambda row: (row.bytes or 0, _time(row)))
    says = [f"ship {best.name}: {_says(best, rows[0], sizes)}"]
    others = [row for row in timed if row not in safest and _time(row) < (1 - MUCH) * _time(best)]
    if others:
        other = min(others, key=_time)
        says.append(f"{other.name} is faster ({_ratios(other, sizes)}), and reaches only the level {other.level}")
    slow = [size for size in sizes if best.ratio.get(size, 0.0) >= 1.0]
    where = "" if len(slow) == len(sizes) else f" at batch {slow[0]}" if slow else ""
    if slow and container is None:
        says.append(
            f"that is slower than the float network{where}; an integer-only network is faster (joins=8 in the recipe, "
            "trained so; docs/integer-only.md)"
        )
    elif slow:
        says.append(f"that is slower than the float network{where}: look at what is in floating point between layers")
    if best.of_fused_form:
        says.append(
            "the model as it was trained differs a little from that form: train network = lsquant.fuse(model) on for "
            "an epoch, and ship that"
        )
    return best.name, "; ".join(says)


def _time(row: Shippable) -> float:
    """Return a mean over the sizes of batches, in which every size counts alike."""
    values = row.ratio or {size: t.p50 for size, t in row.latency.items()}
    return math.prod(values.values()) ** (1 / len(values))


def _ratios(row: Shippable, sizes: Sequence[int]) -> str:
    if not row.ratio:
        return ", ".join(f"{row.latency[size].p50:.3g} ms at batch {size}" for size in sizes)
    return ", ".join(f"{row.ratio[size]:.2f} of the float time at batch {size}" for size in sizes)


def _says(row: Shippable, plain: Shippable, sizes: Sequence[int]) -> str:
    whose = "those of lsquant.fuse(model)" if row.of_fused_form else "the trained ones"
    bits = f"its outputs are {whose}, bit for bit" if row.exact else f"its verdict reaches {row.level}"
    of_float = f" ({row.bytes / plain.bytes:.2f} of float)" if row.bytes and plain.bytes else ""
    return f"{bits}, {_ratios(row, sizes)}, {row.bytes:,} bytes{of_float}"


def _samples(batch: Any) -> int:
    tensors: list[Tensor] = tensors_in(batch)
    return len(tensors[0]) if tensors and tensors[0].dim() else 1


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(value).__name__
        raise UsageError(f"compare: metric(output, batch) gave a {kind}, not a number: {error}") from error
