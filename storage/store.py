"""The study store: studies, trials, curves and artifacts in any database that Optuna takes."""

from __future__ import annotations

import json
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages import _CachedStorage
from optuna.storages._rdb import models
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError

from search_spaces.suggestions import did_you_mean
from storage import artifacts, trials
from storage.artifacts import ArtifactFiles, ArtifactRecord
from storage.engine import connect
from storage.errors import AfterTrialError, StudyIdentityError, StudyNameError, StudyNotFoundError
from storage.identity import differences
from storage.summaries import CREATED, StudySummary, summaries
from storage.urls import artifact_directory, mask_password, without_user_information

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType
    from typing import Self

    from optuna.samplers import BaseSampler
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import Connection

    from storage.trials import TrialResult

__all__ = ["CONFIGURATION", "IDENTITY", "StudyStore"]

IDENTITY = "identity"
"""The user attribute of a study that holds its identity."""

CONFIGURATION = "configuration"
"""The user attribute of a study that holds the resolved configuration of its last launch."""

_LONGEST_NAME = models.MAX_INDEXED_STRING_LENGTH


class StudyStore:
    """Studies in a database, with their artifacts in a directory.

        with StudyStore.open("sqlite:///studies.db") as store:
            study = store.create_or_resume("digits", identity={...}, configuration={...})
            trial = study.ask(distributions)
            store.finish(trial, TrialResult(value=0.6, curve={0: 0.98, 5: 0.97}))

    The store writes results in one transaction each, where Optuna's own calls take one per value; its studies are
    Optuna's, and all their methods work. A study has one driver at a time, which holds its `study_lease`; who reads
    needs none.

    Thread-safe: every call takes a connection of its own from the pool. Not to be shared with a forked process.
    Every use, also of a study that the store has given, raises a `StorageError` where the database fails.

    Attributes:
        url_masked: Where it is, with passwords as `***`.
        storage: Optuna's storage, with its cache of finished trials.
        rdb: The same without the cache.
        artifacts: Optuna's artifact store.
    """

    def __init__(self, rdb: RDBStorage, artifact_files: ArtifactFiles, url_masked: str) -> None:
        self.rdb = rdb
        self.storage = _CachedStorage(rdb)
        self.artifacts = artifact_files
        self.url_masked = url_masked

    @classmethod
    def open(cls, url: str, *, read_only: bool = False, create: bool = True) -> Self:
        """Open the store at a URL, and create what is missing of it.

        Args:
            url: Where it is; any URL that Optuna takes.
            read_only: Refuse every write, and create nothing.
            create: Create the directory, the file and the tables.

        Raises:
            StoreUrlError: The URL cannot be read.
            StoreUnreachableError: The driver, the server or the access rights are missing.
            StoreNotFoundError: Nothing is there, and nothing was to be created.
            StoreFormatError: It is not a study store, or one of another version of Optuna.
            StoreFullError: It doesn't fit on the disk.
        """
        rdb = connect(url, "read" if read_only else "create" if create else "write")
        return cls(rdb, ArtifactFiles(artifact_directory(url)), mask_password(url))

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

    # Studies

    def summaries(self) -> list[StudySummary]:
        """All studies at a glance, in the order of their creation."""
        with self._transaction() as connection:
            return summaries(connection)

    def exists(self, name: str) -> bool:
        """Whether the store holds a study of this name."""
        with self._transaction() as connection:
            return _study_id(connection, name) is not None

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
            TrialResultError: Identity or configuration is not JSON.
        """
        if not name or len(name) > _LONGEST_NAME or not name.isprintable():
            raise StudyNameError(f"A study's name is 1 to {_LONGEST_NAME} printable characters, but got {name!r:.80}.")
        asked = json.loads(trials.to_json(IDENTITY, identity))
        launched = json.loads(trials.to_json(CONFIGURATION, _without_credentials(configuration)))
        if not self.exists(name) and self._create(name, {IDENTITY: asked, CONFIGURATION: launched}):
            return self.load(name, sampler)
        study = self.load(name, sampler)
        self._check_identity(study, asked, upgrade)
        if study.user_attrs.get(CONFIGURATION) != launched:
            study.set_user_attr(CONFIGURATION, launched)
        return study

    def _create(self, name: str, attributes: Mapping[str, Any]) -> bool:
        """Write a new study, unless another process has just done so."""
        created = {CREATED: datetime.now(UTC).isoformat(timespec="seconds")}
        try:
            with self._transaction() as connection:
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

    def adopt_orphans(self, study: Study) -> list[int]:
        """Make every RUNNING trial WAITING, to be called once the lease is held; returns their numbers.

        A trial still RUNNING then was lost with its driver. Its number, parameters and attributes are kept, and the
        next ask gets it.
        """
        orphans = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        with self._transaction() as connection:
            for orphan in orphans:
                trials.release(connection, orphan._trial_id)
        return [orphan.number for orphan in orphans]

    def finish(self, trial: Trial, result: TrialResult) -> None:
        """Write a running trial's result and make it COMPLETE, all or nothing.

        The sampler hears of it first, as it does from Optuna's `tell`; the result is stored whatever it says.

        Raises:
            AfterTrialError: The sampler raised; the result is stored.
            TrialAlreadyFinishedError: It has been finished before; the stored result stays.
            TrialNotRunningError: It is not running.
        """
        try:
            self._tell_sampler(trial, TrialState.COMPLETE, [float(result.value)])
        finally:
            with self._transaction() as connection:
                trials.finish(connection, trial._trial_id, result)

    def fail(self, trial: Trial, reason: str) -> None:
        """Make a running trial FAIL; the reason becomes its user attribute `failure`.

        Raises:
            AfterTrialError: The sampler raised; the reason is stored.
            TrialAlreadyFinishedError: It has been finished before; the stored result stays.
            TrialNotRunningError: It is not running.
        """
        try:
            self._tell_sampler(trial, TrialState.FAIL, None)
        finally:
            with self._transaction() as connection:
                trials.fail(connection, trial._trial_id, reason)

    def _tell_sampler(self, trial: Trial, state: TrialState, values: list[float] | None) -> None:
        frozen = self.storage.get_trial(trial._trial_id)
        if frozen.state != TrialState.RUNNING:
            return
        try:
            trial.study.sampler.after_trial(trial.study, frozen, state, values)
        except Exception as error:  # a sampler of the user's may raise anything
            sampler, reason = type(trial.study.sampler).__name__, " ".join(str(error).split())
            raise AfterTrialError(
                f"{sampler}.after_trial failed for trial {trial.number}, which is stored all the same: "
                f"{type(error).__name__}: {reason}; fix the sampler or use another one."
            ) from error

    # Artifacts

    def write_artifact(self, filename: str, content: bytes, mimetype: str | None = None) -> ArtifactRecord:
        """Write a file whose record is still to be stored, as part of a `TrialResult`.

        Raises:
            StoreFullError: It doesn't fit on the disk; no part of it is left.
        """
        record = ArtifactRecord.new(filename, mimetype)
        self.artifacts.write_bytes(record.artifact_id, content)
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
        try:
            with self._transaction() as connection:
                former = artifacts.replace(connection, key, record)
        except BaseException:
            self.artifacts.discard(record.artifact_id)
            raise
        for artifact_id in former:
            self.artifacts.discard(artifact_id)
        if not isinstance(owner, Study):
            self._forget(owner._trial_id)
        return record.artifact_id

    def _forget(self, trial_id: int) -> None:
        """Let Optuna read a trial anew, which it takes for unchangeable once finished."""
        cache = self.storage
        with cache._lock:
            if known := cache._trial_id_to_study_id_and_number.get(trial_id):
                cache._add_trials_to_cache(known[0], [self.rdb.get_trial(trial_id)])

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
