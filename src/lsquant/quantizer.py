"""``Quantizer``: the module that owns a learned step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lsquant import mse, ops, reference
from lsquant._util.entry import shown
from lsquant._util.errors import UsageError
from lsquant._util.leaf import leaf
from lsquant.mse_rows import row_steps
from lsquant.spec import QuantSpec

Method = Literal["paper", "mse"]


CPU_IS_READ_ALWAYS = True
"""On a CPU a buffer is read in 0.2 us, so every forward pass does; False treats a CPU as an accelerator, where a read
waits for everything queued before."""


class _Mirror(NamedTuple):
    """What the buffers ``signed``, ``count`` and ``initialized`` say, in Python.

    source: the numbers in the buffers, or on an accelerator their identities and versions, that this was read from.
    """

    spec: QuantSpec
    count: int
    initialized: bool
    source: tuple[Any, ...]


UNDECIDED = (0, 0)
"""The bounds of a quantizer whose sign is not decided."""


def _bounds(spec: QuantSpec) -> tuple[int, int]:
    return UNDECIDED if spec.signed is None else (spec.q_min, spec.q_max)


def _range(bounds: tuple[int, ...]) -> str:
    """Return bounds in words, with the bits they take.

    >>> _range((-2, 1))
    '-2 to 1 (2 bit)'
    """
    low, high = bounds
    return f"{low} to {high} ({(high - low).bit_length()} bit)"


class Quantizer(nn.Module):
    """Fake-quantize by a learned step.

    ``v_hat = (clip(round(v / s) + z, q_min, q_max) - z) * s``

    spec: bits, sign and granularity.
    shape: of the step, 1-D: (1,), (channels,) or (groups,).
    axis: the channel dimension, with granularity "channel".
    count: N, the elements of one sample that share a step; needed before the first forward pass.

    Parameters, float32 also under ``.to(dtype)``:
    step: (steps,) float32.
    offset: (steps,) float32, LSQ+'s b; None without ``spec.offset``.

    Buffers:
    initial_step: (steps,) float32, s0 of the guard.
    signed: () int8, -1 while undecided.
    count: () int64, N, 0 while unknown.
    initialized: () bool, whether the step is set.
    bounds: (2,) int32, the lowest and the highest code, (0, 0) while the sign is undecided; what a loaded state is
        compared with.
    guarded: () int64, not saved, the steps below the guard that training passes have met.

    Sign, N and whether a step is set are needed in Python.  In eager mode on a CPU they are read from the buffers in
    every forward pass.  On an accelerator they are read again where a buffer was replaced or its ``_version`` changed,
    and in compiled code they are constants, read when the buffers were last loaded, calibrated or looked at outside
    of it.  So a write through ``.data``, and DistributedDataParallel's broadcast, is not seen on an accelerator:
    ``lsquant.integrations.distributed.synchronize(model)`` reads the buffers again.

    Raises: UsageError for a shape, axis or count that does not fit the specification.

    >>> quantizer = Quantizer(QuantSpec(4, signed=True), count=3)
    >>> quantizer.initialize(torch.tensor([-0.8, 0.2, 0.7]))
    >>> quantizer.codes(torch.tensor([-0.8, 0.2, 9.0])).tolist()
    [-8, 2, 7]
    """

    step: nn.Parameter
    offset: nn.Parameter | None
    initial_step: Tensor
    signed: Tensor
    count: Tensor
    initialized: Tensor
    bounds: Tensor
    guarded: Tensor

    def __init__(
        self, spec: QuantSpec, shape: Sequence[int] = (1,), *, axis: int | None = None, count: int | None = None
    ) -> None:
        super().__init__()
        if not isinstance(spec, QuantSpec):
            raise UsageError(f"Quantizer: spec={shown(spec)}; give a QuantSpec, e.g. QuantSpec(4)")
        is_list = isinstance(shape, Sequence) and not isinstance(shape, str)
        if not is_list or len(shape) != 1 or type(shape[0]) is not int or shape[0] < 1:
            raise UsageError(f"Quantizer: shape={shown(shape)}; a step is 1-D, (1,) or one per channel or group")
        if count is not None and (type(count) is not int or count < 1):
            raise UsageError(f"Quantizer: count={count}; N is the number of elements of one sample that share a step")
        if spec.granularity == "channel" and axis is None:
            raise UsageError("Quantizer: granularity='channel' needs axis=, the channel dimension")
        self.requested = spec
        self.axis = axis if spec.granularity == "channel" else None
        self.name = ""
        self.enabled = True
        self.filled_steps = 0
        ones = torch.ones(tuple(shape), dtype=torch.float32)  # whatever the default dtype is
        self.step = nn.Parameter(ones)
        self.register_parameter("offset", nn.Parameter(torch.zeros_like(ones)) if spec.offset else None)
        self.register_buffer("initial_step", torch.ones_like(ones))
        self.register_buffer("signed", torch.tensor(-1 if spec.signed is None else int(spec.signed), dtype=torch.int8))
        self.register_buffer("count", torch.tensor(count or 0))
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("bounds", torch.tensor(_bounds(spec), dtype=torch.int32))
        self.register_buffer("guarded", torch.tensor(0), persistent=False)
        self._mirror = _Mirror(spec, count or 0, False, ())

    # ---- what Python has to know of the buffers ----

    def _state(self) -> _Mirror:
        """Return what the buffers say now; in compiled code, what they said when they were last read."""
        if not torch.compiler.is_compiling():
            self._follow()
        return self._mirror

    def _follow(self) -> None:
        """Read the buffers where they changed; leave the mirror where they cannot be read."""
        buffers: dict[str, Any] = self._buffers  # an attribute of a module takes longer
        signed, count, initialized = buffers["signed"], buffers["count"], buffers["initialized"]
        if type(signed) is not Tensor or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            return  # a fake tensor, or a trace, in which a value would become a constant
        if signed.is_meta:
            return
        try:
            if signed.is_cpu and CPU_IS_READ_ALWAYS:
                source = (signed.item(), count.item(), initialized.item())
            else:
                source = tuple((id(t), 0 if t.is_inference() else t._version) for t in (signed, count, initialized))
            if source != self._mirror.source:
                self._read(source)
        except RuntimeError:
            return  # under a mode for fake tensors, as exporters use it, there are no values

    def _read(self, source: tuple[Any, ...]) -> None:
        numbers = [t.detach().to(torch.int64) for t in (self.signed, self.count, self.initialized)]
        sign, count, initialized = torch.stack(numbers).tolist()  # one wait for the device
        spec = self.requested if sign < 0 else self.requested.decide(bool(sign))
        self._mirror = _Mirror(spec, count, bool(initialized), source)

    def _refresh(self) -> None:
        """Read the buffers again, also where nothing shows that they changed."""
        self._mirror = self._mirror._replace(source=())
        self._follow()

    def _stale_state(self, compiled: bool = False) -> str:
        """Say how what Python knows of the buffers differs from them; "" where it does not.

        compiled: whether compiled code uses this quantizer.  Eager code reads the buffers before it uses them, as far
            as it sees that they changed; compiled code has what was read before.
        """
        if self.signed.is_meta:
            return ""
        if not compiled:
            self._follow()
        known = self._mirror
        sign, count, initialized = int(self.signed), int(self.count), bool(self.initialized)
        spec = self.requested if sign < 0 else self.requested.decide(bool(sign))
        pairs = {
            "sign": (known.spec.signed, spec.signed),
            "N": (known.count, count),
            "initialized": (known.initialized, initialized),
        }
        return ", ".join(f"{name} {old} instead of {new}" for name, (old, new) in pairs.items() if old != new)

    @property
    def spec(self) -> QuantSpec:
        """The specification, with the sign that was decided."""
        return self._state().spec

    @property
    def q_min(self) -> int:
        """Lowest code; raises while the sign is undecided."""
        return self.spec.q_min

    @property
    def q_max(self) -> int:
        """Highest code; raises while the sign is undecided."""
        return self.spec.q_max

    @property
    def is_initialized(self) -> bool:
        """Whether the step has been set, by ``initialize``, calibration or a loaded checkpoint."""
        return self._state().initialized

    @property
    def elements_per_step(self) -> int:
        """N, the elements of one sample that share a step; 0 while unknown."""
        return self._state().count

    @property
    def gradient_scale(self) -> float:
        """``g = 1 / sqrt(N * q_max)``.  Raises UsageError while N is unknown."""
        return self._gradient_scale(self._state())

    def _gradient_scale(self, state: _Mirror) -> float:
        if not state.count:
            raise UsageError(
                f"{self._who()}: N is unknown, so there is no gradient scale; give Quantizer(..., count=N), the "
                "elements of one sample that share a step, or let lsquant.calibrate set it"
            )
        return reference.gradient_scale(state.count, state.spec.q_max)

    # ---- the forward pass ----

    def effective_step(self) -> Tensor:
        """Compute the guarded step ``s_min where s < s_min, else s``, of slope 1; raises while none is set."""
        self.require_initialized()
        return reference.guard(self.step, self.initial_step, self.step_dtype)

    @property
    def step_dtype(self) -> str:
        """The type that the step is rounded to in every forward pass."""
        return self.requested.step_dtype

    def zero_point(self) -> Tensor | None:
        """Return LSQ+'s integer zero points, int32 like step; None without an offset."""
        if self.offset is None:
            return None
        step = self.effective_step().detach()
        return reference.zero_point(step, self.offset.detach(), self.q_min, self.q_max).to(torch.int32)

    def grid(self) -> ops.Grid:
        """Return the record that the ops take; raises while no step, sign or N is set."""
        state = self._state()
        if not state.initialized:
            self.require_initialized()
        spec = state.spec
        step = reference.guard(self.step, self.initial_step, self.step_dtype)
        return ops.Grid(
            step, spec.q_min, spec.q_max, self._gradient_scale(state), self.offset, axis=self.axis,
            group_size=spec.group_size,
        )  # fmt: skip

    def count_guarded(self) -> None:
        """Add the steps below the guard to ``guarded``, in a training pass."""
        if self.training and torch.is_grad_enabled():
            self.guarded += (self.step.detach() < reference.GUARD_FACTOR * self.initial_step).sum()

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize x (any shape that fits the step); x itself while ``enabled`` is False."""
        if not isinstance(x, Tensor):
            return leaf(self, x)
        if not self.enabled:
            return x
        grid = self.grid()
        self.count_guarded()
        return ops.fake_quantize_with(x, grid)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the integers ``clip(round(x/s) + z, q_min, q_max)``, int8 (q_min < 0) or uint8, in the shape of x.

        Raises: UsageError before initialisation and for NaN or infinite values, which no integer can say.
        """
        step, q_min, q_max = self.effective_step(), self.q_min, self.q_max
        kind = {"axis": self.axis, "group_size": self.spec.group_size, "offset": self.offset}
        found = reference.codes(x.detach(), step, q_min, q_max, **kind)
        if bool(torch.isnan(found).any()) or not bool(torch.isfinite(step).all()):
            raise UsageError(f"{self._who()}: the input or the step has NaN or infinite values, which have no code")
        return found.to(torch.int8 if q_min < 0 else torch.uint8)

    def require_initialized(self) -> Quantizer:
        """Return the quantizer itself; raises UsageError naming the remedy while no step is set."""
        if not self.is_initialized:
            raise UsageError(
                f"{self._who()} has no step yet. Call lsquant.calibrate(model, batches), load a checkpoint with "
                "lsquant.load, or call .initialize(x) on a stand-alone Quantizer"
            )
        return self

    def _who(self) -> str:
        return f"quantizer {self.name!r}" if self.name else "this Quantizer"

    # ---- setting the step ----

    @torch.no_grad()
    def initialize(self, x: Tensor, method: Method = "mse", importance: Tensor | None = None) -> None:
        """Set sign and step from values: "mse", least squared error, or "paper", ``2 mean|v| / sqrt(q_max)``.

        importance: by which squared errors are weighted, for "mse" without an offset; a shape that broadcasts to that
            of x, at least 0; None for 1.
        x: values in the shape that will be quantized, float.  A step whose values are all zero gets the median of the
        others (counted in ``filled_steps``).  Raises: UsageError for an empty, non-finite or all-zero x.
        """
        if method not in ("mse", "paper"):
            raise UsageError(f"{self._who()}: method={method!r}; use 'mse' or 'paper'")
        if not isinstance(x, Tensor):
            raise UsageError(f"{self._who()}: cannot set a step from {shown(x)}; give a tensor")
        if not x.numel():
            raise UsageError(f"{self._who()}: cannot set a step from an empty tensor of shape {tuple(x.shape)}")
        if bad := int((~torch.isfinite(x)).sum()):
            raise UsageError(f"{self._who()}: cannot set a step, {bad} of {x.numel()} values are NaN or infinite")
        spec = self.requested.decide(bool((x < 0).any()))
        if method == "paper" and not spec.offset:
            kind = {"axis": self.axis, "group_size": spec.group_size}
            self._set(spec, reference.initial_step(x, spec.q_max, **kind))
        elif spec.offset or (self.step.numel() == 1 and importance is None):
            summaries = [mse.ValueSummary() for _ in range(self.step.numel())]
            self.summarize(x, summaries)
            self.initialize_from(summaries, method)
        else:
            found = self._rows(x)
            weights = None if importance is None else self._rows(importance.to(x.device).expand_as(x))
            self._set(spec, row_steps(found, spec.q_min, spec.q_max, weights))

    @torch.no_grad()
    def _prefer_exact(self, x: Tensor) -> None:
        """Replace each step that is set by one that represents its values of x exactly, where there is one."""
        spec = self.spec
        if spec.offset or not self.is_initialized:
            return
        exact = mse.exact_steps(x, spec.q_min, spec.q_max, axis=self.axis, group_size=spec.group_size)
        if bool((exact > 0).any()):
            filled = self.filled_steps
            self._set(spec, torch.where(exact > 0, exact.to(self.step.device), self.step))
            self.filled_steps = filled

    def summarize(self, x: Tensor, summaries: list[mse.ValueSummary]) -> None:
        """Add the values of x to one summary per step.  Raises: UsageError where x has not as many steps."""
        for summary, row in zip(summaries, self._rows(x), strict=True):
            summary.add(row)

    def _rows(self, x: Tensor) -> Tensor:
        """View x as (steps, elements).  Raises: UsageError where x has not as many steps."""
        shape, axis, size = tuple(x.shape), self.axis, self.spec.group_size
        if (axis is not None and not -x.dim() <= axis < x.dim()) or (size is not None and x.numel() % size):
            what = f"axis {axis}" if size is None else f"groups of {size}"
            raise UsageError(f"{self._who()}: it has {what}, which values of shape {shape} do not have")
        rows = mse.rows_per_step(x.detach(), axis, size)
        if len(rows) != self.step.numel():
            raise UsageError(
                f"{self._who()}: its step has shape {tuple(self.step.shape)}, values of shape {shape} need {len(rows)}"
            )
        return rows

    @torch.no_grad()
    def initialize_from(self, summaries: list[mse.ValueSummary], method: Method = "mse") -> None:
        """Initialize as ``initialize`` does, from one summary of a stream of values per step."""
        spec = self.requested.decide(any(s.low < 0 for s in summaries))
        bounds = (spec.q_min, spec.q_max)
        if spec.offset:
            found = torch.tensor([mse.best_step_and_offset(s, *bounds) for s in summaries], dtype=torch.float32)
            self._set(spec, found[:, 0].clone(), found[:, 1])
        elif method == "mse":
            self._set(spec, torch.tensor([mse.best_step(s, *bounds) for s in summaries], dtype=torch.float32))
        else:
            means = torch.tensor([s.magnitude / s.total for s in summaries], dtype=torch.float64)
            self._set(spec, 2.0 * means / spec.q_max**0.5)

    def _set(self, spec: QuantSpec, step: Tensor, offset: Tensor | None = None) -> None:
        step = step.to(self.step.device, torch.float32)
        if step.shape != self.step.shape:
            raise UsageError(
                f"{self._who()}: its step has shape {tuple(self.step.shape)}, these values need {tuple(step.shape)}"
            )
        # a mean so small that the step is denormal or 0 in float32 counts as zero
        tiny = step < torch.finfo(torch.float32).tiny
        if bool(tiny.all()):
            raise UsageError(
                f"{self._who()}: all values are zero, no step can be set; check the data, or skip this layer"
            )
        step[tiny] = step[~tiny].median()
        if self.step_dtype != "float32":
            off = (reference.snapped(step, self.step_dtype) - step).abs() > step / 64
            if bool(off.any()):
                raise UsageError(
                    f"{self._who()}: a step would be {float(step[off][0]):.3g}, which {self.step_dtype} does not hold; "
                    "use step_dtype='bfloat16', or 'float32'"
                )
        self.filled_steps = int(tiny.sum())
        self.step.copy_(step)
        if self.offset is not None and offset is not None:
            self.offset.copy_(offset)
        self.initial_step.copy_(step)
        self.signed.fill_(int(bool(spec.signed)))
        self._write_bounds(spec)
        self.initialized.fill_(True)
        self._refresh()

    def _write_bounds(self, spec: QuantSpec) -> None:
        for place, bound in zip(self.bounds, _bounds(spec), strict=True):
            place.fill_(bound)

    @torch.no_grad()
    def set_count(self, count: int) -> None:
        """Freeze N, the elements of one sample that share a step."""
        self.count.fill_(count)
        self._refresh()

    @torch.no_grad()
    def adopt(self, other: Quantizer) -> None:
        """Take N, sign, step and offset from an initialised quantizer of the same specification."""
        self.set_count(other.elements_per_step)
        self._set(other.spec, other.step.detach().clone(), other.offset)
        self.filled_steps = other.filled_steps

    def forget(self) -> None:
        """Mark the step as not set; the parameter object stays."""
        self.initialized.fill_(False)
        self._refresh()

    @torch.no_grad()
    def respecify(self, spec: QuantSpec, rescale: bool) -> None:
        """Change the bits, with the same step shape: the step becomes ``s * q_max_old / q_max_new``, or unset.

        Raises: UsageError where the new spec needs a step of another shape or an offset more or less.
        """
        old = self.spec
        if (spec.granularity, spec.group_size, spec.offset) != (old.granularity, old.group_size, old.offset):
            raise UsageError(f"{self._who()}: {spec} does not keep the step's shape of {old}")
        new = spec.decide(old.signed) if rescale and old.signed is not None else spec
        if self.is_initialized and rescale and new.signed == old.signed:
            ratio = old.q_max / new.q_max
            self.step.mul_(ratio)
            self.initial_step.mul_(ratio)
        else:
            self.initialized.fill_(False)
        self.requested = spec
        self.signed.fill_(-1 if new.signed is None else int(new.signed))
        self._write_bounds(new)
        self._refresh()

    # ---- modules' machinery ----

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Move, never change a dtype: steps stay float32 under ``.half()``, ``.to(torch.bfloat16)`` and the like."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        before = self._buffers.get("guarded")  # the frozen quantizer, which borrows this method, has none
        nn.Module._apply(self, keep_dtype, recurse)
        after = self._buffers.get("guarded")
        if before is not None and after is not None and before.is_meta and not after.is_meta:  # to_empty
            after.zero_()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Write the state with the bounds of the codes in use: PyTorch's averages truncate integer buffers."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if differ := self._other_bounds():
            destination[prefix + "bounds"] = torch.tensor(differ[1], dtype=torch.int32, device=self.bounds.device)

    def _other_bounds(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return (in the buffer, of the codes in use) where these differ; None where they do not, or have no values."""
        if type(self.bounds) is not Tensor or self.bounds.is_meta:
            return None
        wanted = _bounds(self.spec)
        try:
            found = tuple(self.bounds.tolist())
        except RuntimeError:  # under a mode for fake tensors, as exporters use it
            return None
        return None if found == wanted else (found, wanted)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load this quantizer's part of a state, or none of it, with the reason in ``error_msgs``.

        A state without any key of this quantizer leaves it as it is (a float checkpoint).  A state of another number of
        bits, sign or steps is an error.  One without ``bounds``, as earlier versions wrote it, is not compared.
        """
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not own:
            return
        if problem := self._misfit({key.removeprefix(prefix): value for key, value in own.items()}):
            name = prefix.removesuffix(".") or self.name or "this Quantizer"
            error_msgs.append(f"quantizer {name!r}: {problem}")
            return
        for key, t in {**self._parameters, **self._buffers}.items():  # a state may be assigned as it is
            value = own.get(prefix + key)
            if t is not None and isinstance(value, Tensor) and value.dtype != t.dtype:
                own[prefix + key] = value.to(t.dtype)
        sign = own.get(prefix + "signed")
        if prefix + "bounds" not in own and isinstance(sign, Tensor) and not sign.is_meta and sign.numel() == 1:
            spec = self.requested if int(sign) < 0 else self.requested.decide(bool(sign))
            own[prefix + "bounds"] = torch.tensor(_bounds(spec), dtype=torch.int32, device=sign.device)
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if self.guarded.is_meta and not self.step.is_meta:  # a state was assigned, and has no counter
            self.guarded = torch.zeros_like(self.guarded, device=self.step.device)
        self._refresh()

    def _misfit(self, state: dict[str, Any]) -> str:
        """Say why a state cannot be that of this quantizer; "" where it can."""
        remedy = "prepare the model by the recipe that the state was made with"
        step = state.get("step")
        if isinstance(step, Tensor) and step.shape != self.step.shape:
            return (
                f"size mismatch: the state has a step of shape {tuple(step.shape)}, the model one of shape "
                f"{tuple(self.step.shape)} ({self.requested}); {remedy}"
            )
        if isinstance(step, Tensor) and ("offset" in state) != (self.offset is not None):
            has, lacks = ("the state", "the model") if self.offset is None else ("the model", "the state")
            return f"{has} has an offset, {lacks} has none; {remedy}"
        sign, bounds = state.get("signed"), state.get("bounds")
        if not isinstance(sign, Tensor) or not isinstance(bounds, Tensor) or sign.is_meta or bounds.is_meta:
            return ""
        if sign.numel() != 1 or tuple(bounds.shape) != (2,):
            return f"its sign and bounds have the shapes {tuple(sign.shape)} and {tuple(bounds.shape)}; {remedy}"
        theirs, decided = tuple(int(bound) for bound in bounds.tolist()), int(sign)
        if theirs == UNDECIDED or (decided < 0 and self.requested.signed is None):
            return ""
        mine = self.requested if decided < 0 else self.requested.decide(bool(decided))
        if theirs == _bounds(mine):
            return ""
        low, high = _bounds(mine)
        return f"the state has the codes {_range(theirs)}, the model {low} to {high} ({mine}); {remedy}"

    def extra_repr(self) -> str:
        state = "" if self.is_initialized else ", not calibrated"
        shape = "" if self.step.numel() == 1 else f", {self.step.numel()} steps"
        return f"{self.spec}{shape}{state}" + ("" if self.enabled else ", off")
