"""The rules on how the package is built: which part may import which, what is loaded when."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "lsquant"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports only modules with a strictly lower number, or of its own sub-package. docs/architecture.md has the
# same table. Files named __init__.py and __main__.py directly under lsquant/ are exempt.
LAYERS = {
    "_util": 0,
    "_version": 0,
    "spec": 1,
    "mse": 1,
    "changes": 1,
    "reference": 2,
    "reference_integer": 2,
    "mse_rows": 2,
    "kernels": 3,
    "ops": 4,
    "quantizer": 5,
    "tied": 6,
    "nn": 6,
    "recipe": 7,
    "tying": 7,
    "unsupported": 7,
    "tracing": 7,
    "dataflow": 7,
    "joining": 8,
    "program": 9,
    "convert": 10,
    "calibration": 11,
    "bias_correction": 11,
    "checkpoint": 11,
    "fusion": 11,
    "diagnostics": 12,
    "training": 13,
    "shipped": 14,
    "formats": 15,
    "verification": 16,
    "integrations": 17,
    "runs": 18,
    "report": 19,
    "tasks": 19,
    "cli": 20,
}
NEVER = {"formats": {"kernels", "training"}}
OPTIONAL = {
    *("onnx", "onnxruntime", "onnxscript", "onnx_ir", "sklearn", "matplotlib", "PIL"),
    *("transformers", "accelerate", "lightning", "tensorboard", "triton", "gguf", "openvino", "torchao"),
    *("compressed_tensors", "scipy", "pyarrow", "re2"),
}


def part(file: Path) -> str:
    """The entry of LAYERS a file belongs to: its first folder or its own name."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_module(dotted: str) -> bool:
    path = ROOT / "src" / Path(*dotted.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports(file: Path) -> list[tuple[int, str]]:
    """(line, dotted module) of everything in lsquant that a file imports, at any depth of the code."""
    package = list(file.relative_to(PACKAGE.parent).with_suffix("").parts[:-1])
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for name in node.names:
                full = f"{module}.{name.name}"
                found.append((node.lineno, full if is_module(full) else module))
    return [(line, module) for line, module in found if module.split(".")[0] == "lsquant"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downwards(file):
    if file.parent == PACKAGE and file.stem in ("__init__", "__main__"):
        return
    own = part(file)
    assert own in LAYERS, f"{file.name} is in no row of the table of layers: add it here and to docs/architecture.md"
    for line, module in imports(file):
        where = f"{file.relative_to(ROOT)}:{line} imports {module}"
        names = module.split(".")
        assert len(names) > 1, f"{where}: import from the module that defines the name, not from the package"
        other = names[1]
        assert other in LAYERS, f"{where}, which is in no row of the table of layers"
        assert other == own or LAYERS[other] < LAYERS[own], f"{where}: {LAYERS[own]} may not import {LAYERS[other]}"
        assert other not in NEVER.get(own, ()), f"{where}: {own}/ never imports {other}/ directly"


def test_the_documentation_has_the_same_table():
    rows = re.findall(r"^\| *(\d+) *\| *(.+?) *\|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    documented = {
        name.removesuffix(".py").rstrip("/"): int(number)
        for number, places in rows
        for name in re.findall(r"`([^`]+)`", places)
    }
    assert documented == LAYERS


def test_every_part_is_a_package_or_module_with_init():
    for folder in {file.parent for file in FILES}:
        assert (folder / "__init__.py").exists(), f"{folder.relative_to(ROOT)} has no __init__.py: it would not ship"


def test_no_module_bears_the_name_of_a_public_function():
    lsquant = importlib.import_module("lsquant")
    names = {part(file) for file in FILES} - {"__init__", "__main__"}
    for name in names & set(dir(lsquant)):
        assert inspect.ismodule(getattr(lsquant, name)), f"lsquant.{name} is both a module and something else"


def modules_after(statement: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after `statement`."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_import_loads_no_optional_package():
    ours = modules_after("import lsquant, lsquant.cli")
    bare = modules_after("import torch, numpy, safetensors.torch")
    assert "lsquant" in ours
    assert not (ours - bare) & OPTIONAL


def test_a_training_step_loads_no_compiler():
    step = (
        "import torch, lsquant; m = torch.nn.Sequential(torch.nn.Linear(4, 4)); "
        "lsquant.prepare(m, lsquant.Recipe(4, 4)); x = torch.randn(8, 4); lsquant.calibrate(m, [x]); "
        "m(x).sum().backward()"
    )
    assert "torch._dynamo" not in modules_after(step)


def test_private_names_of_torch():
    """No private module of torch, and no private method of a layer, is imported or called.

    ``TorchDispatchMode`` is public, torch's notes on extending it say so, although its module is not.
    """
    banned = re.compile(r"(from|import) torch\.(\w+\.)*_\w+|torch\._C\b|\._conv_forward\b|\b_VF\b")
    for file in FILES:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            public = line == "from torch.utils._python_dispatch import TorchDispatchMode"
            assert public or not banned.search(line), f"{file.relative_to(ROOT)}:{number}: {line.strip()}"


def test_the_files_that_the_documentation_names_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    walks = re.findall(r"^\d\. (?:Back: )?((?:`[^`]+`(?:, )?)+)", text, re.MULTILINE)
    index = re.findall(r"^\| [^|]+\? \| ([^|]+) \|", text, re.MULTILINE)
    named = {name for part in walks + index for name in re.findall(r"`([^`]+)`", part)}
    assert len(index) >= 15
    files = [name for name in sorted(named) if "/" in name or name.endswith(".py")]
    assert [name for name in files if not (PACKAGE / name).exists()] == []
