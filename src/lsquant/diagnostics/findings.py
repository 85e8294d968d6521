"""What ``check`` reports: findings, each with a code, a severity and a remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from lsquant.diagnostics.symptoms import Symptom

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

CODES: dict[str, tuple[Severity, str]] = {
    "not_prepared": ("error", "call lsquant.prepare(model, recipe), then lsquant.calibrate(model, batches)"),
    "step_unset": ("error", "call lsquant.calibrate(model, batches), or lsquant.load a checkpoint"),
    "step_not_finite": ("error", "go back to the last good checkpoint; lower the learning rate or clip gradients"),
    "on_meta": ("error", "load a state: load_state_dict(state, assign=True), or model.to_empty(device='cpu') and load"),
    "stale_state": ("error", "lsquant.integrations.distributed.synchronize(model) reads the buffers again"),
    "other_bounds": ("error", "prepare the model by the recipe of the state that was copied, and copy it again"),
    "few_values": (
        "warning",
        "where one does, lsquant.calibrate(model, batches, weights='mse', again=True) takes it, and prepare for a "
        "frozen weight (requires_grad_(False)); else give it more bits, or leave it in floating point (skip=)",
    ),
    "tied_twice": ("error", "tie the weights before prepare, or call prepare again, so that they share a quantizer"),
    "step_below_guard": ("warning", "lower the learning rate of the steps: lsquant.param_groups(..., step_lr=...)"),
    "guarded_often": ("warning", "lower the learning rate of the steps: lsquant.param_groups(..., step_lr=...)"),
    "switched_off": ("warning", "set quantizer.enabled = True, or leave the block of lsquant.disabled"),
    "step_missing": ("error", "build the optimizer after prepare: Optimizer(lsquant.param_groups(model, lr))"),
    "stale_parameters": ("error", "build the optimizer anew, after prepare and after every change of parameters"),
    "weight_missing": ("warning", "build the optimizer from lsquant.param_groups(model, lr)"),
    "step_decayed": ("warning", "use lsquant.param_groups(model, lr, weight_decay), which never decays steps"),
    "step_frozen": ("warning", "let it learn: requires_grad_(True) and a learning rate above 0"),
    "values_not_finite": ("error", "look at the data, and at the first layer that has this finding"),
    "weights_not_finite": ("error", "go back to the last good checkpoint; lower the learning rate or clip gradients"),
    "order_assumed": ("error", "call prepare(model, recipe, example_inputs=batch), so that the order is known"),
    "clipped": (
        "warning",
        "calibrate again on data like these (again=True); give the layer more bits, or see lsquant.sensitivity",
    ),
    "unused_levels": ("warning", "the step is too large: calibrate again on data like these (again=True)"),
    "signed_in_vain": (
        "warning",
        "leave signed=None in the recipe and calibrate again (again=True), or give signed=False",
    ),
    "few_levels": (
        "warning",
        "look at its values on the page of lsquant report; fewer bits would do, or calibrate again (again=True)",
    ),
    "negative_cut": (
        "warning",
        "leave signed=None in the recipe and calibrate again on data like these (again=True), or use offset=True",
    ),
    "calibration_poor": ("warning", "calibrate again (again=True) on more data, and on data like these"),
    "step_collapsed": ("warning", "lower the learning rate of the steps: lsquant.param_groups(..., step_lr=...)"),
    "step_exploded": ("warning", "lower the learning rate of the steps: lsquant.param_groups(..., step_lr=...)"),
    "step_unmoved": (
        "warning",
        "let its layer take part in the loss (.detach(), no_grad, unused outputs); where its gradient is not 0 but too "
        "small to move a float32 number, train longer, or raise step_lr",
    ),
    "adam_step_lr": (
        "warning",
        "give each step a learning rate of its own: lsquant.param_groups(..., relative_step_lr=0.003)",
    ),
    "dead_channels": (
        "warning",
        "a step per channel, a smaller step, or a smaller layer: these channels give a constant",
    ),
    "oscillating": (
        "warning",
        "a lower learning rate at the end, averaged weights (WeightAverage, --ema), or more bits",
    ),
    "stale_batchnorm": ("warning", "estimate them anew: lsquant.training.reestimate_batchnorm, or --bn-batches"),
    "not_reached": ("warning", "give batches that reach the layer, or leave it in floating point (skip=)"),
    "bypassed": ("error", "call the layer instead of using its weight, or leave it in floating point (skip=)"),
    "unfit": ("error", "do as it says, then call lsquant.prepare(model, recipe) again; no file can be written so"),
    "added_later": ("warning", "call lsquant.prepare(model, recipe) again; the steps of the other layers are kept"),
    "not_integer": (
        "note",
        "let modules of docs/integer-only.md do it, where it can be done; what stays costs time in the shipped network",
    ),
    "stays_float": (
        "warning",
        "do what the message names, replace it by layers that lsquant knows, or accept that it stays in floating point",
    ),
}
"""Code -> severity and remedy."""

WEIGHT_REMEDY = (
    "lower the learning rate of the steps; layer.weight_quantizer.initialize(layer.weight) sets this one anew, and "
    "lsquant.calibrate(model, batches, weights='mse', again=True) all of the model"
)
"""The remedy for weights that do not fit their step: `calibrate` leaves weights as they are unless asked."""


@dataclass(frozen=True)
class Finding:
    """One problem of a model, its optimizer or its data.

    code: a key of ``CODES``.
    severity: "error", "warning" or "note".
    where: name of the quantizer, parameter or layer; "" for the model.
    message: what is wrong, in words.
    remedy: what to do.
    evidence: the numbers behind it.
    """

    code: str
    severity: Severity
    where: str
    message: str
    remedy: str
    evidence: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.severity}: {self.where or '(root)'}: {self.message} [{self.code}]\n    remedy: {self.remedy}"


def finding(code: str, where: str, message: str, severity: Severity | None = None, **evidence: Any) -> Finding:
    """Make a finding with the remedy of its code, and its severity unless another is given."""
    usual, remedy = CODES[code]
    if code in ("clipped", "unused_levels") and where.endswith("weight_quantizer"):
        remedy = WEIGHT_REMEDY
    return Finding(code, severity or usual, where, message, remedy, evidence)


def findings(where: str, symptoms: Iterable[Symptom]) -> Iterator[Finding]:
    """Turn the symptoms of one quantizer or layer into findings."""
    for code, message, evidence in symptoms:
        yield finding(code, where, message, **evidence)
