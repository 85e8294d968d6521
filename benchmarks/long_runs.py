"""The long CIFAR-10 runs: ResNet-20 at low bits, one after another, over as many days as they take.

    python benchmarks/long_runs.py --data DIR --init resnet20.safetensors --teacher resnet56.safetensors

takes the runs of QUEUE (or `--only`) in their order: finished ones are left alone, and one that was stopped goes on,
with the bits of one that was not.  `--out` (runs/long) has a run directory each, `--results` (results/long) a JSON
each.  The JSON is rewritten when a run ends or is stopped by SIGINT or SIGTERM: metrics of every epoch, seed, commits,
versions, hardware, seconds.  A run whose JSON says that it is finished is not made again.  `--collect` only writes
these files, also of runs that were killed.  stderr gets a line an epoch.

While something is timed: `--pause` stops the process where it is, `--continue` lets it go on.

Before the machine is given up: `--keep-state` writes what the run in progress needs to go on, at most 3 MB, to
`--results`/state/RUN.tar.xz.  The first command, in a fresh clone elsewhere, goes on from that file: with the same bits
where the processor is of the same kind, and it says so where it is another.  The file is deleted when the run ends.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lsquant import Recipe
from lsquant._util.errors import UsageError
from lsquant._util.files import atomic_write_bytes, atomic_write_text, json_text, read_json, write_json
from lsquant._util.toml import to_toml
from lsquant.diagnostics.environment import environment
from lsquant.runs.directory import START, TEACHER, sha256
from lsquant.tasks import Run, get_task, is_run, open_run, run_training
from lsquant.training import Log, load_state

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ROOT / "results" / "networks"
LIMIT, LARGEST = 3_000_000, 100_000_000  # bytes of a kept state, and of what it may hold
CHECKPOINT = "last/lsq.safetensors"
STATE = ("config.toml", "recipe.toml", "env.json", "log.jsonl", CHECKPOINT)  # what a run goes on from, with FILES
FILES = ("init", "teacher", "start")  # of a run; whoever goes on has them, so only their SHA-256 are kept


@dataclass(frozen=True)
class Plan:
    """A run.

    preset: the recipe's.  says: in the table of results.  start: the preset of the network of results/networks that it
    starts from (None: the float network).  taught: against --teacher.  settings: others of the run.
    """

    preset: str
    epochs: int
    lr: float
    says: str = ""
    start: str | None = None
    taught: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def bits(self) -> str:
        """Of weights and inputs, e.g. "2/8"."""
        return "/".join(self.preset[1:].split("a"))


# the gradients of the teacher's part are larger at this temperature: lower rates
WARM = {"distill_temperature": 4.0}
SCHEDULED = {"transition_rate": 0.002}
ADAM = {"optimizer": "adam"}
RUNS = {
    # the first results (docs/results.md)
    "w2a2": Plan("w2a2", 40, 0.03),
    "w4a4": Plan("w4a4", 26, 0.05),
    "w3a3": Plan("w3a3", 24, 0.02),
    "w4a4-rate": Plan("w4a4", 15, 0.01, "at another rate"),
    "w3a3-rate": Plan("w3a3", 40, 0.05, "at another rate"),
    "w2a2-teacher": Plan("w2a2", 40, 0.03, "with a teacher", taught=True),
    "w4a4-teacher": Plan("w4a4", 26, 0.05, "with a teacher", taught=True),
    "w3a3-teacher": Plan("w3a3", 24, 0.02, "with a teacher", taught=True),
    "w2a2-more": Plan("w2a2", 10, 0.02, "trained further", "w2a2"),
    "w4a4-more": Plan("w4a4", 6, 0.03, "trained further", "w4a4"),
    "w3a3-more": Plan("w3a3", 14, 0.03, "trained further", "w3a3"),
    "w2a2-distill": Plan("w2a2", 9, 0.02, "further against the float network", "w2a2", settings={"distill": True}),
    "w4a4-distill": Plan("w4a4", 9, 0.02, "further against the float network", "w4a4", settings={"distill": True}),
    "w3a3-distill": Plan("w3a3", 9, 0.02, "further against the float network", "w3a3", settings={"distill": True}),
    "w2a2-next": Plan("w2a2", 12, 0.02, "from the network of a bit more", "w3a3"),
    "w3a3-next": Plan("w3a3", 26, 0.05, "from the network of a bit more", "w4a4"),
    "w2a2-taught": Plan("w2a2", 12, 0.01, "further with a teacher", "w2a2", True, WARM),
    "w4a4-taught": Plan("w4a4", 12, 0.01, "further with a teacher", "w4a4", True, WARM),
    "w3a3-taught": Plan("w3a3", 12, 0.01, "further with a teacher", "w3a3", True, WARM),
    # the pilot of equal budgets (docs/pilot.md)
    "w2a2-sgd": Plan("w2a2", 10, 0.03, "pilot: SGD"),
    "w2a2-sgd-transitions": Plan("w2a2", 10, 0.03, "pilot: SGD, transition rates", settings=SCHEDULED),
    "w2a2-adam": Plan("w2a2", 10, 0.001, "pilot: Adam", settings=ADAM),
    "w2a2-adam-transitions": Plan("w2a2", 10, 0.001, "pilot: Adam, transition rates", settings=ADAM | SCHEDULED),
    "w2a2-sgd-teacher": Plan("w2a2", 10, 0.03, "pilot: SGD, teacher", None, True, WARM),
    "w2a2-sgd-transitions-teacher": Plan(
        "w2a2", 10, 0.03, "pilot: SGD, transition rates, teacher", None, True, WARM | SCHEDULED
    ),
    "w2a2-adam-teacher": Plan("w2a2", 10, 0.001, "pilot: Adam, teacher", None, True, WARM | ADAM),
    "w2a2-adam-transitions-teacher": Plan(
        "w2a2", 10, 0.001, "pilot: Adam, transition rates, teacher", None, True, WARM | ADAM | SCHEDULED
    ),
    "w2a2-transitions": Plan("w2a2", 40, 0.03, "transition rates", settings=SCHEDULED),
    # the long ones
    "w2a2-long": Plan("w2a2", 120, 0.03, "long, transition rates", settings=SCHEDULED),
    "w2a8-long": Plan("w2a8", 120, 0.03, "long, transition rates", settings=SCHEDULED),
    "w3a3-long": Plan("w3a3", 120, 0.03, "long, transition rates", settings=SCHEDULED),
    "w4a4-long": Plan("w4a4", 120, 0.03, "long, transition rates", settings=SCHEDULED),
}
QUEUE = ("w2a2-transitions", "w2a2-long", "w2a8-long", "w3a3-long", "w4a4-long")


def commit() -> str:
    """The commit of the working tree, with a + if it has changes."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def collect(path: Path, results: Path) -> None:
    """One JSON of a run that is there, finished or not."""
    run = open_run(path)
    rows = [row for row in Log(run.file("log.jsonl")).rows() if row["phase"] == "lsq"]
    keep = ("epoch", "loss", "accuracy", "test_loss", "train_accuracy", "lr", "transition_rate", "transition_target",
            "transition_lr", "seconds")  # fmt: skip
    metrics, commits = run.file("metrics.json"), path.with_suffix(".commits")
    result: dict[str, Any] = {
        "run": path.name, "finished": metrics.is_file(), "epochs_done": len(rows), "settings": run.settings.to_dict(),
        "teacher": run.teacher and Path(run.teacher).name, "start": run.start and Path(run.start).name,
        "model": run.task.options["model"],
        "environment": read_json(run.file("env.json")), "commits": [],
        "rows": [{key: row[key] for key in keep if key in row} for row in rows],
    }  # fmt: skip
    if run.settings.transition_rate is not None and run.file(CHECKPOINT).is_file():
        result["trace"] = load_state(run.file(CHECKPOINT))["extras"]["transition"]["trace"]
    if commits.is_file():
        result["commits"] = list(dict.fromkeys(commits.read_text().splitlines()))
    if metrics.is_file():
        result["metrics"] = read_json(metrics)
    write_json(results / f"{path.name}.json", result)


