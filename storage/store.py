"""The study store: studies, trials, curves and artifacts in any database that Optuna takes."""

from __future__ import annotations

import json
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import optuna
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages._rdb import models
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError

from search_spaces.reasons import reason_of
from search_spaces.suggestions import did_you_mean
from storage import artifacts, measurements, trials
from storage.artifact_files import claim, is_claimed, open_artifact_files
from storage.artifacts import ArtifactRecord
from storage.cache import StudyCache
from storage.engine import connect
from storage.errors import (
    AfterTrialError,
    ArtifactsAwayError,
    StorageError,
    StoreBusyError,
    StoreUnreachableError,
    StudyIdentityError,
    StudyNameError,
    StudyNotFoundError,
    TrialAlreadyFinishedError,
    TrialNotRunningError,
    TrialNotWaitingError,
)
from storage.identity import differences
from storage.lease import LeaseHolder, file_lease, file_lease_holder, server_lease, server_lease_holder
from storage.patience import IMPATIENT, Outages, Patience
from storage.schema import store_id
from storage.summaries import CREATED, StudySummary, summaries
from storage.urls import lock_directory, mask_password, without_user_information

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from optuna.samplers import BaseSampler
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import Connection

    from storage.artifact_files import ArtifactFiles
    from storage.measurements import MeasurementRecord
    from storage.trials import TrialResult

__all__ = ["CONFIGURATION", "IDENTITY", "StudyStore"]

IDENTITY = "identity"
"""The user attribute of a study that holds its identity."""

CONFIGURATION = "configuration"
"""The user attribute of a study that holds the resolved configuration of its last launch."""

_T = TypeVar("_T")
# Of the store's artifacts, to tell whether they are in a place: one may have been removed by hand.
_N_LOOKED_FOR = 3
_LONGEST_NAME = models.MAX_INDEXED_STRING_LENGTH


