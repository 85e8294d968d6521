"""What the log collects while training, as a share of the training step.

``python benchmarks/speed.py collection``.  Looks at oscillating weights: EVERY calls, one of which looks, by EVERY.
Transitions: what TransitionRate does around every optimizer step.  End of an epoch: steps, R and guards of every
quantizer and clip rates on SAMPLE inputs, by the steps of an epoch.  All are timed alone, in turns with the step: a
hundredth more would be lost in the spread of a step.
"""

from __future__ import annotations

import torch
from network_speed import Builder, Network
from networks import WORKLOADS, Workload
from timing import Contender, Options, Row, measure, rows, say, show

from lsquant.tasks.digits import DigitsNet
from lsquant.training import TransitionRate, clip_rates, param_groups
from lsquant.training.facts import quantizer_facts
from lsquant.training.oscillation import EVERY, WINDOW, Oscillation

SAMPLE = 32
STEP, LOOKS, END = "training step", "looks, by step", "end of an epoch, by step"
TRANSITIONS = "transitions counted"
DIGITS = Workload("network of the digits task", DigitsNet, (64, 1, 8, 8), (8, 1, 8, 8))
STEPS_OF_AN_EPOCH = {"ResNet-20": 391, DIGITS.what: 20}


def contenders(network: Network) -> list[Contender]:
    """The step, EVERY looks with a full window behind them, and what is collected at the end of an epoch."""
    network.model.train()
    network.step()
    oscillation = Oscillation(network.model)

    def looks(times: int = EVERY) -> None:
        for _ in range(times):
            oscillation.look()

    def end_of_epoch() -> None:
        quantizer_facts(network.model)
        oscillation.shares()
        clip_rates(network.model, [network.x[:SAMPLE]], max_batches=1)
        network.model.train()

    # its hooks around a step of an optimizer without gradients, which does nothing
    still = torch.optim.SGD(param_groups(network.model, 0.1, low_bit=True))
    TransitionRate(network.model, still, steps=10**6)

    def transitions() -> None:
        still.zero_grad()
        still.step()

    looks(EVERY * (WINDOW + 1))
    parts = {STEP: network.step, LOOKS: looks, TRANSITIONS: transitions, END: end_of_epoch}
    return [Contender(name, part, STEP) for name, part in parts.items()]


def run(options: Options) -> list[Row]:
    found: list[Row] = []
    for workload in (WORKLOADS["resnet20"], DIGITS):
        builder = Builder(workload, options)
        say(f"collection: {builder.configuration}")
        part = contenders(builder.build("lsquant, cpp"))
        measure(part, options)
        for contender, times in zip(part, (1, EVERY, 1, STEPS_OF_AN_EPOCH[workload.what]), strict=True):
            contender.seconds = [s / times for s in contender.seconds]
        new = list(rows("collection", builder.configuration, "training", part, options))
        show(new)
        found += new
    return found
