"""The model fuzzer by hand: ``python tests/fuzz/run.py 0 200``, or one seed, or a case in a file.

Each seed is a random network.  It is prepared, trained and shipped in every form; forms are compared with the trained
network.  A failing network is printed as JSON, made smaller while it fails in the same way.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.fuzz_nets import Case
from helpers.fuzz_run import Run, failure_of


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("first", nargs="?", type=int, default=0, help="the first seed")
    parser.add_argument("end", nargs="?", type=int, help="the seed after the last one; default: one seed")
    parser.add_argument(
        "--case", type=Path, help="a file with a case as JSON, as a failure prints it, instead of seeds"
    )
    parser.add_argument("--onnx-every", type=int, default=1, help="write ONNX files for every n-th seed only")
    parser.add_argument("--without", default="", help="leave out networks with one of these tags, as 'value hook,late'")
    parser.add_argument("--shrink", type=int, default=3, help="how many failing networks are made smaller")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.case is not None:
            failure = failure_of(Case.from_json(options.case.read_text()), Path(folder))
            print(failure or "nothing fails")
            return int(failure is not None)
        seeds = range(options.first, options.first + 1 if options.end is None else options.end)
        run = Run(Path(folder), options.onnx_every, options.without.split(","), loud=sys.stderr.isatty())
        run.over(seeds)
        print(", ".join(f"{name} {count}" for name, count in sorted(run.counts.items())), flush=True)
        for paragraph in run.report(options.shrink):
            print(paragraph, flush=True)
    return int(bool(run.failures))


if __name__ == "__main__":
    sys.exit(main())
