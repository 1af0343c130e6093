"""The contract of the store, on every backend."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from forked_python import ForkedPython
from optuna.artifacts import ArtifactMeta, get_all_artifact_meta, upload_artifact
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from storage.errors import (
    AfterTrialError,
    StoreReadOnlyError,
    StudyIdentityError,
    StudyNameError,
    StudyNotFoundError,
    TrialAlreadyFinishedError,
    TrialNotRunningError,
    TrialNotWaitingError,
    TrialResultError,
)
from storage.store import StudyStore
from storage.trials import TrialResult

SPACE: dict[str, BaseDistribution] = {
    "LLR": CategoricalDistribution(["Epsilon", "ZPlus"]),
    "abs": CategoricalDistribution([False, True]),
    "epsilon": FloatDistribution(1e-6, 1.0, log=True),
}
IDENTITY = {"model": {"name": "digits_cnn", "fingerprint": "ab12"}, "rates": [0.0, 0.5], "seed": 0}
CONFIGURATION = {"n_trials": 10, "device": "cpu"}
CURVE = {step: 0.98 - step / 200 for step in range(0, 100, 5)}
ATTRIBUTES = {"auc": 0.6, "seconds": {"attribution": 1.5, "evaluation": 3}, "role": "search", "note": "Größe ≤ ½ \x00"}


def create(store: StudyStore, name: str = "digits", sampler: BaseSampler | None = None, **identity: Any) -> Study:
    return store.create_or_resume(
        name,
        identity={**IDENTITY, **identity},
        configuration=CONFIGURATION,
        sampler=sampler or RandomSampler(seed=0),
    )


def result(value: float = 0.6, **arguments: Any) -> TrialResult:
    return TrialResult(**{"value": value, "curve": CURVE, "attributes": ATTRIBUTES, **arguments})


def rows(store: StudyStore) -> dict[str, list[Any]]:
    """Everything in the database."""
    metadata = sqlalchemy.MetaData()
    metadata.reflect(store.rdb.engine)
    with store.rdb.engine.connect() as connection:
        return {
            table.name: sorted(map(repr, connection.execute(sqlalchemy.select(table))))
            for table in metadata.sorted_tables
        }


def content(trial: FrozenTrial) -> FrozenTrial:
    """A trial without its id, its dates and the ids of its artifacts."""
    bare = copy.deepcopy(trial)
    bare._trial_id = 0
    bare.datetime_start = bare.datetime_complete = None
    bare._system_attrs = {key: value for key, value in bare._system_attrs.items() if not key.startswith("artifacts:")}
    return bare


def read(store: StudyStore, artifact_id: str) -> bytes:
    with store.artifacts.open_reader(artifact_id) as file:
        return file.read()


def by_name(metas: list[ArtifactMeta]) -> list[ArtifactMeta]:
    """Artifacts in one order; a database keeps them in any."""
    return sorted(metas, key=lambda meta: meta.filename)


# Studies


def test_new_store_is_empty(store: StudyStore) -> None:
    assert store.summaries() == []
    assert not store.exists("digits")


def test_created_study_holds_identity_and_configuration(store: StudyStore) -> None:
    study = create(store)
    assert store.exists("digits")
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert study.user_attrs["identity"] == IDENTITY
    assert study.user_attrs["configuration"] == CONFIGURATION
    age = datetime.now(UTC) - datetime.fromisoformat(study.user_attrs["created"])
    assert abs(age) < timedelta(minutes=1)


def test_sampler_is_the_one_given(store: StudyStore) -> None:
    sampler = RandomSampler(seed=1)
    assert create(store, sampler=sampler).sampler is sampler
    assert store.load("digits", sampler).sampler is sampler


def test_same_identity_resumes(store: StudyStore) -> None:
    study = create(store)
    store.finish(study.ask(SPACE), result())
    resumed = create(store)
    assert resumed._study_id == study._study_id
    assert [trial.state for trial in resumed.trials] == [TrialState.COMPLETE]


def test_resumption_refreshes_the_configuration_only(store: StudyStore) -> None:
    create(store)
    before = rows(store)
    study = store.create_or_resume("digits", identity=IDENTITY, configuration={"n_trials": 20})
    assert study.user_attrs["configuration"] == {"n_trials": 20}
    after = rows(store)
    assert {name for name in before if before[name] != after[name]} == {"study_user_attributes"}


def test_other_identity_is_refused_and_nothing_written(store: StudyStore) -> None:
    create(store)
    before = rows(store)
    with pytest.raises(StudyIdentityError) as caught:
        store.create_or_resume(
            "digits",
            identity={"model": {"name": "resnet18", "fingerprint": "ab12"}, "rates": [0.0, 0.5]},
            configuration={"n_trials": 20},
        )
    assert str(caught.value).splitlines() == [
        "Study 'digits' is another search; choose another --study, or launch as it was (stored -> asked):",
        '  model.name: "digits_cnn" -> "resnet18"',
        "  seed: 0 -> absent",
    ]
    assert [difference.key for difference in caught.value.differences] == ["model.name", "seed"]
    assert rows(store) == before


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_study_of_another_program_is_refused(store: StudyStore, direction: str) -> None:
    study = optuna.create_study(study_name="digits", storage=store.storage, direction=direction)
    if direction == "minimize":
        study.set_user_attr("identity", IDENTITY)
    before = rows(store)
    with pytest.raises(StudyIdentityError, match="made by another program; choose another --study"):
        create(store)
    assert rows(store) == before


def test_stored_identity_is_compared_in_the_form_of_today(store: StudyStore) -> None:
    create(store)
    before = rows(store)
    asked = {**IDENTITY, "repair": "none"}

    def upgrade(stored: dict[str, Any]) -> dict[str, Any]:
        return {"repair": "none", **stored}

    store.create_or_resume("digits", identity=asked, configuration=CONFIGURATION, upgrade=upgrade)
    assert rows(store) == before
    with pytest.raises(StudyIdentityError, match="repair: absent -> "):
        store.create_or_resume("digits", identity=asked, configuration=CONFIGURATION)


def test_credentials_stay_out_of_the_configuration(store: StudyStore) -> None:
    url = "postgresql://ada:s3cret@host/studies"
    configuration = {"storage": url, "nested": [{"url": url}], "data": "folder:/a@b"}
    study = store.create_or_resume("digits", identity=IDENTITY, configuration=configuration)
    bare = "postgresql://host/studies"
    assert study.user_attrs["configuration"] == {"storage": bare, "nested": [{"url": bare}], "data": "folder:/a@b"}
    assert "s3cret" not in repr(rows(store))


@pytest.mark.parametrize("name", ["", "a\nb", "a\x00b", "x" * 513])
def test_impossible_name_is_refused(store: StudyStore, name: str) -> None:
    with pytest.raises(StudyNameError, match="1 to 512 printable characters"):
        create(store, name)
    assert store.summaries() == []


def test_any_printable_name_will_do(store: StudyStore) -> None:
    for name in ("x" * 512, 'it\'s 100 % "Größe"', "../a/b"):
        assert create(store, name).study_name == name


def test_identity_must_be_json(store: StudyStore) -> None:
    with pytest.raises(TrialResultError, match="`identity` must be JSON with finite numbers"):
        create(store, seed=float("nan"))
    assert store.summaries() == []


def test_unknown_study_is_named_with_the_closest(store: StudyStore) -> None:
    create(store)
    with pytest.raises(StudyNotFoundError) as caught:
        store.load("digit")
    assert (
        str(caught.value) == f"There is no study 'digit' in {store.url_masked}. Did you mean 'digits'? Known: digits."
    )


def test_summaries(store: StudyStore) -> None:
    study = create(store)
    for value in (0.4, 0.7, 0.5):
        store.finish(study.ask(SPACE), result(value))
    store.fail(study.ask(SPACE), "out of memory")
    study.ask(SPACE)
    optuna.create_study(study_name="foreign", storage=store.storage, direction="minimize")
    foreign = store.load("foreign")
    for value in (2.0, 1.0):
        foreign.tell(foreign.ask(), value)
    create(store, "empty")
    digits, other, empty = store.summaries()
    assert digits.name == "digits"
    assert digits.n_trials == {TrialState.RUNNING: 1, TrialState.COMPLETE: 3, TrialState.FAIL: 1}
    assert digits.best_value == 0.7
    for when in (digits.created, digits.last_completed):
        assert when is not None
        assert abs(datetime.now(UTC) - when) < timedelta(minutes=1)
    assert (other.name, other.best_value, other.created) == ("foreign", 1.0, None)
    assert (empty.name, empty.n_trials, empty.best_value, empty.last_completed) == ("empty", {}, None, None)


def test_summaries_take_two_queries(store: StudyStore) -> None:
    for name in ("a", "b", "c"):
        study = create(store, name)
        for _ in range(3):
            store.finish(study.ask(SPACE), result())
    statements: list[str] = []
    sqlalchemy.event.listen(
        store.rdb.engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2])
    )
    assert [summary.n_trials for summary in store.summaries()] == [{TrialState.COMPLETE: 3}] * 3
    assert len(statements) == 2


# Trials


def test_finish_equals_optunas_own_calls(store: StudyStore, tmp_path: Path) -> None:
    study, twin = create(store, "digits"), create(store, "twin")
    contents = {"curve.csv": b"rate,accuracy\n0,0.98\n", "curve.png": b"\x89PNG", "curve.csv.gz": b"zip", "odd": b""}

    trial = study.ask(SPACE)
    records = tuple(store.write_artifact(name, content) for name, content in contents.items())
    store.finish(trial, result(artifacts=records))

    other = twin.ask(SPACE)
    for step, accuracy in CURVE.items():
        other.report(accuracy, step)
    for key, value in ATTRIBUTES.items():
        other.set_user_attr(key, value)
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        upload_artifact(artifact_store=store.artifacts, file_path=str(tmp_path / name), study_or_trial=other)
    twin.tell(other, 0.6)

    for storage in (store.storage, store.rdb):
        ours, theirs = storage.get_trial(trial._trial_id), storage.get_trial(other._trial_id)
        assert content(ours) == content(theirs)
        assert ours.datetime_start is not None
        assert ours.datetime_complete is not None
        assert theirs.datetime_complete is not None
        assert ours.datetime_start <= ours.datetime_complete <= theirs.datetime_complete
        metas = [by_name(get_all_artifact_meta(each, storage=storage)) for each in (ours, theirs)]
        for meta in (*metas[0], *metas[1]):
            assert read(store, meta.artifact_id) == contents[meta.filename]
            meta.artifact_id = ""
        assert metas[0] == metas[1]


class NotingSampler(RandomSampler):
    """Keeps what it is told with the trial, as samplers with constraints do."""

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        study._storage.set_trial_system_attr(trial._trial_id, "told", [trial.state.name, state.name, values])


def test_sampler_hears_of_a_trial_as_from_tell(store: StudyStore) -> None:
    study, twin = create(store, "digits", NotingSampler()), create(store, "twin", NotingSampler())
    store.finish(study.ask(), TrialResult(value=0.6, curve={}))
    store.fail(study.ask(), "reason")
    twin.tell(twin.ask(), 0.6)
    twin.tell(twin.ask(), state=TrialState.FAIL)
    told = [[trial._system_attrs["told"] for trial in each.trials] for each in (study, twin)]
    assert told[0] == told[1] == [["RUNNING", "COMPLETE", [0.6]], ["RUNNING", "FAIL", None]]


def test_result_is_stored_whatever_the_sampler_says(store: StudyStore) -> None:
    class Failing(RandomSampler):
        def after_trial(self, *arguments: object) -> None:
            raise LookupError("no")

    study = create(store, sampler=Failing())
    with pytest.raises(AfterTrialError, match=r"Failing\.after_trial failed for trial 0.*: LookupError: no") as caught:
        store.finish(study.ask(SPACE), result())
    assert isinstance(caught.value.__cause__, LookupError)
    with pytest.raises(AfterTrialError, match="trial 1"):
        store.fail(study.ask(SPACE), "reason")
    assert study.best_value == 0.6
    assert study.trials[1].state == TrialState.FAIL


def test_study_sees_a_finished_trial_at_once(store: StudyStore) -> None:
    study = create(store)
    first, second = study.ask(SPACE), study.ask(SPACE)
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING, TrialState.RUNNING]
    store.finish(second, result(0.7))
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING, TrialState.COMPLETE]
    store.finish(first, result(0.6))
    assert [trial.value for trial in study.trials] == [0.6, 0.7]
    assert study.best_trial.number == 1
    assert study.trials[0].intermediate_values == CURVE
    assert study.ask(SPACE).number == 2


def test_finish_is_one_transaction(store: StudyStore) -> None:
    study = create(store)
    trial = study.ask(SPACE)
    commits: list[object] = []
    writes: list[int] = []
    sqlalchemy.event.listen(store.rdb.engine, "commit", commits.append)

    def note_write(*arguments: Any) -> None:
        if not arguments[2].startswith("SELECT"):
            writes.append(len(commits))

    sqlalchemy.event.listen(store.rdb.engine, "before_cursor_execute", note_write)
    store.finish(trial, result(artifacts=(store.write_artifact("a.csv", b""),)))
    assert len(writes) > 3
    assert len(set(writes)) == 1


def test_failed_finish_writes_nothing(store: StudyStore) -> None:
    study = create(store)
    trial = study.ask(SPACE)
    record = store.write_artifact("a.csv", b"")
    before = rows(store)
    with pytest.raises(sqlalchemy.exc.IntegrityError):
        store.finish(trial, result(artifacts=(record, record)))
    assert rows(store) == before
    store.finish(trial, result(artifacts=(record,)))


def test_second_finish_is_refused(store: StudyStore) -> None:
    study = create(store)
    trial = study.ask(SPACE)
    store.finish(trial, result())
    before = rows(store)
    for again in (
        lambda: store.finish(trial, result(0.9)),
        lambda: store.fail(trial, "late"),
    ):
        with pytest.raises(TrialAlreadyFinishedError, match="Trial 0 is COMPLETE already and stays as it is"):
            again()
    assert rows(store) == before


def test_trial_that_is_not_running_cannot_finish(store: StudyStore) -> None:
    study = create(store)
    trial = study.ask(SPACE)
    store.adopt_orphans(study)
    with pytest.raises(TrialNotRunningError, match="Trial 0 is WAITING, not RUNNING"):
        store.finish(trial, result())


def test_trial_of_a_deleted_study_cannot_finish(store: StudyStore) -> None:
    study = create(store)
    trial = study.ask(SPACE)
    optuna.delete_study(study_name="digits", storage=store.rdb)
    with pytest.raises(TrialNotRunningError, match="gone; its study has been deleted"):
        store.finish(trial, result())


def test_of_many_finishing_at_once_one_wins(store: StudyStore) -> None:
    study = create(store)
    trial = study.ask(SPACE)
    start = threading.Barrier(4)
    outcomes: list[object] = []

    def finish(value: float) -> None:
        start.wait()
        try:
            store.finish(trial, result(value))
        except TrialAlreadyFinishedError as error:
            outcomes.append(error)
        else:
            outcomes.append(value)

    threads = [threading.Thread(target=finish, args=(value / 10,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [outcome for outcome in outcomes if isinstance(outcome, float)]
    assert len(outcomes) == 4
    assert study.best_value == winner


def test_failure_keeps_its_reason(store: StudyStore) -> None:
    study = create(store)
    store.fail(study.ask(SPACE), "relevance of layer1.0 is not finite")
    [trial] = study.trials
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs == {"failure": "relevance of layer1.0 is not finite"}
    assert trial.value is None
    assert trial.datetime_complete is not None


def test_adopted_trial_is_asked_again_as_it_was(store: StudyStore) -> None:
    study = create(store)
    trial = study.ask(SPACE)
    trial.set_user_attr("key", "point 7")
    trial.report(0.1, 0)
    trial.report(0.1, 3)
    store.adopt_orphans(study)
    again = study.ask(SPACE)
    assert (again.number, again.params, again.user_attrs) == (0, trial.params, {"key": "point 7"})
    store.finish(again, result())
    assert study.trials[0].intermediate_values == CURVE
    assert study.trials[0].user_attrs == {"key": "point 7", **ATTRIBUTES}


def test_orphans_are_adopted(store: StudyStore, url: str) -> None:
    study = create(store)
    finished, *orphans = [study.ask(SPACE) for _ in range(3)]
    store.finish(finished, result())
    other = create(store, "other")
    other.ask(SPACE)
    with StudyStore.open(url) as next_driver:
        resumed = next_driver.load("digits", RandomSampler())
        assert next_driver.adopt_orphans(resumed) == [1, 2]
        assert next_driver.adopt_orphans(resumed) == []
        asked = [resumed.ask(SPACE) for _ in orphans]
        assert [trial.params for trial in asked] == [trial.params for trial in orphans]
        assert resumed.ask(SPACE).number == 3
    assert [trial.state for trial in other.trials] == [TrialState.RUNNING]


# Trials that are handed out


def suggest(trial: Trial) -> dict[str, Any]:
    return {name: trial._suggest(name, distribution) for name, distribution in SPACE.items()}


def waiting(**arguments: Any) -> FrozenTrial:
    """A trial with some of a space's parameters, to be added."""
    return create_trial(
        **{
            "state": TrialState.WAITING,
            "params": {"LLR": "ZPlus"},
            "distributions": {"LLR": SPACE["LLR"]},
            "user_attrs": {"heuristic": "zplus"},
            **arguments,
        }
    )


