"""The dashboard as a person sees it: a real study in headless Chromium."""

import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

HPO = [sys.executable, "-m", "hpo.cli"]
CHROMIUM = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1600",
    "--virtual-time-budget=20000",
]


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    """Address of a dashboard over a finished study of digits."""
    directory = tmp_path_factory.mktemp("dashboard")
    storage = ["--storage", f"sqlite:///{directory / 'studies.db'}"]
    launch = [*HPO, "launch", *storage, "--study", "pictured", "--n-trials", "2", "--rates", "0,0.3,0.6"]
    subprocess.run(launch, check=True, capture_output=True, timeout=300)
    command = [*HPO, "dashboard", *storage, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            yield re.search(r"http://127\.0\.0\.1:\d+", line).group()
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            finally:
                process.kill()


def chromium(tmp_path, *arguments):
    if shutil.which("chromium") is None:
        pytest.skip("needs Chromium on PATH")
    command = ["chromium", *CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout


def test_study_list_names_the_study(dashboard, tmp_path):
    assert "pictured" in chromium(tmp_path, "--dump-dom", f"{dashboard}/dashboard")


def test_trial_page_shows_the_curve_and_its_artifacts(dashboard, tmp_path):
    picture = tmp_path / "trial.png"
    dom = chromium(
        tmp_path, "--dump-dom", f"--screenshot={picture}", f"{dashboard}/dashboard/studies/1/trials?numbers=0"
    )
    assert "curve.png" in dom
    assert "curve.csv" in dom
    assert "heuristic" in dom


def test_dashboard_answers_over_http(dashboard):
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(f"{dashboard}/api/studies", timeout=5) as answer:
                assert b"pictured" in answer.read()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
