"""The dashboard, over HTTP."""

from __future__ import annotations

import json
import re
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from forked_python import ForkedPython
from optuna_dashboard._app import create_app

from storage.dashboard import serve
from storage.errors import DashboardAddressError, StoreNotFoundError
from storage.roles import create_reader
from storage.store import StudyStore
from storage.trials import TrialResult

Start = Callable[..., ForkedPython]
SERVE = """
import sys, warnings
warnings.simplefilter("ignore")  # what its dependencies say of their next versions
from storage.dashboard import serve
ready = lambda address: print(address, flush=True)
serve(sys.argv[1], host=sys.argv[3], port=0, allow_writes=sys.argv[2] == "True", on_ready=ready)
print("ended", flush=True)
"""


@dataclass(frozen=True)
class Dashboard:
    process: ForkedPython
    address: str

    def ask(
        self, path: str, method: str = "GET", body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        request = urllib.request.Request(
            self.address.removesuffix("/dashboard") + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **(headers or {})},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def json(self, path: str) -> Any:
        status, body = self.ask(path)
        assert status == 200, body
        return json.loads(body)


def _open(start: Start, url: str, *, allow_writes: bool = False, host: str = "127.0.0.1") -> Dashboard:
    process = start(SERVE, url, str(allow_writes), host)
    address = process.stdout.readline().strip()
    assert address.startswith(f"http://{host}:"), process.communicate()[1]
    return Dashboard(process, address)


@pytest.fixture
def filled(store: StudyStore) -> StudyStore:
    """A study with a finished trial that has a curve and an artifact."""
    study = store.create_or_resume("digits", identity={"seed": 0}, configuration={})
    trial = study.ask({"abs": optuna.distributions.CategoricalDistribution([False, True])})
    csv = store.write_artifact("curve.csv", b"rate,accuracy\n0,0.98\n")
    store.finish(trial, TrialResult(0.6, {0: 0.98, 50: 0.7}, {"auc": 0.6}, (csv,)))
    return store


def test_study_is_shown_with_curve_and_artifacts(filled: StudyStore, url: str, start: Start) -> None:
    plot = filled.add_artifact(filled.load("digits"), "best.png", b"\x89PNG plot")
    dashboard = _open(start, url)
    [summary] = dashboard.json("/api/studies")["study_summaries"]
    assert summary["study_name"] == "digits"
    study_id = summary["study_id"]
    detail = dashboard.json(f"/api/studies/{study_id}")
    assert detail["has_intermediate_values"]
    assert [each["artifact_id"] for each in detail["artifacts"]] == [plot]
    [trial] = detail["trials"]
    assert trial["state"] == "Complete"
    assert trial["intermediate_values"] == [{"step": 0, "value": 0.98}, {"step": 50, "value": 0.7}]
    [artifact] = trial["artifacts"]
    assert artifact["filename"] == "curve.csv"
    path = f"/artifacts/{study_id}/{trial['trial_id']}/{artifact['artifact_id']}"
    assert dashboard.ask(path) == (200, b"rate,accuracy\n0,0.98\n")
    assert dashboard.ask(f"/artifacts/{study_id}/{plot}") == (200, b"\x89PNG plot")
    status, page = dashboard.ask("/dashboard")
    assert status == 200
    assert b"<html" in page


def test_trials_that_finish_meanwhile_appear_with_later_plots(filled: StudyStore, url: str, start: Start) -> None:
    dashboard = _open(start, url)
    study = filled.load("digits")
    trial = study.ask()
    filled.finish(trial, TrialResult(0.7, {0: 0.9}))
    filled.add_artifact(trial, "curve.png", b"png")
    detail = dashboard.json(f"/api/studies/{study._study_id}")
    assert [each["state"] for each in detail["trials"]] == ["Complete", "Complete"]
    assert [each["filename"] for each in detail["trials"][1]["artifacts"]] == ["curve.png"]


def test_artifacts_come_from_a_bucket(
    postgresql_server: Any, bucket: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_ARTIFACTS", f"s3://{bucket}/studies")
    url = postgresql_server.new_database()
    with StudyStore.open(url) as store:
        study = store.create_or_resume("digits", identity={}, configuration={})
        plot = store.add_artifact(study, "best.png", b"\x89PNG plot")
    assert _open(start, url).ask(f"/artifacts/{study._study_id}/{plot}") == (200, b"\x89PNG plot")


WRITES = [
    ("DELETE", "/api/studies/{study}", None),
    ("POST", "/api/studies/{study}/rename", {"study_name": "stolen"}),
    ("POST", "/api/studies", {"study_name": "new", "directions": ["maximize"]}),
    ("PUT", "/api/studies/{study}/note", {"version": 1, "body": "note"}),
    ("POST", "/api/trials/{trial}/tell", {"state": "Fail"}),
    ("DELETE", "/api/artifacts/{study}/{trial}/{artifact}", None),
    ("POST", "/incompatible-rdb-schema", None),
]


def test_nothing_is_written_by_default(filled: StudyStore, url: str, start: Start) -> None:
    study = filled.load("digits")
    [artifact] = list(filled.artifacts.directory.iterdir())
    names = {"study": study._study_id, "trial": study.trials[0]._trial_id, "artifact": artifact.name}
    dashboard = _open(start, url)
    for method, path, body in WRITES:
        status, answer = dashboard.ask(path.format(**names), method, body)
        assert (status, "--allow-writes" in answer.decode()) == (403, True), (method, path)
    assert [summary.name for summary in filled.summaries()] == ["digits"]
    assert study.best_value == 0.6
    assert artifact.exists()


def test_every_page_is_shown_to_the_read_only_role(
    postgresql_server: Any, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose writes the database refuses, even where the dashboard lets them pass."""
    monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path / "artifacts"))
    url = postgresql_server.new_database()
    with StudyStore.open(url) as store:
        study = store.create_or_resume("digits", identity={"seed": 0}, configuration={})
        for value in (0.5, 0.6):
            trial = study.ask({"abs": optuna.distributions.CategoricalDistribution([False, True])})
            csv = store.write_artifact("curve.csv", b"0,0.98")
            store.finish(trial, TrialResult(value, {0: 0.98, 50: 0.7}, artifacts=(csv,)))
        plot = store.add_artifact(study, "best.png", b"png")
        role = f"dashboard_{study._study_id}_{url[-8:]}"
        create_reader(url, role, "p4ssw0rd")
        dashboard = _open(start, url.replace("owner:s3cret%25word", f"{role}:p4ssw0rd"), allow_writes=True)
        owners = _open(start, url)
        values = {
            "study_id": str(study._study_id),
            "trial_id": str(trial._trial_id),
            "filename": "bundle.js",
            "": "/studies",
        }
        seen = 0
        for route in create_app(optuna.storages.InMemoryStorage()).routes:
            if route.method != "GET":
                continue
            artifact = csv.artifact_id if "<trial_id" in route.rule else plot
            for plot_type in PLOTS if "<plot_type" in route.rule else [""]:
                filling = {**values, "artifact_id": artifact, "plot_type": plot_type}
                path = _filled(route.rule, filling)
                status, body = dashboard.ask(path)
                # Plots that are drawn here take plotly, which the pages don't use unless told to.
                assert status == (owners.ask(path)[0] if plot_type else 200), (path, body)
                seen += 1
        assert seen > 15
        before = store.summaries(), study.trials
        names = {"study": study._study_id, "trial": trial._trial_id, "artifact": csv.artifact_id}
        for method, path, body in WRITES:
            if "artifacts" in path:  # a file, which the database doesn't guard
                continue
            status, _ = dashboard.ask(path.format(**names), method, body)
            assert status >= 400, (method, path)
        assert (store.summaries(), store.load("digits").trials) == before


def _filled(rule: str, values: dict[str, str]) -> str:
    """A route's rule with values in place of its `<name:type>`."""
    return re.sub(r"<(\w*)(?::[^<>]*)?>", lambda match: values[match[1]], rule)


PLOTS = ["contour", "slice", "parallel_coordinate", "rank", "edf", "timeline", "param_importances", "pareto_front"]


def test_writes_work_when_allowed(filled: StudyStore, url: str, start: Start) -> None:
    dashboard = _open(start, url, allow_writes=True)
    study_id = filled.load("digits")._study_id
    status, _ = dashboard.ask(f"/api/studies/{study_id}/rename", "POST", {"study_name": "renamed"})
    assert status == 201
    [summary] = filled.summaries()
    assert summary.name == "renamed"
    renamed_id = filled.load("renamed")._study_id
    status, _ = dashboard.ask(f"/api/studies/{renamed_id}", "DELETE", {})
    assert status == 204
    assert filled.summaries() == []


@pytest.mark.parametrize(("host", "rebound"), [("127.0.0.1", 403), ("127.0.0.2", 403), ("0.0.0.0", 200)])
def test_pages_from_elsewhere_neither_read_nor_write(
    filled: StudyStore, url: str, start: Start, host: str, rebound: int
) -> None:
    """Only on all addresses, which the user must ask for, any name is the dashboard's own."""
    dashboard = _open(start, url, allow_writes=True, host=host)
    study_id = filled.load("digits")._study_id
    assert dashboard.json("/api/studies")["study_summaries"]
    for name in ("attacker.example:8080", "[malformed"):
        assert dashboard.ask("/api/studies", headers={"Host": name})[0] == rebound, name
    for origin in ("http://attacker.example", "http://127.0.0.1:1", "null"):
        assert dashboard.ask(f"/api/studies/{study_id}", "DELETE", {}, {"Origin": origin})[0] == 403, origin
    assert [summary.name for summary in filled.summaries()] == ["digits"]
    own = {"Host": "localhost:8080", "Origin": "http://localhost:8080"}
    assert dashboard.ask(f"/api/studies/{study_id}", "DELETE", {}, own)[0] == 204


def test_interrupt_ends_it_in_order(filled: StudyStore, url: str, start: Start) -> None:
    dashboard = _open(start, url)
    dashboard.json("/api/studies")
    dashboard.process.send_signal(signal.SIGINT)
    output, errors = dashboard.process.communicate(timeout=60)
    assert (output, dashboard.process.returncode) == ("ended\n", 0), errors
    assert "Traceback" not in errors


def test_store_without_studies_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="start one with `hpo launch`"):
        serve(url)
    assert not (tmp_path / "studies.db").exists()


def test_port_in_use_is_refused(filled: StudyStore, url: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(DashboardAddressError, match=f"127.0.0.1:{port}: Address already in use; choose another"):
            serve(url, port=port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("no-such-host.invalid", 0)])
def test_impossible_address_is_refused(filled: StudyStore, url: str, host: str, port: int) -> None:
    with pytest.raises(DashboardAddressError, match="choose another --host or --port"):
        serve(url, host=host, port=port)
