"""Integer-only ResNet-20 without training: least squares, importance, corrected biases (docs/integer-only.md).

    python studies/without_training.py --data DIR --init resnet20.safetensors

DIR: the images of CIFAR-10 (docs/cifar10.md).  2,000 training images calibrate, all 10,000 test images measure.
"""

from __future__ import annotations

import argparse
from itertools import islice

import torch

import lsquant
from lsquant import QuantSpec, Recipe, Rule
from lsquant.tasks import get_task, load_float

BATCH, BATCHES, CORRECTED = 250, 8, 4
WEIGHTS = {
    "w4a8, per tensor": QuantSpec(4, True),
    "w4a8, per channel": QuantSpec(4, True, granularity="channel"),
    "w8a8, per channel": QuantSpec(8, True, granularity="channel"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--init", required=True, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = get_task("cifar10", data=arguments.data)
    batches = list(islice(task.batches("calibration", batch_size=BATCH), BATCHES))
    for name, weight in WEIGHTS.items():
        model = load_float(task.model(), arguments.init).eval()
        lsquant.trace(model, task.example_input())
        recipe = Recipe(weight, 8, [Rule("first", 8, 8), Rule("last", 8, 8)], joins=8)
        lsquant.prepare(model, recipe, example_inputs=task.example_input())
        for importance in (False, True):
            lsquant.calibrate(model, batches, weights="mse", importance=importance, again=True)
            how = "with importance" if importance else "least squares"
            print(name, how, task.metric(lsquant.fuse(model)), flush=True)
        lsquant.correct_bias(model, batches, max_batches=CORRECTED)
        print(name, "and correct_bias", task.metric(lsquant.fuse(model)), flush=True)


if __name__ == "__main__":
    main()
