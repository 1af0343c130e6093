"""The dashboard as a person sees it: a real study in headless Chromium."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    "--hide-scrollbars",
    "--virtual-time-budget=20000",
]
N_HEURISTICS = 10
N_TRIALS = 6
N_RATES = 20


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    """Address of a dashboard over a finished study of digits."""
    directory = tmp_path_factory.mktemp("dashboard")
    # A path as short as a person's: it stands in the picture.
    storage = ["--storage", "sqlite:///studies.db"]
    launch = [*HPO, "launch", *storage, "--study", "pictured", "--exact", "--n-trials", str(N_TRIALS)]
    if "HPO_DASHBOARD_PICTURE" not in os.environ:
        launch += ["--evaluation-images", "100"]
    subprocess.run(launch, check=True, cwd=directory, capture_output=True, timeout=300)
    command = [*HPO, "dashboard", *storage, "--port", "0"]
    with subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            yield re.search(r"http://127\.0\.0\.1:\d+", line).group()
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            finally:
                process.kill()


def chromium(tmp_path, address, *arguments, size="1400,1600"):
    """The page's document once its scripts have run."""
    if shutil.which("chromium") is None:
        pytest.skip("needs Chromium on PATH")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = ["chromium", *CHROMIUM, f"--window-size={size}", profile, "--dump-dom", *arguments, address]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout


def fetch(address):
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return answer.read()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def lines_of(plot):
    """What each line of a plot by plotly passes through, in pixels; it leaves out points on straight stretches."""
    lines = plot.split('<g class="trace scatter')[1:]
    paths = [re.search(r'<path class="js-line" d="M([^"]*)"', line).group(1) for line in lines]
    return [np.array([point.split(",") for point in path.split("L")], dtype=float) for path in paths]


def source_of(name, page):
    """The address, on the dashboard, of an artifact that the page shows as a picture."""
    (source,) = re.findall(rf'alt="{re.escape(name)}" src="(/artifacts/[^"]+)"', page)
    return source


def is_picture(content):
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 100


def test_study_list_names_the_study(dashboard, tmp_path):
    assert "pictured" in chromium(tmp_path, f"{dashboard}/dashboard")


def test_study_page_shows_every_curve_and_the_best_trial(dashboard, tmp_path):
    picture = tmp_path / "study.png"
    shot = f"--screenshot={picture}"
    page = chromium(tmp_path, f"{dashboard}/dashboard/studies/1", shot, size="2400,3440")
    study = json.loads(fetch(f"{dashboard}/api/studies/1"))
    values = [trial["values"][0] for trial in study["trials"] if trial["state"] == "Complete"]
    assert len(values) == N_HEURISTICS + N_TRIALS
    assert str(max(values)) in page
    curves = page[page.index('id="graph-intermediate-values"') :]
    assert all(f'data-unformatted="trial #{number} "' in curves for number in range(len(values)))
    drawn = lines_of(curves)
    assert len(drawn) == len(values)
    (left, _), (right, _) = drawn[0][0], drawn[0][-1]
    pixels, accuracies = [], []
    for line, trial in zip(drawn, study["trials"], strict=True):
        accuracy = {each["step"]: each["value"] for each in trial["intermediate_values"]}
        steps = np.round(max(accuracy) * (line[:, 0] - left) / (right - left)).astype(int)
        assert len(accuracy) == N_RATES
        pixels += [*line[:, 1]]
        accuracies += [accuracy[step] for step in steps]
    slope, offset = np.polyfit(accuracies, pixels, 1)
    assert slope < -100
    assert np.abs(slope * np.array(accuracies) + offset - pixels).max() < 0.1
    is_picture(fetch(f"{dashboard}{source_of('study.png', page)}"))
    keep(picture)


def test_trial_page_shows_its_composite_curve_and_artifacts(dashboard, tmp_path):
    page = chromium(tmp_path, f"{dashboard}/dashboard/studies/1/trials?numbers=0")
    assert "heuristic" in page
    assert "curve.csv" in page
    assert "curve.png" in page
    is_picture(fetch(f"{dashboard}{source_of('curve.png', page)}"))


def test_dashboard_answers_over_http(dashboard):
    assert b"pictured" in fetch(f"{dashboard}/api/studies")


def keep(picture):
    """Write the picture that the README shows, where the environment names its file."""
    with Image.open(picture) as image:
        half = image.convert("RGB").resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        assert len(half.getcolors(half.width * half.height)) > 100
        if kept := os.environ.get("HPO_DASHBOARD_PICTURE"):
            half.quantize(128).save(Path(kept), optimize=True)