class StudyStore:
    """Studies in a database, with their artifacts in a directory or a bucket.

        with StudyStore.open("sqlite:///studies.db") as store, store.lease("digits"):
            study = store.create_or_resume("digits", identity={...}, configuration={...})
            trial, composite = store.ask(study, space.suggest)
            store.finish(trial, TrialResult(value=0.6, curve={0: 0.98, 5: 0.97}))

    The store writes results in one transaction each, where Optuna's own calls take one per value; its studies are
    Optuna's, and all their methods work. A study has one driver at a time, which holds its `lease`; who reads needs
    none.

    Thread-safe: every call takes a connection of its own from the pool. Only `ask` and `claim` are one thread's, that
    of the study's driver: after an outage each running trial that has not been handed out is released. Not to be
    shared with a forked process.
    Every use, also of a study that the store has given, raises a `StorageError` where the database fails. The store's
    own methods, and all that only reads, first wait out an outage as patiently as they were told to. A write of which
    the answer was lost is made once all the same.

    Attributes:
        url_masked: Where it is, with passwords as `***`.
        storage: Optuna's storage, with its cache of finished trials.
        rdb: The same without the cache.
        artifacts: The files of artifacts, as an artifact store of Optuna.
    """

    def __init__(
        self,
        rdb: RDBStorage,
        artifact_files: ArtifactFiles,
        url_masked: str,
        lock_files: Path,
        patience: Patience = IMPATIENT,
    ) -> None:
        # A file that cannot be opened stays so; a server comes back.
        on_server = rdb.engine.dialect.name != "sqlite"
        passing: tuple[type[StorageError], ...] = (StoreBusyError, StoreUnreachableError)
        self._outages = Outages(patience, url_masked, passing if on_server else passing[:1])
        self._artifact_outages = Outages(patience, artifact_files.location, (ArtifactsAwayError,))
        self._lock_files = lock_files
        self._given: set[int] = set()
        self._has_place = not artifact_files.is_placed
        self.rdb = rdb
        self.storage = StudyCache(rdb, self._outages)
        self.artifacts = artifact_files
        self.url_masked = url_masked

    @classmethod
    def open(cls, url: str, *, read_only: bool = False, create: bool = True, patience: Patience = IMPATIENT) -> Self:
        """Open the store at a URL, and create what is missing of it.

        Args:
            url: Where it is; any URL that Optuna takes.
            read_only: Refuse every write, and create nothing.
            create: Create the directory, the file and the tables.
            patience: How long to wait for the store wherever it goes away later; to be opened, it must be there.

        Raises:
            StoreUrlError: The URL, or `HPO_ARTIFACTS`, cannot be read.
            StoreUnreachableError: The driver, the server or the access rights are missing.
            StoreNotFoundError: Nothing is there, and nothing was to be created.
            StoreFormatError: It is not a study store, or one of another version of Optuna or of this product.
            StoreFullError: It doesn't fit on the disk.
        """
        files = open_artifact_files(url)
        rdb = connect(url, "read" if read_only else "create" if create else "write")
        return cls(rdb, files, mask_password(url), lock_directory(url), patience)

    def close(self) -> None:
        """Give all connections back."""
        self.rdb.remove_session()
        self.rdb.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"StudyStore({self.url_masked!r})"

    # Leases

    @contextmanager
    def lease(self, name: str) -> Iterator[LeaseHolder]:
        """Hold the right to drive the study of a name, which need not exist yet.

        On PostgreSQL it holds for all machines, is taken again after a lost connection, and whatever this store writes
        meanwhile goes through only while it is held. On other databases it is a file lock.

        Raises:
            StudyInUseError: Another process, or another part of this one, holds it; the message says who.
            LeaseLostError: From a later write: another process has taken the study over.
        """
        if self._on_postgresql:
            with server_lease(self.rdb.engine, name, self._outages) as holder:
                yield holder
        else:
            with file_lease(self._lock_files, name) as holder:
                yield holder

    def lease_holder(self, name: str) -> LeaseHolder | None:
        """Who drives the study of a name, or None."""
        if not self._on_postgresql:
            return file_lease_holder(self._lock_files, name)
        return self._patiently(lambda connection, again: server_lease_holder(connection, name))

    @property
    def _on_postgresql(self) -> bool:
        return self.rdb.engine.dialect.name == "postgresql"

    # Studies

    def summaries(self) -> list[StudySummary]:
        """All studies at a glance, in the order of their creation."""
        return self._patiently(lambda connection, again: summaries(connection))

    def exists(self, name: str) -> bool:
        """Whether the store holds a study of this name."""
        return self._patiently(lambda connection, again: _study_id(connection, name) is not None)

    def load(self, name: str, sampler: BaseSampler | None = None) -> Study:
        """The study of a name; without a sampler it is one to read from.

        Raises:
            StudyNotFoundError: The store doesn't hold it.
        """
        if not self.exists(name):
            known = did_you_mean(name, (summary.name for summary in self.summaries()))
            raise StudyNotFoundError(f"There is no study {name!r} in {self.url_masked}.{known}")
        return optuna.load_study(study_name=name, storage=self.storage, sampler=sampler)

    def create_or_resume(
        self,
        name: str,
        *,
        identity: Mapping[str, Any],
        configuration: Mapping[str, Any],
        sampler: BaseSampler | None = None,
        upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> Study:
        """The study of a name that maximizes its metric, created with its identity in one transaction if need be.

        Args:
            name: Up to 512 printable characters.
            identity: What makes it this search; JSON.
            configuration: How it is launched this time; JSON. User information is taken out of URLs in it.
            sampler: Who proposes trials.
            upgrade: Brings a stored identity into the form of the one asked for, before the two are compared.

        Raises:
            StudyNameError: No study can have this name.
            StudyIdentityError: The stored study is another search; it is left as it is.
            ArtifactsMismatchError: `HPO_ARTIFACTS` names another store's place.
            TrialResultError: Identity or configuration is not JSON.
        """
        if not name or len(name) > _LONGEST_NAME or not name.isprintable():
            raise StudyNameError(f"A study's name is 1 to {_LONGEST_NAME} printable characters, but got {name!r:.80}.")
        asked = json.loads(trials.to_json(IDENTITY, identity))
        launched = json.loads(trials.to_json(CONFIGURATION, _without_credentials(configuration)))
        self._claim_place()
        if not self.exists(name) and self._create(name, {IDENTITY: asked, CONFIGURATION: launched}):
            return self.load(name, sampler)
        study = self.load(name, sampler)
        self._check_identity(study, asked, upgrade)
        if study.user_attrs.get(CONFIGURATION) != launched:
            self.set_attribute(study, CONFIGURATION, launched)
        return study

    def set_attribute(
        self, study: Study, key: str, value: Any, *, measured: Collection[MeasurementRecord] = ()
    ) -> None:
        """Write a user attribute of a study, and with it what has been measured for it.

        Raises:
            TrialResultError: It is not JSON, or a number in it is not finite.
        """
        attribute = models.StudyUserAttributeModel
        row = {"study_id": study._study_id, "key": key, "value_json": trials.to_json(key, value)}

        def write(connection: Connection, again: bool) -> None:
            former = (attribute.study_id == study._study_id) & (attribute.key == key)
            connection.execute(delete(attribute).where(former))
            connection.execute(insert(attribute).values(row))
            measurements.remember(connection, measured)

        self._patiently(write)

    def _create(self, name: str, attributes: Mapping[str, Any]) -> bool:
        """Write a new study, unless another process has just done so."""
        created = {CREATED: datetime.now(UTC).isoformat(timespec="seconds")}

        def write(connection: Connection, again: bool) -> None:
            inserted = connection.execute(insert(models.StudyModel).values(study_name=name)).inserted_primary_key
            assert inserted is not None
            study = {"study_id": inserted[0]}
            direction = {"objective": 0, "direction": StudyDirection.MAXIMIZE}
            connection.execute(insert(models.StudyDirectionModel), [{**study, **direction}])
            connection.execute(
                insert(models.StudyUserAttributeModel),
                [
                    {**study, "key": key, "value_json": json.dumps(value)}
                    for key, value in {**attributes, **created}.items()
                ],
            )

        try:
            self._patiently(write)
        except IntegrityError:
            return False
        return True

    def _check_identity(self, study: Study, asked: Any, upgrade: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        name, choose = study.study_name, "choose another --study, or launch as it was"
        stored = study.user_attrs.get(IDENTITY)
        if stored is None or study.directions != [StudyDirection.MAXIMIZE]:
            raise StudyIdentityError(f"Study {name!r} was made by another program; {choose.partition(',')[0]}.")
        if different := differences(upgrade(stored), asked):
            raise StudyIdentityError(f"Study {name!r} is another search; {choose} (stored -> asked):", different)

    # Trials

    def trials(self, study: Study, states: Collection[TrialState] | None = None) -> list[FrozenTrial]:
        """The trials of a study, of some states or of all, in the order of their numbers; not to be changed."""
        return study.get_trials(deepcopy=False, states=None if states is None else tuple(states))

    def ask(self, study: Study, suggest: Callable[[Trial], _T]) -> tuple[Trial, _T]:
        """A running trial, a waiting one if there is any, and what is suggested for it.

        Its parameters are written all at once. A trial that an outage has cut off is asked again, so that none is left
        RUNNING without somebody who evaluates it.

        Args:
            study: Whose sampler proposes.
            suggest: Asks the trial for its parameters; called again after an outage.
        """

        def attempt(again: bool) -> tuple[Trial, _T]:
            if again:
                self._take_back(study)
            with self.storage.parameters_at_once():
                trial = study.ask()
                suggested = suggest(trial)
            return trial, suggested

        trial, suggested = self._outages.wait_out(attempt)
        self._given.add(trial._trial_id)
        return trial, suggested

    def _take_back(self, study: Study) -> None:
        """Release the running trials that nobody has been given, which an answer that was lost leaves behind.

        No other thread may be about to be given one.
        """
        with self._transaction() as connection:
            for trial_id in trials.running(connection, study._study_id).keys() - self._given:
                trials.release(connection, trial_id)

    def add_waiting(self, study: Study, trial: FrozenTrial) -> FrozenTrial:
        """Add a WAITING trial with all that it holds, and return it with its number."""
        trial._validate()

        def attempt(again: bool) -> FrozenTrial:
            if again:
                waiting = self.storage.get_all_trials(study._study_id, deepcopy=False, states=(TrialState.WAITING,))
                for stored in waiting:
                    if (stored.params, stored.user_attrs) == (trial.params, trial.user_attrs):
                        return stored
            return self.storage.get_trial(self.storage.create_new_trial(study._study_id, template_trial=trial))

        return self._outages.wait_out(attempt)

    def claim(self, study: Study, trial: FrozenTrial) -> Trial:
        """Make a waiting trial RUNNING, and hand it out.

        Raises:
            TrialNotWaitingError: It is in another state.
        """

        def write(connection: Connection, again: bool) -> None:
            try:
                trials.claim(connection, trial._trial_id)
            except TrialNotWaitingError:
                ours = again and trial._trial_id not in self._given
                if not (ours and trial._trial_id in trials.running(connection, study._study_id)):
                    raise

        self._patiently(write)
        claimed = self._outages.wait_out(lambda again: Trial(study, trial._trial_id))
        self._given.add(claimed._trial_id)
        return claimed

    def release(self, trial: Trial | FrozenTrial, losses: int | None = None) -> None:
        """Make a running trial WAITING: its number, parameters and attributes are kept, and the next ask gets it.

        Args:
            trial: A trial that is not evaluated any more.
            losses: How often it was lost with its worker; kept as its user attribute `losses`.

        Raises:
            TrialNotRunningError: It is not running.
        """

        def write(connection: Connection, again: bool) -> None:
            try:
                trials.release(connection, trial._trial_id, losses)
            except TrialNotRunningError:
                if not (again and trials.is_released(connection, trial._trial_id, losses)):
                    raise

        self._patiently(write)
        self._given.discard(trial._trial_id)

    def adopt_orphans(self, study: Study) -> list[int]:
        """Make every RUNNING trial WAITING, to be called once the lease is held; returns their numbers.

        A trial still RUNNING then was lost with its driver. Its number, parameters and attributes are kept, and the
        next ask gets it.
        """
        adopted: set[int] = set()

        def write(connection: Connection, again: bool) -> None:
            orphans = trials.running(connection, study._study_id)
            for trial_id in orphans:
                trials.release(connection, trial_id)
            adopted.update(orphans.values())
            self._given.difference_update(orphans)

        self._patiently(write)
        return sorted(adopted)

    def finish(self, trial: Trial, result: TrialResult) -> None:
        """Write a running trial's result and make it COMPLETE, all or nothing.

        The sampler hears of it first, as it does from Optuna's `tell`; the result is stored whatever it says.

        Raises:
            AfterTrialError: The sampler raised; the result is stored.
            TrialAlreadyFinishedError: It has been finished before; the stored result stays.
            TrialNotRunningError: It is not running.
        """
        self._end(trial, TrialState.COMPLETE, [float(result.value)], trials.finish, trials.holds, result)

    def fail(self, trial: Trial, reason: str) -> None:
        """Make a running trial FAIL; the reason becomes its user attribute `failure`.

        Raises:
            AfterTrialError: The sampler raised; the reason is stored.
            TrialAlreadyFinishedError: It has been finished before; the stored result stays.
            TrialNotRunningError: It is not running.
        """
        self._end(trial, TrialState.FAIL, None, trials.fail, trials.has_failed, reason)

    def prune(self, trial: Trial, attributes: Mapping[str, Any]) -> None:
        """Make a running trial PRUNED, without a value.

        Raises:
            AfterTrialError: The sampler raised; what is written stays.
            TrialAlreadyFinishedError: It has been finished before; the stored result stays.
            TrialNotRunningError: It is not running.
        """
        self._end(trial, TrialState.PRUNED, None, trials.prune, trials.is_pruned, attributes)

    def _end(
        self,
        trial: Trial,
        state: TrialState,
        values: list[float] | None,
        end: Callable[[Connection, int, _T], None],
        has_ended: Callable[[Connection, int, _T], bool],
        content: _T,
    ) -> None:
        """Tell the sampler, and then make a running trial end, once however often its answer is lost.

        Args:
            trial: Running.
            state: In which it ends.
            values: That the sampler is told.
            end: Writes the state and the content.
            has_ended: Whether the trial is in this state with this very content.
            content: What the trial ends with.
        """

        def write(connection: Connection, again: bool) -> None:
            try:
                end(connection, trial._trial_id, content)
            except TrialAlreadyFinishedError:
                if not (again and has_ended(connection, trial._trial_id, content)):
                    raise

        try:
            self._tell_sampler(trial, state, values)
        finally:
            self._patiently(write)
            self._given.discard(trial._trial_id)

    def _tell_sampler(self, trial: Trial, state: TrialState, values: list[float] | None) -> None:
        frozen = self.storage.get_trial(trial._trial_id)
        if frozen.state != TrialState.RUNNING:
            return
        sampler = trial.study.sampler
        try:
            self._outages.wait_out(lambda again: sampler.after_trial(trial.study, frozen, state, values))
        except StorageError:
            raise
        except Exception as error:  # a sampler of the user's may raise anything
            name = type(sampler).__name__
            raise AfterTrialError(
                f"{name}.after_trial failed for trial {trial.number}, which is stored all the same: "
                f"{reason_of(error)}; fix the sampler or use another one."
            ) from error

    # Measurements

    def measurements(
        self, subjects: Collection[str], most_bytes: int = measurements.MOST_BYTES
    ) -> list[MeasurementRecord]:
        """What is known of subjects, the newest first, as much of it as `storage.measurements.recall` says."""
        return self._patiently(lambda connection, again: measurements.recall(connection, subjects, most_bytes))

    def forget_measurements(self, before: datetime) -> int:
        """Delete what has been measured before a time, which is then measured again if need be; how many there were."""
        return self._patiently(lambda connection, again: measurements.forget(connection, before))

    # Artifacts

    def _claim_place(self) -> None:
        if not self._has_place:
            identity = self._patiently(lambda connection, again: store_id(connection))
            # Only one that may not be written to can be of an earlier release still.
            if identity is not None:
                claim(self.artifacts, identity)
            self._has_place = True

    def check_artifacts(self) -> str | None:
        """Look at the place of artifacts before anything is computed; a sentence if earlier ones are elsewhere.

        Raises:
            ArtifactsMismatchError: `HPO_ARTIFACTS` names another store's place.
            StorageError: It cannot be read.
        """
        with self._transaction() as connection:
            recorded, identity = artifacts.recorded_ids(connection), store_id(connection)
        if self.artifacts.is_placed and identity is not None:
            is_claimed(self.artifacts, identity)
        if not recorded or any(self._has_artifact(each) for each in sorted(recorded)[:_N_LOOKED_FOR]):
            return None
        return (
            f"The store has {len(recorded)} artifacts, but they aren't in {self.artifacts.location}, where new ones "
            "will be: set HPO_ARTIFACTS to where they are, or copy them there."
        )

    def _has_artifact(self, artifact_id: str) -> bool:
        try:
            self.artifacts.open_reader(artifact_id).close()
        except ArtifactNotFound:
            return False
        return True

    def write_artifact(self, filename: str, content: bytes, mimetype: str | None = None) -> ArtifactRecord:
        """Write a file whose record is still to be stored, as part of a `TrialResult`; waits out a bucket's outage.

        Raises:
            ArtifactsMismatchError: `HPO_ARTIFACTS` names another store's place.
            StoreFullError: It doesn't fit on the disk; no part of it is left.
        """
        self._claim_place()
        record = ArtifactRecord.new(filename, mimetype)
        self._artifact_outages.wait_out(lambda again: self.artifacts.write_bytes(record.artifact_id, content))
        return record

    def add_artifact(
        self, owner: Study | Trial | FrozenTrial, filename: str, content: bytes, mimetype: str | None = None
    ) -> str:
        """Attach a file to a study or to a trial in any state, in place of a former one of this name; returns its id.

        Raises:
            StoreFullError: It doesn't fit on the disk; the former one stays.
        """
        record = self.write_artifact(filename, content, mimetype)
        key = {"study_id": owner._study_id} if isinstance(owner, Study) else {"trial_id": owner._trial_id}
        former: set[str] = set()

        def write(connection: Connection, again: bool) -> None:
            former.update(artifacts.replace(connection, key, record))

        try:
            self._patiently(write)
        except Exception as error:
            self.discard_refused(record, error)
            raise
        for artifact_id in former - {record.artifact_id}:
            self.artifacts.discard(artifact_id)
        if not isinstance(owner, Study):
            self.storage.forget(owner._trial_id)
        return record.artifact_id

    def discard_refused(self, record: ArtifactRecord, error: Exception) -> None:
        """Remove a file whose record could not be stored, unless it may have been: the answer was lost, say.

        What stays without a record is found by `hpo gc`.
        """
        if not isinstance(error, StoreBusyError | StoreUnreachableError):
            self.artifacts.discard(record.artifact_id)

    def _patiently(self, work: Callable[[Connection, bool], _T]) -> _T:
        """What is done in a transaction of its own, and again in another where an outage has cut it off."""

        def attempt(again: bool) -> _T:
            with self._transaction() as connection:
                return work(connection, again)

        return self._outages.wait_out(attempt)

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """The one way to the tables: commits, or rolls back; the engine translates what fails."""
        with self.rdb.engine.begin() as connection:
            yield connection


def _study_id(connection: Connection, name: str) -> int | None:
    study = models.StudyModel
    return connection.scalar(select(study.study_id).where(study.study_name == name))


def _without_credentials(value: Any) -> Any:
    """A JSON value in which no URL has user information."""
    match value:
        case dict():
            return {key: _without_credentials(each) for key, each in value.items()}
        case list() | tuple():
            return [_without_credentials(each) for each in value]
        case str() if "://" in value:
            return without_user_information(value)
    return value
