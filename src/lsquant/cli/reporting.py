"""``lsquant report``: the page of one run or several, of what is there, saying what is missing; or of FILE."""

from __future__ import annotations

from argparse import Namespace
from glob import escape
from pathlib import Path
from shlex import quote
from typing import Any

from torch import nn

from lsquant._util.errors import LsquantError, UsageError
from lsquant._util.files import require_no_link
from lsquant.cli.outcome import Outcome
from lsquant.cli.subject import BATCH, given
from lsquant.cli.user_model import UserModel
from lsquant.cli.words import measured, results, table
from lsquant.convert import prepare
from lsquant.formats import file_formats
from lsquant.report.model_facts import model_facts
from lsquant.report.page import write_page, write_report
from lsquant.report.run_files import complete, from_log, read_verdict, run_files
from lsquant.runs import Run
from lsquant.tasks import open_run
from lsquant.training.progress import message
from lsquant.training.state import load_model_part, load_model_state

BATCHES = 2  # of the calibration data that the page of a run looks at, unless --max-batches says otherwise
_FLOATS, _PACKED = "quantized weights in float32", "the same packed, with steps"


def report(a: Namespace) -> Outcome:
    """Write the page of the runs, or of FILE."""
    if any(Path(path).is_file() for path in a.path) or a.model is not None or (a.data and not is_folder(a.data)):
        return _report_of_file(a)
    return _report_of_runs(a)


def _report_of_file(a: Namespace) -> Outcome:
    """Write the page about FILE's quantizers, and the verdicts that `verify` left beside it."""
    if len(a.path) > 1:
        raise UsageError("report: a FILE with --model has a page of its own; several RUN are run directories")
    (name,) = a.path
    if a.model is None:
        raise UsageError(f"{name} is a file, not a run directory, and needs --model package.module:build")
    subject, file = UserModel.of(a, name), Path(name)
    model = subject.model()
    path = Path(a.out) if a.out else file.with_suffix(".html")
    if not a.out:
        require_no_link(path)
    found = [read_verdict(one) for one in sorted(file.parent.glob(f"{escape(file.stem)}.*verdict.json"))]
    limit = a.max_batches or 32
    write_report(model, path, subject.check_batches(), max_batches=limit, title=file.name, verdicts=found)
    levels = {v["profile"]: v["level"] for v in found if v["runtime"].startswith(("ONNX", "PyTorch"))}
    return Outcome({"report": str(path), "verdicts": levels}, str(path))


def _report_of_runs(a: Namespace) -> Outcome:
    """Write one page of all runs."""
    if a.data is not None and not Path(a.data).is_dir():
        raise UsageError(f"--data {a.data}: there is no such folder; without --data the run's own is taken")
    if len(a.path) > 1 and a.out is None:
        raise UsageError("report of several runs: say where to write it with --out FILE")
    path = Path(a.out) if a.out else Path(a.path[0]) / "report.html"
    if not a.out:
        require_no_link(path)
    runs = [run_facts(Path(folder), a) for folder in a.path]
    names = ", ".join(run["name"] for run in runs)
    task = runs[0]["config"].get("task")
    write_page(f"lsquant: {task}, {names}" if task and len(runs) == 1 else f"lsquant: {names}", runs, path)
    summaries, lines = zip(*(_summary(run) for run in runs), strict=True)
    for run in runs:
        for text in run["missing"]:
            message(f"{run['name']}: {text}", a.quiet)
    where = [("report", str(path))]
    if len(runs) == 1:
        return Outcome({"report": str(path), **summaries[0]}, table([*lines[0], *where]))
    named = {run["path"]: facts for run, facts in zip(runs, summaries, strict=True)}
    text = "\n\n".join(f"{run['path']}\n{table(some)}" for run, some in zip(runs, lines, strict=True))
    return Outcome({"report": str(path), "runs": named}, f"{text}\n\n{table(where)}")


def is_folder(data: str) -> bool:
    """Tell whether --data says where the data of a run has moved, not which function gives batches."""
    return ":" not in data or Path(data).is_dir()


