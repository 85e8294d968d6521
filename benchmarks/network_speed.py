"""A training step and an evaluation pass of a network, float and quantized at 4/4 bits, eager and compiled.

Before anything is timed, outputs and gradients are compared, of the float contenders with each other and of the
quantized ones with each other; lsquant's output has to be that of its eager engine, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from networks import WORKLOADS, Workload
from peers import formulated, quantized
from quantizer_speed import engines
from timing import Contender, Options, Row, forget_compiled, measure, profile, rows, say, show
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant

FLOAT, COMPILED = "float", "float, compiled"
STEP, EVALUATION = "training step", "evaluation"
BITS = "w4a4"


@dataclass
class Network:
    """A model with its batch and optimizer."""

    model: nn.Module
    run: Callable[[Tensor], Tensor]
    x: Tensor
    target: Tensor
    labels: bool
    optimizer: torch.optim.Optimizer
    autocast: bool = False

    def output_and_loss(self) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.autocast):
            y = self.run(self.x)
        return y, F.cross_entropy(y.float(), self.target) if self.labels else (y.float() * self.target).sum()

    def step(self) -> None:
        """One training step: forward, backward, optimizer."""
        _, loss = self.output_and_loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.autocast):
            return self.run(self.x)


class Builder:
    """Makes the contenders of one workload, all from the same weights and the same batch."""

    def __init__(self, workload: Workload, options: Options) -> None:
        torch.manual_seed(0)
        self.workload, self.options = workload, options
        shape = workload.tiny if options.tiny else workload.shape
        self.model = workload.make()
        self.x = torch.randn(shape)
        if workload.images:
            with torch.no_grad():  # statistics of BatchNorm that belong to the weights
                for _ in range(5):
                    self.model(self.x[:16])
        classes = self.model(self.x[:1].expand(2, *shape[1:])).shape[-1]
        self.target = torch.randint(classes, shape[:1]) if workload.images else torch.randn(shape) / self.x.numel()
        self.recipe = lsquant.Recipe.preset(BITS, first_last=workload.first_last)

    @property
    def configuration(self) -> str:
        """What all contenders have in common."""
        ends = f", first and last {self.workload.first_last}" if self.workload.first_last else ""
        kind = "bfloat16 autocast" if self.options.autocast else "float32"
        shape = "x".join(map(str, self.x.shape))
        return f"{self.workload.what}, input {shape}, {kind}, quantized at 4/4 bits{ends}"

    def names(self) -> dict[str, str]:
        """Every contender and the one its ratio is taken to."""
        layouts = {"float, contiguous": FLOAT} if self.workload.images else {}
        best = engines(self.options.device)[-1]
        eager = {FLOAT: FLOAT, **layouts, "LSQ formulation, eager": FLOAT, f"lsquant, {best}": FLOAT}
        return {**eager, COMPILED: COMPILED, "LSQ formulation, compiled": COMPILED, "lsquant, compiled": COMPILED}

    def build(self, name: str) -> Network:
        """A contender by its name."""
        kind, _, how = name.partition(", ")
        sample = self.x[:16]
        if kind == "float":
            model = copy.deepcopy(self.model)
        else:
            model = (quantized if kind == "lsquant" else formulated)(self.model, self.recipe, sample)
        device, images = self.options.device, self.workload.images
        layout = torch.channels_last if images and how != "contiguous" else torch.contiguous_format
        model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
        x = self.x.to(device, memory_format=layout, copy=True).requires_grad_(not images)
        groups: Any = lsquant.param_groups(model, lr=1e-3) if kind == "lsquant" else model.parameters()
        optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)
        run = torch.compile(model, dynamic=False) if how == "compiled" else model
        return Network(model, run, x, self.target.to(device), images, optimizer, self.options.autocast)


def outcome(network: Network, exact: bool) -> dict[str, Tensor]:
    """What a contender computes: both outputs, and the length of the gradient of its weights.

    Raises: RuntimeError where ``exact`` and the output is not that of the eager engine.
    """
    network.model.eval()
    found = {"evaluation": network.evaluate().float()}
    with lsquant.use_engine("eager"):
        if exact and not torch.equal(found["evaluation"], network.evaluate().float()):
            raise RuntimeError("lsquant's output is not that of its eager engine")
    network.model.train()
    output, loss = network.output_and_loss()
    loss.backward()
    weights = [p.grad.norm() for p in network.model.parameters() if p.dim() > 1 and p.grad is not None]
    network.optimizer.zero_grad()
    return {**found, "training": output.detach().float(), "gradient": torch.stack(weights).norm()}


def checked(name: str, network: Network, wanted: dict[str, Tensor], autocast: bool) -> str:
    """Relative differences from the first contender of the kind; raises RuntimeError where they are no rounding.

    Quantized networks are allowed more: where a rounding error flips a code, the difference grows from layer to layer.
    """
    found = outcome(network, exact=name.startswith("lsquant") and not name.endswith("compiled"))
    if not wanted:
        wanted.update(found)
    gaps = {what: float((found[what] - right).norm() / right.norm()) for what, right in wanted.items()}
    text = "off by " + ", ".join(f"{gap:.1e} ({what})" for what, gap in gaps.items())
    allowed = (0.05 if autocast else 1e-3) if name.startswith("float") else (0.5 if autocast else 0.2)
    if not max(gaps.values()) < allowed:
        raise RuntimeError(f"{name} is {text} from others that should compute the same")
    return text


def run(workload: str, options: Options) -> list[Row]:
    """The training step, then the evaluation pass, of one workload."""
    builder = Builder(WORKLOADS[workload], options)
    say(f"{workload}: {builder.configuration}")
    forget_compiled()
    networks, checks = {}, {}
    first: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    names = builder.names()
    for name in options.chosen(names):
        networks[name] = builder.build(name)
        checks[name] = checked(name, networks[name], first[name.startswith("float")], options.autocast)
    found: list[Row] = []
    for phase in (STEP, EVALUATION):
        field = []
        for name, network in networks.items():
            network.model.train(phase == STEP)
            call = network.step if phase == STEP else network.evaluate
            field.append(Contender(name, call, names[name], check=checks[name]))
        measure(field, options)
        new = list(rows(workload, builder.configuration, phase, field, options))
        show(new)
        found += new
        for contender in field if options.profile else ():
            profile(f"{workload} {phase}", contender, options)
    return found
