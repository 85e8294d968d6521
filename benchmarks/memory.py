"""Peak memory of a training step: what autograd keeps, and how far the process grows.

Every measurement is a fresh process, started by ``python benchmarks/speed.py memory``.  Kept: the bytes of the storages
saved for backward, each counted once, without parameters and buffers.  Peak: the largest resident size (VmHWM) during
three steps, less the resident size right before them, after two steps with two samples (compiled: with all, so that
compiling does not count) and after free memory was given back.  The C library keeps freed blocks, and what it cannot
use again, another amount in every process, counts too; so the peak is also taken with glibc told to give every freed
block of 1 MiB or more back, which shows what the step itself needs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from network_speed import Builder, Network
from networks import WORKLOADS
from timing import Contender, Options, Row, rows, say, show
from torch import Tensor

CHOSEN = ("resnet20", "vit")
MIB = 2**20
PHASES = {"kept": "kept for backward", "peak": "peak of the process", "own": "peak, freed blocks given back"}


def kept(network: Network) -> int:
    """Bytes saved for backward by one step, without parameters and buffers."""
    own = [*network.model.parameters(), *network.model.buffers()]
    known = {t.untyped_storage().data_ptr() for t in own}
    alive: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            alive[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _, loss = network.output_and_loss()
        total = sum(storage.nbytes() for storage in alive.values())
    loss.backward()
    network.optimizer.zero_grad()
    return total


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def peak(network: Network) -> int:
    """Bytes by which the process grows during training steps."""
    if network.x.device.type != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        network.step()
        return torch.cuda.max_memory_allocated() - before
    x, target = network.x, network.target
    if network.run is network.model:
        network.x, network.target = x[:2].detach().requires_grad_(x.requires_grad), target[:2]
    for _ in range(2):
        network.step()
    network.x, network.target = x, target
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    before = resident("VmRSS")
    for _ in range(3):
        network.step()
    return resident("VmHWM") - before


def child(workload: str, contender: str, options: Options) -> None:
    """Prints the two numbers of one contender as JSON.  The peak comes first: the process is still small."""
    network = Builder(WORKLOADS[workload], options).build(contender)
    network.model.train()
    grown = peak(network)
    print(json.dumps({"kept": kept(network), "peak": grown}))


def measured(workload: str, contender: str, options: Options, give_back: bool = False) -> dict[str, float]:
    """Run ``child`` in a process of its own; ``give_back``: freed blocks at once."""
    command = [sys.executable, __file__, workload, contender, "--threads", str(torch.get_num_threads())]
    command += ["--device", options.device]
    command += [flag for flag, given in (("--tiny", options.tiny), ("--autocast", options.autocast)) if given]
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": str(MIB)} if give_back else {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"memory of {workload}, {contender}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(options: Options) -> list[Row]:
    """The numbers of every contender, the contenders in turns."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        say("memory: left out, it is read from /proc/self, which Linux alone has")
        return []
    found: list[Row] = []
    for workload in CHOSEN:
        builder = Builder(WORKLOADS[workload], options)
        say(f"memory: {builder.configuration}")
        baselines = builder.names()
        chosen = options.chosen(baselines)
        sizes: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
        for _ in range(options.repeats):
            for name in chosen:
                size, own = (measured(workload, name, options, give_back) for give_back in (False, True))
                sizes[name].append({**size, "own": own["peak"]})
        for what, phase in PHASES.items():
            field = [Contender(n, None, baselines[n]) for n in chosen]
            for contender in field:
                contender.seconds = [size[what] for size in sizes[contender.name]]
            new = list(rows("memory", builder.configuration, phase, field, options, "MiB", 1 / MIB))
            show(new)
            found += new
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="one measurement of memory, in this process")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--autocast", action="store_true")
    a = parser.parse_args(arguments)
    torch.set_num_threads(a.threads)
    child(a.workload, a.contender, Options(device=a.device, tiny=a.tiny, autocast=a.autocast))


if __name__ == "__main__":
    main()