def test_asked_trial_runs_with_all_that_was_suggested(store: StudyStore) -> None:
    study, twin = create(store), create(store, "twin")
    for _ in range(3):
        trial, suggested = store.ask(study, suggest)
        assert trial.params == suggested == twin.ask(SPACE).params
    for ours, theirs in zip(store.trials(study), store.trials(twin), strict=True):
        assert content(ours) == content(theirs)
        assert ours.state == TrialState.RUNNING


def test_parameters_are_written_all_at_once(store: StudyStore) -> None:
    study = create(store)
    seen: list[dict[str, Any]] = []

    def interrupted(trial: Trial) -> None:
        suggest(trial)
        seen.append(store.rdb.get_trial(trial._trial_id).params)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.ask(study, interrupted)
    [trial] = store.trials(study)
    assert seen == [trial.params] == [{}]
    assert trial.state == TrialState.RUNNING
    # It is the next one's again, who draws all of its parameters.
    store.adopt_orphans(study)
    again, suggested = store.ask(study, suggest)
    assert (again.number, again.params) == (0, suggested)
    assert set(suggested) == set(SPACE)


def test_distribution_that_the_study_does_not_have_is_refused(store: StudyStore, url: str) -> None:
    store.ask(create(store), suggest)
    with StudyStore.open(url) as other:
        study = other.load("digits", RandomSampler(seed=1))
        with pytest.raises(ValueError, match="CategoricalDistribution does not support dynamic value space"):
            other.ask(study, lambda trial: trial.suggest_categorical("LLR", ["Gamma"]))
        assert other.trials(study)[1].params == {}