def run_facts(folder: Path, a: Namespace) -> dict[str, Any]:
    """Return what the page shows of a run: its files, and its model on the calibration data as far as they exist."""
    run = run_files(folder)
    last, missing = run.pop("last"), run["missing"]
    try:
        opened = open_run(folder, **given(a, "task", "data"))
        model = trained(opened, missing)
    except LsquantError as error:
        missing.append(f"no model: {error}")
        run["quantizers"] = from_log(last)
    else:
        run["commands"] = commands_of(opened)
        try:
            batches = opened.task.batches("calibration", batch_size=BATCH, seed=opened.settings.seed)
            facts = model_facts(model, batches, max_batches=a.max_batches or BATCHES)
        except LsquantError as error:
            missing.append(f"no activations: {error}")
            facts = model_facts(model, None)
        run |= facts | {"recipe": run["recipe"] or facts["recipe"]}
    complete(run["quantizers"], last)
    run["results"] = [[key, name, run["metrics"][key]] for key, name in results(run["metrics"])]
    return run


def trained(run: Run, missing: list[str]) -> nn.Module:
    """Return the trained model, or of an unfinished run the model of its last checkpoint. Raises: LsquantError."""
    checkpoints = sorted(run.file("last").glob("lsq*.safetensors"), key=lambda f: f.stat().st_mtime)
    try:
        return run.model()
    except LsquantError as error:
        if not checkpoints:
            raise
        missing.append(f"{error}; shown is the checkpoint {checkpoints[-1].name}")
    model = run.float_model()
    prepare(model, run.recipe, example_inputs=run.task.example_input())
    load_model_state(model, load_model_part(checkpoints[-1]))
    return model.eval()


def _summary(run: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the result for --json, and the lines of the text, of one run."""
    sizes = run.get("sizes", {})
    files = {_FLOATS: sizes["float"], _PACKED: sizes["packed"]} if sizes else {}
    rows = {row.file_name: row for row in file_formats().values()}
    for name, size in run["files"]:
        files[name] = size
        row = rows.get(Path(name).name)
        header = None if row is None else row.header_size(Path(run["path"]) / name)
        if header is not None:
            files[f"{name}: header"] = header
    verdicts = [v for v in run["verdicts"] if {"profile", "runtime", "level"} <= v.keys()]
    lines = [(name, measured(run["metrics"][key])) for key, name in results(run["metrics"])]
    lines += [(name, f"{size:,} bytes") for name, size in files.items()]
    lines += [(f"profile {v['profile']}, {v['runtime']}", _level_in_words(v["level"])) for v in verdicts]
    facts = {"metrics": run["metrics"], "verdicts": {v["profile"]: v["level"] for v in verdicts}, "files": files}
    return facts | {"missing": run["missing"]}, lines


def _level_in_words(level: str) -> str:
    return "exact, level outputs" if level == "outputs" else f"level {level}"


def commands_of(run: Run) -> list[str]:
    """Return the commands that repeat the run, its files and this page."""
    own = f" --task {quote(run.task_name)}" if ":" in run.task_name else ""
    others = [f"lsquant {c} {quote(str(run.path))}{own}" for c in ("export", "verify", "compare", "report")]
    return [train_command(run), *others]


def train_command(run: Run) -> str:
    """Return the command that repeats a run."""
    changed = {k: v for k, v in run.settings.to_dict().items() if v != getattr(run.task.settings, k)}
    if not run.trains_float:  # train refuses options that have no effect
        changed = {k: v for k, v in changed.items() if not k.startswith("float_")}
    if run.settings.optimizer != "sgd":
        changed["lr"] = run.settings.lr  # train has another default for these
        changed = {k: v for k, v in changed.items() if k != "momentum" or run.init is None}
    options = [_option(name, value) for name, value in changed.items() if value is not None]
    files = {"init": run.init, "teacher": run.teacher, "start": run.start}
    given = {**{k: run.task.options.get(k) for k in ("data", "model")}, **files}
    options += [f"--{k} {quote(str(v))}" for k, v in given.items() if v is not None]
    recipe = quote(str(run.file("recipe.toml")))
    return " ".join(["lsquant train", quote(run.task_name), "--recipe", recipe, "--out DIR", *options])


def _option(name: str, value: Any) -> str:
    """Format a setting as on the command line."""
    flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
    if isinstance(value, bool):
        return flag
    return f"{flag} {','.join(map(str, value)) if isinstance(value, tuple) else value}"
