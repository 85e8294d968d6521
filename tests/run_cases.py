"""Run every script of a folder, each alone in an empty folder, and print what it prints: ``make cases CASES=FOLDER``.

A case is a small Python or shell script that shows one behaviour.  The exit code is 1 where a script was ended by a
signal or by the time limit, 2 where the folder holds no script, else 0: what is right, the cases say.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHELLS = {".py": (sys.executable,), ".sh": ("bash",)}
"""Suffix -> what runs it."""


def run(script: Path, limit: float) -> tuple[str, str, bool]:
    """Return (how it ended, its output, whether by itself).  limit: in seconds."""
    bin_folder = Path(sys.executable).parent  # the commands of this environment come first
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*SHELLS[script.suffix], str(script)], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            how = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
        except subprocess.TimeoutExpired:
            code, how = -1, f"ended by the time limit of {limit:g} s"
        finally:
            _end(process)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return f"{how}, {time.monotonic() - started:.1f} s", text, code >= 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a script and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder with *.py and *.sh")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a script may take (default: 300)")
    options = parser.parse_args()
    scripts = sorted(p.resolve() for p in options.folder.glob("*") if p.suffix in SHELLS and p.is_file())
    if not scripts:
        print(f"{options.folder} holds no *.py and no *.sh", file=sys.stderr)
        return 2
    by_themselves = True
    for script in scripts:
        how, text, ended = run(script, options.limit)
        by_themselves &= ended
        print(f"---- {script.name}: {how}\n{text}", flush=True)
    return 0 if by_themselves else 1


if __name__ == "__main__":
    sys.exit(main())