def test_released_trial_is_asked_again_as_it_was(store: StudyStore) -> None:
    study = create(store)
    first, suggested = store.ask(study, suggest)
    second, _ = store.ask(study, suggest)
    store.release(first, losses=2)
    [released] = store.trials(study, [TrialState.WAITING])
    assert (released.number, released.params, released.user_attrs) == (0, suggested, {"losses": 2})
    again, same = store.ask(study, suggest)
    assert (again.number, same) == (0, suggested)
    store.release(second)
    assert store.trials(study)[1].user_attrs == {}
    with pytest.raises(TrialNotRunningError, match="Trial 1 is WAITING, not RUNNING"):
        store.release(second)


def test_finished_trial_cannot_be_released(store: StudyStore) -> None:
    study = create(store)
    trial, _ = store.ask(study, suggest)
    store.finish(trial, result())
    before = rows(store)
    with pytest.raises(TrialAlreadyFinishedError, match="Trial 0 is COMPLETE already"):
        store.release(trial, losses=1)
    assert rows(store) == before


def test_added_trial_waits_until_it_is_claimed(store: StudyStore) -> None:
    study = create(store)
    running, _ = store.ask(study, suggest)
    added = store.add_waiting(study, waiting())
    assert (added.number, added.state, added.user_attrs) == (1, TrialState.WAITING, {"heuristic": "zplus"})
    claimed = store.claim(study, added)
    assert (claimed.number, claimed.params) == (1, {"LLR": "ZPlus"})
    assert claimed.datetime_start is not None
    assert abs(datetime.now() - claimed.datetime_start) < timedelta(minutes=1)
    assert [trial.state for trial in store.trials(study)] == [TrialState.RUNNING, TrialState.RUNNING]
    store.finish(claimed, result())
    for trial, state in ((claimed, "COMPLETE"), (running, "RUNNING")):
        with pytest.raises(TrialNotWaitingError, match=f"is {state}, not WAITING"):
            store.claim(study, store.storage.get_trial(trial._trial_id))


