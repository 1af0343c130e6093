"""Databases that restart, stay away or lose an answer; launchers that race, differ, or live in other time zones."""

import itertools
import random
import time
from datetime import UTC, datetime, timedelta

import optuna
import pytest
from chaos.faults import every, outage
from chaos.launches import GRID_6, GRID_60, RAY, full_only
from chaos.stub import StubSettings
from commit_proxy import CommitProxy

from storage.store import StudyStore

QUICK = StubSettings(seconds=0.02)


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=full_only)])
def test_the_server_crashes(new_postgresql, make_study, full, record, executor):
    server = new_postgresql()
    study = make_study(
        server.new_database(),
        space_path=("cnn" if executor == "ray" else GRID_60) if full else GRID_6,
        settings=StubSettings(seconds=(1.0 if executor == "ray" else 2.0) if full else 0.3),
        options=RAY if executor == "ray" else (),
    )

    def crash() -> bool:
        server.restart("immediate")
        return True

    with study.witness:
        launch = study.start()
        launch.wait_for("1/10")
        with every(lambda: 40.0 if full else 1.0, crash) as crashes:
            while crashes.n < 2:
                assert launch.process.poll() is None, launch.log
                time.sleep(0.1)
        outage(server, 60 if full else 2)
        assert launch.end(600) == 0, launch.log
    record(4, study.check(), restarts=crashes.n, outages=1)


def test_a_server_that_stays_away_ends_the_launch(new_postgresql, make_study, full, record):
    server = new_postgresql()
    space_path = GRID_60 if full else GRID_6
    study = make_study(server.new_database(), space_path=space_path, options=("--store-timeout", "2"))
    with study.witness:
        launch = study.start()
        launch.wait_for("3/10  trial")
        server.stop()
        assert launch.end(60) == 1, launch.log
        assert "--store-timeout" in launch.log.splitlines()[-1]
        server.start()
        study.settings = QUICK
        study.run()
    record(4, study.check(), outages=1)


def test_commits_and_their_answers_are_lost(postgresql_server, make_study, full, record):
    """Again and again, at random, a COMMIT or its answer, and the connection with it."""
    choose, n_chosen = random.Random(0), 0
    url = postgresql_server.new_database()
    with CommitProxy(postgresql_server.port) as proxy:
        study = make_study(
            url.replace(f":{postgresql_server.port}/", f":{proxy.port}/"),
            witness_url=url,
            space_path=GRID_60 if full else GRID_6,
            settings=StubSettings(seconds=0.5 if full else 0.05),
        )

        def lose() -> bool:
            """Counted in commits, so that who is slow comes as far between two losses."""
            nonlocal n_chosen
            if proxy.n_lost < n_chosen:
                return False
            proxy.lose(choose.randint(1, 12), delivered=choose.random() < 0.7)
            n_chosen += 1
            return True

        with study.witness:
            launch = study.start()
            launch.wait_for("1/10  trial")
            with every(lambda: 0.02, lose):
                launch.wait_for("11/11  trial", timeout_s=300)
            proxy.keep()
            assert launch.end() == 0, launch.log
    assert proxy.n_lost >= 5
    record(5, study.check(), commits_lost=proxy.n_lost)


@full_only
def test_the_answer_of_a_commit_is_lost(postgresql_server, make_study, record):
    """Of every seventh one, each in a study of its own."""
    for n_lost in itertools.count(1, 7):
        url = postgresql_server.new_database()
        with CommitProxy(postgresql_server.port) as proxy:
            proxy.lose(n_lost, delivered=True)
            study = make_study(
                url.replace(f":{postgresql_server.port}/", f":{proxy.port}/"),
                witness_url=url,
                settings=QUICK,
                space_path=GRID_6,
            )
            # To open a store it has to be there: what is lost then ends the launch.
            if study.start().end() != 0:
                study.run()
        if proxy.n_lost == 0:
            break
        record(5, study.check(), commits_lost=1)


def test_five_launchers_at_once_on_an_empty_database(url, make_study, record):
    study = make_study(url, space_path=GRID_6, settings=QUICK)
    launches = [study.start() for _ in range(5)]
    codes = [launch.end() for launch in launches]
    assert 0 in codes
    for launch, code in zip(launches, codes, strict=True):
        # Who comes when the study is finished has nothing to do.
        assert code == 0 or (code == 1 and "is driven by pid " in launch.log), launch.log
    record(6, study.check(), launchers=5)


def test_another_search_of_the_same_name_is_refused(url, make_study, record):
    study = make_study(url, space_path=GRID_6, settings=QUICK)
    study.run()
    study.witness.look()
    others = [
        (["--space", GRID_60], {}),
        (["--sampler", "tpe"], {}),
        ([], StubSettings(seconds=0.02, data="d1").to_environment()),
    ]
    for options, environment in others:
        other = study.start(*options, **environment)
        assert other.end() == 1, other.log
        assert "Study 's' is another search" in other.log
    record(7, study.check(), refused=len(others))


def test_a_study_of_another_direction_is_refused(url, make_study):
    with StudyStore.open(url) as store:
        optuna.create_study(study_name="s", storage=store.storage, direction="minimize")
    launch = make_study(url).start()
    assert launch.end() == 1
    assert "Study 's' was made by another program" in launch.log
    with StudyStore.open(url, read_only=True) as store:
        assert store.load("s").get_trials() == []


def test_drivers_in_mixed_time_zones(url, make_study, record):
    study = make_study(url, space_path=GRID_6, settings=StubSettings(seconds=0.3))
    begun = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=1)
    zones = [("Asia/Tokyo", "America/New_York"), ("America/Los_Angeles", "Asia/Kolkata"), ("UTC", "UTC")]
    with study.witness:
        for zone, database_zone in zones[:-1]:
            launch = study.start(TZ=zone, PGTZ=database_zone)
            launch.wait_for("  trial ")
            other = study.start(TZ=database_zone, PGTZ=zone)
            assert other.end() == 1, other.log
            assert f"is driven by pid {launch.process.pid} on host " in other.log
            launch.kill()
        study.environment |= {"TZ": zones[-1][0], "PGTZ": zones[-1][1]}
        study.run()
    ended = datetime.now(UTC).replace(tzinfo=None) + timedelta(seconds=1)
    # As stored, which is UTC; Optuna's own calls read and write local time.
    with StudyStore.open(url, read_only=True) as store, store.rdb.engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT datetime_start, datetime_complete FROM trials").all()
    for row in rows:
        started, completed = (datetime.fromisoformat(str(each)) for each in row)
        assert begun <= started <= completed <= ended
    record(12, study.check(), drivers_killed=2)
