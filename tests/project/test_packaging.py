"""The wheel, the package with its core dependencies only, and the public surface, written down in public_surface.txt.

After a wanted change of the surface: ``python tests/project/test_packaging.py`` writes the file anew.
"""

from __future__ import annotations

import argparse
import inspect
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import lsquant
from lsquant import Quantizer, QuantSpec, Recipe, Rule
from lsquant.cli.main import parser

ROOT = Path(__file__).resolve().parents[2]
SURFACE = Path(__file__).with_name("public_surface.txt")
FILES = sorted(f.relative_to(ROOT / "src") for f in (ROOT / "src" / "lsquant").rglob("*.py"))

# ---- the public surface ----


def own_names(kind: type, base: type = object) -> Iterator[str]:
    """Public methods with signatures and public properties of a class, beyond those of a base."""
    for name, value in sorted(inspect.getmembers(kind)):
        if name.startswith("_") or getattr(base, name, None) is value:
            continue
        if inspect.isfunction(value) or inspect.ismethod(value):
            yield f"{kind.__name__}.{name}{inspect.signature(value)}"
        elif isinstance(value, property):
            yield f"{kind.__name__}.{name}"


def surface() -> str:
    """Names, signatures, keys of the state dict and flags of the command line, a line each."""
    lines = ["# lsquant: names and signatures"]
    for name in lsquant.__all__:
        value = getattr(lsquant, name)
        if inspect.isclass(value):
            errors = issubclass(value, Exception)
            lines.append(name if errors or value is lsquant.Changes else f"{name}{inspect.signature(value)}")
            if not errors:
                lines += own_names(value, tuple if issubclass(value, tuple) else nn.Module)
        else:
            lines.append(f"{name}{inspect.signature(value)}" if inspect.isfunction(value) else name)
    lines += ["", "# lsquant.nn, lsquant.reference: names"]
    for module in (lsquant.nn, lsquant.reference):
        short = module.__name__.removeprefix("lsquant.")
        for name, value in sorted(vars(module).items()):
            home = getattr(value, "__module__", "") or ""
            if not name.startswith("_") and home.startswith("lsquant.") and (inspect.isclass(value) or callable(value)):
                lines.append(f"{short}.{name}")
    lines += ["", "# state dict of Linear, Conv1d, ConvTranspose2d, Embedding, BatchNorm1d, and of a Quantizer"]
    layers = nn.ModuleDict({
        "linear": nn.Linear(4, 4), "conv": nn.Conv1d(2, 2, 2), "up": nn.ConvTranspose2d(2, 2, 2),
        "words": nn.Embedding(4, 4), "norm": nn.BatchNorm1d(2),
    })  # fmt: skip
    lsquant.prepare(layers, Recipe(4, 4, [Rule("linear", activation=QuantSpec(4, offset=True))]))
    layers["alone"] = Quantizer(QuantSpec(4))
    lines += [
        f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in layers.state_dict().items()
    ]
    lines += ["", "# command line"]
    top = parser()
    commands = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction)).choices
    for name, sub in [("", top), *sorted(commands.items())]:
        for action in sub._actions:
            if not isinstance(action, argparse._SubParsersAction):
                words = (
                    [*action.option_strings, str(action.metavar or "")] if action.option_strings else [action.metavar]
                )
                lines.append(" ".join(filter(None, ["lsquant", name, *map(str, words)])))
    return "\n".join(lines) + "\n"


def test_the_public_surface_is_as_written_down():
    how = "if this is wanted: python tests/project/test_packaging.py, and CHANGELOG.md"
    assert surface() == SURFACE.read_text(), how


def test_all_is_sorted_and_is_what_the_module_has():
    assert lsquant.__all__ == sorted(lsquant.__all__)
    modules = {f.parts[1].removesuffix(".py") for f in FILES}
    public = {n for n in vars(lsquant) if not n.startswith("_")} - modules
    assert public | {"nn", "reference"} == set(lsquant.__all__) - {"__version__"}
    assert all(hasattr(lsquant, name) for name in lsquant.__all__)


# ---- core dependencies only ----