def test_two_equal_trials_may_wait(store: StudyStore) -> None:
    study = create(store)
    assert [store.add_waiting(study, waiting()).number for _ in range(2)] == [0, 1]


def test_trials_of_a_state(store: StudyStore) -> None:
    study = create(store)
    first, _ = store.ask(study, suggest)
    store.ask(study, suggest)
    store.finish(first, result())
    assert [trial.number for trial in store.trials(study)] == [0, 1]
    for state, numbers in ((TrialState.COMPLETE, [0]), (TrialState.RUNNING, [1]), (TrialState.WAITING, [])):
        assert [trial.number for trial in store.trials(study, [state])] == numbers


def test_attribute_of_a_study_replaces_the_former(store: StudyStore) -> None:
    study, other = create(store), create(store, "other")
    for value in ("first", {"auc": [0.5, None]}):
        store.set_attribute(study, "description", value)
        assert study.user_attrs["description"] == value
    assert "description" not in other.user_attrs
    with pytest.raises(TrialResultError, match="`description` must be JSON with finite numbers"):
        store.set_attribute(study, "description", float("nan"))


def test_asking_takes_no_longer_with_many_trials(store: StudyStore) -> None:
    study = create(store)

    def statements_of_a_trial() -> int:
        statements: list[str] = []

        def note(*arguments: Any) -> None:
            statements.append(arguments[2])

        sqlalchemy.event.listen(store.rdb.engine, "before_cursor_execute", note)
        store.finish(store.ask(study, suggest)[0], result())
        sqlalchemy.event.remove(store.rdb.engine, "before_cursor_execute", note)
        return len(statements)

    statements_of_a_trial()
    first = statements_of_a_trial()
    for _ in range(20):
        store.finish(store.ask(study, suggest)[0], result())
    assert statements_of_a_trial() == first < 40


