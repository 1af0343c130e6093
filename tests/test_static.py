"""Lint, format, types and import rules: the tools' settings are in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = {
    "ruff check": [sys.executable, "-m", "ruff", "check", "."],
    "ruff format": [sys.executable, "-m", "ruff", "format", "--check", "."],
    "mypy": [sys.executable, "-m", "mypy"],
    "import-linter": [str(Path(sys.executable).with_name("lint-imports"))],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_finds_nothing(tool):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(TOOLS[tool], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_machine_path_is_in_the_project():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("the project isn't a git checkout")
    own = Path(__file__).resolve().relative_to(ROOT)
    for name in tracked:
        path = ROOT / name
        if path.exists() and Path(name) != own and path.suffix in {".py", ".md", ".toml", ".yml", ".json", ""}:
            text = path.read_text(errors="ignore")
            assert "/root/" not in text, name
            assert str(ROOT) not in text, name
