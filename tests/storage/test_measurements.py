"""Measurements that the store keeps: written with their trials, read for the same network and images."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy
from optuna.samplers import RandomSampler
from optuna.study import Study
from optuna.trial import Trial
from postgresql_cluster import Server

from storage.errors import LeaseLostError, TrialAlreadyFinishedError
from storage.measurements import MeasurementRecord, Volume, recall, remember, volume
from storage.schema import LEASES, MEASUREMENTS, TABLES, stored_version
from storage.store import StudyStore
from storage.trials import TrialResult


def record(mask: int = 0, **changed: Any) -> MeasurementRecord:
    fields = {
        "subject": "s",
        "origin": "o",
        "n_images": 20,
        "correct": b"\x00\xff\x80",
        "parameters": 2**40,
        "flops": 7,
    }
    return MeasurementRecord(mask=f"{mask:032x}", **{**fields, **changed})


def asked(store: StudyStore, name: str = "digits") -> tuple[Study, Trial]:
    study = store.create_or_resume(name, identity={}, configuration={}, sampler=RandomSampler(0))
    return study, store.ask(study, lambda trial: trial.suggest_float("epsilon", 0, 1))[0]


def write(store: StudyStore, *records: MeasurementRecord) -> None:
    with store.rdb.engine.begin() as connection:
        remember(connection, records)


def test_a_trial_is_finished_with_its_measurements(store: StudyStore, url: str) -> None:
    records = (record(2), record(1), record(1, origin="p"), record(1, subject="t"))
    _, trial = asked(store)
    store.finish(trial, TrialResult(0.5, {0: 0.5}, measurements=records))
    with StudyStore.open(url, read_only=True) as reader:
        assert set(reader.measurements({"s"})) == set(records[:3])
        assert set(reader.measurements(["s", "t"])) == set(records)
        assert reader.measurements({"u"}) == reader.measurements(()) == []


def test_a_trial_that_is_finished_already_leaves_none(store: StudyStore) -> None:
    _, trial = asked(store)
    store.finish(trial, TrialResult(0.5, {}, measurements=(record(1),)))
    with pytest.raises(TrialAlreadyFinishedError):
        store.finish(trial, TrialResult(0.6, {}, measurements=(record(2),)))
    assert store.measurements({"s"}) == [record(1)]


def test_an_attribute_is_written_with_its_measurements(store: StudyStore) -> None:
    study, _ = asked(store)
    store.set_attribute(study, "confirmed:0", {"auc": 0.5}, measured=[record()])
    assert store.measurements({"s"}) == [record()]


def test_what_is_there_stays(store: StudyStore) -> None:
    write(store, record(1), record(2))
    write(store, record(1, flops=8), record(3))
    assert {each.mask: each.flops for each in store.measurements({"s"})} == {record(n).mask: 7 for n in (1, 2, 3)}


def test_who_may_not_drive_a_study_leaves_none(postgresql_server: Server) -> None:
    url = postgresql_server.new_database()
    with StudyStore.open(url) as store, store.lease("digits"):
        _, trial = asked(store)
        with StudyStore.open(url) as other, other.rdb.engine.begin() as connection:
            connection.execute(sqlalchemy.update(LEASES).values(token="another's"))
        with pytest.raises(LeaseLostError):
            store.finish(trial, TrialResult(0.5, {}, measurements=(record(),)))
        assert store.measurements({"s"}) == []


def test_the_newest_are_read_up_to_a_bound(store: StudyStore) -> None:
    write(store, *map(record, range(10)))
    with store.rdb.engine.begin() as connection:
        for mask in range(10):
            written = datetime.now(UTC).replace(tzinfo=None) - timedelta(days=(mask - 5) % 10)
            this = MEASUREMENTS.c.mask == record(mask).mask
            connection.execute(sqlalchemy.update(MEASUREMENTS).where(this).values(created=written))
    assert store.measurements({"s"}) == [record((5 + n) % 10) for n in range(10)]
    for_each = 420 + 3
    assert store.measurements({"s"}, 4 * for_each) == [record(n) for n in (5, 6, 7, 8)]
    assert store.measurements({"s"}, 4 * for_each - 1) == [record(n) for n in (5, 6, 7)]
    assert store.measurements({"s"}, 0) == []


def test_what_is_old_is_counted_and_forgotten(store: StudyStore) -> None:
    write(store, *map(record, range(3)))
    between = datetime.now(UTC)
    write(store, record(3), record(4, n_images=0, correct=b""))
    with store.rdb.engine.connect() as connection:
        assert volume(connection) == Volume(5, 12)
        assert volume(connection, between) == Volume(3, 9)
        assert not volume(connection, between - timedelta(hours=1))
    assert store.forget_measurements(between) == 3
    assert set(store.measurements({"s"})) == {record(3), record(4, n_images=0, correct=b"")}


def test_two_studies_that_write_the_same_at_once_do_not_block_each_other(store: StudyStore, url: str) -> None:
    records = [record(mask) for mask in range(400)]
    failures: list[BaseException] = []

    def work(name: str, step: int) -> None:
        try:
            with StudyStore.open(url) as own:
                study, trial = asked(own, name)
                for first in range(0, 400, 20):
                    own.finish(trial, TrialResult(0.5, {}, measurements=tuple(records[first : first + 20][::step])))
                    trial, _ = own.ask(study, lambda trial: trial.suggest_float("epsilon", 0, 1))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"study {n}", (1, -1)[n % 2])) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert set(store.measurements({"s"})) == set(records)


def test_a_store_of_version_2_is_read_without_and_upgraded_when_written_to(url: str) -> None:
    with StudyStore.open(url) as store, store.rdb.engine.begin() as connection:
        MEASUREMENTS.drop(connection)
        connection.execute(sqlalchemy.text("UPDATE hpo_schema SET version = 2"))
    with StudyStore.open(url, read_only=True) as store:
        assert store.measurements({"s"}) == []
    with StudyStore.open(url, create=False) as store, store.rdb.engine.begin() as connection:
        assert stored_version(connection) == 3
        assert set(sqlalchemy.inspect(connection).get_table_names()) >= set(TABLES.tables)
        remember(connection, [record()])
        assert recall(connection, {"s"}) == [record()]


def test_a_record_has_a_bit_an_image() -> None:
    with pytest.raises(ValueError, match=r"`correct` must have a bit an image, but got 3 bytes for .*n_images=25"):
        record(n_images=25)
