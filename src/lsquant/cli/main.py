"""``lsquant``: parse the arguments, call the command, print its outcome, return the exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, get_args

from lsquant._util import interrupt
from lsquant._util.errors import CannotWrite, LsquantError
from lsquant._util.files import json_text
from lsquant._version import __version__
from lsquant.cli import commands
from lsquant.cli.reporting import report
from lsquant.cli.training import train
from lsquant.formats import DEFAULT, INTEGER_ONLY, file_formats
from lsquant.formats.gguf.blocks import TYPES
from lsquant.formats.onnx.integer import FORMS
from lsquant.recipe import Target
from lsquant.runs import is_run
from lsquant.runs.settings import Autocast, Optimizer
from lsquant.tasks import TASKS
from lsquant.verification import LEVELS, RUNTIMES

OWN_TASK = "the task FILE.py:task of a RUN of your own: nothing that a file names is run"
GOOD, NOT_AS_REQUIRED, USAGE, INTERRUPTED = 0, 1, 2, interrupt.INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; each sets ``run``, a function of the parsed arguments."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as one JSON object")
    common.add_argument("--quiet", action="store_true", help="no progress on stderr")
    common.add_argument("--threads", type=int, metavar="N", help="torch's threads")
    common.add_argument("--seed", type=int, metavar="N", help="seed of every random choice (train; default 0)")
    top = argparse.ArgumentParser(prog="lsquant", description="Learned Step Size Quantization: train, export, verify.")
    top.add_argument("--version", action="version", version=f"lsquant {__version__}")
    subs = top.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: commands.Command, about: str) -> argparse.ArgumentParser:
        text = about[0].upper() + about[1:] + "."
        sub = subs.add_parser(name, help=about, description=text, parents=[common], allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    _train(add("train", train, "train a task's float network, then at low bits with learned steps"))

    sub = add("eval", commands.evaluate, "measure the trained model of a run, or with --task of FILE, on the test data")
    sub.add_argument("path", metavar="RUN", help="run directory, or a FILE: float, of lsquant.save, or packed")
    sub.add_argument("--task", metavar="TASK", help=f"the task that measures FILE, or {OWN_TASK}")
    _task_options(sub)

    sub = add("calibrate", commands.calibrate, "quantize a model of your own without training and save it")
    _own(sub)
    sub.add_argument("--out", required=True, metavar="FILE", help="the file to write, as lsquant.save does")
    sub.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    _bits(sub)
    sub.add_argument("--init", metavar="FILE", help="a float checkpoint (.safetensors) for the model")
    _rules(sub, "rule of the initial steps (default mse)")

    sub = add("export", commands.export, "write the trained integers of a run or FILE as ONNX, packed, GGUF, ...")
    _subject(sub)
    _profile(sub)
    sub.add_argument("--opset", type=int, metavar="N", help="operator set (default: the lowest that suffices)")
    sub.add_argument("--form", choices=FORMS, help="of profile integer (default: qdq)")
    sub.add_argument("--type", choices=TYPES, help="of profile gguf: of weights that it holds exactly (default: q4_0)")
    sub.add_argument("--tokenizer", metavar="PATH", help="of a language model: folder, for gguf also a file")
    sub.add_argument("--out", metavar="FILE", help="default: RUN/export/PROFILE.onnx or packed.safetensors, or by FILE")
    about = "also write inputs, codes and outputs of 4 samples as FILE.npz, and check_vectors.py beside it"
    sub.add_argument("--vectors", metavar="FILE", help=about)

    sub = add("verify", commands.verify_, "compare an exported file with the trained model on the test set")
    _subject(sub)
    _profile(sub)
    sub.add_argument("--file", metavar="FILE", help="the exported file (default: where export writes it)")
    sub.add_argument("--require", choices=LEVELS[1:], default=LEVELS[-1], help="level needed for exit code 0")
    about = f"what runs the file: {', '.join(RUNTIMES)}; another than the profile's first has its own verdict file"
    sub.add_argument("--runtime", choices=RUNTIMES, help=about)
    about = "folder with onnxruntime-web from npm (default: LSQUANT_NODE_MODULES)"
    sub.add_argument("--node-modules", metavar="DIR", help=about)

    about = "write every file that a run can ship as: bytes, time in ONNX Runtime over float, metric and verdict"
    sub = add("compare", commands.compare_, about)
    _subject(sub)
    sub.add_argument("--repeats", type=int, metavar="N", help="rounds of timing, at least 7 (default 15)")
    sub.add_argument("--out", metavar="DIR", help="keep the files there (default: they are deleted)")

    sub = add("check", commands.check_, "find what is wrong with a trained model; exit code 1 if it is an error")
    _subject(sub)

    sub = add("report", report, "write an HTML page about a run, several runs or FILE")
    sub.add_argument("path", nargs="+", metavar="RUN", help="run directories, or with --model a FILE of lsquant.save")
    sub.add_argument("--task", metavar="FILE.py:task", help=OWN_TASK)
    _own(sub)
    sub.add_argument("--out", metavar="FILE", help="default: RUN/report.html, or beside FILE")

    sub = add("figure", commands.figure, "draw the staircase and the gradients of its step, as SVG and PNG")
    sub.add_argument("--out", metavar="DIR", default=".", help="folder (default: here)")
    sub.add_argument("--bits", type=int, default=2, help="2 to 8 (default 2)")
    sub.add_argument("--signed", action="store_true", help="signed levels")
    sub.add_argument("--offset", type=float, metavar="B", help="LSQ+ with this offset, for a step of 1 (try -0.75)")

    add("env", commands.env, "print versions and hardware, for a bug report")
    return top


def _profile(sub: argparse.ArgumentParser) -> None:
    known = file_formats()
    about = f"one of {', '.join(known)} (default {DEFAULT}; of an integer-only RUN {INTEGER_ONLY})"
    sub.add_argument("--profile", choices=known, metavar="P", help=about)


def _subject(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("path", metavar="RUN", help="run directory, or with --model a FILE of lsquant.save or calibrate")
    sub.add_argument("--task", metavar="FILE.py:task", help=OWN_TASK)
    _own(sub)


def _own(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", metavar="PLACE:NAME", help="package.module:build or FILE.py:build, gives a float model")
    about = "package.module:batches or FILE.py:batches, gives batches; DIR where the data of a RUN has moved"
    sub.add_argument("--data", metavar="PLACE:NAME", help=about)
    sub.add_argument("--max-batches", type=int, metavar="N", help="look at no more than N batches of --data")


def _task_options(sub: argparse.ArgumentParser, files: bool = False) -> None:
    about = "folder of the task's data (cifar10), or text files (text)"
    sub.add_argument("--data", metavar="PLACE", help=about, nargs="+" if files else None)
    about = "network of the task (cifar10: resnet20, 32, 44, 56; text: a folder of transformers)"
    sub.add_argument("--model", metavar="NAME", help=about)
    if files:
        sub.add_argument("--valid", nargs="+", metavar="FILE", help="text: measure on these (default: the last 5 %%)")
        sub.add_argument("--sequence", type=int, metavar="N", help="text: tokens of a sample (default 256)")
        sub.add_argument("--eval-tokens", type=int, metavar="N", help="text: measure on N tokens (default 100000)")
        about = "text: compute activations twice instead of keeping them"
        sub.add_argument("--activation-checkpointing", action="store_true", default=None, help=about)
        about = "text: leave embeddings and head in floating point, as vLLM wants them"
        sub.add_argument("--float-embeddings", action="store_true", default=None, help=about)


def _bits(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--bits", type=int, metavar="N", help="bits of weights and activations")
    sub.add_argument("--weight-bits", type=int, metavar="N", help="bits of weights alone")
    sub.add_argument("--activation-bits", type=int, metavar="N", help="bits of activations alone")
    about = "a recipe in TOML instead of --bits, or the name of a preset: w4a4, w4g32, ..."
    sub.add_argument("--recipe", metavar="FILE", help=about)
    about = "8-bit codes between all layers, additions included: an integer-only network (docs/integer-only.md)"
    sub.add_argument("--integer-only", action="store_true", help=about)
    about = "with --integer-only: the runtimes it is for, which decide the type of stored codes (default onnxruntime)"
    sub.add_argument("--target", choices=get_args(Target), help=about)


def _train(sub: argparse.ArgumentParser) -> None:
    known = f"one of {', '.join(TASKS)}, or FILE.py:task of your own; left out with --resume"
    sub.add_argument("task", nargs="?", metavar="TASK", help=known)
    sub.add_argument("--out", required=True, metavar="DIR", help="run directory")
    sub.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    sub.add_argument("--overwrite", action="store_true", help="replace a run that exists")
    _bits(sub)
    _task_options(sub, files=True)
    sub.add_argument("--init", metavar="FILE", help="a float checkpoint (.safetensors) instead of float training")
    about = "train the network of this packed or saved file further, instead of a float one"
    sub.add_argument("--start", metavar="FILE", help=about)
    sub.add_argument("--checkpoint-every", type=int, metavar="N", help="write a checkpoint every N iterations as well")
    sub.add_argument("--tensorboard", action="store_true", help="also write the log's numbers to DIR/tensorboard")
    sub.add_argument("--teacher", metavar="FILE", help="distill from this float checkpoint (.safetensors)")
    boolean = argparse.BooleanOptionalAction
    sub.add_argument("--distill", action=boolean, default=None, help="train against the run's float network as well")
    about = "less weight decay for weights of 2 and 3 bits"
    sub.add_argument("--weight-decay-by-bits", action=boolean, default=None, help=about)
    about = "at low bits: sgd, or adam, adamw with --lr 0.001 by default (default sgd)"
    sub.add_argument("--optimizer", choices=get_args(Optimizer), help=about)
    sub.add_argument("--autocast", choices=get_args(Autocast), help="type of the forward passes in training")
    sub.add_argument("--progressive", type=numbers, metavar="N,N", help="train at these bits first, e.g. 8,4")
    for name, about in _WHOLE.items():
        sub.add_argument(f"--{name}", type=int, metavar="N", help=about)
    for name, about in _REAL.items():
        sub.add_argument(f"--{name}", type=float, metavar="X", help=about)
    _rules(sub, "rule of the initial steps")


def _rules(sub: argparse.ArgumentParser, about: str) -> None:
    for name in ("weight-init", "activation-init"):
        sub.add_argument(f"--{name}", choices=("paper", "mse"), help=about)


_WHOLE = {
    "epochs": "epochs at low bits",
    "float-epochs": "epochs of the float network",
    "batch-size": "samples in a training batch",
    "accumulate": "cut every batch into N parts and add their gradients: less memory",
    "warmup": "iterations in which learning rates rise",
    "progressive-epochs": "epochs at each of --progressive, taken from --epochs",
    "fold-epochs": "the last of --epochs, in the integer-only form (with --integer-only)",
    "bn-batches": "estimate BatchNorm statistics anew on N training batches at the end",
    "calibration-batches": "batches that set the activation steps",
}
_REAL = {
    "lr": "learning rate at low bits",
    "step-lr": "learning rate of the steps (default --lr)",
    "fold-lr": "learning rate of --fold-epochs",
    "float-lr": "learning rate of the float network",
    "momentum": "of SGD",
    "weight-decay": "at low bits",
    "float-weight-decay": "of the float network",
    "clip-norm": "largest norm of the gradient at low bits",
    "transition-rate": "initial share of the low-bit weights that change code in a step, e.g. 0.002 (falls to 0)",
    "distill-weight": "weight of the teacher's part of the loss",
    "distill-temperature": "temperature of the teacher's part of the loss",
    "ema": "decay of an average of the weights, which is evaluated and kept, e.g. 0.999",
}


def numbers(text: str) -> tuple[int, ...]:
    """Parse "8,4"; argparse reports a ValueError."""
    return tuple(int(part) for part in text.split(","))


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Handle SIGTERM, which schedulers and containers send, like Ctrl-C: with a message and exit code 130."""

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 good, 1 result not as required, 2 usage, 3 missing or damaged, 130 interrupted."""
    interrupt.release()
    arguments = None
    try:
        with _terminated_like_interrupted():
            _open_closed_streams()
            arguments = _parsed(argv)
            commands.set_threads(arguments)
            outcome = arguments.run(arguments)
            _print(json_text(outcome.result, indent=2) if arguments.json else outcome.text)
    except LsquantError as error:
        return _fail(f"error: {error}", error.exit_code)
    except OSError as error:  # of the system, while something was read or written
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"error: {place}{error.strerror or error}", CannotWrite.exit_code)
    except KeyboardInterrupt:
        return _fail(f"interrupted{_hint(arguments)}", INTERRUPTED)
    return GOOD if outcome.good else NOT_AS_REQUIRED


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    try:
        return parser().parse_args(argv)
    except SystemExit:  # after --help, --version or a message
        _print("")
        raise


def _fail(text: str, code: int) -> int:
    """Say why on stderr, as far as it can be said, and return the exit code."""
    with suppress(OSError):
        print(f"lsquant: {_printable(text, sys.stderr)}", file=sys.stderr, flush=True)
    return code


def _printable(text: str, stream: Any) -> str:
    """Return a text without what steers a terminal, for it may come from a file, and in characters the stream takes."""
    plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return plain.encode(encoding, "backslashreplace").decode(encoding)


def _hint(arguments: argparse.Namespace | None) -> str:
    """Say how an interrupted training goes on, if it has begun."""
    if arguments is None or arguments.run is not train or not is_run(arguments.out):
        return ""
    return f"; go on with: lsquant train --resume --out {arguments.out}"


def _print(text: str) -> None:
    """Print a result, so that it has arrived.  Raises: CannotWrite where nobody reads stdout, or a disk is full."""
    try:
        print(_printable(text, sys.stdout), end="\n" if text else "", flush=True)
    except LsquantError:
        raise
    except OSError as error:
        # the interpreter flushes again when it ends, which would print a traceback
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise CannotWrite(f"cannot write the result to stdout: {error.strerror or error}") from error


class _Closed:
    """Stands for a stdout that was closed before the program began: a result is lost."""

    def write(self, text: str) -> NoReturn:
        raise CannotWrite("cannot write the result to stdout: it is closed; use >/dev/null where nobody wants it")

    def flush(self) -> None:
        pass


def _open_closed_streams() -> None:
    """Open what is closed of stdin, stdout and stderr, or the next file that is opened takes its place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, this one
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
