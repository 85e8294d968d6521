"""``Quantizer``: the module that owns a learned step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lsquant import mse, ops, reference
from lsquant._util.errors import UsageError
from lsquant.spec import QuantSpec

Method = Literal["paper", "mse"]


class Quantizer(nn.Module):
    """A staircase with learned step: ``v_hat = (clip(round(v/s) + z, q_min, q_max) - z) * s``.

    spec: what to do.  shape: of the step, 1-D: (1,), (channels,) or (groups,).  axis: the channel dimension.
    count: N, the elements of one sample that share a step; needed before the first forward pass.

    Parameters: ``step`` shape, float32; ``offset`` the same with ``spec.offset``.  Buffers: ``initial_step`` like step
    (s0 of the guard), ``signed`` int8 (-1 undecided), ``count`` int64 (0 unknown), ``initialized`` bool.  They stay
    float32 under ``.to(dtype)``.  ``guarded`` (int64, not saved) counts training passes of steps below the guard.
    """

    step: nn.Parameter
    offset: nn.Parameter | None
    initial_step: Tensor
    signed: Tensor
    count: Tensor
    initialized: Tensor
    guarded: Tensor

    def __init__(
        self, spec: QuantSpec, shape: Sequence[int] = (1,), *, axis: int | None = None, count: int | None = None
    ) -> None:
        super().__init__()
        if len(shape) != 1 or shape[0] < 1:
            raise UsageError(f"Quantizer: shape={tuple(shape)}; a step is 1-D, (1,) or one per channel or group")
        if count is not None and (type(count) is not int or count < 1):
            raise UsageError(f"Quantizer: count={count}; N is the number of elements of one sample that share a step")
        if spec.granularity == "channel" and axis is None:
            raise UsageError("Quantizer: granularity='channel' needs axis=, the channel dimension")
        self.requested = spec
        self.spec = spec
        self.axis = axis if spec.granularity == "channel" else None
        self.name = ""
        self.enabled = True
        self.filled_steps = 0
        self.step = nn.Parameter(torch.ones(tuple(shape)))
        self.register_parameter("offset", nn.Parameter(torch.zeros(tuple(shape))) if spec.offset else None)
        self.register_buffer("initial_step", torch.ones(tuple(shape)))
        self.register_buffer("signed", torch.tensor(-1 if spec.signed is None else int(spec.signed), dtype=torch.int8))
        self.register_buffer("count", torch.tensor(count or 0))
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("guarded", torch.tensor(0), persistent=False)
        self._count, self._initialized = count or 0, False

    # ---- what the forward pass needs, from Python mirrors: no tensor is read back ----

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
        return self._initialized

    @property
    def samples_share(self) -> int:
        """N, the elements of one sample that share a step; 0 while unknown."""
        return self._count

    @property
    def gradient_scale(self) -> float:
        """``g = 1 / sqrt(N * q_max)``.  Raises UsageError while N is unknown."""
        if not self._count:
            raise UsageError(
                f"{self._who()}: N is unknown, so there is no gradient scale; give Quantizer(..., count=N), the "
                "elements of one sample that share a step, or let lsquant.calibrate set it"
            )
        return reference.gradient_scale(self._count, self.q_max)

    def effective_step(self) -> Tensor:
        """The guarded step ``s_min where s < s_min, else s``, differentiable with slope 1; raises while none is set."""
        self.require_initialized()
        return reference.guard(self.step, self.initial_step)

    def zero_point(self) -> Tensor | None:
        """LSQ+'s integer zero points, int32 like step; None without an offset."""
        if self.offset is None:
            return None
        step = self.effective_step().detach()
        return reference.zero_point(step, self.offset.detach(), self.q_min, self.q_max).to(torch.int32)

    def grid(self) -> ops.Grid:
        """Step, bounds, g, offset and group size as the ops take them; counts guarded steps when training."""
        step = self.effective_step()
        if self.training and torch.is_grad_enabled():
            self.guarded += (self.step.detach() < reference.GUARD_FACTOR * self.initial_step).sum()
        return ops.Grid(step, self.q_min, self.q_max, self.gradient_scale, self.offset, self.spec.group_size)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize x (any shape that fits the step); x itself while ``enabled`` is False."""
        if not self.enabled:
            return x
        step, q_min, q_max, scale, offset, size = self.grid()
        return ops.fake_quantize(x, step, q_min, q_max, scale, axis=self.axis, group_size=size, offset=offset)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The integers ``clip(round(x/s) + z, q_min, q_max)``, int8 (q_min < 0) or uint8, in the shape of x.

        Raises: UsageError before initialisation and for NaN or infinite values, which no integer can say.
        """
        step, q_min, q_max = self.effective_step(), self.q_min, self.q_max
        kind = {"axis": self.axis, "group_size": self.spec.group_size, "offset": self.offset}
        found = reference.codes(x.detach(), step, q_min, q_max, **kind)
        if bool(torch.isnan(found).any()) or not bool(torch.isfinite(step).all()):
            raise UsageError(f"{self._who()}: the input or the step has NaN or infinite values, which have no code")
        return found.to(torch.int8 if q_min < 0 else torch.uint8)

    def require_initialized(self) -> Quantizer:
        """Itself; raises UsageError naming the remedy while no step is set."""
        if not self._initialized:
            raise UsageError(
                f"{self._who()} has no step yet. Call lsquant.calibrate(model, batches), load a checkpoint with "
                "lsquant.load, or call .initialize(x) on a stand-alone Quantizer"
            )
        return self

    def _who(self) -> str:
        return f"quantizer {self.name!r}" if self.name else "this Quantizer"

    # ---- setting the step ----

    @torch.no_grad()
    def initialize(self, x: Tensor, method: Method = "mse") -> None:
        """Set sign and step from values: "mse", least squared error, or "paper", ``2 mean|v| / sqrt(q_max)``.

        x: values in the shape that will be quantized, float.  A step whose values are all zero gets the median of the
        others (counted in ``filled_steps``).  Raises: UsageError for an empty, non-finite or all-zero x.
        """
        if method not in ("mse", "paper"):
            raise UsageError(f"{self._who()}: method={method!r}; use 'mse' or 'paper'")
        if not x.numel():
            raise UsageError(f"{self._who()}: cannot set a step from an empty tensor of shape {tuple(x.shape)}")
        if bad := int((~torch.isfinite(x)).sum()):
            raise UsageError(f"{self._who()}: cannot set a step, {bad} of {x.numel()} values are NaN or infinite")
        spec = self.requested.decide(bool((x < 0).any()))
        if method == "paper" and not spec.offset:
            kind = {"axis": self.axis, "group_size": spec.group_size}
            self._set(spec, reference.initial_step(x, spec.q_max, **kind))
        else:
            summaries = [mse.ValueSummary() for _ in range(self.step.numel())]
            self.summarize(x, summaries)
            self.initialize_from(summaries, method)

    def summarize(self, x: Tensor, summaries: list[mse.ValueSummary]) -> None:
        """Add the values of x to one summary per step.  Raises: UsageError where x has not as many steps."""
        rows = mse.rows_per_step(x.detach(), self.axis, self.spec.group_size)
        if len(rows) != len(summaries):
            raise UsageError(
                f"{self._who()}: its step has shape {tuple(self.step.shape)}, values of shape {tuple(x.shape)} "
                f"need {len(rows)}"
            )
        for summary, row in zip(summaries, rows, strict=True):
            summary.add(row)

    @torch.no_grad()
    def initialize_from(self, summaries: list[mse.ValueSummary], method: Method = "mse") -> None:
        """As ``initialize``, from one summary of a stream of values per step."""
        spec = self.requested.decide(any(s.low < 0 for s in summaries))
        bounds = (spec.q_min, spec.q_max)
        if spec.offset:
            found = torch.tensor([mse.best_step_and_offset(s, *bounds) for s in summaries])
            self._set(spec, found[:, 0].clone(), found[:, 1])
        elif method == "mse":
            self._set(spec, torch.tensor([mse.best_step(s, *bounds) for s in summaries]))
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
        self.filled_steps = int(tiny.sum())
        self.spec = spec
        self.step.copy_(step)
        if self.offset is not None and offset is not None:
            self.offset.copy_(offset)
        self.initial_step.copy_(step)
        self.signed.fill_(int(bool(spec.signed)))
        self.initialized.fill_(True)
        self._initialized = True

    @torch.no_grad()
    def set_count(self, count: int) -> None:
        """Freeze N, the elements of one sample that share a step."""
        self.count.fill_(count)
        self._count = count

    @torch.no_grad()
    def adopt(self, other: Quantizer) -> None:
        """Take N, sign, step and offset from an initialised quantizer of the same specification."""
        self.set_count(other.samples_share)
        self._set(other.spec, other.step.detach().clone(), other.offset)
        self.filled_steps = other.filled_steps

    def forget(self) -> None:
        """Mark the step as not set; the parameter object stays."""
        self.initialized.fill_(False)
        self._initialized = False

    @torch.no_grad()
    def respecify(self, spec: QuantSpec, rescale: bool) -> None:
        """Another number of bits for the same step shape: ``s * q_max_old / q_max_new``, or unset.

        Raises: UsageError where the new spec needs a step of another shape or an offset more or less.
        """
        if (spec.granularity, spec.group_size, spec.offset) != (
            self.spec.granularity, self.spec.group_size, self.spec.offset,
        ):  # fmt: skip
            raise UsageError(f"{self._who()}: {spec} does not keep the step's shape of {self.spec}")
        old, self.requested = self.spec, spec
        self.spec = spec.decide(old.signed) if rescale and old.signed is not None else spec
        if not self._initialized:
            return
        if rescale and self.spec.signed == old.signed:
            ratio = old.q_max / self.spec.q_max
            self.step.mul_(ratio)
            self.initial_step.mul_(ratio)
            return
        self.signed.fill_(-1 if spec.signed is None else int(spec.signed))
        self.forget()

    # ---- modules' machinery ----

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Move, never change a dtype: steps stay float32 under ``.half()``, ``.to(torch.bfloat16)`` and the like."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        nn.Module._apply(self, keep_dtype, recurse)  # not super(): the frozen quantizer borrows this method
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """A checkpoint without any key of this quantizer leaves it as it is (a float checkpoint)."""
        if not any(key.startswith(prefix) for key in state_dict):
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.read_state()

    def read_state(self) -> None:
        """Read the decided sign, N and whether a step is set back from the buffers, after these were written to."""
        if self.initialized.device.type == "meta":
            return
        sign = int(self.signed.item())
        self.spec = self.requested if sign < 0 else self.requested.decide(bool(sign))
        self._count, self._initialized = int(self.count.item()), bool(self.initialized.item())

    def extra_repr(self) -> str:
        state = "" if self._initialized else ", not calibrated"
        shape = "" if self.step.numel() == 1 else f", {self.step.numel()} steps"
        return f"{self.spec}{shape}{state}" + ("" if self.enabled else ", off")
