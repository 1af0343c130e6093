"""The compose file, read by docker-compose itself."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_docker_compose_reads_it_and_the_dashboard_is_local():
    if shutil.which("docker-compose") is None:
        pytest.skip("needs docker-compose on PATH")
    done = subprocess.run(["docker-compose", "config"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "127.0.0.1:8080:8080" in done.stdout
    assert "studies:/data" in done.stdout
