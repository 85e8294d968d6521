"""An own transformer in an own training loop: which symbol occurs most often in a sequence?

    python examples/own_loop_transformer.py

It trains in floating point, then with 3-bit weights and inputs and learned steps, AdamW both times.  ``task`` describes
the same job to the command line, which brings its own loop (with SGD):

    lsquant train examples/own_loop_transformer.py:task --bits 3 --out runs/majority
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant
from lsquant.tasks import Settings

SYMBOLS, LENGTH, WIDTH = 6, 12, 32


class Block(nn.Module):
    """Self-attention and a feed-forward part, each behind a LayerNorm.  (batch, length, WIDTH) to the same."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Network(nn.Module):
    """(batch, LENGTH) symbols to (batch, SYMBOLS) logits."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.symbols(symbols) + self.places(torch.arange(symbols.shape[1], device=symbols.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean(1)))


def batches(count: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random sequences (size, LENGTH), and for each the symbol that occurs most often, the lowest of several."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        symbols = torch.randint(SYMBOLS, (size, LENGTH), generator=generator)
        yield symbols, F.one_hot(symbols, SYMBOLS).sum(1).argmax(1)


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    symbols, labels = next(batches(1, 2000, seed=1))
    return float((model.eval()(symbols).argmax(1) == labels).float().mean())


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for symbols, labels in batches(steps, 64, seed=2):
        loss = F.cross_entropy(model(symbols), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main(out: str = ".", steps: int = 200) -> dict[str, float]:
    """Train, quantize, train again and save into the folder ``out``; returns the accuracies."""
    torch.manual_seed(0)
    model = Network()
    fit(model, torch.optim.AdamW(model.parameters(), 3e-3), steps)
    result = {"float32": accuracy(model)}

    # ---- with lsquant ----
    calibration = list(batches(4, 64, seed=3))
    changes = lsquant.prepare(model, lsquant.Recipe.preset("w3a3"), example_inputs=calibration[0])
    lsquant.calibrate(model, calibration)
    print(changes)
    result["3 bits, not trained"] = accuracy(model)

    # an Adam-type optimizer moves a step by about step_lr an iteration, whatever the gradient: docs/troubleshooting.md
    groups = lsquant.param_groups(model, lr=1e-3, weight_decay=0.01, step_lr=1e-3)
    fit(model, torch.optim.AdamW(groups), steps)
    result["3 bits, learned steps"] = accuracy(model)

    lsquant.save(model, Path(out) / "own_transformer.safetensors")
    for name, value in result.items():
        print(f"{name:24} {value:.1%}")
    return result


class Majority:
    """The job with the members of ``lsquant.tasks.Task``."""

    name = "majority"
    settings = Settings(batch_size=64, float_epochs=4, epochs=4, float_lr=0.1, lr=0.02, clip_norm=1.0)

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}  # what else it is made from, for the run's config.toml

    def model(self) -> nn.Module:
        return Network()

    def example_input(self) -> Tensor:
        return next(batches(1, 1, seed=0))[0]

    def batches(self, split: str, *, batch_size: int, seed: int = 0, epoch: int = 0) -> Iterator[Any]:
        first = {"train": 1000 * seed + 10 + epoch, "calibration": 3, "test": 1}[split]
        return batches(self.steps_per_epoch(batch_size), batch_size, first)

    def steps_per_epoch(self, batch_size: int) -> int:
        return 100

    def metric(self, model: nn.Module) -> dict[str, float]:
        training = model.training
        try:
            return {"accuracy": 100 * accuracy(model)}  # in percent
        finally:
            model.train(training)


task = Majority()

if __name__ == "__main__":
    main(*sys.argv[1:2])
