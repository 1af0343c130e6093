"""The commands that look after a store: what they print, and how they end."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

from hpo.administration import parse_age
from hpo.cli import cli
from hpo.errors import ConfigurationError
from storage.measurements import MeasurementRecord
from storage.schema import newest_versions
from storage.store import StudyStore
from storage.trials import TrialResult

NEWEST = newest_versions()


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_logging: None) -> None:
    for name in ("HPO_ARTIFACTS", "HPO_DASHBOARD_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HPO_STORAGE", f"sqlite:///{tmp_path / 'studies.db'}")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def hpo(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, arguments, prog_name="hpo")
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def refused(*arguments: str) -> str:
    result = hpo(*arguments, code=1)
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    return line.removeprefix("Error: ")


@pytest.fixture
def store(url: str) -> Iterator[StudyStore]:
    with StudyStore.open(url) as opened:
        yield opened


@pytest.fixture
def messy(store: StudyStore) -> StudyStore:
    """A study with one trial that is complete, two that nobody drives, and an old file that nothing refers to."""
    study = store.create_or_resume("digits", identity={}, configuration={})
    record = store.write_artifact("curve.csv", b"0,1")
    store.finish(study.ask(), TrialResult(0.6, {}, artifacts=(record,)))
    study.ask()
    study.ask()
    lost = store.write_artifact("curve.csv", b"lost")
    os.utime(Path(store.artifacts.location, lost.artifact_id), (0, 0))
    store.write_artifact("curve.csv", b"just written")
    return store


def states(store: StudyStore) -> dict[str, int]:
    return {state.name: count for state, count in store.summaries()[0].n_trials.items()}


# hpo db init


def test_init_says_what_it_has_done(url: str, tmp_path: Path) -> None:
    assert hpo("db", "init").stdout == f"Created the tables of {url}: {NEWEST}.\n"
    assert hpo("db", "init").stdout == f"All tables of {url} were there: {NEWEST}.\n"
    done = json.loads(hpo("db", "init", "--json").stdout)
    versions = {"own": NEWEST.own, "optuna": NEWEST.optuna}
    assert done == {"storage": url, "before": versions, "after": versions, "role": None}
    assert json.loads(hpo("list", "--json").stdout) == []


def test_init_upgrades(store: StudyStore, url: str) -> None:
    with store.rdb.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE hpo_schema")
    line = hpo("db", "init").stdout
    assert line == f"Upgraded the tables of {url}: {NEWEST.optuna} by Optuna's count and 0 by our own -> {NEWEST}.\n"


def test_init_sets_up_the_dashboards_role(postgresql_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = postgresql_server.new_database()
    role = f"dashboard_{url[-8:]}"
    monkeypatch.setenv("HPO_DASHBOARD_PASSWORD", "p4ssw0rd")
    printed = hpo("db", "init", "--storage", url, "--dashboard-role", role, "-v")
    assert printed.stdout.splitlines()[1] == f"Created the role '{role}', which may read every table and write nothing."
    again = hpo("db", "init", "--storage", url, "--dashboard-role", role)
    assert again.stdout.splitlines()[1].startswith(f"The role '{role}' was there; its password")
    for text in (printed.output, again.output):
        assert "p4ssw0rd" not in text
        assert "s3cret" not in text
    reader = url.replace("owner:s3cret%25word", f"{role}:p4ssw0rd")
    with psycopg.connect(reader.replace("+psycopg", "")) as connection:
        assert connection.execute("SELECT count(*) FROM studies").fetchone() == (0,)
    health = json.loads(hpo("db", "check", "--json", "--storage", reader).stdout)
    assert (health["user"], health["may_write"], health["healthy"]) == (role, False, True)
    assert f"{role} may only read" in hpo("db", "check", "--storage", reader).stdout


@pytest.mark.parametrize("password", [None, ""])
def test_init_wants_the_roles_password_in_the_environment(
    password: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if password is not None:
        monkeypatch.setenv("HPO_DASHBOARD_PASSWORD", password)
    expected = "`--dashboard-role reader` takes its password from HPO_DASHBOARD_PASSWORD, which is not set."
    assert refused("db", "init", "--dashboard-role", "reader") == expected
    assert list(tmp_path.iterdir()) == []


def test_init_has_no_role_for_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HPO_DASHBOARD_PASSWORD", "p4ssw0rd")
    assert "is for PostgreSQL, and the store is sqlite:///" in refused("db", "init", "--dashboard-role", "reader")
    assert list(tmp_path.iterdir()) == []


# hpo db check


def test_check_of_a_healthy_store(store: StudyStore) -> None:
    with store.lease("digits") as holder:
        study = store.create_or_resume("digits", identity={}, configuration={})
        study.ask()
        text = hpo("db", "check").stdout
        health = json.loads(hpo("db", "check", "--json").stdout)
    assert text.endswith("All is well.\n")
    assert len(text.splitlines()) < 24
    assert f"pid {holder.pid}" in " ".join(text.split())
    assert health["healthy"]
    assert health["problems"] == []
    assert health["studies"] == [
        {
            "study": "digits",
            "holder": {"host": holder.host, "pid": holder.pid, "started": holder.started},
            "n_trials": {"running": 1},
            "n_orphans": 0,
        }
    ]


def test_check_of_an_unhealthy_store_fails(messy: StudyStore) -> None:
    problem = "Study 'digits' has RUNNING trials that nobody drives (2): launch it, or run `hpo gc`."
    assert hpo("db", "check", code=1).stdout.splitlines()[-1] == f"Problem: {problem}"
    health = json.loads(hpo("db", "check", "--json", code=1).stdout)
    assert (health["healthy"], health["problems"]) == (False, [problem])
    assert health["artifacts"]["n_files"] == 3


def test_check_of_no_store(tmp_path: Path) -> None:
    assert refused("db", "check").startswith("There are no studies at sqlite:///")
    assert list(tmp_path.iterdir()) == []


def test_check_of_a_server_that_is_away_hides_the_password() -> None:
    line = refused("db", "check", "--storage", "postgresql+psycopg://ada:s3cret@127.0.0.1:1/studies")
    assert line.startswith("Cannot reach the store postgresql+psycopg://ada:***@127.0.0.1:1/studies: ")


# hpo gc


def test_gc_without_leftovers(store: StudyStore) -> None:
    assert hpo("gc").stdout == f"Nothing to do in {store.url_masked}.\n"


def test_gc_says_what_it_would_do(messy: StudyStore) -> None:
    before = states(messy), len(list(messy.artifacts.stored()))
    assert hpo("gc", "--dry-run").stdout.splitlines() == [
        f"In {messy.url_masked}:",
        "  release 2 trials of study 'digits' that nobody drives: 1, 2",
        f"  remove 1 file (4 B) that nothing refers to from {messy.artifacts.location}",
    ]
    assert (states(messy), len(list(messy.artifacts.stored()))) == before


def test_gc_clears(messy: StudyStore) -> None:
    lines = hpo("gc", "--yes").stdout.splitlines()
    assert lines[3:] == [
        "Released 2 trials of study 'digits'; a launch goes on with them.",
        f"Removed 1 file (4 B) from {messy.artifacts.location}.",
    ]
    assert states(messy) == {"WAITING": 2, "COMPLETE": 1}
    assert len(list(messy.artifacts.stored())) == 2
    assert hpo("gc").stdout == f"Nothing to do in {messy.url_masked}.\n"
    assert "  remove 1 file (12 B)" in hpo("gc", "--older-than", "0", "--dry-run").stdout


def test_gc_acts_only_when_told_to(messy: StudyStore) -> None:
    before = states(messy)
    result = hpo("gc", code=1)
    assert result.stderr == "Error: Standard input is no terminal to ask at; pass --yes, or --dry-run to look.\n"
    assert states(messy) == before


@pytest.mark.parametrize(("answer", "code", "after"), [(b"n\n", 1, "RUNNING"), (b"y\n", 0, "WAITING")])
def test_gc_asks_at_a_terminal(messy: StudyStore, answer: bytes, code: int, after: str) -> None:
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer)
        done = subprocess.run(
            [sys.executable, "-m", "hpo.cli", "gc"], stdin=theirs, capture_output=True, text=True, timeout=120
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == code, done.stderr
    assert "Go on? [y/N]: " in done.stdout + done.stderr
    assert states(messy)[after] == 2


def test_gc_forgets_old_measurements_where_it_is_told_to(store: StudyStore) -> None:
    record = MeasurementRecord("subject", "origin", "mask", 1000, bytes(125), 10, 100)
    study = store.create_or_resume("digits", identity={}, configuration={})
    store.finish(study.ask(), TrialResult(0.6, {}, measurements=(record,)))
    assert json.loads(hpo("db", "check", "--json").stdout)["measurements"] == {"n": 1, "n_bytes": 125}
    assert "measurements 1 of pruned networks, 125 B" in " ".join(hpo("db", "check").stdout.split())
    for arguments in ([], ["--measurements-older-than", "1h"], ["--measurements-older-than", "9999999h"]):
        assert hpo("gc", *arguments).stdout.startswith("Nothing to do")
    lines = hpo("gc", "--measurements-older-than", "0", "--yes").stdout.splitlines()
    assert lines[1].startswith("  forget 1 measurement written before 2")
    assert lines[2].startswith("Forgot 1 measurement written before 2")
    assert store.measurements({"subject"}) == []


def test_gc_leaves_a_study_alone_that_is_driven(messy: StudyStore) -> None:
    with messy.lease("digits"):
        assert "release" not in hpo("gc", "--dry-run").stdout
        hpo("gc", "--yes")
        assert states(messy)["RUNNING"] == 2


@pytest.mark.parametrize("text", ["", "soon", "-1", "1d", "99999999h", "10000000000000h", "9" * 400])
def test_age_that_is_none(text: str) -> None:
    with pytest.raises(ConfigurationError, match="`--older-than` must be a duration such as 0, 90"):
        parse_age(text)


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("90", 90), ("90s", 90), ("30m", 1800), ("24h", 86400)])
def test_age(text: str, seconds: int) -> None:
    assert parse_age(text).total_seconds() == seconds


# Help


@pytest.mark.parametrize("arguments", [["db"], ["db", "init"], ["db", "check"], ["gc"]])
def test_help_has_examples_and_imports_nothing_heavy(arguments: list[str]) -> None:
    text = hpo(*arguments, "--help").stdout
    examples = text.partition("Examples:\n")[2].splitlines()
    assert examples
    assert all(f"hpo {' '.join(arguments)}" in line for line in examples)
    code = (
        f"import sys\nfrom hpo.cli import cli\ntry: cli({[*arguments, '--help']!r})\nexcept SystemExit: pass\n"
        "print({'torch', 'optuna', 'sqlalchemy', 'rich'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "set()"