# ---- the state of the run in progress ----


def keep_state(path: Path, results: Path) -> Path:
    """Write `results`/state/RUN.tar.xz; states of finished runs are deleted.

    Raises: UsageError where it would be larger than LIMIT, or where the kept state is further than the run.
    """
    run, file = open_run(path), results / "state" / f"{path.name}.tar.xz"
    checkpoint = run.file(CHECKPOINT).read_bytes()  # before the log: one that is longer than it knows of is cut
    about = {"reached": reached(load_state(run.file(CHECKPOINT))), "commits": "", "sha256": {}}
    if file.is_file() and (further := read_state(file)[0]["reached"]) > about["reached"]:
        raise UsageError(f"{file} is further ({further}) than {path} ({about['reached']}): delete one of the two")
    if path.with_suffix(".commits").is_file():
        about["commits"] = path.with_suffix(".commits").read_text()
    about["sha256"] = {name: sha256(given) for name in FILES if (given := getattr(run, name)) is not None}
    content = {name: checkpoint if name == CHECKPOINT else run.file(name).read_bytes() for name in STATE}
    content["config.toml"] = to_toml(_without_folders(run)).encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in {**content, "about.json": json_text(about).encode()}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    data = lzma.compress(packed.getvalue())
    if len(data) > LIMIT:
        raise UsageError(f"the state of {path.name} takes {len(data):,} bytes, more than {LIMIT:,}")
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(file, data)
    for other in file.parent.glob("*.tar.xz"):
        result = results / f"{other.name.removesuffix('.tar.xz')}.json"
        if result.is_file() and read_json(result)["finished"]:
            other.unlink()
    return file


