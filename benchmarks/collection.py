"""What the log collects while training, as a share of the training step.

``python benchmarks/speed.py collection``.  Looks at oscillating weights: EVERY calls, one of which looks, by EVERY.
End of an epoch: steps, R and guards of every quantizer and clip rates on SAMPLE inputs, by the steps of an epoch.
Both are timed alone, in turns with the step: a hundredth more would be lost in the spread of a step.
"""

from __future__ import annotations

from network_speed import Builder, Network
from networks import WORKLOADS, Workload
from timing import Contender, Options, Row, measure, rows, say, show

from lsquant.tasks.digits import DigitsNet
from lsquant.training import clip_rates
from lsquant.training.facts import quantizer_facts
from lsquant.training.oscillation import EVERY, WINDOW, Oscillation

SAMPLE = 32
STEP, LOOKS, END = "training step", "looks, by step", "end of an epoch, by step"
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

    looks(EVERY * (WINDOW + 1))
    return [Contender(STEP, network.step, STEP), Contender(LOOKS, looks, STEP), Contender(END, end_of_epoch, STEP)]


def run(options: Options) -> list[Row]:
    found: list[Row] = []
    for workload in (WORKLOADS["resnet20"], DIGITS):
        builder = Builder(workload, options)
        say(f"collection: {builder.configuration}")
        part = contenders(builder.build("lsquant, cpp"))
        measure(part, options)
        for contender, times in zip(part, (1, EVERY, STEPS_OF_AN_EPOCH[workload.what]), strict=True):
            contender.seconds = [s / times for s in contender.seconds]
        new = list(rows("collection", builder.configuration, "training", part, options))
        show(new)
        found += new
    return found