CORE_ONLY = """
import importlib.metadata as metadata, re, sys

def closure(names):
    known = set()
    while names:
        name = re.sub("[-_.]+", "-", names.pop()).lower()
        if name in known:
            continue
        known.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another system
        names += [re.split("[ ;<>=!~\\\\[(]", r)[0] for r in required if "extra ==" not in r]
    return known

core = closure(["torch", "numpy", "safetensors"])
tops = metadata.packages_distributions()
blocked = {top for top, owners in tops.items() if not {re.sub("[-_.]+", "-", o).lower() for o in owners} & core}
blocked -= {"lsquant"}
assert {"onnx", "onnxruntime", "sklearn", "pytest"} & set(tops) <= blocked, sorted(blocked)

class Without:
    # one of the finders of Python, blind to the blocked names

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, *rest)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)

import torch
from torch import nn
import lsquant, lsquant.cli

def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(36, 8), nn.Linear(8, 3),
    )

torch.manual_seed(0)
model, x = net(), torch.randn(8, 1, 8, 8)
print(lsquant.prepare(model, lsquant.Recipe.preset("w4a4"), example_inputs=x))
lsquant.calibrate(model, [x])
optimizer = torch.optim.SGD(lsquant.param_groups(model, lr=0.01, weight_decay=1e-4), momentum=0.9)
for _ in range(3):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), torch.arange(8) % 3)
    loss.backward()
    optimizer.step()
assert not [f for f in lsquant.check(model, optimizer, [x]) if f.severity == "error"]
lsquant.sensitivity(model, [x], lambda y, _: float(y.square().mean()))
lsquant.save(model, "m.safetensors")
other = lsquant.load(net(), "m.safetensors")
assert torch.equal(other.eval()(x), model.eval()(x))
assert list(lsquant.integer_weights(model)) == ["0", "5", "6"]
lsquant.export_packed(model, "p.safetensors")
assert lsquant.verify(model, "p.safetensors", [x]).exact
with open("an.onnx", "wb") as file:
    file.write(bytes([8, 10]) + bytes(8))  # begins as an ONNX file does
for use, extra in (
    (lambda: lsquant.export_onnx(model, "m.onnx", x), "lsquant[onnx]"),
    (lambda: lsquant.verify(model, "an.onnx", [x]), "lsquant[onnx]"),
):
    try:
        use()
    except lsquant.LsquantError as error:
        assert extra in str(error), error
    else:
        raise AssertionError(extra)
assert lsquant.cli.main(["env", "--json"]) == 0
assert lsquant.cli.main(["train", "digits", "--bits", "2", "--out", "run", "--quiet"]) == 3
lsquant.revert(model)
"""


def test_core_dependencies_suffice(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", CORE_ONLY],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 layers quantized" in done.stdout
    assert "lsquant[digits]" in done.stderr


# ---- the wheel ----


def run(*command: object, cwd: Path) -> str:
    """Output of a command that must succeed, without this repository on its path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    environment |= {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources with the build tools that are installed; nothing is downloaded."""
    for package in ("setuptools", "pip"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder / "dist")
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=folder)
    (found,) = (folder / "dist").iterdir()
    return found


@pytest.mark.slow
def test_what_is_in_the_wheel(wheel):
    assert wheel.name == f"lsquant-{lsquant.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"lsquant-{lsquant.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        typed = archive.read("lsquant/py.typed")
    assert {str(f) for f in FILES} | {"lsquant/py.typed"} <= names
    assets = {str(f.relative_to(ROOT / "src")) for f in (ROOT / "src/lsquant/report/assets").rglob("*") if f.is_file()}
    assert {"lsquant/report/assets/page.html", "lsquant/report/assets/vendor/uPlot.LICENSE.txt"} <= assets <= names
    assert typed == b""
    assert f"{info}/licenses/LICENSE" in names
    assert all(name.startswith(("lsquant/", f"{info}/")) for name in names), sorted(names)
    assert not [n for n in names if "test" in n or n.endswith((".pyc", ".so"))]
    assert "lsquant = lsquant.cli:main" in entry_points
    assert "License-Expression: Apache-2.0" in metadata
    required = {line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line}
    core = ("torch>=2.11", "numpy>=1.26", "safetensors>=0.5", "filelock>=3.21")
    assert required == {f"Requires-Dist: {name}" for name in core}


@pytest.mark.slow
def test_the_installed_wheel_runs_the_line_from_another_folder(wheel, tmp_path):
    """In an environment of its own; torch and the other dependencies are those of the present one."""
    for package in ("sklearn", "onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    place = tmp_path / "venv"
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "present.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    work = tmp_path / "elsewhere"
    work.mkdir()
    where = run(python, "-c", "import lsquant; print(lsquant.__file__)", cwd=work)
    assert Path(where.strip()).is_relative_to(site)
    command = place / "bin" / "lsquant"
    assert run(command, "--version", cwd=work).strip() == f"lsquant {lsquant.__version__}"
    tiny = ("--float-epochs", 2, "--epochs", 1, "--batch-size", 80, "--threads", 1)
    run(command, "train", "digits", "--bits", 2, "--out", "run", *tiny, cwd=work)
    run(command, "export", "run", cwd=work)
    assert "exact: equal outputs, bit for bit" in run(command, "verify", "run", cwd=work)
    run(command, "report", "run", cwd=work)
    assert (work / "run" / "report.html").stat().st_size > 1000
    run(python, "-m", "lsquant", "eval", "run", "--json", cwd=work)


if __name__ == "__main__":
    SURFACE.write_text(surface())