def _without_folders(run: Run) -> dict[str, Any]:
    """The config of a run with names of files instead of this machine's paths; `restore` writes paths of its own."""
    config = run.config()
    names = {name: Path(config[name]).name for name in FILES if config.get(name) is not None}
    return config | names | {"options": config["options"] | {"data": "data"}, "folder": "."}


def read_state(kept: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What is known about a kept state, and its files by name. Raises: UsageError where it is none."""
    try:
        data = lzma.LZMADecompressor().decompress(kept.read_bytes(), LARGEST)
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            content = {name: archive.extractfile(name).read() for name in (*STATE, "about.json")}  # type: ignore[union-attr]
        about = json.loads(content.pop("about.json"))
        task = tomllib.loads(content["config.toml"].decode())["task"]
        if task != "cifar10" or not {"reached", "commits", "sha256"} <= about.keys():
            raise ValueError(f"task {task!r}")
    except (lzma.LZMAError, tarfile.TarError, KeyError, AttributeError, ValueError, EOFError) as error:
        raise UsageError(f"{kept} is no kept state of a run: {error}") from error
    return about, content


def reached(state: dict[str, Any]) -> list[int]:
    """Epochs and iterations of the next that a checkpoint has done."""
    return [state["at"]["epoch"], state["at"]["step"]]


def restore(kept: Path, run: Run) -> None:
    """Make the run directory of `run`, which names today's files, from a kept state.

    Raises: UsageError where the state is of other settings or another recipe, or a file is another one than then.
    """
    about, content = read_state(kept)
    for name in FILES:
        given, digest = getattr(run, name), about["sha256"].get(name)
        if (given is None) != (digest is None) or (given is not None and sha256(given) != digest):
            raise UsageError(f"{kept}: --{name} {given} is not the file of the run's start (SHA-256 {digest})")
    aside = run.path.with_name(f".{run.path.name}.{os.getpid()}.tmp")
    try:
        (aside / "last").mkdir(parents=True)
        (aside / "export").mkdir()
        for name, data in content.items():
            atomic_write_bytes(aside / name, data)
        old = open_run(aside)
        was, new = old.settings.to_dict(), run.settings.to_dict()
        differ = [f"{key} was {was[key]!r}, not {value!r}" for key, value in new.items() if was[key] != value]
        differ += [] if old.recipe == run.recipe else ["its recipe has other bits"]
        if differ:
            raise UsageError(f"{kept} is of another run: {'; '.join(differ)}")
        for name, place in (("teacher", TEACHER), ("start", START)):
            if (given := getattr(run, name)) is not None:
                atomic_write_bytes(aside / place, Path(given).read_bytes())
        here = replace(run, path=aside, teacher_sha256=old.teacher_sha256)
        atomic_write_text(aside / "config.toml", to_toml({**here.config(), "folder": os.getcwd()}))
        run.path.with_suffix(".commits").write_text(about["commits"])
        os.replace(aside, run.path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    now, then = depends(environment()), depends(read_json(run.file("env.json")))
    differ = [f"{key} {then[key]!r}, here {now[key]!r}" for key in then if now[key] != then[key]]
    says = f"on another machine ({'; '.join(differ)}): not with the same bits" if differ else "with the same bits"
    print(f"{run.path.name}: goes on from {kept}, {says}", file=sys.stderr, flush=True)


def depends(machine: dict[str, Any]) -> dict[str, Any]:
    """What the bits of a run depend on, of the content of env.json."""
    return {key: machine[key] for key in ("processor", "cpu_capability")} | {"torch": machine["packages"]["torch"]}


# ---- the process ----


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the lock of `out`, with this process's number in it. Raises: UsageError where another process has it."""
    with (out / "process").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UsageError(f"process {lock.read()} trains in {out} already") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)


