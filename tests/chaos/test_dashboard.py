"""The dashboard beside a driver: polled while SQLite is written, and with thousands of trials."""

import json
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from chaos.faults import every
from chaos.launcher import ASK_LOG
from chaos.stub import StubProblem, StubSettings, StubWorker
from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy import insert

from hpo import trials
from hpo.config import resolve
from hpo.driver import identity
from hpo.plots import CURVE_CSV, CURVE_PNG
from storage.store import IDENTITY, StudyStore
from storage.trials import TrialResult, finish


@contextmanager
def dashboard(url: str) -> Iterator[str]:
    """The address of a dashboard over a store, in a process of its own."""
    command = [sys.executable, "-m", "hpo.cli", "dashboard", "--storage", url, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert found is not None
            yield found.group()
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            finally:
                process.kill()


def get(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=60) as response:
        assert response.status == 200
        return response.read()


def trials_on_page(address: str, study_id: int = 1) -> list[dict]:
    """What the page of a study asks for, page by page."""
    return json.loads(get(f"{address}/api/studies/{study_id}?after=0"))["trials"]


def test_the_dashboard_is_polled_on_sqlite(make_study, tmp_path, full, record):
    study = make_study(f"sqlite:///{tmp_path}/studies.db", settings=StubSettings(seconds=0.5 if full else 0.1))
    with study.witness:
        launch = study.start()
        launch.wait_for("1/10  trial")
        with dashboard(study.url) as address:
            counts = []

            def poll() -> bool:
                get(f"{address}/api/studies")
                counts.append(len(trials_on_page(address)))
                return True

            with every(lambda: 1.0, poll) as polls:
                assert launch.end() == 0, launch.log
            poll()
    assert counts == sorted(counts)
    assert counts[-1] == 70
    record(14, study.check(), polls=polls.n)


def test_thousands_of_trials(postgresql_server, make_study, tmp_path, full, record):
    n_stored, n_more = (5000, 50) if full else (150, 10)
    epsilons = ", ".join(f"{number}e-6" for number in range(1, 9))
    rules = '["Epsilon", "ZPlus", "AlphaBeta", "Gamma", "Gamma(0.1)"]'
    groups = "".join(f"{group} = {rules}\n" for group in ("LLR", "MLL", "HLL", "FCL"))
    space_path = tmp_path / "many.toml"
    space_path.write_text(f"[parameters]\n{groups}abs = [false, true]\nepsilon = [{epsilons}]\n")
    study = make_study(
        postgresql_server.new_database(),
        space_path=str(space_path),
        settings=StubSettings(seconds=0.0, n_rates=20),
        options=("--exact",),
    )
    fill(study, n_stored)
    figures = {}
    for n_launched, sampler in enumerate(("grid", "tpe"), start=1):
        study.sampler, study.n_trials = sampler, n_stored + n_launched * n_more
        as_of(study, sampler)
        asks = tmp_path / sampler
        launch = study.start(**{ASK_LOG: str(asks)})
        assert launch.end(600) == 0, launch.log
        seconds = [float(line) for line in asks.read_text().split()]
        assert len(seconds) == n_more
        figures[f"ask_p95_s_{sampler}"] = round(statistics.quantiles(seconds, n=20)[-1], 3)
    with dashboard(study.url) as address:
        start = time.perf_counter()
        get(f"{address}/dashboard/studies/1")
        shown = trials_on_page(address)
        figures["study_page_s"] = round(time.perf_counter() - start, 2)
    assert len(shown) == study.n_trials + 10
    record(13, trials=len(shown), **figures)


def fill(study, n_trials):
    """Write a study as a driver leaves it, in one transaction."""
    worker, space = StubWorker(study.settings), study.space
    distributions = space.distributions()
    with StudyStore.open(study.url) as store:
        files = [store.write_artifact(name, b"") for name in (CURVE_CSV, CURVE_PNG)]
        stored = store.create_or_resume("s", identity=identity_of(study, "grid"), configuration={})
        with store.rdb.engine.begin() as connection:
            for number, composite in enumerate(space.grid()[:n_trials]):
                row = {"number": number, "study_id": stored._study_id, "state": TrialState.RUNNING}
                [trial_id] = connection.execute(
                    insert(models.TrialModel).values(**row, datetime_start=datetime(2026, 1, 1))
                ).inserted_primary_key
                connection.execute(
                    insert(models.TrialParamModel),
                    [
                        {
                            "trial_id": trial_id,
                            "param_name": name,
                            "param_value": distributions[name].to_internal_repr(value),
                            "distribution_json": distribution_to_json(distributions[name]),
                        }
                        for name, value in space.parameters(composite).items()
                    ],
                )
                evaluation = worker.evaluate(composite, "search")
                result = TrialResult(
                    evaluation.figures["auc"],
                    trials.steps(evaluation.curve.rates, evaluation.curve.accuracies),
                    {"role": "search", "composite": composite.to_json(), **trials.attributes(evaluation)},
                    tuple(files),
                )
                finish(connection, trial_id, result)


def identity_of(study, sampler):
    options = {"study": "s", "storage": study.url, "space": study.space_path, "sampler": sampler, "n_trials": 1}
    return identity(resolve(options), study.space, StubProblem(study.settings))


def as_of(study, sampler):
    """Let the stored trials be of a study with another sampler: writing them takes minutes."""
    with StudyStore.open(study.url) as store:
        store.load("s").set_user_attr(IDENTITY, identity_of(study, sampler))
