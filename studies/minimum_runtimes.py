"""Which releases of ONNX Runtime run which profile, and do they compute what was trained?

    python studies/minimum_runtimes.py [1.19.2 1.20.1 ...] [--wheels FOLDER]

A network with convolutions (depthwise, transposed), linear layers (one with groups), LSQ+ and BatchNorm is exported in
every profile, with golden vectors.  Each release is installed from PyPI (or from wheels in FOLDER) into a folder of its
own, and runs every file on the vectors in a process of its own, as a device would.  Prints a Markdown table: "equal"
where all outputs have the trained bits, else the largest difference, else the reason why the file is refused.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

import lsquant
from lsquant import QuantSpec, Recipe, Rule

RELEASES = ("1.16.3", "1.18.1", "1.19.2", "1.20.1", "1.22.1", "1.23.2", "1.24.1", "1.26.0", "1.32.0")
OLD_NUMPY = "numpy==1.26.4"  # for releases before 1.19
RUN = """
import sys, numpy, onnxruntime
v = numpy.load(sys.argv[2])
onnxruntime.set_default_logger_severity(4)
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
(y,) = session.run(None, {session.get_inputs()[0].name: v["input/0"]})
print("equal" if y.tobytes() == v["output/0"].tobytes() else f"differs by up to {abs(y - v['output/0']).max():.1e}")
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.up = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ConvTranspose2d(8, 8, 2, 2)
        self.pool, self.hidden, self.head = nn.AvgPool2d(3), nn.Linear(128, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.up(torch.relu(self.depthwise(x) + x)))
        return self.head(torch.relu(self.hidden(self.pool(x).flatten(1))))


def exported(folder: Path) -> dict[str, Path]:
    """Name -> file; each with its vectors, NAME.npz, beside it."""
    found = {}
    x = torch.randn(16, 3, 6, 6)
    for bits, profile, opset in ((4, "exact", None), (4, "qdq", None), (4, "small", None), (2, "small", None),
                                 (2, "small", 21)):  # fmt: skip
        torch.manual_seed(bits)
        model = Net()
        ends = [Rule(name, 8, QuantSpec(8, offset=name == "stem")) for name in ("stem", "head")]
        groups = Rule("hidden", QuantSpec(bits, granularity="group", group_size=32))
        lsquant.prepare(model, Recipe(QuantSpec(bits, granularity="channel"), bits, [*ends, groups]), x)
        lsquant.calibrate(model, [x])
        path = lsquant.export_onnx(model, folder / f"{bits}{profile}{opset}.onnx", x, profile=profile, opset=opset)
        lsquant.export_vectors(model, path.with_suffix(".npz"), x[:4])
        proto = onnx.load(path)
        found[f"`{profile}`, {bits} bits | {proto.opset_import[0].version} | {proto.ir_version}"] = path
    return found


def installed(release: str, folder: Path, wheels: Path | None) -> Path:
    """A folder with this release and nothing else but, for old ones, an old NumPy."""
    place = folder / release
    packages = [f"onnxruntime=={release}"] + ([OLD_NUMPY] if int(release.split(".")[1]) < 19 else [])
    where = ["--find-links", str(wheels)] if wheels else []
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(place),
        *where,
        *packages,
    ]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return place


def verdict(path: Path, place: Path) -> str:
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(path), str(path.with_suffix(".npz"))]
    environment = {**os.environ, "PYTHONPATH": str(place)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 0:
        return done.stdout.strip()
    reason = re.sub(
        r".*?(Failed|Could not|Unsupported|NOT_IMPLEMENTED|INVALID)", r"\1", done.stderr.strip().splitlines()[-1]
    )
    return f"refused: {reason[:90]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", default=RELEASES)
    parser.add_argument("--wheels", type=Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = exported(Path(folder))
        print("| profile | opset | IR | " + " | ".join(a.releases) + " |\n|" + "---|" * (3 + len(a.releases)))
        places = [installed(release, Path(folder), a.wheels) for release in a.releases]
        for name, path in files.items():
            print(f"| {name} | " + " | ".join(verdict(path, place) for place in places) + " |", flush=True)


if __name__ == "__main__":
    main()
