"""The C++ engine's arithmetic for instruction sets that this processor may not have, against plain loops."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lsquant.kernels.cpp.build import ARITHMETIC, LEVELS, SOURCES

KERNELS = Path(__file__).parents[2] / "src" / "lsquant" / "kernels" / "cpp"
CHECK = Path(__file__).parents[1] / "cpp" / "check_kernels.cpp"
ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64")  # a cross compiler and an emulator


def built(command: str, flags: tuple[str, ...], to: Path) -> Path:
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed")
    sources = [str(KERNELS / name) for name in SOURCES if name != "binding.cpp"]
    options = [*ARITHMETIC, *flags, "-std=c++20", "-w", "-static", f"-I{KERNELS}"]
    subprocess.run([command, *options, str(CHECK), *sources, "-o", str(to)], check=True)
    return to


def passes(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "all equal\n"


@pytest.mark.slow
@pytest.mark.parametrize("level", ["baseline", "AVX2"])
def test_on_this_processor(level: str, tmp_path: Path) -> None:
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if level == "AVX2" and not {"avx2", "fma", "f16c"} <= set(cpu.split()):
        pytest.skip("this processor has no AVX2")
    passes([str(built("g++", LEVELS.get(level, ()), tmp_path / "check"))])


@pytest.mark.slow
def test_on_arm_under_an_emulator(tmp_path: Path) -> None:
    if shutil.which(ARM[1]) is None:
        pytest.skip(f"{ARM[1]} is not installed")
    passes([ARM[1], str(built(ARM[0], (), tmp_path / "check"))])


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("-mavx512vnni",)], ids=["AVX512", "AVX512 VNNI"])
def test_avx512_compiles(extra: tuple[str, ...], tmp_path: Path) -> None:
    built("g++", LEVELS["AVX512"] + extra, tmp_path / "check")
