"""``make cases``: each script alone in an empty folder, with its name, exit code and output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RUNNER = Path(__file__).parents[1] / "run_cases.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUNNER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_scripts_run_alone_and_print(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import os; print(os.listdir()); open('left', 'w').close()")
    (tmp_path / "b.py").write_text("import os, sys; print(os.listdir(), file=sys.stderr); raise SystemExit(3)")
    (tmp_path / "c.sh").write_text("ls; command -v python; exit 1")
    (tmp_path / "README.md").write_text("no script")
    found = run(tmp_path)
    assert found.returncode == 0, found.stderr
    lines = [line for line in found.stdout.splitlines() if line]
    assert lines[0].startswith("---- a.py: exit code 0, ")
    assert lines[1] == "[]"
    assert lines[2].startswith("---- b.py: exit code 3, ")
    assert lines[3] == "[]"
    assert lines[4].startswith("---- c.sh: exit code 1, ")
    assert lines[5] == str(Path(sys.executable).parent / "python")
    assert sorted(os.listdir(tmp_path)) == ["README.md", "a.py", "b.py", "c.sh"]


def test_what_does_not_end_by_itself_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    (tmp_path / "b.sh").write_text("echo begun; sleep 100 & sleep 100")
    found = run(tmp_path, "--limit", 3)
    assert found.returncode == 1
    assert "a.py: ended by SIGKILL" in found.stdout
    assert "b.sh: ended by the time limit of 3 s" in found.stdout
    assert "begun" in found.stdout


def test_a_folder_without_scripts(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert found.returncode == 2
    assert "holds no *.py and no *.sh" in found.stderr