# Artifacts


def test_study_artifact_replaces_the_former_of_its_name(store: StudyStore) -> None:
    study = create(store)
    store.add_artifact(study, "best.png", b"first", "image/png")
    kept = store.add_artifact(study, "other.png", b"other")
    second = store.add_artifact(study, "best.png", b"second")
    metas = by_name(get_all_artifact_meta(study))
    assert [(meta.artifact_id, meta.filename, meta.mimetype) for meta in metas] == [
        (second, "best.png", "image/png"),
        (kept, "other.png", "image/png"),
    ]
    assert read(store, second) == b"second"
    assert {path.name for path in store.artifacts.directory.iterdir()} == {kept, second}


def test_finished_trial_takes_artifacts_and_shows_them(store: StudyStore) -> None:
    study = create(store)
    trial = study.ask(SPACE)
    store.finish(trial, result(artifacts=(store.write_artifact("curve.csv", b"0,1"),)))
    [frozen] = study.trials
    before = content(frozen)
    store.add_artifact(frozen, "curve.png", b"png")
    store.add_artifact(trial, "notes.txt", b"text")
    assert content(study.trials[0]) == before
    metas = by_name(get_all_artifact_meta(study.trials[0], storage=store.storage))
    assert [meta.filename for meta in metas] == ["curve.csv", "curve.png", "notes.txt"]