def send(out: Path, number: int) -> None:
    """A signal to the process that trains. Raises: UsageError if there is none."""
    with (out / "process").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:  # held by the process that trains
            lock.seek(0)
            os.kill(int(lock.read()), number)
        else:
            raise UsageError(f"no run is going on in {out}")


def stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def planned(name: str, a: argparse.Namespace) -> Run:
    """The run of that name with today's files."""
    plan, task = RUNS[name], get_task("cifar10", data=a.data, model=a.model)
    options = {"epochs": a.epochs or plan.epochs, "lr": a.lr or plan.lr, "seed": a.seed, "threads": a.threads}
    settings = replace(task.settings, weight_decay_by_bits=True, **{**options, "distill": False, **plan.settings})
    start = None if plan.start is None else str(a.networks / f"cifar10-{a.model}-{plan.start}.safetensors")
    teacher = a.teacher if plan.taught else None
    return Run(a.out / name, task, Recipe.preset(plan.preset), settings, a.init, teacher, start=start)


def train(name: str, a: argparse.Namespace) -> None:
    """One run to its end, from where it is; nothing where its results say that it is finished.

    Raises: UsageError where a kept state is further than the run that is here.
    """
    run, kept, result = planned(name, a), a.results / "state" / f"{name}.tar.xz", a.results / f"{name}.json"
    if result.is_file() and read_json(result)["finished"] and not is_run(run.path):
        print(f"{name}: finished, see {result}", file=sys.stderr, flush=True)
        return
    if not run.file("metrics.json").is_file():
        if kept.is_file() and not is_run(run.path):
            restore(kept, run)
        elif kept.is_file() and run.file(CHECKPOINT).is_file():
            there, here = read_state(kept)[0]["reached"], reached(load_state(run.file(CHECKPOINT)))
            if there > here:
                raise UsageError(f"{kept} is further ({there}) than {run.path} ({here}): delete one of the two")
        print(f"{name}: {'going on' if is_run(run.path) else 'starting'}", file=sys.stderr, flush=True)
        with run.path.with_suffix(".commits").open("a") as file:
            print(commit(), file=file)
    try:
        run_training(run, resume=True, checkpoint_every=100)
        kept.unlink(missing_ok=True)
    finally:
        if is_run(run.path):
            collect(run.path, a.results)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data")
    parser.add_argument("--init")
    parser.add_argument("--teacher")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--epochs", type=int, help="by default those of the plan in this file, as the learning rate")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads: the bits of a run depend on them")
    parser.add_argument("--out", type=Path, default=Path("runs/long"))
    parser.add_argument("--results", type=Path, default=Path("results/long"))
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="RUN", help=", ".join(RUNS))
    parser.add_argument("--networks", type=Path, default=NETWORKS, help="files that runs of low bits start from")
    parser.add_argument("--collect", action="store_true", help="write the JSON of runs, train nothing")
    parser.add_argument("--pause", action="store_true", help="stop the process that trains where it is")
    parser.add_argument("--continue", action="store_true", dest="go_on", help="let a paused process go on")
    parser.add_argument("--keep-state", action="store_true", help="write the state of the run in progress")
    a = parser.parse_args(argv)
    a.only = a.only or (RUNS if a.collect or a.keep_state else QUEUE)
    for folder in (a.out, a.results):
        folder.mkdir(parents=True, exist_ok=True)
    if a.pause or a.go_on:
        return send(a.out, signal.SIGSTOP if a.pause else signal.SIGCONT)
    if a.collect:
        for name in a.only:
            if is_run(a.out / name):
                collect(a.out / name, a.results)
        return None
    if a.keep_state:
        return _keep(a)
    if a.init is None or (a.teacher is None and any(RUNS[name].taught for name in a.only)):
        parser.error("--init and, for runs with a teacher, --teacher are needed")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with alone(a.out):
        for name in a.only:
            train(name, a)
    return None


def _keep(a: argparse.Namespace) -> None:
    """The state of the run in progress; of several the one that went on last."""
    begun = [name for name in a.only if is_run(a.out / name) and (a.out / name / CHECKPOINT).is_file()]
    begun.sort(key=lambda name: (a.out / name / CHECKPOINT).stat().st_mtime, reverse=True)
    for name in begun:
        path = a.out / name
        if not (path / "metrics.json").is_file():
            file = keep_state(path, a.results)
            collect(path, a.results)
            print(f"{file}: {file.stat().st_size:,} bytes", file=sys.stderr)
            return
    print("no run is in progress", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"long_runs: {error}")
