"""Setting up the tables of a store, its health, and what dead drivers leave, on every backend."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from forked_python import ForkedPython
from optuna.trial import TrialState

from storage.engine import prepare
from storage.errors import ArtifactsMismatchError, StorageError, StoreFormatError, StudyInUseError
from storage.health import check
from storage.leftovers import Leftovers, OrphanedTrials, find_leftovers, release_orphans, remove_files
from storage.measurements import Volume
from storage.schema import Versions, newest_versions
from storage.store import StudyStore
from storage.trials import TrialResult

Start = Callable[..., ForkedPython]
NEWEST = newest_versions()
AN_HOUR = timedelta(hours=1)


def statement(store: StudyStore, *texts: str) -> None:
    with store.rdb.engine.begin() as connection:
        for text in texts:
            connection.execute(sqlalchemy.text(text))


# Tables


def test_tables_are_created_once(url: str) -> None:
    assert prepare(url) == (None, NEWEST)
    assert prepare(url) == (NEWEST, NEWEST)
    with StudyStore.open(url, create=False) as store:
        assert store.summaries() == []


def test_store_that_was_launched_on_is_complete(store: StudyStore, url: str) -> None:
    assert prepare(url) == (NEWEST, NEWEST)


def test_tables_of_an_older_optuna_are_upgraded(url: str) -> None:
    with StudyStore.open(url) as store:
        study = store.create_or_resume("digits", identity={"seed": 0}, configuration={})
        store.finish(study.ask(), TrialResult(0.6, {0: 0.98}))
        # What Optuna 3.1 had: the index came with the next revision.
        statement(
            store,
            "DROP INDEX ix_trials_study_id",
            "UPDATE alembic_version SET version_num = 'v3.0.0.d'",
            "UPDATE version_info SET library_version = '3.1.0'",
            "DROP TABLE hpo_schema",
            "DROP TABLE hpo_lease",
        )
    with pytest.raises(StoreFormatError, match="upgrade older ones with `hpo db init`"):
        StudyStore.open(url)
    assert prepare(url) == (Versions(0, "v3.0.0.d"), NEWEST)
    with StudyStore.open(url) as store:
        tables = sqlalchemy.inspect(store.rdb.engine)
        assert ["study_id"] in [index["column_names"] for index in tables.get_indexes("trials")]
        assert store.load("digits").best_value == 0.6
        with store.rdb.engine.connect() as connection:
            version = connection.scalar(sqlalchemy.text("SELECT library_version FROM version_info"))
        assert version != "3.1.0"


def test_tables_of_a_newer_optuna_are_left_as_they_are(url: str) -> None:
    with StudyStore.open(url) as store:
        statement(store, "UPDATE alembic_version SET version_num = 'v99.0.0.a'")
    with pytest.raises(StoreFormatError, match="or update Optuna with"):
        prepare(url)
    with pytest.raises(StoreFormatError, match="or update Optuna with"):
        StudyStore.open(url)


def test_failed_upgrade_changes_nothing(postgresql_server: Any) -> None:
    url = postgresql_server.new_database()
    with StudyStore.open(url) as store:
        # The migration meets an index that it is to create.
        statement(
            store,
            "CREATE INDEX trials_study_id_key ON trials (study_id)",
            "UPDATE alembic_version SET version_num = 'v3.0.0.d'",
            "DROP TABLE hpo_schema",
        )
    with pytest.raises(StorageError, match="already exists"):
        prepare(url)
    engine = sqlalchemy.create_engine(url)
    with engine.connect() as connection:
        assert connection.scalar(sqlalchemy.text("SELECT version_num FROM alembic_version")) == "v3.0.0.d"
        assert not sqlalchemy.inspect(connection).has_table("hpo_schema")
    engine.dispose()


PREPARE = """
import sys
from storage.engine import prepare
print("ready", flush=True)
sys.stdin.readline()
before, after = prepare(sys.argv[1])
print("created" if before is None else "there" if before == after else "upgraded")
"""


def test_ten_processes_create_the_tables_at_once(url: str, start: Start) -> None:
    processes = [start(PREPARE, url) for _ in range(10)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 10, answers
    assert sorted(output for output, _ in answers) == ["created\n", *["there\n"] * 9]
    with StudyStore.open(url, create=False) as store:
        assert store.summaries() == []


# Drivers that die

DRIVE = """
import sys
from storage.store import StudyStore
with StudyStore.open(sys.argv[1]) as store, store.lease("digits"):
    study = store.create_or_resume("digits", identity={}, configuration={})
    for _ in range(3):
        store.ask(study, lambda trial: None)
    store.finish(store.ask(study, lambda trial: None)[0], __import__("storage").TrialResult(0.5, {}))
    print("driving", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def driver(url: str, start: Start) -> ForkedPython:
    """A process that drives study `digits`, with three trials RUNNING and one COMPLETE."""
    process = start(DRIVE, url)
    assert process.stdout.readline() == "driving\n", process.communicate()[1]
    return process


def kill(process: ForkedPython) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_trials_of_a_live_driver_are_no_orphans(driver: ForkedPython, url: str) -> None:
    [study] = check(url).studies
    assert study.holder is not None
    assert study.holder.pid == driver.pid
    assert study.n_orphans == 0
    assert check(url).problems == ()
    with StudyStore.open(url) as store:
        assert not find_leftovers(store, AN_HOUR)
        with pytest.raises(StudyInUseError):
            release_orphans(store, OrphanedTrials("digits", (0, 1, 2)))
        assert store.summaries()[0].n_trials[TrialState.RUNNING] == 3


def test_trials_of_a_killed_driver_are_released(driver: ForkedPython, url: str) -> None:
    kill(driver)
    health = check(url)
    assert [(study.holder, study.n_orphans) for study in health.studies] == [(None, 3)]
    [problem] = health.problems
    assert problem == "Study 'digits' has RUNNING trials that nobody drives (3): launch it, or run `hpo gc`."
    with StudyStore.open(url) as store:
        leftovers = find_leftovers(store, AN_HOUR)
        assert leftovers == Leftovers((OrphanedTrials("digits", (0, 1, 2)),), (), (), Volume(0, 0), None)
        [orphans] = leftovers.orphans
        assert release_orphans(store, orphans) == (0, 1, 2)
        assert store.lease_holder("digits") is None
        assert store.summaries()[0].n_trials == {TrialState.COMPLETE: 1, TrialState.WAITING: 3}
        assert not find_leftovers(store, AN_HOUR)
    assert check(url).problems == ()


# Artifacts


@pytest.fixture(params=["directory", "bucket"])
def _artifacts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    location = str(tmp_path / "artifacts")
    if request.param == "bucket":
        location = f"s3://{request.getfixturevalue('bucket')}/studies"
    monkeypatch.setenv("HPO_ARTIFACTS", location)


@pytest.fixture
def filled(_artifacts: None, store: StudyStore) -> StudyStore:
    """A study with an artifact, and one of a trial."""
    study = store.create_or_resume("digits", identity={}, configuration={})
    store.add_artifact(study, "best.png", b"png")
    store.finish(study.ask(), TrialResult(0.6, {}, artifacts=(store.write_artifact("curve.csv", b"0,1"),)))
    return store


def stored(store: StudyStore) -> set[str]:
    return {file.artifact_id for file in store.artifacts.stored()}


def test_files_that_nothing_refers_to_are_removed_and_no_other(filled: StudyStore, url: str) -> None:
    kept = stored(filled)
    lost = {filled.write_artifact("curve.csv", b"lost").artifact_id for _ in range(3)}
    assert not find_leftovers(filled, AN_HOUR)
    leftovers = find_leftovers(filled, timedelta(seconds=-5))
    assert {file.artifact_id for file in leftovers.files} == lost
    assert (leftovers.orphans, leftovers.uploads) == ((), ())
    assert check(url).problems == ()
    assert {file.artifact_id for file in remove_files(filled, leftovers.files)} == lost
    assert stored(filled) == kept
    assert not find_leftovers(filled, timedelta(seconds=-5))


def test_file_that_is_recorded_meanwhile_stays(filled: StudyStore) -> None:
    study = filled.load("digits")
    record = filled.write_artifact("curve.csv", b"late")
    leftovers = find_leftovers(filled, timedelta(seconds=-5))
    assert [file.artifact_id for file in leftovers.files] == [record.artifact_id]
    filled.finish(study.ask(), TrialResult(0.7, {}, artifacts=(record,)))
    assert remove_files(filled, leftovers.files) == ()
    assert record.artifact_id in stored(filled)


def test_file_whose_record_the_dashboard_has_removed_is_a_leftover(filled: StudyStore) -> None:
    study = filled.load("digits")
    [key] = [key for key in filled.rdb.get_study_system_attrs(study._study_id) if key.startswith("artifacts:")]
    filled.rdb.set_study_system_attr(study._study_id, key, json.dumps(None))
    [file] = find_leftovers(filled, timedelta(seconds=-5)).files
    assert key.endswith(file.artifact_id)


def test_record_of_the_dashboards_own_is_one(store: StudyStore) -> None:
    study = store.create_or_resume("digits", identity={}, configuration={})
    trial = study.ask()
    record = store.write_artifact("notes.txt", b"")
    key = f"dashboard:artifacts:{trial._trial_id}:{record.artifact_id}"
    store.rdb.set_trial_system_attr(trial._trial_id, key, "{}")
    assert find_leftovers(store, timedelta(seconds=-5)).files == ()


def test_interrupted_write_is_cleared_away(filled: StudyStore, bucket: str, s3_client: Any) -> None:
    kept = stored(filled)
    artifact_id = "01234567-89ab-cdef-0123-456789abcdef"
    if filled.artifacts.location.startswith("s3:"):
        # moto dates it to 2010, whenever it is.
        [name] = [each["Name"] for each in s3_client.list_buckets()["Buckets"] if each["Name"] == bucket]
        s3_client.create_multipart_upload(Bucket=name, Key=f"studies/{artifact_id}")
    else:
        part = Path(filled.artifacts.location, f".{artifact_id}.part")
        part.write_bytes(b"half")
        assert not find_leftovers(filled, AN_HOUR)
        os.utime(part, (0, 0))
    leftovers = find_leftovers(filled, AN_HOUR)
    assert [file.artifact_id for file in leftovers.uploads] == [artifact_id]
    assert leftovers.files == ()
    assert len(remove_files(filled, leftovers.uploads)) == 1
    assert stored(filled) == kept
    assert not find_leftovers(filled, AN_HOUR)


def test_place_of_another_store_is_left_alone(filled: StudyStore, tmp_path: Path) -> None:
    kept = stored(filled)
    with StudyStore.open(f"sqlite:///{tmp_path}/other.db") as other:
        refusal = f"The artifacts in {filled.artifacts.location} are another store's; set HPO_ARTIFACTS to a place "
        for use in (
            lambda: other.create_or_resume("other", identity={}, configuration={}),
            lambda: other.write_artifact("curve.csv", b"0,1"),
            lambda: find_leftovers(other, timedelta(seconds=-5)),
        ):
            with pytest.raises(ArtifactsMismatchError) as caught:
                use()
            assert str(caught.value).startswith(refusal)
        assert other.summaries() == []
    [problem] = check(f"sqlite:///{tmp_path}/other.db").problems
    assert problem.startswith(refusal)
    assert stored(filled) == kept


def test_place_is_claimed_once(filled: StudyStore, url: str) -> None:
    with filled.artifacts.open_reader("store.json") as mark:
        before = mark.read()
    with StudyStore.open(url) as again:
        again.create_or_resume("digits", identity={}, configuration={})
        assert again.write_artifact("curve.csv", b"0,1").artifact_id in stored(filled)
    with filled.artifacts.open_reader("store.json") as mark:
        assert mark.read() == before


def test_files_of_nobody_are_left_alone(filled: StudyStore, tmp_path: Path) -> None:
    # Files that an earlier release has written, which set no mark.
    filled.artifacts.remove("store.json")
    kept = stored(filled)
    belong = "they belong to another store; correct HPO_ARTIFACTS"
    with (
        StudyStore.open(f"sqlite:///{tmp_path}/empty.db") as empty,
        pytest.raises(ArtifactsMismatchError, match=belong),
    ):
        find_leftovers(empty, timedelta(seconds=-5))
    lost = filled.write_artifact("curve.csv", b"lost").artifact_id
    assert {file.artifact_id for file in find_leftovers(filled, timedelta(seconds=-5)).files} == {lost}
    assert stored(filled) == kept | {lost}


def test_files_of_which_none_is_ours_are_left_alone(filled: StudyStore) -> None:
    for artifact_id in stored(filled):
        filled.artifacts.remove(artifact_id)
    filled.write_artifact("curve.csv", b"lost")
    with pytest.raises(ArtifactsMismatchError, match="they belong to another store; correct HPO_ARTIFACTS"):
        find_leftovers(filled, AN_HOUR)


def test_default_directory_has_no_mark(tmp_path: Path) -> None:
    with StudyStore.open(f"sqlite:///{tmp_path}/own.db") as own:
        own.create_or_resume("digits", identity={}, configuration={})
        record = own.write_artifact("curve.csv", b"0,1")
        assert os.listdir(tmp_path / "own.db.artifacts") == [record.artifact_id]
        [file] = find_leftovers(own, timedelta(seconds=-5)).files
        assert file.artifact_id == record.artifact_id


def test_missing_artifacts_are_named(filled: StudyStore, url: str) -> None:
    health = check(url).artifacts
    assert (health.n_files, health.n_bytes, health.missing, health.failure) == (2, 6, (), None)
    [first, second] = sorted(stored(filled))
    filled.artifacts.remove(second)
    health = check(url).artifacts
    assert (health.n_files, health.missing) == (1, (second,))
    [problem] = check(url).problems
    assert problem.startswith(f"Artifacts are missing from {filled.artifacts.location} (1, such as {second})")
    filled.artifacts.remove(first)
    assert len(check(url).artifacts.missing) == 2


# Health


def test_health_of_each_backend(store: StudyStore, url: str) -> None:
    health = check(url)
    assert health.url_masked == store.url_masked
    assert health.versions == health.newest == NEWEST
    assert 0 < health.latency_s < 1
    assert health.may_write
    assert health.studies == ()
    if url.startswith("sqlite"):
        assert health.server.startswith("SQLite 3.")
        assert (health.time_zone, health.user) == (None, None)
    else:
        assert health.server.startswith("PostgreSQL 1")
        assert (health.time_zone, health.user) == ("Asia/Tokyo", "owner")


def test_check_changes_nothing(filled: StudyStore, url: str, tmp_path: Path) -> None:
    def everything() -> tuple[object, ...]:
        metadata = sqlalchemy.MetaData()
        metadata.reflect(filled.rdb.engine)
        with filled.rdb.engine.connect() as connection:
            rows = {
                table.name: sorted(map(repr, connection.execute(sqlalchemy.select(table))))
                for table in metadata.sorted_tables
            }
        contents = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        return rows, contents, sorted(filled.artifacts.stored(), key=lambda file: file.artifact_id)

    before = everything()
    assert check(url).problems == ()
    assert everything() == before


def test_outdated_tables_are_a_problem(store: StudyStore, url: str) -> None:
    statement(store, "UPDATE hpo_schema SET version = 0")
    [problem] = check(url).problems
    assert problem.endswith("run `hpo db init`.")


def test_bucket_that_is_not_there_is_a_problem(
    store: StudyStore, url: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_ARTIFACTS", "s3://no-such-bucket")
    assert check(url).problems == ("There is no bucket for s3://no-such-bucket; create it, or correct HPO_ARTIFACTS.",)


def test_driver_that_ends_meanwhile_leaves_no_orphans(
    store: StudyStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = store.create_or_resume("digits", identity={}, configuration={})
    look = StudyStore.lease_holder

    def end_before_a_look(looking: StudyStore, name: str) -> Any:
        for trial in store.trials(study, (TrialState.RUNNING,)):
            store.release(trial)
        return look(looking, name)

    monkeypatch.setattr(StudyStore, "lease_holder", end_before_a_look)
    study.ask()
    assert find_leftovers(store, AN_HOUR).orphans == ()
    study.ask()
    assert check(url).problems == ()
