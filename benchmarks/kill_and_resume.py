"""Is a training that was killed and resumed the same, bit for bit, as one that was not?

    python benchmarks/kill_and_resume.py --kills 50 digits --bits 2 --float-epochs 2 --epochs 3

What is not an option of this script goes to `lsquant train`, without --out.  It trains twice undisturbed, in
FOLDER/whole and FOLDER/again, which must be equal.  Then, for every kill, it starts the same training in a new folder,
sends SIGKILL after a random part of the time that the second one took, resumes it by `lsquant train --resume`, and
compares model.safetensors byte for byte, metrics.json and log.jsonl apart from times.  A run that is through before its
kill does not count and is repeated.  The folder of an equal run is deleted, one that differs is kept.  Exit code 0 if
all were equal.

The runs are children of this process, forked after it has imported what the first one imported, so that a kill costs no
start of Python and falls into the training, not into imports.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from lsquant.cli import main as lsquant

CLOCK = ("seconds", "samples_per_second", "targets_per_second")


def child(*arguments: object, output: Path) -> int:
    """The process id of a child that runs `lsquant` with these arguments; it prints to the file `output`."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with open(output, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                status = lsquant([str(a) for a in arguments])
            output.with_suffix(".modules").write_text("\n".join(sys.modules))
        finally:
            os._exit(status)
    return pid


def ended(pid: int) -> int:
    """The status of a child that ends by itself or was killed: an exit code, or minus a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(output: Path, *arguments: object) -> None:
    if status := ended(child("train", *arguments, output=output)):
        raise SystemExit(f"lsquant train ended with {status}:\n{output.read_text()}")


def content(run: Path) -> tuple[bytes, list[dict], dict]:
    """Model, log and metrics of a finished run, without the times."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for row in rows:
        for name in CLOCK:
            row.pop(name, None)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics.pop("seconds")
    return (run / "model.safetensors").read_bytes(), rows, metrics


def differences(run: Path, whole: tuple[bytes, list[dict], dict]) -> list[str]:
    names = ("model.safetensors", "log.jsonl", "metrics.json")
    return [name for name, a, b in zip(names, content(run), whole, strict=True) if a != b]


def kill_and_resume(folder: Path, kills: int, seed: int, arguments: list[str]) -> list[tuple[float, list[str]]]:
    """(share of the whole time after which it was killed, names of the files that differ) for every kill."""
    train(folder / "whole.txt", *arguments, "--out", folder / "whole")
    for name in (folder / "whole.modules").read_text().splitlines():
        with contextlib.suppress(ImportError):  # the task's own file
            importlib.import_module(name)
    began = time.monotonic()
    train(folder / "again.txt", *arguments, "--out", folder / "again")
    length, rng, found = time.monotonic() - began, random.Random(seed), []
    whole = content(folder / "whole")
    if different := differences(folder / "again", whole):
        raise SystemExit(f"two runs left alone differ in {', '.join(different)}: {folder}")
    while len(found) < kills:
        run, output = folder / str(len(found)), folder / f"{len(found)}.txt"
        at = rng.random()
        pid = child("train", *arguments, "--out", run, output=output)
        time.sleep(at * length)
        os.kill(pid, signal.SIGKILL)  # nothing happens if it has ended: it is waited for only below
        if (status := ended(pid)) == 0:
            shutil.rmtree(run)
            continue
        if status != -signal.SIGKILL:
            raise SystemExit(f"the run in {run} ended with {status} by itself:\n{output.read_text()}")
        rows = len((run / "log.jsonl").read_text().splitlines()) if (run / "log.jsonl").exists() else 0
        train(output, *arguments, "--resume", "--out", run)
        different = differences(run, whole)
        found.append((at, different))
        said = f"differs: {', '.join(different)}, kept in {run}" if different else "equal"
        print(f"{len(found)}/{kills} killed after {at:.0%} of the time, {rows} epochs: {said}", flush=True)
        if not different:
            shutil.rmtree(run)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="how many (default 50)")
    parser.add_argument("--kill-seed", type=int, default=0, metavar="N", help="seed of the random points (default 0)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to run, an empty folder (default: a new one)")
    options, arguments = parser.parse_known_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    found = kill_and_resume(folder, options.kills, options.kill_seed, arguments)
    equal = sum(not different for _, different in found)
    print(f"{equal} of {len(found)} runs ended with the bits of the run that was not killed")
    if equal == len(found) and options.folder is None:
        shutil.rmtree(folder)
    return 0 if equal == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