def test_artifact_that_the_dashboard_has_removed_is_passed_over(store: StudyStore) -> None:
    study = create(store)
    former = store.add_artifact(study, "best.png", b"first")
    store.rdb.set_study_system_attr(study._study_id, f"artifacts:{former}", json.dumps(None))
    store.add_artifact(study, "best.png", b"second")


def test_refused_artifact_leaves_no_file(postgresql_server: Any) -> None:
    with StudyStore.open(postgresql_server.new_database()) as store:
        trial = create(store).ask(SPACE)
        optuna.delete_study(study_name="digits", storage=store.rdb)
        with pytest.raises(sqlalchemy.exc.IntegrityError):
            store.add_artifact(trial, "late.png", b"png")
        assert list(store.artifacts.directory.iterdir()) == []


# Processes


def test_read_only_store_refuses_writes(store: StudyStore, url: str) -> None:
    trial = create(store).ask(SPACE)
    with StudyStore.open(url, read_only=True) as reader:
        study = reader.load("digits")
        assert len(study.trials) == len(reader.summaries()) == 1
        for write in (
            lambda: study.set_user_attr("a", 1),
            lambda: study.ask(),
            lambda: reader.fail(trial, "no"),
            lambda: reader.create_or_resume("new", identity={}, configuration={}),
        ):
            with pytest.raises(StoreReadOnlyError, match="may only be read"):
                write()
        store.finish(trial, result())
        assert study.best_value == 0.6


RACE = """
import sys, time
from pathlib import Path
from storage.errors import StudyIdentityError
from storage.store import StudyStore
url, go, seed = sys.argv[1:]
print("ready", flush=True)
while not Path(go).exists():
    time.sleep(0.001)
try:
    with StudyStore.open(url) as store:
        study = store.create_or_resume("digits", identity={"seed": int(seed)}, configuration={})
        print(study._study_id, study.user_attrs["identity"]["seed"])
except StudyIdentityError as error:
    print("refused", error.differences[0].stored)
"""


def _race(start: Callable[..., ForkedPython], url: str, go: Path, seeds: list[int]) -> list[str]:
    processes = [start(RACE, url, str(go), str(seed)) for seed in seeds]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    go.touch()
    outputs = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        outputs.append(output.strip())
    return outputs


def test_processes_that_create_the_same_study_at_once_share_it(
    url: str, tmp_path: Path, start: Callable[..., ForkedPython]
) -> None:
    assert set(_race(start, url, tmp_path / "go", [5, 5, 5, 5])) == {"1 5"}


def test_of_processes_with_other_identities_one_wins(
    url: str, tmp_path: Path, start: Callable[..., ForkedPython]
) -> None:
    with StudyStore.open(url):
        pass
    outputs = _race(start, url, tmp_path / "go", [0, 1, 2, 3])
    [winner] = [output for output in outputs if not output.startswith("refused")]
    assert sorted(outputs) == sorted([winner, *[f"refused {winner.split()[1]}"] * 3])
    with StudyStore.open(url) as store:
        assert len(store.summaries()) == 1


IN_TOKYO = """
import sys
from storage.store import StudyStore
from storage.trials import TrialResult
with StudyStore.open(sys.argv[1]) as store:
    study = store.create_or_resume("digits", identity={}, configuration={})
    store.finish(study.ask(), TrialResult(value=0.5, curve={}))
    store.fail(study.ask(), "reason")
    study.tell(study.ask(), 0.5)
"""


def test_times_are_stored_in_utc_wherever_they_are_taken(url: str, start: Callable[..., ForkedPython]) -> None:
    process = start(IN_TOKYO, url, TZ="Asia/Tokyo", PGTZ="Asia/Tokyo")
    assert process.wait(timeout=120) == 0, process.communicate()[1]
    with StudyStore.open(url, read_only=True) as store:
        with store.rdb.engine.connect() as connection:
            stored = connection.execute(sqlalchemy.text("SELECT datetime_start, datetime_complete FROM trials")).all()
        for when in (when for row in stored for when in row):
            moment = datetime.fromisoformat(str(when))
            assert moment.tzinfo is None
            assert abs(datetime.now(UTC) - moment.replace(tzinfo=UTC)) < timedelta(minutes=2)
        for trial in store.load("digits").trials:
            assert trial.duration is not None
            assert timedelta(0) <= trial.duration < timedelta(minutes=1)


FINISH_FOREVER = """
import sys
from storage.store import StudyStore
from storage.trials import TrialResult
with StudyStore.open(sys.argv[1]) as store:
    study = store.load("digits")
    store.adopt_orphans(study)
    while True:
        trial = study.ask()
        print("asked", flush=True)
        record = store.write_artifact("curve.csv", b"0,1")
        curve = {step: 0.5 for step in range(0, 100, 5)}
        store.finish(trial, TrialResult(value=0.5, curve=curve, attributes={"auc": 0.5}, artifacts=(record,)))
"""


def test_killed_driver_leaves_whole_trials_only(url: str, start: Callable[..., ForkedPython]) -> None:
    with StudyStore.open(url) as store:
        create(store)
    for n_kills in range(4):
        process = start(FINISH_FOREVER, url)
        assert process.stdout.readline() == "asked\n", process.communicate()[1]
        time.sleep(0.05 + 0.037 * n_kills)
        process.kill()
        process.wait()
        with StudyStore.open(url, read_only=True) as reader:
            trials = reader.load("digits").trials
            assert trials
            for trial in trials:
                complete = trial.state == TrialState.COMPLETE
                assert len(trial.intermediate_values) == (20 if complete else 0)
                assert trial.user_attrs == ({"auc": 0.5} if complete else {})
                metas = get_all_artifact_meta(trial, storage=reader.storage)
                assert [read(reader, meta.artifact_id) for meta in metas] == ([b"0,1"] if complete else [])
            assert sum(not trial.state.is_finished() for trial in trials) <= 1
            assert [trial.number for trial in trials] == list(range(len(trials)))


def test_store_is_optunas_own(store: StudyStore) -> None:
    assert isinstance(store.rdb, RDBStorage)
    attributes: Mapping[str, object] = create(store).user_attrs
    assert set(attributes) == {"configuration", "created", "identity"}
